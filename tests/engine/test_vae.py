"""Decoding: the pipeline's bits in every dtype; float32 where half precision overflows; never a black picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_conftest import load_plain

from imagend.errors import NotFinite
from imagend.worker import vae

SIZE = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture
def pipe() -> Any:
    return load_plain()


def paint(pipe: Any, output_type: str) -> Any:
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe("a large red circle", generator=generator, output_type=output_type, **SIZE).images


def same(image: Any, other: Any) -> bool:
    return bool((np.asarray(image) == np.asarray(other)).all())


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("force_upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_gives_the_pipelines_bits(pipe: Any, dtype: torch.dtype, force_upcast: bool) -> None:
    pipe.to(dtype)
    pipe.vae.register_to_config(force_upcast=force_upcast)
    expected = paint(pipe, "pil")[0]
    latents = paint(pipe, "latent")
    assert latents.dtype is dtype
    vae.upcast(pipe.vae)
    assert pipe.vae.dtype is (torch.float32 if dtype is torch.float16 and force_upcast else dtype)
    assert same(vae.decode(pipe, latents), expected)


def test_latents_with_mean_and_deviation_are_decoded_as_the_pipeline_does(pipe: Any) -> None:
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])
    assert same(vae.decode(pipe, paint(pipe, "latent")), paint(pipe, "pil")[0])


def test_what_overflows_in_float16_is_decoded_again_in_float32(pipe: Any) -> None:
    pipe.vae.to(torch.float16)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 2000
    latents = paint(pipe, "latent")
    half = pipe.vae.decode(latents.half() / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert not half.isfinite().all()
    image = vae.decode(pipe, latents)
    assert pipe.vae.dtype is torch.float16  # as it was
    pipe.vae.to(torch.float32)
    assert same(image, vae.decode(pipe, latents))


@pytest.mark.parametrize("culprit", ["latents", "vae"])
def test_what_is_no_number_is_no_picture(pipe: Any, culprit: str) -> None:
    latents = paint(pipe, "latent")
    if culprit == "latents":
        latents[0, 0, 0, 0] = float("nan")
    else:
        pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match="denoising" if culprit == "latents" else "the VAE"):
        vae.decode(pipe, latents)
