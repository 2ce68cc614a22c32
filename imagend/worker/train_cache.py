"""What stays the same at every step of a training, computed once: pictures as latents, captions as embeddings.

They are kept in main memory, where a picture of 1024x1024 takes 0.5 MB and a caption 0.3 to 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from imagend.errors import BadDataset
from imagend.train_spec import Train
from imagend.worker.dataset import Example, open_entry
from imagend.worker.gauge import host_room
from imagend.worker.vae import in_float32

if TYPE_CHECKING:
    from imagend.worker.main import Context

STAGE = "caching"
Encoded = tuple[torch.Tensor, torch.Tensor]
"""Of a text: the sequence, and the pooled embedding."""


@dataclass(frozen=True)
class Cache:
    """On the CPU. `moments`: of each example, what the VAE made of it; `time_ids`: its sizes, as SDXL is told them."""

    moments: list[torch.Tensor]
    time_ids: list[list[float]]
    captions: list[str]
    texts: dict[str, Encoded]
    """by caption; empty where the text encoders learn"""

    def latents(self, indices: list[int], drawn: torch.Generator) -> torch.Tensor:
        """As the VAE would give them: drawn from its distribution."""
        distribution = DiagonalGaussianDistribution(torch.stack([self.moments[index] for index in indices]))
        mean, std = distribution.mean, distribution.std
        return mean + std * torch.randn(mean.shape, generator=drawn)


@torch.no_grad()  # type: ignore[untyped-decorator]
def build(pipe: Any, spec: Train, examples: list[Example], context: Context, device: torch.device) -> Cache:
    """Raises BadDataset where memory is too short for it, or a picture changed; BadPicture, Interrupt."""
    captions = [spec.caption(example.entry.caption) for example in examples]
    texts = sorted({*captions, ""}) if not spec.train_text_encoder else []
    _check_room(pipe, spec, examples, len(texts))
    moments, time_ids = [], []
    for number, example in enumerate(examples):
        context.progress(STAGE, number, len(examples))
        picture = open_entry(example.entry)
        if picture.sha256 != example.sha256:
            raise BadDataset(spec.dataset, f"{example.entry.file} changed meanwhile; send the job again", spec.dataset)
        pixels = torch.from_numpy(np.asarray(picture.sized(*example.bucket)).copy())
        moments.append(_moments(pipe.vae, (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0).to(device)))
        time_ids.append(_time_ids(example))
    encoded = {}
    for text in texts:
        context.progress(STAGE, len(examples), len(examples))
        embeds, pooled = encode(pipe, [text])
        encoded[text] = embeds[0].cpu(), pooled[0].cpu()
    return Cache(moments, time_ids, captions, encoded)


def _check_room(pipe: Any, spec: Train, examples: list[Example], texts: int) -> None:
    latents = sum(8 * 4 * (one.bucket.width // 8) * (one.bucket.height // 8) for one in examples)
    width = pipe.unet.config.cross_attention_dim
    needed = latents + texts * pipe.text_encoder_2.dtype.itemsize * (pipe.tokenizer.model_max_length + 1) * width
    if needed > (room := host_room() // 2):
        why = f"its latents and embeddings take {needed >> 20} MiB of main memory, and {room >> 20} are to be had"
        raise BadDataset(spec.dataset, f"{why}; use fewer pictures, or a smaller resolution", spec.dataset)


def _moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    def encoded() -> torch.Tensor:
        found: torch.Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.parameters
        return found

    found = encoded()
    if not found.isfinite().all():
        found = in_float32(vae, encoded)
    return found[0].float().cpu()


def _time_ids(example: Example) -> list[float]:
    """Original size, where it was cut, target size: height first. As the picture is, once it is scaled."""
    (width, height), (to_width, to_height) = example.size, example.bucket
    scale = max(to_width / width, to_height / height)
    top, left = round((height * scale - to_height) / 2), round((width * scale - to_width) / 2)
    return [float(number) for number in (height, width, top, left, to_height, to_width)]


def encode(pipe: Any, texts: list[str]) -> Encoded:
    """As pipe.encode_prompt, whose first 77 tokens count; with gradients, where they are wanted."""
    sequences = []
    pairs = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
    for tokenizer, encoder in pairs:
        length = tokenizer.model_max_length
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        found = encoder(ids.to(encoder.device), output_hidden_states=True)
        sequences.append(found.hidden_states[-2])
    return torch.cat(sequences, dim=-1), found[0]


def truncated(pipe: Any, captions: list[str]) -> int:
    """How many captions have more tokens than are trained."""
    longest = pipe.tokenizer.model_max_length
    return sum(len(pipe.tokenizer(text).input_ids) > longest for text in set(captions))
