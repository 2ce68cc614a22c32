"""Chains, as a worker goes through them: the bits of each step, whatever happens between and within them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from engine_conftest import Painter, load_plain
from PIL import Image

from imagend.job import Outcome
from imagend.messages import Made, Message, Progress

QUICK = {"prompt": "a large red circle on a blue background", "num_inference_steps": 3, "seed": 7, "count": 2}
CHAIN = QUICK | {"chain": {"upscale": {}}}
ANEW = QUICK | {"chain": {"upscale": {"strength": 0.7}}}
FILES = ["generate/0000.png", "generate/0001.png", "upscale/0000.png", "upscale/0001.png"]
STEPS = ["generate", "upscale"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def painted(folder: Path) -> dict[str, str]:
    """The digests of the pictures in a draft, by their names."""
    pictures = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
    return {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items()}


@pytest.fixture(scope="module", params=[CHAIN, ANEW], ids=["enlarged", "painted anew"])
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def whole(
    painter: Painter, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, list[Message]]:
    """A chained job, done without disturbance: its draft, and what was said."""
    folder = tmp_path_factory.mktemp("whole")
    painter.hear = None
    return folder, painter.run(folder, **job), painter.said


def first_said(painter: Painter, step: str, picture: int, then: Callable[[], None]) -> None:
    """Do something when a worker is at a picture of a step."""

    def hear(message: Message) -> None:
        if isinstance(message, Progress) and (message.chain_step, message.picture) == (step, picture):
            then()

    painter.hear = hear


def test_the_first_step_paints_what_a_job_without_a_chain_does(
    painter: Painter, whole: tuple[Path, Any, list[Message]], tmp_path: Path
) -> None:
    folder, ended, _ = whole
    alone = painter.run(tmp_path, **QUICK)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    for index in (0, 1):
        assert (pixels(folder / "generate" / f"000{index}.png") == pixels(tmp_path / f"000{index}.png")).all()
    assert [one.file for one in alone.artifacts] == ["0000.png", "0001.png"]
    assert "upscaler" not in alone.engine
    assert not any(isinstance(message, Made) for message in painter.said)


@pytest.mark.parametrize("scale", [2, 4])
def test_the_second_step_is_what_pillow_makes_of_the_first(painter: Painter, tmp_path: Path, scale: int) -> None:
    ended = painter.run(tmp_path, **CHAIN | {"chain": {"upscale": {"scale": scale}}, "count": 1})
    small, large = ended.artifacts
    image = Image.open(tmp_path / small.file)
    expected = image.resize((128 * scale, 128 * scale), Image.Resampling.LANCZOS)
    assert (pixels(tmp_path / large.file) == np.asarray(expected)).all()
    assert (large.width, large.index, large.seed) == (128 * scale, 0, 7)
    assert ended.engine["upscaler"] == {"name": "Lanczos", "scale": scale}
    text = Image.open(tmp_path / large.file).text  # type: ignore[attr-defined]
    assert f"Postprocess upscale by: {scale}, Postprocess upscaler: Lanczos" in text["parameters"]
    assert "Postprocess" not in image.text["parameters"]  # type: ignore[attr-defined]
    assert "trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]


def test_painted_anew_is_what_diffusers_makes_of_the_enlarged_picture(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **ANEW)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**load_plain().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for small, large in zip(ended.artifacts[:2], ended.artifacts[2:], strict=True):
        image = Image.open(tmp_path / small.file).resize((256, 256), Image.Resampling.LANCZOS)
        expected = pipe(
            prompt=QUICK["prompt"],
            image=image,
            strength=0.7,
            num_inference_steps=3,
            guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(large.seed),
        ).images[0]
        assert (pixels(tmp_path / large.file) == np.asarray(expected)).all()
        assert (pixels(tmp_path / large.file) != np.asarray(image)).any()
    text = Image.open(tmp_path / large.file).text  # type: ignore[attr-defined]
    assert "Denoising strength: 0.7" in text["parameters"]
    assert "Size: 128x128" in text["parameters"]
    assert "Hires upscale: 2, Hires upscaler: Lanczos" in text["parameters"]
    assert "Postprocess" not in text["parameters"]
    assert json.loads(text["imagend"])["spec"]["chain"]["upscale"]["strength"] == 0.7
    assert "Denoising" not in Image.open(tmp_path / small.file).text["parameters"]  # type: ignore[attr-defined]
    assert painter.run(tmp_path / "after", **QUICK).artifacts[0].pixels_sha256 == ended.artifacts[0].pixels_sha256


def test_painted_anew_with_all_that_the_job_has_equals_a_job_that_begins_with_the_enlarged_picture(
    painter: Painter, tmp_path: Path
) -> None:
    edges, large = tmp_path / "edges.png", tmp_path / "large.png"
    Image.new("RGB", (200, 100), "white").save(edges)
    control = {"image": "shapes/edges", "model": "shapes-xl-mask", "control_strength": 0.8}
    both = {"control": [control], "references": [{"image": "shapes/edges", "strength": 0.5}], "seed": 7, "count": 1}
    pictures = {"shapes/edges": edges}
    ended = painter.run(tmp_path / "chain", pictures, **ANEW | both)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    small = Image.open(tmp_path / "chain" / "generate" / "0000.png")
    small.resize((256, 256), Image.Resampling.LANCZOS).save(large)
    begun = {"image": "shapes/large", "strength": 0.7, "width": 256, "height": 256}
    alone = painter.run(tmp_path / "alone", pictures | {"shapes/large": large}, **QUICK | both | begun)
    assert alone.artifacts[0].pixels_sha256 == ended.artifacts[1].pixels_sha256
    assert ended.artifacts[1].pixels_sha256 != ended.artifacts[0].pixels_sha256


def test_artifacts_keep_their_index_and_seed(whole: tuple[Path, Any, list[Message]]) -> None:
    folder, ended, said = whole
    assert [(one.file, one.index, one.seed) for one in ended.artifacts] == [
        (file, index, 7 + index) for file, index in zip(FILES, (0, 1, 0, 1), strict=True)
    ]
    for one in ended.artifacts:
        data = (folder / one.file).read_bytes()
        assert (one.size, one.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    (made,) = [message for message in said if isinstance(message, Made)]
    assert made.artifacts == ended.artifacts[:2]
    assert set(ended.timings) >= {"painting", "upscaling", "saving"}


def test_each_step_is_half_of_the_progress(whole: tuple[Path, Any, list[Message]]) -> None:
    said = [message for message in whole[2] if isinstance(message, Progress)]
    progress = [message.progress for message in said if message.progress is not None]
    assert len(progress) == len(said)
    assert progress == sorted(progress)
    assert [message.chain_step for message in said] == sorted(str(message.chain_step) for message in said)
    of = {step: [message.progress for message in said if message.chain_step == step] for step in STEPS}
    assert (of["generate"][0], of["generate"][-1], of["upscale"][0], of["upscale"][-1]) == (0.0, 0.5, 0.5, 1.0)
    assert 0.25 in of["generate"]
    assert 0.75 in of["upscale"]


@pytest.mark.parametrize("step", STEPS)
def test_a_cancelled_chain_stops_in_each_step_and_another_attempt_makes_only_what_is_missing(
    painter: Painter, job: dict[str, Any], whole: tuple[Path, Any, list[Message]], tmp_path: Path, step: str
) -> None:
    first_said(painter, step, 1, painter.worker.stop)
    assert painter.run(tmp_path, **job).outcome is Outcome.CANCELLED
    before = painted(tmp_path)
    assert sorted(before) == FILES[: FILES.index(f"{step}/0001.png")]
    resume(painter, job, whole, tmp_path, before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("step", STEPS)
def test_a_worker_killed_in_each_step_loses_no_picture_that_was_made(
    painter: Painter, job: dict[str, Any], whole: tuple[Path, Any, list[Message]], tmp_path: Path, step: str
) -> None:
    def die() -> None:
        os._exit(9)

    if (child := os.fork()) == 0:
        first_said(painter, step, 1, die)
        painter.run(tmp_path, **job)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    before = painted(tmp_path)
    resume(painter, job, whole, tmp_path, before)


def resume(
    painter: Painter,
    job: dict[str, Any],
    whole: tuple[Path, Any, list[Message]],
    folder: Path,
    before: dict[str, str],
) -> None:
    """Nothing that was there is made again, and the end is the same as without disturbance."""
    painter.hear = None
    made = {name: (folder / name).stat().st_ino for name in before}
    ended = painter.run(folder, **job)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert {name: (folder / name).stat().st_ino for name in before} == made
    assert [one.pixels_sha256 for one in ended.artifacts] == [one.pixels_sha256 for one in whole[1].artifacts]
    done = [message.progress for message in painter.said if isinstance(message, Progress)]
    assert done[-1] == 1.0


def test_what_a_picture_was_made_from_decides_whether_it_is_made_again(
    painter: Painter, job: dict[str, Any], whole: tuple[Path, Any, list[Message]], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "again")
    before = painted(folder)
    ended = painter.run(folder, **job | {"chain": {"upscale": job["chain"]["upscale"] | {"scale": 4}}})
    assert [one.width for one in ended.artifacts] == [128, 128, 512, 512]
    ended = painter.run(folder, **job | {"seed": 8})
    assert {name for name, digest in painted(folder).items() if digest == before[name]} == set()
    assert ended.artifacts[2].width == 256


def test_a_chain_that_breaks_says_what_was_made_and_why_it_ends(painter: Painter, tmp_path: Path) -> None:
    (tmp_path / "upscale").write_text("no folder")
    ended = painter.run(tmp_path, **CHAIN)
    assert (ended.outcome, ended.failure.error.code) == (Outcome.FAILED, "INSUFFICIENT_STORAGE")
    (made,) = [message for message in painter.said if isinstance(message, Made)]
    assert [one.file for one in made.artifacts] == FILES[:2]


def test_a_chain_whose_painting_fails_upscales_nothing(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **CHAIN | {"vae": "there-is-none"})
    assert (ended.outcome, ended.failure.error.code) == (Outcome.FAILED, "MODEL_NOT_FOUND")
    assert not any(isinstance(message, Made) for message in painter.said)
    assert not (tmp_path / "upscale").exists()
