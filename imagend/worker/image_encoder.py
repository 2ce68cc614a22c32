"""Pictures → embeddings for an IP-Adapter, by CLIP's image encoder: as diffusers' encode_image(). On the CPU always.

Each is computed once, in float32, and kept (embedding_cache.py), so that the bits depend on no memory mode, and for a
picture that was seen before no encoder is loaded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from imagend.architecture import ModelKind
from imagend.errors import JobFailed, NoImageEncoder
from imagend.models import Model, Models, digest, read_json
from imagend.worker.bases import network_of, reading
from imagend.worker.embedding_cache import EmbeddingCache
from imagend.worker.pictures import Picture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

PLUS = "plus"
"""The IP-Adapters that read the encoder's last hidden states but one; plain ones read its projection."""
_VERSIONS = {name: version(name) for name in ("torch", "transformers", "pillow")}


class Embedding(NamedTuple):
    """Of shape (1, width), or (1, tokens, width) for Plus; `negative` is what no picture gives."""

    positive: torch.Tensor
    negative: torch.Tensor


class ImageEncoder:
    """The encoder that goes with an IP-Adapter, loaded when a picture needs it."""

    def __init__(self, models: Models, model: Model, form: str, cache: EmbeddingCache | None) -> None:
        self._models, self.model, self._form, self._cache = models, model, form, cache
        self._loaded: Any = None

    def encode(self, name: str, picture: Picture, loading: Callable[[], None]) -> Embedding:
        """`loading` is called before the encoder is loaded. Raises BrokenModel, BrokenWeights, ModelReplaced."""
        about = {
            "name": name,
            "picture": picture.sha256,
            "encoder_name": self.model.name,
            "encoder": digest(self._models.digests(self.model)),
            "form": self._form,
            "versions": " ".join(f"{one} {number}" for one, number in _VERSIONS.items()),
        }
        found = self._cache.get(about) if self._cache else None
        if found is None or found.keys() != {*Embedding._fields}:
            found = self._encode(picture, loading)._asdict()
            if self._cache:
                self._cache.put(about, found)
        return Embedding(**found)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _encode(self, picture: Picture, loading: Callable[[], None]) -> Embedding:
        if self._loaded is None:
            loading()
            self._loaded = self._load()
        size = self._loaded.config.image_size
        processor = CLIPImageProcessorPil(size=size, crop_size=size)
        pixels = processor(picture.image, return_tensors="pt").pixel_values
        if self._form != PLUS:
            positive = self._loaded(pixels).image_embeds
            return Embedding(positive, torch.zeros_like(positive))
        states = [self._loaded(one, output_hidden_states=True) for one in (pixels, torch.zeros_like(pixels))]
        return Embedding(*(found.hidden_states[-2].contiguous() for found in states))

    def _load(self) -> Any:
        with reading(self.model, self._models, with_processor=False):
            return network_of(CLIPVisionModelWithProjection, self.model)


def find_encoder(models: Models, adapter: Model) -> Model:
    """The first by name of those whose embeddings are as wide as the adapter reads them. Raises NoImageEncoder."""
    key = "hidden_size" if adapter.architecture.format == PLUS else "projection_dim"
    width = adapter.architecture.image_width
    for name in models.list(ModelKind.CLIP_VISION):
        with contextlib.suppress(JobFailed):
            model = models.find(name, ModelKind.CLIP_VISION)
            if not model.is_file and read_json(model.path / "config.json").get(key) == width:
                return model
    encoder = "sdxl_models" if width == _BIGG_PROJECTION and key == "projection_dim" else "models"
    raise NoImageEncoder(adapter.name, key, width, encoder)


_BIGG_PROJECTION = 1280
"""of OpenCLIP's ViT-bigG, which h94/IP-Adapter keeps beside its SDXL models; all others there read ViT-H"""
