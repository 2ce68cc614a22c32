"""A picture to begin with: its latents, and diffusers' img2img pipeline on the components that are there.

diffusers' own call encodes the picture anew for each seed and moves the VAE between dtypes meanwhile; here it is
encoded once, where the memory ladder has an eye on it, and the call gets latents. The bits are the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from PIL import Image

from imagend.errors import NotFinite
from imagend.generate_spec import Generate
from imagend.worker.vae import in_float32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import StableDiffusionXLControlNetImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline


def pipeline(pipe: Any) -> Any:
    """The same components, no second copy; adapters and memory modes are in the modules, and so are shared."""
    controlled = "controlnet" in pipe.components
    kind = StableDiffusionXLControlNetImg2ImgPipeline if controlled else StableDiffusionXLImg2ImgPipeline
    made = kind(**pipe.components, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


class Beginning:
    """The distribution of latents that the VAE makes of a picture: what each seed draws its own from."""

    def __init__(self, vae: Any, distribution: Any, dtype: torch.dtype) -> None:
        self._vae, self._distribution, self._dtype = vae, distribution, dtype

    def start(self, pipe: Any, spec: Generate, generator: torch.Generator) -> tuple[Any, dict[str, Any]]:
        """What paints from it, and what its call takes."""
        return pipeline(pipe), {"image": self.latents(generator), "strength": spec.strength}

    def latents(self, generator: torch.Generator) -> torch.Tensor:
        """As the pipeline's prepare_latents(): the first that the generator is asked for; the noise comes after it."""
        config = self._vae.config
        latents: torch.Tensor = self._distribution.sample(generator).to(self._dtype)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return config.scaling_factor * latents
        mean, std = (torch.tensor(value).view(1, 4, 1, 1).to(latents) for value in (mean, std))
        return (latents - mean) * config.scaling_factor / std


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode(pipe: Any, image: Image.Image | torch.Tensor, dtype: torch.dtype) -> Beginning:
    """Of a picture, or of samples from -1 to 1. `dtype` is that of the embeddings, which the pipeline computes in.
    Raises NotFinite."""
    vae = pipe.vae
    samples = pipe.image_processor.preprocess(image) if isinstance(image, Image.Image) else image
    samples = samples.to(pipe._execution_device, dtype)

    def distribution() -> Any:
        return vae.encode(samples.to(vae.dtype)).latent_dist

    found = distribution()
    if not found.parameters.isfinite().all():
        found = in_float32(vae, distribution)
        if not found.parameters.isfinite().all():
            raise NotFinite("the VAE makes no numbers of the picture to begin with", "Name another one in `vae`")
    return Beginning(vae, found, dtype)
