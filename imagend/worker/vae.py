"""Latents to pixels, as the pipeline does it, bit for bit; and again in float32 where half precision overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from PIL import Image

from imagend.errors import NotFinite

T = TypeVar("T")


def upcast(vae: Any) -> None:
    """Keep the weights of a VAE in float32 where it says that it overflows in float16 (`force_upcast`).

    The pipeline widens and narrows them around each picture; to widen is exact, so that once will do.
    """
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)


@torch.no_grad()  # type: ignore[untyped-decorator]
def decode(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """One picture of latents (1 x 4 x height/8 x width/8, as the pipeline's call gives them). Raises NotFinite."""
    vae = pipe.vae
    samples = _samples(vae, latents)
    if not samples.isfinite().all():
        if not latents.isfinite().all():
            raise NotFinite("denoising gave values that are no numbers", "Try another scheduler or guidance_scale")
        samples = in_float32(vae, lambda: _samples(vae, latents))
        if not samples.isfinite().all():
            raise NotFinite("the VAE gave values that are no numbers", "Name another one in `vae`")
    image: Image.Image = pipe.image_processor.postprocess(samples, output_type="pil")[0]
    return image


def in_float32(vae: Any, work: Callable[[], T]) -> T:
    """Do what a VAE is to do with its weights widened."""
    before = vae.dtype
    if before is torch.float32:
        return work()
    vae.to(torch.float32)
    try:
        return work()
    finally:
        vae.to(before)


def _samples(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    latents = latents.to(vae.dtype)
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value).view(1, 4, 1, 1).to(latents.device, latents.dtype) for value in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    samples: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return samples
