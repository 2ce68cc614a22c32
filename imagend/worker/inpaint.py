"""A part of a picture to paint anew: diffusers' inpainting pipeline on the components that are there.

diffusers' own call encodes the picture, and the picture without its part, anew for each seed; here both are encoded
once, where the memory ladder has an eye on them. A UNet of 4 channels is shown the picture alone. The bits are the
same.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image

from imagend.generate_spec import Generate
from imagend.worker import img2img
from imagend.worker.masks import HALF

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import StableDiffusionXLControlNetInpaintPipeline, StableDiffusionXLInpaintPipeline

_CHANNELS = 9
"""of a UNet made for inpainting: it is shown noise, the mask and the picture without its part"""


class _Encoded:
    """In place of the VAE: what it has made of the picture, and of the picture without its part."""

    picture: img2img.Beginning
    rest: img2img.Beginning
    _asked: img2img.Beginning

    def prepare_latents(self, *args: Any, **options: Any) -> Any:
        self._asked = self.picture
        return super().prepare_latents(*args, **options)  # type: ignore[misc]

    def prepare_mask_latents(self, *args: Any, **options: Any) -> Any:
        self._asked = self.rest
        return super().prepare_mask_latents(*args, **options)  # type: ignore[misc]

    def _encode_vae_image(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self._asked.latents(generator)


class _Inpaint(_Encoded, StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
    pass


class _ControlledInpaint(_Encoded, StableDiffusionXLControlNetInpaintPipeline):  # type: ignore[misc]
    pass


class Beginning:
    """A picture and the part of it that is painted anew (white in `mask`), both of the size that is painted."""

    def __init__(
        self, image: Image.Image, mask: Image.Image, picture: img2img.Beginning, rest: img2img.Beginning
    ) -> None:
        self._image, self._mask, self._picture, self._rest = image, mask, picture, rest

    def start(self, pipe: Any, spec: Generate, generator: torch.Generator) -> tuple[Any, dict[str, Any]]:
        """What paints from it, and what its call takes."""
        kind = _ControlledInpaint if "controlnet" in pipe.components else _Inpaint
        made = kind(**pipe.components, add_watermarker=False)
        made.set_progress_bar_config(disable=True)
        made.picture, made.rest = self._picture, self._rest
        size = {"width": spec.width, "height": spec.height}
        return made, {"image": self._image, "mask_image": self._mask, "strength": spec.strength, **size}


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode(pipe: Any, image: Image.Image, mask: Image.Image, dtype: torch.dtype) -> Beginning:
    """`dtype` is that of the embeddings, which the pipeline computes in. Raises NotFinite."""
    picture = rest = img2img.encode(pipe, image, dtype)
    if pipe.unet.config.in_channels == _CHANNELS:  # else it is not looked at, and only draws as many random numbers
        kept = torch.from_numpy(np.asarray(mask) < HALF)[None, None]
        rest = img2img.encode(pipe, pipe.image_processor.preprocess(image) * kept, dtype)
    return Beginning(image, mask, picture, rest)
