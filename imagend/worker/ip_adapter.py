"""The IP-Adapter of a job in the base's UNet, and what a job's references are to it. The base itself is never changed.

To diffusers each reference has an adapter of its own, with a strength for each layer; these are one and the same
modules, several times in its lists. The last adapter stays in main memory while jobs do without it. After IP-Adapter,
https://arxiv.org/abs/2308.06721.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from imagend.architecture import ModelKind
from imagend.errors import JobFailed, UnusableModel
from imagend.generate_spec import Generate
from imagend.memory_plan import Stage
from imagend.models import Model, Models
from imagend.reference_field import Reference, acting, choose, layers
from imagend.worker.bases import errors_of
from imagend.worker.embedding_cache import EmbeddingCache
from imagend.worker.image_encoder import ImageEncoder, find_encoder
from imagend.worker.loras import Context
from imagend.worker.part import own
from imagend.worker.pictures import Picture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.image_processor import IPAdapterMaskProcessor
    from diffusers.models.embeddings import MultiIPAdapterImageProjection


class _Loaded:
    """An adapter's modules: attention processors by name, and what projects embeddings."""

    def __init__(self, model: Model, unet: Any, models: Models) -> None:
        models.check(model)
        with errors_of(model):
            tensors: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
            for name, tensor in load_file(model.path).items():
                part, _, rest = name.partition(".")
                tensors[part][rest] = tensor
            made = unet._convert_ip_adapter_attn_to_diffusers([tensors], low_cpu_mem_usage=True)
            projection = unet._convert_ip_adapter_image_proj_to_diffusers(tensors["image_proj"], low_cpu_mem_usage=True)
            self.processors = {name: one for name, one in made.items() if isinstance(one, torch.nn.Module)}
            self.projection = MultiIPAdapterImageProjection([projection])
            for module in self.modules():
                if missing := next((name for name, one in module.state_dict().items() if one.is_meta), None):
                    raise ValueError(f"it lacks some of its weights, {missing} among them")
                own(module.to(unet.dtype))
        models.check_unchanged(model)
        self.model, self.build = model, _build(unet)

    def many(self, count: int) -> None:
        """So many references will be shown."""
        if len(self.projection.image_projection_layers) == count:
            return
        lists = [(one, name) for one in self.processors.values() for name in ("to_k_ip", "to_v_ip")]
        for owner, name in (*lists, (self.projection, "image_projection_layers")):
            first = getattr(owner, name)[0]
            setattr(owner, name, torch.nn.ModuleList([first] * count))

    def modules(self) -> list[Any]:
        return [*self.processors.values(), self.projection]

    def to(self, device: Any) -> None:
        for module in self.modules():
            module.to(device)


class IpAdapter:
    """`used` is the adapter that acts in the current job, and what encodes pictures for it."""

    def __init__(self, models: Models, cache: EmbeddingCache | None) -> None:
        self._models, self._cache = models, cache
        self._loaded: _Loaded | None = None
        self._unet: Any = None
        self._before: dict[str, Any] = {}
        self._encoder: ImageEncoder | None = None

    @property
    def used(self) -> tuple[Model, ...]:
        if self._unet is None or self._loaded is None or self._encoder is None:
            return ()
        return self._loaded.model, self._encoder.model

    def apply(self, pipe: Any, spec: Generate, release: Callable[[], None], context: Context) -> None:
        """Let a completed spec's references, and no others, be seen by the pipeline's UNet. `release` takes a memory
        mode off it. Raises UnknownModel and its like, NoIpAdapter, NoImageEncoder, UnsupportedSetting, Interrupt."""
        references = acting(spec.references, spec.reference_strength)
        model = self.find(spec, pipe) if references else None
        encoder = find_encoder(self._models, model) if model else None
        current = self._loaded.model if self._loaded else None
        if self._unet is not None and (self._unet is not pipe.unet or model != current):
            release()
            self.detach()
        if model is None or encoder is None:
            return
        self._encoder = ImageEncoder(self._models, encoder, model.architecture.format, self._cache)
        if self._unet is None:
            release()
            self._attach(model, pipe.unet, context)
        self._weigh(references)

    def find(self, spec: Generate, pipe: Any) -> Model:
        """The adapter that a job means."""
        width = pipe.unet.config.cross_attention_dim
        if spec.ip_adapter is None:
            name = choose([one for one in self._models.list(ModelKind.IP_ADAPTER) if self._fits(one, width)])
            return self._models.find(name, ModelKind.IP_ADAPTER)
        model = self._models.find(spec.ip_adapter, ModelKind.IP_ADAPTER)
        if model.architecture.cross_attention_dim != width:
            raise UnusableModel("IP-Adapter", model.name, "made for a model of another size than this job's")
        return model

    def _fits(self, name: str, width: int) -> bool:
        try:
            return self._models.find(name, ModelKind.IP_ADAPTER).architecture.cross_attention_dim == width
        except JobFailed:
            return False

    def detach(self) -> None:
        """Leave the UNet as it was. No memory mode may be on it."""
        if self._unet is not None:
            self._unet.set_attn_processor({**self._unet.attn_processors, **self._before})
            self._unet.encoder_hid_proj = None
            self._unet.config.encoder_hid_dim_type = None
        self._unet, self._before, self._encoder = None, {}, None
        if self._loaded is not None:
            self._loaded.to("cpu")

    def shed(self) -> None:
        """Let go of an adapter that does not act in the current job."""
        if self._unet is None:
            self._loaded = None

    def arguments(
        self,
        spec: Generate,
        pictures: Mapping[str, Picture],
        canvas: Callable[[str], Image.Image],
        pipe: Any,
        context: Context,
    ) -> dict[str, Any]:
        """What the pipeline's call takes for the references; nothing without any. `canvas` gives a picture at the size
        that is painted."""
        references = acting(spec.references, spec.reference_strength)
        if not references or self._encoder is None:
            return {}
        found = []
        for reference in references:
            context.progress(Stage.ENCODING)
            picture = pictures[reference.image]
            found.append(self._encoder.encode(reference.image, picture, lambda: context.progress(Stage.LOADING)))
        assert spec.guidance_scale is not None
        is_guided = spec.guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
        arguments: dict[str, Any] = {
            "ip_adapter_image_embeds": [
                torch.cat([half[:, None] for half in (one.negative, one.positive)[not is_guided :]]).to(pipe.unet.dtype)
                for one in found
            ]
        }
        if any(one.mask for one in references):
            masks = [one.mask and _mask(canvas(one.mask)).to(pipe._execution_device) for one in references]
            arguments["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
        return arguments

    def _attach(self, model: Model, unet: Any, context: Context) -> None:
        if self._loaded is None or (self._loaded.model, self._loaded.build) != (model, _build(unet)):
            context.progress(Stage.LOADING)
            start = time.perf_counter()
            self._loaded = None
            self._loaded = _Loaded(model, unet, self._models)
            seconds = round(time.perf_counter() - start, 6)
            context.loading["ip_adapter"] = {"name": model.name, "seconds": seconds, "bytes": model.size}
        self._loaded.to(unet.device)
        before = unet.attn_processors
        self._before = {name: before[name] for name in self._loaded.processors}
        unet.set_attn_processor({**before, **self._loaded.processors})
        unet.encoder_hid_proj = self._loaded.projection
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        self._unet = unet

    def _weigh(self, references: tuple[Reference, ...]) -> None:
        assert self._loaded is not None
        names = list(self._loaded.processors)
        acting_in = [layers(reference.influence, names) for reference in references]
        self._loaded.many(len(references))
        for name, processor in self._loaded.processors.items():
            processor.scale = [
                one.strength if name in by else 0.0 for one, by in zip(references, acting_in, strict=True)
            ]


def _mask(picture: Image.Image) -> torch.Tensor:
    """Of shape (1, 1, height, width), 1 where the reference acts."""
    mask: torch.Tensor = IPAdapterMaskProcessor().preprocess(picture)
    return mask


def _build(unet: Any) -> Any:
    """What decides whether the same modules fit."""
    config = unet.config
    return unet.dtype, tuple(config.block_out_channels), config.cross_attention_dim, tuple(unet.attn_processors)
