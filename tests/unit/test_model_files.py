"""Models as files in ComfyUI's folders: what is listed under which name, and how a job may call it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.targets import safetensors
from hypothesis import given
from hypothesis import strategies as st

from imagend.architecture import ModelKind
from imagend.errors import AmbiguousModel, BrokenWeights, UnknownModel, UnusableModel
from imagend.model_names import match
from imagend.models import Models

SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048],
    "model.diffusion_model.middle_block.1.transformer_blocks.9.norm1.weight": [1280],
    "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [768],
    "conditioner.embedders.1.model.ln_final.weight": [1280],
    "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
}


def weights(shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> bytes:
    """A whole weight file of zeros, of one byte an element."""
    at, entries = 0, {}
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return safetensors(entries | ({"__metadata__": metadata} if metadata else {}), bytes(at))


def put(models: Models, path: str, shapes: dict[str, list[int]] = SDXL) -> Path:
    target = models.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(weights(shapes))
    return target


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_a_file_is_called_by_its_folder_and_its_name_without_extension(models: Models) -> None:
    put(models, "checkpoints/Pony Diffusion (v6) [pruned].safetensors")
    put(models, "checkpoints/real/v1.0.sft")
    assert models.list() == ["Pony Diffusion (v6) [pruned]", "real/v1.0"]
    for name in ("real/v1.0", "real/v1.0.sft", "v1.0", "v1.0.sft"):
        found = models.find(name)
        assert (found.name, found.is_file, found.path) == ("real/v1.0", True, models.root / "checkpoints/real/v1.0.sft")
    assert found.size == found.path.stat().st_size
    assert (found.native_size, found.architecture.base, found.architecture.format) == (1024, "sdxl", "single_file")


def test_a_bare_name_that_two_have_must_be_said_in_full(models: Models) -> None:
    for folder in ("a", "b"):
        put(models, f"checkpoints/{folder}/one.safetensors")
    with pytest.raises(AmbiguousModel, match=r"There are a/one, b/one\. Name one of them"):
        models.find("one")
    assert models.find("b/one").name == "b/one"


def test_a_folder_and_a_file_of_one_name_are_told_apart_by_the_extension(models: Models) -> None:
    (models.root / "diffusers" / "one").mkdir(parents=True)
    (models.root / "diffusers" / "one" / "model_index.json").touch()
    put(models, "checkpoints/one.safetensors")
    assert models.list() == ["one", "one.safetensors"]
    assert models.find("one.safetensors").is_file


def test_each_kind_has_its_folder(models: Models) -> None:
    put(models, "vae/x.safetensors", {"decoder.conv_in.weight": [512, 4, 3, 3]})
    assert models.find("x", ModelKind.VAE).kind is ModelKind.VAE
    for kind in set(ModelKind) - {ModelKind.VAE}:
        with pytest.raises(UnknownModel, match=f"No {kind.noun} named 'x'"):
            models.find("x", kind)


def test_a_file_in_the_wrong_folder_is_refused_with_the_right_one(models: Models) -> None:
    put(models, "loras/x.safetensors")
    with pytest.raises(UnusableModel, match=r"The LoRA 'x' cannot be used: it is a model: it belongs in checkpoints/"):
        models.find("x", ModelKind.LORA)


def test_a_half_file_is_broken_and_a_pickle_no_model(models: Models) -> None:
    path = put(models, "checkpoints/half.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    path.with_name("old.ckpt").touch()
    assert models.list() == ["half"]
    with pytest.raises(BrokenWeights, match=r"half\.safetensors cannot be used: its tensors need"):
        models.find("half")


def test_a_file_that_was_replaced_is_another_model(models: Models) -> None:
    path = put(models, "checkpoints/x.safetensors")
    before = models.find("x")
    assert models.find("x") == before
    path.unlink()
    put(models, "checkpoints/x.safetensors", SDXL | {"more": [1]})
    assert models.find("x") != before
    path.unlink()
    put(models, "checkpoints/x.safetensors", {"decoder.conv_in.weight": [512, 4, 3, 3]})
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
