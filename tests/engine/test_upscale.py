"""Pictures made larger: by Pillow's own bits, marked as what they are, within bounds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from engine_conftest import Painter
from PIL import Image
from upscalers import upscale

from imagend.job import Outcome
from imagend.messages import Progress


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(1).integers(0, 255, (30, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("scale", [2, 4])
def test_it_is_what_pillow_makes_of_it(painter: Painter, photo: Path, tmp_path: Path, scale: int) -> None:
    ended = upscale(painter, photo, tmp_path / "a", scale=scale)
    (artifact,) = ended.artifacts
    image = Image.open(tmp_path / "a" / "0000.png")
    expected = Image.open(photo).resize((50 * scale, 30 * scale), Image.Resampling.LANCZOS)
    assert (np.asarray(image) == np.asarray(expected)).all()
    assert (artifact.width, artifact.height, artifact.seed) == (*expected.size, None)
    assert artifact.sha256 == hashlib.sha256((tmp_path / "a" / "0000.png").read_bytes()).hexdigest()
    assert ended.engine["pictures"][0]["sha256"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    assert set(ended.engine["versions"]) == {"imagend", "pillow"}
    assert json.loads(image.text["imagend"])["spec"]["scale"] == scale  # type: ignore[attr-defined]


def test_it_tells_its_progress_and_each_word_is_a_cancel_point(painter: Painter, photo: Path, tmp_path: Path) -> None:
    upscale(painter, photo, tmp_path / "a")
    told = [(one.stage, one.step, one.steps) for one in painter.said if isinstance(one, Progress)]
    assert told == [("upscaling", 0, 1), ("upscaling", 1, 1)]
    painter.hear = lambda message: painter.worker.stop()
    assert upscale(painter, photo, tmp_path / "b").outcome is Outcome.CANCELLED
    assert list((tmp_path / "b").iterdir()) == []


def test_what_was_made_by_ai_stays_marked_so_and_nothing_else_is(painter: Painter, photo: Path, tmp_path: Path) -> None:
    upscale(painter, photo, tmp_path / "a", metadata="none")
    own = Image.open(tmp_path / "a" / "0000.png").text  # type: ignore[attr-defined]
    assert list(own) == ["XML:com.adobe.xmp"]
    assert "algorithmicallyEnhanced" in own["XML:com.adobe.xmp"]
    painter.run(tmp_path / "painted", prompt="a circle", num_inference_steps=1, width=64, height=64)
    upscale(painter, tmp_path / "painted" / "0000.png", tmp_path / "b")
    made = Image.open(tmp_path / "b" / "0000.png").text  # type: ignore[attr-defined]
    assert "trainedAlgorithmicMedia" in made["XML:com.adobe.xmp"]


def test_a_result_that_is_too_large_is_refused_and_the_largest_is_not(painter: Painter, tmp_path: Path) -> None:
    Image.new("RGB", (1025, 8)).save(tmp_path / "wide.png")
    ended = upscale(painter, tmp_path / "wide.png", tmp_path / "a", scale=4)
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert "4 times as large it has 4100x32 pixels" in ended.failure.error.message
    assert upscale(painter, tmp_path / "wide.png", tmp_path / "a", scale=2).outcome is Outcome.SUCCEEDED
    Image.new("RGB", (1024, 1024)).save(tmp_path / "large.png")
    assert upscale(painter, tmp_path / "large.png", tmp_path / "b", scale=4).artifacts[0].width == 4096


def test_other_bytes_than_were_sent_along_are_refused(painter: Painter, photo: Path, tmp_path: Path) -> None:
    name = f"sha256:{'0' * 64}"
    ended = upscale(painter, photo, tmp_path / "a", name)
    assert "the disk gave other bytes" in ended.failure.error.message
    name = f"sha256:{hashlib.sha256(photo.read_bytes()).hexdigest()}"
    assert upscale(painter, photo, tmp_path / "a", name).outcome is Outcome.SUCCEEDED
