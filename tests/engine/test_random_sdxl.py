"""Models with random weights, and single files made of folders: what the benchmarks measure must be real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from engine_conftest import EMBEDDED

from benchmarks import random_sdxl, single_file
from imagend.weights import read_header
from imagend.worker.pipelines import StableDiffusionXLPipeline

FULL_SIZE = REPOSITORY / "imagend" / "sdxl"
COMPONENTS = tuple(random_sdxl.WEIGHTS)


def load(path: Path, configs: Path | None = None) -> Any:
    how = {"local_files_only": True, "dtype": torch.float16, "add_watermarker": False}
    if configs:
        pipe = StableDiffusionXLPipeline.from_single_file(path, config=str(configs), **how)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(path, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shapes-xl's shapes, with more layers, so that a wrong number in a name hits another tensor."""
    folder = tmp_path_factory.mktemp("random") / "random"
    overrides = {"unet": {"layers_per_block": 2, "transformer_layers_per_block": [1, 1, 2]}, "vae": {}}
    random_sdxl.build(EMBEDDED, folder, torch.float16, overrides | {"vae": {"mid_block_add_attention": True}})
    return folder


def test_a_single_file_holds_what_its_folder_holds(random: Path, tmp_path: Path) -> None:
    single_file.write(random, tmp_path / "random.safetensors", {"modelspec.title": "random"})
    ours, theirs = load(random), load(tmp_path / "random.safetensors", random)
    for component in COMPONENTS:
        one, other = getattr(ours, component).state_dict(), getattr(theirs, component).state_dict()
        assert one.keys() == other.keys()
        assert not [name for name in one if not torch.equal(one[name], other[name])]
    header = read_header(tmp_path / "random.safetensors", "random")
    assert header.metadata["modelspec.title"] == "random"
    assert header.tensors.keys() >= {  # of sd_xl_base_1.0.safetensors
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    }


def test_full_size_is_sdxls() -> None:
    """As many weights as stabilityai/stable-diffusion-xl-base-1.0 has."""
    configs = {name: json.loads((FULL_SIZE / name / "config.json").read_text()) for name in COMPONENTS}
    counts = {
        name: sum(shape.numel() for shape in random_sdxl.shapes(name, config).values())
        for name, config in configs.items()
    }
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }


def test_random_weights_are_all_different_and_of_a_new_layers_scale(random: Path) -> None:
    for component in COMPONENTS:
        state = getattr(load(random), component).state_dict()
        drawn = [tensor.float() for tensor in state.values() if tensor.ndim > 1]
        assert len({tuple(tensor.flatten()[:8].tolist()) for tensor in drawn}) == len(drawn)
        for tensor in drawn:
            bound = tensor[0].numel() ** -0.5
            assert 0.5 * bound < tensor.abs().max() <= 1.01 * bound
        assert all((tensor == name.endswith("weight")).all() for name, tensor in state.items() if tensor.ndim < 2)


def test_random_weights_are_the_same_each_time_and_of_the_dtype(tmp_path: Path) -> None:
    shapes = {"a.weight": [40, 30], "a.bias": [40], "b.weight": [7, 5, 3, 3]}
    for name in ("one", "two"):
        random_sdxl.write(tmp_path / name, shapes, torch.bfloat16, 3)
    random_sdxl.write(tmp_path / "other", shapes, torch.bfloat16, 4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != (tmp_path / "other").read_bytes()
    header = read_header(tmp_path / "one", "one")
    assert {name: (item.dtype, list(item.shape)) for name, item in header.tensors.items()} == {
        name: ("BF16", shape) for name, shape in shapes.items()
    }


def test_a_random_model_paints_noise_that_is_finite(random: Path) -> None:
    pipe = load(random).to(torch.float32)
    generator = torch.Generator().manual_seed(1)
    image = pipe("a", width=64, height=64, num_inference_steps=2, generator=generator, output_type="np").images[0]
    assert 0.01 < image.std() < 0.5  # not grey, not black, not all clipped
    assert json.loads((random / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
