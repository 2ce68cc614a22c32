"""Models as files in ComfyUI's folders: what is listed under which name, and how a job may call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightfiles import SDXL, VAE, put

from imagend import models as module
from imagend.architecture import ModelKind
from imagend.errors import AmbiguousModel, BrokenWeights, UnknownModel, UnusableModel
from imagend.model_names import match
from imagend.models import Models

SMALL = SDXL | {  # of a sibling's width, so that the files are small
    "model.diffusion_model.input_blocks.0.0.weight": [32, 4, 3, 3],
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [64, 160],
    "model.diffusion_model.label_emb.0.0.weight": [1, 1],
    "first_stage_model.decoder.conv_in.weight": [1, 4, 3, 3],
}


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_a_file_is_called_by_its_folder_and_its_name_without_extension(models: Models) -> None:
    put(models.root, "checkpoints/Pony Diffusion (v6) [pruned].safetensors", SMALL)
    put(models.root, "checkpoints/real/v1.0.sft", SMALL)
    assert models.list() == ["Pony Diffusion (v6) [pruned]", "real/v1.0"]
    for name in ("real/v1.0", "real/v1.0.sft", "v1.0", "v1.0.sft"):
        found = models.find(name)
        assert (found.name, found.is_file, found.path) == ("real/v1.0", True, models.root / "checkpoints/real/v1.0.sft")
    assert found.size == found.path.stat().st_size
    assert (found.native_size, found.architecture.base, found.architecture.format) == (128, "sdxl", "single_file")


def test_the_configuration_of_a_file_is_that_of_its_shape(models: Models) -> None:
    """SDXL's own, which imagend carries; a small sibling's is a folder's of the same shape; none else has one."""
    put(models.root, "checkpoints/xl.safetensors", SDXL)
    put(models.root, "checkpoints/small.safetensors", SMALL)
    put(
        models.root,
        "checkpoints/odd.safetensors",
        SMALL | {"model.diffusion_model.input_blocks.0.0.weight": [8, 4, 1, 1]},
    )
    assert models.config_folder(models.find("xl")).name == "sdxl"
    assert models.find("xl").native_size == 1024
    assert models.config_folder(models.find("small")).name == "shapes-xl"
    assert models.find("small").native_size == 128
    with pytest.raises(UnusableModel, match=r"a relative of SDXL of another size \(8, 160\)"):
        models.find("odd")
    unet = {"sample_size": 8, "block_out_channels": [8], "cross_attention_dim": 160}
    for path, content in (
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
        ("unet/config.json", unet),
        ("vae/config.json", {"block_out_channels": [1, 2]}),
    ):
        (models.root / "diffusers/odd-folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (models.root / "diffusers/odd-folder" / path).write_text(json.dumps(content))
    assert models.config_folder(models.find("odd")).name == "odd-folder"
    assert models.find("odd").native_size == 16


def test_what_the_daemon_knows_is_not_hashed_again(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    put(models.root, "vae/x.safetensors", VAE)
    model = models.find("x", ModelKind.VAE)
    models.learn(dict.fromkeys(model.version, "5a"))
    monkeypatch.setattr(module.hashlib, "file_digest", None)
    assert models.digests(model) == {"x.safetensors": "5a"}


def test_a_bare_name_that_two_have_must_be_said_in_full(models: Models) -> None:
    for folder in ("a", "b"):
        put(models.root, f"checkpoints/{folder}/one.safetensors", SMALL)
    with pytest.raises(AmbiguousModel, match=r"There are a/one, b/one\. Name one of them"):
        models.find("one")
    assert models.find("b/one").name == "b/one"


def test_a_folder_and_a_file_of_one_name_are_told_apart_by_the_extension(models: Models) -> None:
    (models.root / "diffusers" / "one").mkdir(parents=True)
    (models.root / "diffusers" / "one" / "model_index.json").touch()
    put(models.root, "checkpoints/one.safetensors", SMALL)
    assert models.list() == ["one", "one.safetensors"]
    assert models.find("one.safetensors").is_file


def test_each_kind_has_its_folder(models: Models) -> None:
    put(models.root, "vae/x.safetensors", {"decoder.conv_in.weight": [512, 4, 3, 3]})
    assert models.find("x", ModelKind.VAE).kind is ModelKind.VAE
    for kind in set(ModelKind) - {ModelKind.VAE}:
        with pytest.raises(UnknownModel, match=f"No {kind.noun} named 'x'"):
            models.find("x", kind)


def test_a_file_in_the_wrong_folder_is_refused_with_the_right_one(models: Models) -> None:
    put(models.root, "loras/x.safetensors", SMALL)
    with pytest.raises(UnusableModel, match=r"The LoRA 'x' cannot be used: it is a model: it belongs in checkpoints/"):
        models.find("x", ModelKind.LORA)


def test_a_half_file_is_broken_and_a_pickle_no_model(models: Models) -> None:
    path = put(models.root, "checkpoints/half.safetensors", SMALL)
    path.write_bytes(path.read_bytes()[:-1])
    path.with_name("old.ckpt").touch()
    assert models.list() == ["half"]
    with pytest.raises(BrokenWeights, match=r"half\.safetensors cannot be used: its tensors need"):
        models.find("half")


def test_a_file_that_was_replaced_is_another_model(models: Models) -> None:
    path = put(models.root, "checkpoints/x.safetensors", SMALL)
    before = models.find("x")
    assert models.find("x") == before
    path.unlink()
    put(models.root, "checkpoints/x.safetensors", SMALL | {"more": [1]})
    assert models.find("x") != before
    path.unlink()
    put(models.root, "checkpoints/x.safetensors", {"decoder.conv_in.weight": [512, 4, 3, 3]})
    with pytest.raises(UnusableModel, match="it is a VAE"):
        models.find("x")


# Names are keys


@given(st.text(max_size=30) | st.sampled_from(["../x", "/etc/passwd", "a/../a/one", "./a/one", "a//one", "a/one/"]))
def test_no_name_leads_outside_the_listing(name: str) -> None:
    known = {"a/one", "b/two"}
    try:
        assert match(name, ModelKind.BASE, known) in known
    except (UnknownModel, AmbiguousModel):
        assert name not in known


def test_near_matches_come_first_and_the_message_stays_short() -> None:
    known = {f"aaa{number:04d}" for number in range(2000)} | {"x/zebra XL v2"}
    with pytest.raises(UnknownModel) as caught:
        match("Zebra xl", ModelKind.LORA, known)
    assert "Known are: x/zebra XL v2, aaa0000, aaa0001" in str(caught.value)
    assert "and 1981 more (imagend models --kind lora lists them)" in str(caught.value)
    assert len(str(caught.value)) < 600
