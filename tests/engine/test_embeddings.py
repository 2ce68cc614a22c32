"""Embeddings by name in whole jobs: painted as diffusers paints them, told in the manifest, refused with reasons."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from engine_conftest import EMBEDDED, Painter, StableDiffusionXLPipeline
from PIL import Image
from prompts import ONE, THREE, made, save
from safetensors.torch import save_file

from imagend.job import Outcome
from imagend.memory_plan import Mode

JOB = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/embeddings/ beside the embedded model: one and three vectors, and what is none for this model."""
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    folder = root / "embeddings"
    save(ONE, folder)
    save(THREE, folder / "sub")
    for name in ("a/dust", "b/dust"):
        save(made(name, 1, 7), folder)
    one, two = made("", 2, 8).vectors
    for name in ("easynegative", "old (1)"):
        save_file({"emb_params": torch.randn(2, 768)}, folder / f"{name}.safetensors")
    save_file({"clip_l": torch.randn(1, 768), "clip_g": torch.randn(1, 1280)}, folder / "sdxl.safetensors")
    save_file({"clip_l": one, "clip_g": two[:1]}, folder / "uneven.safetensors")
    save_file({"clip_l": one[0].clone(), "clip_g": two[0].clone()}, folder / "flat.safetensors")
    save_file({"clip_l": one[:0].clone(), "clip_g": two[:0].clone()}, folder / "none.safetensors")
    save_file({"clip_l": one, "clip_g": two.index_fill(1, torch.tensor(7), torch.inf)}, folder / "infinite.safetensors")
    save_file({"text_encoders_0": one, "text_encoders_1": two}, folder / "trainers.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "zorp.safetensors").read_bytes()[:-1])
    return folder


@pytest.fixture(scope="module")
def inverting(folder: Path) -> Painter:
    return Painter(folder.parent)


@pytest.fixture(scope="module")
def inverted() -> Any:
    """diffusers, with two embeddings loaded as its documentation says for SDXL."""
    pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for one in (ONE, THREE):
        pipe.load_textual_inversion(one.vectors[0], token=one.name)
        second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(one.vectors[1], token=one.name, **second)
    return pipe


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path / "0000.png").convert("RGB"))


def by_diffusers(pipe: Any, prompt: str, negative_prompt: str) -> np.ndarray:
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
    generator = torch.Generator("cpu").manual_seed(3)
    return np.asarray(pipe(prompt, negative_prompt=negative_prompt, generator=generator, **call).images[0])


@pytest.mark.parametrize("syntax", ["compel", "a1111", "plain"])
def test_a_job_paints_what_diffusers_paints(inverting: Painter, inverted: Any, tmp_path: Path, syntax: str) -> None:
    expected = by_diffusers(inverted, "a zorp circle", "glimb")
    for number, (prompt, negative) in enumerate(
        [
            ("a zorp circle", "glimb"),
            ("a embedding:zorp.safetensors circle", "embedding:sub/glimb"),
            ("a Zorp circle", "embedding:glimb.pt"),
        ]
    ):
        job = JOB | {"prompt": prompt, "negative_prompt": negative, "prompt_syntax": syntax}
        ended = inverting.run(tmp_path / str(number), **job)
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure
        assert (pixels(tmp_path / str(number)) == expected).all()


def test_the_manifest_and_the_png_name_what_was_used(inverting: Painter, folder: Path, tmp_path: Path) -> None:
    ended = inverting.run(tmp_path, **JOB, prompt="a glimb", negative_prompt="zorp glimb")
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("sub/glimb.safetensors", "zorp.safetensors")
    ]
    expected = [{"name": "sub/glimb", "sha256": digests[0]}, {"name": "zorp", "sha256": digests[1]}]
    assert ended.engine["embeddings"] == expected
    text = Image.open(tmp_path / "0000.png").text["parameters"]  # type: ignore[attr-defined]
    assert f'TI hashes: "sub/glimb: {digests[0][:12]}, zorp: {digests[1][:12]}"' in text


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.FP8])
def test_every_memory_mode_finds_them(
    inverting: Painter, inverted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    inverting.pipelines.prompts.clear()
    monkeypatch.setattr(inverting.pipelines.ladder, "modes", (mode,))
    ended = inverting.run(tmp_path, **JOB, prompt="a glimb circle", negative_prompt="zorp")
    inverting.pipelines.ladder.placement.release()
    assert ended.memory["mode"] == mode.value
    assert (pixels(tmp_path) == by_diffusers(inverted, "a glimb circle", "zorp")).all()


def test_the_next_job_knows_nothing_of_it(inverting: Painter, plain: Any, tmp_path: Path) -> None:
    inverting.run(tmp_path / "a", **JOB, prompt="a zorp circle")
    ended = inverting.run(tmp_path / "b", **JOB, prompt="a red circle", negative_prompt="blurry")
    assert ended.engine["embeddings"] == []
    assert (pixels(tmp_path / "b") == by_diffusers(plain, "a red circle", "blurry")).all()


def test_a_bare_name_of_one_for_another_model_is_a_word(inverting: Painter, plain: Any, tmp_path: Path) -> None:
    """As in AUTOMATIC1111: else a folder of old embeddings would take words away from everybody."""
    negative = "blurry, easynegative, old (1)), red"
    job = JOB | {"prompt": "a red circle", "negative_prompt": negative, "prompt_syntax": "plain"}
    ended = inverting.run(tmp_path, **job)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.engine["embeddings"] == []
    assert (pixels(tmp_path) == by_diffusers(plain, "a red circle", negative)).all()


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ("a embedding:easynegative", "MODEL_UNUSABLE", ["'easynegative'", "SD 1.5"]),
        ("a embedding:gone", "MODEL_NOT_FOUND", ["'gone'", "zorp"]),
        ("a dust", "INVALID_PARAMETERS", ["a/dust, b/dust"]),
        ("a sdxl", "INVALID_PARAMETERS", ["'sdxl'", "768 and 1280", "64 and 96", "Leave it out"]),
        ("a uneven", "INVALID_PARAMETERS", ["'uneven'", "(2, 64) and (1, 96)"]),
        ("a embedding:flat", "INVALID_PARAMETERS", ["'flat'", "(64,)"]),
        ("a embedding:none", "INVALID_PARAMETERS", ["'none'", "(0, 64)"]),
        ("a infinite", "INVALID_PARAMETERS", ["'infinite'", "no number"]),
        ("a cut", "MODEL_UNUSABLE", ["cut.safetensors"]),
    ],
)
def test_what_cannot_be_used_is_refused_and_the_next_job_is_well(
    inverting: Painter, plain: Any, tmp_path: Path, prompt: str, code: str, words: list[str]
) -> None:
    ended = inverting.run(tmp_path / "a", **JOB, prompt=prompt)
    assert ended.outcome is Outcome.FAILED
    assert ended.failure.error.code == code
    for word in words:
        assert word in ended.failure.error.message
    inverting.run(tmp_path / "b", **JOB, prompt="a blue star", negative_prompt="red")
    assert (pixels(tmp_path / "b") == by_diffusers(plain, "a blue star", "red")).all()


def test_the_names_of_diffusers_older_trainers(inverting: Painter, tmp_path: Path) -> None:
    ended = inverting.run(tmp_path / "a", **JOB, prompt="a trainers")
    assert [one["name"] for one in ended.engine["embeddings"]] == ["trainers"]
    inverting.run(tmp_path / "b", **JOB, prompt="a word")
    assert (pixels(tmp_path / "a") != pixels(tmp_path / "b")).any()


def test_a_file_that_comes_or_changes_is_seen_by_the_next_job(inverting: Painter, folder: Path, tmp_path: Path) -> None:
    job = JOB | {"prompt": "a newcomer circle"}
    shas = [inverting.run(tmp_path / "0", **job).artifacts[0].pixels_sha256]
    for number in (1, 2):
        save(made("newcomer", 2, number), folder)
        shas.append(inverting.run(tmp_path / str(number), **job).artifacts[0].pixels_sha256)
    (folder / "newcomer.safetensors").unlink()
    assert len(set(shas)) == 3
    assert inverting.run(tmp_path / "3", **job).artifacts[0].pixels_sha256 == shas[0]


def test_a_draft_painted_with_another_file_is_painted_again(inverting: Painter, folder: Path, tmp_path: Path) -> None:
    job = JOB | {"prompt": "a changing circle"}
    save(made("changing", 2, 1), folder)
    before = inverting.run(tmp_path, **job).artifacts[0].pixels_sha256
    save(made("changing", 2, 2), folder)
    assert inverting.run(tmp_path, **job).artifacts[0].pixels_sha256 != before
    (folder / "changing.safetensors").unlink()


def test_a_picture_of_a_set_names_the_embeddings_that_it_has(inverting: Painter, tmp_path: Path) -> None:
    items = [{"name": "with", "values": {"x": ONE.name}}, {"name": "without", "values": {"x": "blue"}}]
    ended = inverting.run(tmp_path / "set", **JOB, prompt="a {x} circle", items=items)
    assert [one["name"] for one in ended.engine["embeddings"]] == [ONE.name]
    alone = inverting.run(tmp_path / "alone", **JOB, prompt=f"a {ONE.name} circle")
    assert ended.artifacts[0].pixels_sha256 == alone.artifacts[0].pixels_sha256
    texts = {name: Image.open(tmp_path / "set" / f"{name}.png").text for name in ("with", "without")}  # type: ignore[attr-defined]
    assert ("TI hashes" in texts["with"]["parameters"], "TI hashes" in texts["without"]["parameters"]) == (True, False)
