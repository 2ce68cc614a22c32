"""What is painted: the same bits as plain diffusers, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from engine_conftest import EMBEDDED, REF, Painter
from PIL import Image

from imagend.errors import BrokenModel, BrokenWeights
from imagend.job import Outcome
from imagend.messages import Progress, Run
from imagend.models import Models
from imagend.worker import images
from imagend.worker.pipelines import Pipelines, StableDiffusionXLPipeline

PROMPT = "a large red circle on a blue background"
QUICK = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.0}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def plainly(plain: Any, seed: int, scheduler: Any = None, **arguments: Any) -> np.ndarray:
    """One plain diffusers call."""
    plain.scheduler = scheduler or diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    call = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.0, "width": 128, "height": 128} | arguments
    return np.asarray(plain(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0])


def test_a_picture_equals_a_plain_diffusers_call_bit_for_bit(painter: Painter, plain: Any, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **QUICK, seed=7)
    assert ended.outcome is Outcome.SUCCEEDED
    assert (pixels(tmp_path / "0000.png") == plainly(plain, 7)).all()


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"negative_prompt": ""}, {"negative_prompt": ""}),
        ({"negative_prompt": "a green star"}, {"negative_prompt": "a green star"}),
        ({"width": 192, "height": 96}, {"width": 192, "height": 96}),
        ({"guidance_scale": 0.0}, {"guidance_scale": 0.0}),
        ({"clip_skip": 0}, {"clip_skip": 0}),
        ({"clip_skip": 1}, {"clip_skip": 1}),
        ({"prompt_syntax": "plain"}, {}),
        ({"prompt_syntax": "a1111"}, {}),
    ],
)
def test_every_argument_means_what_it_means_in_diffusers(
    painter: Painter, plain: Any, tmp_path: Path, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    ended = painter.run(tmp_path, **(QUICK | fields), seed=3)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert (pixels(tmp_path / "0000.png") == plainly(plain, 3, **arguments)).all()


def test_picture_i_does_not_depend_on_how_many_were_asked_for(painter: Painter, plain: Any, tmp_path: Path) -> None:
    painter.run(tmp_path / "four", **QUICK, seed=10, count=4)
    painter.run(tmp_path / "one", **QUICK, seeds=(12,))
    four = pixels(tmp_path / "four" / "0002.png")
    assert (four == pixels(tmp_path / "one" / "0000.png")).all()
    assert (four == plainly(plain, 12)).all()


@pytest.mark.parametrize(
    ("name", "scheduler", "overrides"),
    [
        (
            "DPM++ 2M Karras",
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"},
        ),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("DDIMScheduler", "DDIMScheduler", {}),
    ],
)
def test_schedulers_by_both_names(
    painter: Painter, plain: Any, tmp_path: Path, name: str, scheduler: str, overrides: dict[str, Any]
) -> None:
    own = diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    ended = painter.run(tmp_path / "a", **QUICK, seed=1, scheduler=name)
    expected = plainly(plain, 1, getattr(diffusers, scheduler).from_config(own.config, **overrides))
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    assert ended.engine["scheduler"]["class"] == scheduler
    painter.run(tmp_path / "b", **QUICK, seed=1)  # the next job has the model's own again
    assert (pixels(tmp_path / "b" / "0000.png") == plainly(plain, 1)).all()


def test_every_known_scheduler_paints(painter: Painter, tmp_path: Path) -> None:
    from imagend import schedulers

    for name in schedulers.NAMES:
        ended = painter.run(tmp_path / name, **QUICK | {"width": 64, "height": 64}, seed=1, scheduler=name)
        assert ended.outcome is Outcome.SUCCEEDED, (name, ended.failure)
        chunk = Image.open(tmp_path / name / "0000.png").text["imagend"]  # type: ignore[attr-defined]
        json.loads(chunk, parse_constant=pytest.fail)  # DPM-Solver's lambda_min_clipped is -inf, JSON has none


def test_what_the_prompt_says_is_what_is_seen(painter: Painter, tmp_path: Path) -> None:
    painter.run(tmp_path, prompt=PROMPT, num_inference_steps=14, guidance_scale=4.0, seed=7)
    image = pixels(tmp_path / "0000.png").astype(int)
    red, blue = image[64, 64], image[4, 4]
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80


def test_progress_tells_every_step_and_stage(painter: Painter, tmp_path: Path) -> None:
    painter.run(tmp_path, **QUICK, count=2)
    told = [message for message in painter.said if isinstance(message, Progress)]
    steps = [(one.picture, one.step) for one in told if one.stage == "painting"]
    assert steps == [(picture, step) for picture in (0, 1) for step in (0, 1, 2, 3)]
    assert {(one.pictures, one.steps) for one in told if one.stage == "painting"} == {(2, 3)}
    assert "encoding" in {one.stage for one in told}


def test_an_interrupted_job_paints_only_what_is_missing(painter: Painter, plain: Any, tmp_path: Path) -> None:
    def interrupt(message: Any) -> None:
        if isinstance(message, Progress) and (message.picture, message.step) == (1, 2):
            painter.worker.stop()

    painter.hear = interrupt
    assert painter.run(tmp_path, **QUICK, seed=5, count=3).outcome is Outcome.CANCELLED
    first = (tmp_path / "0000.png").stat()
    assert not (tmp_path / "0001.png").exists()
    painter.hear = None
    ended = painter.run(tmp_path, **QUICK, seed=5, count=3)
    assert (tmp_path / "0000.png").stat() == first  # not painted again
    assert {one.picture for one in painter.said if isinstance(one, Progress) and one.stage == "painting"} == {1, 2}
    assert [artifact.seed for artifact in ended.artifacts] == [5, 6, 7]
    for index in range(3):
        assert (pixels(tmp_path / f"{index:04d}.png") == plainly(plain, 5 + index)).all()


@pytest.mark.parametrize("harm", ["torn picture", "torn note", "other recipe", "no note"])
def test_a_draft_that_is_not_whole_or_not_ours_is_painted_again(
    painter: Painter, plain: Any, tmp_path: Path, harm: str
) -> None:
    painter.run(tmp_path, **QUICK, seed=5)
    picture, note = tmp_path / "0000.png", tmp_path / ".0000.json"
    match harm:
        case "torn picture":
            picture.write_bytes(picture.read_bytes()[:-100])
        case "torn note":
            note.write_bytes(note.read_bytes()[:-100])
        case "other recipe":
            painter.run(tmp_path, **QUICK | {"num_inference_steps": 2}, seed=5)
        case "no note":
            note.unlink()
            picture.write_bytes(b"")
    painter.run(tmp_path, **QUICK, seed=5)
    assert (pixels(picture) == plainly(plain, 5)).all()


def test_cancel_takes_effect_at_the_next_step_and_spares_the_next_job(painter: Painter, tmp_path: Path) -> None:
    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and message.step == 1:
            painter.worker.cancel(REF)

    painter.hear = cancel
    ended = painter.run(tmp_path / "a", **QUICK)
    assert ended.outcome is Outcome.CANCELLED
    assert max(one.step for one in painter.said if isinstance(one, Progress)) == 1
    painter.hear = None
    painter.worker.cancel(REF)  # late
    assert painter.run(tmp_path / "b", **QUICK).outcome is Outcome.SUCCEEDED


def test_the_artifact_says_what_is_on_disk(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **QUICK, seed=7)
    (artifact,) = ended.artifacts
    data = (tmp_path / artifact.file).read_bytes()
    assert (artifact.size, artifact.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    image = Image.open(tmp_path / artifact.file)
    assert image.size == (artifact.width, artifact.height) == (128, 128)
    assert artifact.pixels_sha256 == hashlib.sha256(image.tobytes()).hexdigest()
    assert ended.timings.keys() >= {"encoding", "painting", "saving"}
    weights = EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors"
    told = ended.engine["model"]["files"]["unet/diffusion_pytorch_model.safetensors"]
    assert told == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ended.engine["versions"].keys() >= {"imagend", "torch", "diffusers", "transformers", "compel"}


def test_png_carries_infotext_our_chunk_and_the_ai_mark(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **QUICK, negative_prompt="a star, blurry", seed=7, scheduler="DPM++ 2M Karras")
    text = Image.open(tmp_path / "0000.png").text  # type: ignore[attr-defined]
    prompt, negative, settings = text["parameters"].split("\n")
    assert (prompt, negative) == (PROMPT, "Negative prompt: a star, blurry")
    assert settings.startswith(
        "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 7, Size: 128x128,"
    )
    assert f"Model hash: {ended.engine['model']['sha256'][:10]}, Model: shapes-xl" in settings
    assert ", RNG: CPU, " in settings
    item = json.loads(text["imagend"])
    assert (item["spec"]["seed"], item["pixels_sha256"]) == (7, ended.artifacts[0].pixels_sha256)
    assert "digitalsourcetype/trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]


def test_metadata_none_leaves_only_the_ai_mark(painter: Painter, tmp_path: Path) -> None:
    painter.run(tmp_path, **QUICK, seed=7, metadata="none")
    data = (tmp_path / "0000.png").read_bytes()
    assert b"red circle" not in data
    assert list(Image.open(tmp_path / "0000.png").text) == ["XML:com.adobe.xmp"]  # type: ignore[attr-defined]


def test_out_of_memory_is_an_error_of_its_own_and_the_pipeline_lives(
    painter: Painter, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter.run(tmp_path / "warm", **QUICK)
    unet = painter.pipelines.get("shapes-xl", lambda: None).unet

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with monkeypatch.context() as patch:
        patch.setattr(unet, "forward", exhausted)
        ended = painter.run(tmp_path / "a", **QUICK)
    assert ended.failure.error.code == "OUT_OF_MEMORY"
    assert "128x128" in ended.failure.error.message
    painter.run(tmp_path / "b", **QUICK, seed=7)
    assert (pixels(tmp_path / "b" / "0000.png") == plainly(plain, 7)).all()


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"clip_skip": 30}, "INVALID_PARAMETERS", "clip_skip"),
        ({"prompt": "red " * 4200}, "INVALID_PARAMETERS", "4096"),
        ({"negative_prompt": "red " * 4200}, "INVALID_PARAMETERS", "negative_prompt"),
    ],
)
def test_what_only_the_model_can_refuse(
    painter: Painter, tmp_path: Path, fields: dict[str, Any], code: str, words: str
) -> None:
    ended = painter.run(tmp_path, **(QUICK | fields))
    assert ended.outcome is Outcome.FAILED
    assert ended.failure.error.code == code
    assert words in ended.failure.error.message
    assert not ended.failure.try_again


def test_a_prompt_of_4000_tokens_paints(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **QUICK | {"prompt": "red " * 4000, "num_inference_steps": 1})
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("harm", ["cut", "gone", "nonsense"])
def test_a_broken_model_names_itself(tmp_path: Path, component: str, harm: str) -> None:
    broken = tmp_path / "diffusers" / "broken"
    shutil.copytree(EMBEDDED, broken, ignore=shutil.ignore_patterns("*.py", "*.png"))
    (weights,) = (broken / component).glob("*.safetensors")
    match harm:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "gone":
            weights.unlink()
        case "nonsense":
            weights.write_bytes(b"no tensors here")
    with pytest.raises((BrokenModel, BrokenWeights), match=r"'broken'| broken/"):
        Pipelines("cpu", Models(tmp_path)).get("broken", lambda: None)


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


def infest(folder: Path, disguise: str, sang: Path) -> None:
    """Hide a pickle among a component's weights."""
    (weights,) = folder.glob("*.safetensors")
    evil = pickle.dumps(Canary(str(sang)), 4)
    name = "pytorch_model.bin" if weights.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    match disguise:
        case ".bin":
            weights.unlink()
            (folder / name).write_bytes(evil)
        case ".safetensors":
            weights.write_bytes(evil)
        case "both":
            weights.write_bytes(weights.read_bytes()[:1000])
            (folder / name).write_bytes(evil)
        case "index":
            weights.unlink()
            index = {"metadata": {"total_size": 1}, "weight_map": {"a": name}}
            (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
            (folder / name).write_bytes(evil)
        case "adapter":
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
            (folder / "adapter_model.bin").write_bytes(evil)


DISGUISES = [".bin", ".safetensors", "both", "index", "adapter"]


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, disguise: str) -> None:
    """Not even with torch's weights_only, which has been got around before (CVE-2025-32434)."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    folder = tmp_path / "diffusers" / "evil" / component
    shutil.copytree(EMBEDDED, folder.parent, ignore=shutil.ignore_patterns("*.py", "*.png"))
    infest(folder, disguise, tmp_path / "sang")
    with pytest.raises((BrokenModel, BrokenWeights)):
        Pipelines("cpu", Models(tmp_path)).get("evil", lambda: None)
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("disguise", DISGUISES)
def test_nothing_is_unpickled_of_a_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disguise: str) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    shutil.copytree(EMBEDDED / "vae", tmp_path / "vae" / "evil")
    infest(tmp_path / "vae" / "evil", disguise, tmp_path / "sang")
    with pytest.raises((BrokenModel, BrokenWeights)):
        Pipelines("cpu", Models(tmp_path)).get("shapes-xl", lambda: None, "evil")
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("trouble", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("lost", 700)])
def test_trouble_of_the_device_while_loading_is_not_blamed_on_the_model(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise trouble

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", fail)
    with pytest.raises(type(trouble)):
        Pipelines("cpu", Models(EMBEDDED.parents[1])).get("shapes-xl", lambda: None)


def test_a_full_disk_is_told_as_such(painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "save_png", full)
    ended = painter.run(tmp_path, **QUICK, count=3)
    assert ended.failure.error.code == "INSUFFICIENT_STORAGE"
    assert "No space left" in ended.failure.error.message


def test_a_lost_device_costs_an_attempt_and_not_the_job(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = painter.pipelines.get("shapes-xl", lambda: None).unet

    def lost(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(unet, "forward", lost)
    ended = painter.run(tmp_path, **QUICK)
    assert ended.failure.try_again
    assert "illegal memory access" in ended.failure.error.message


def test_a_bug_is_logged_without_the_prompt(painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = painter.pipelines.get("shapes-xl", lambda: None).unet

    def bug(*_: Any, **__: Any) -> None:
        raise ValueError("".join(("can", "ary")))

    monkeypatch.setattr(unet, "forward", bug)
    ended = painter.run(tmp_path, **QUICK)
    assert ended.failure.error.code == "INTERNAL"
    assert "in bug" in ended.failure.traceback
    assert "canary" not in ended.model_dump_json()


def test_a_cancel_right_behind_the_job_is_not_lost(painter: Painter, tmp_path: Path) -> None:
    spec = QUICK | {"model": "shapes-xl", "width": 64, "height": 64, "seeds": [1]}
    run = Run(job=REF, kind="generate", spec=spec, folder=str(tmp_path))
    context = painter.worker.expect(run)
    painter.worker.cancel(REF)  # before the attempt has begun
    assert painter.worker.attempt(run, context).outcome is Outcome.CANCELLED
