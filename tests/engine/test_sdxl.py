"""The configuration of SDXL that imagend carries: sizes as of SDXL base 1.0, and CLIP's vocabulary, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import imagend

SDXL = Path(imagend.__file__).parent / "sdxl"


@pytest.mark.parametrize(
    ("part", "parameters"),
    [("unet", 2_567_463_684), ("vae", 83_653_863), ("text_encoder", 123_060_480), ("text_encoder_2", 694_659_840)],
)
def test_each_part_has_as_many_parameters_as_that_of_sdxl(part: str, parameters: int) -> None:
    library, name = diffusers.DiffusionPipeline.load_config(SDXL)[part]
    with torch.device("meta"):
        if library == "diffusers":
            cls: Any = getattr(diffusers, name)
            module = cls.from_config(cls.load_config(SDXL, subfolder=part))
        else:
            module = getattr(transformers, name)(transformers.CLIPTextConfig.from_pretrained(SDXL, subfolder=part))
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize(("part", "padding"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_the_tokenizers_are_clips(part: str, padding: int) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(SDXL / part, local_files_only=True)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Naïve 😀!").input_ids == tokenizer("naïve   😀!").input_ids
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + [padding] * 74


def test_the_scheduler_is_sdxls() -> None:
    config = diffusers.EulerDiscreteScheduler.from_pretrained(SDXL, subfolder="scheduler").config
    expected = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    assert expected.items() <= config.items()
    assert (config["timestep_spacing"], config["prediction_type"]) == ("leading", "epsilon")
