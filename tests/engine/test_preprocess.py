"""kind: preprocess: the control picture that a generate job would make, as a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from engine_conftest import REF, Painter
from PIL import Image, ImageOps

from imagend.control import Preprocess
from imagend.job import Outcome
from imagend.messages import Progress, Run

NAME = "leona/front"
NOISE = np.random.default_rng(1).integers(0, 255, (90, 200, 3), np.uint8)


def preprocess(painter: Painter, path: Path, folder: Path, **fields: Any) -> Any:
    """The worker's Ended."""
    painter.said = []
    asked = Preprocess.model_validate_json(json.dumps({"type": "canny", "image": NAME} | fields))
    folder.mkdir(exist_ok=True)
    run = Run(
        job=REF, kind="preprocess", spec=asked.model_dump(mode="json"), folder=str(folder), pictures={NAME: str(path)}
    )
    return painter.worker.attempt(run, painter.worker.expect(run))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(NOISE).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_edges_are_opencvs_at_the_pictures_own_size(painter: Painter, photo: Path, tmp_path: Path) -> None:
    ended = preprocess(painter, photo, tmp_path / "a")
    (artifact,) = ended.artifacts
    assert (pixels(tmp_path / "a" / "0000.png") == cv2.Canny(NOISE, 100, 200)[..., None]).all()
    assert (artifact.width, artifact.height, artifact.seed) == (200, 90, None)
    assert ended.engine["preprocessors"] == [{"type": "canny", "name": "opencv", "version": cv2.__version__}]
    assert "opencv-python-headless" in ended.engine["versions"]


def test_it_shows_what_a_job_of_that_size_shows_its_controlnet(painter: Painter, photo: Path, tmp_path: Path) -> None:
    preprocess(painter, photo, tmp_path / "a", width=96, height=128)
    fitted = ImageOps.fit(Image.fromarray(NOISE), (96, 128), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(fitted), 100, 200)
    assert (pixels(tmp_path / "a" / "0000.png") == edges[..., None]).all()
    job = {"prompt": "a circle", "num_inference_steps": 3, "seed": 1, "width": 96, "height": 128}
    control = {"type": "canny", "model": "shapes-xl-mask", "image": NAME, "control_strength": 1.0}
    made = painter.run(tmp_path / "b", {NAME: photo}, **job, control=[control | {"preprocess": True}])
    given = painter.run(tmp_path / "c", {NAME: tmp_path / "a" / "0000.png"}, **job, control=[control])
    assert made.artifacts[0].pixels_sha256 == given.artifacts[0].pixels_sha256


def test_no_model_is_loaded_for_it_and_its_words_are_cancel_points(photo: Path, tmp_path: Path) -> None:
    painter = Painter()
    preprocess(painter, photo, tmp_path / "a")
    assert painter.pipelines.switch.pipe is None
    told = [(one.stage, one.step, one.steps) for one in painter.said if isinstance(one, Progress)]
    assert told == [("preprocessing", 0, 1), ("preprocessing", 1, 1)]
    painter.hear = lambda message: painter.worker.stop()
    assert preprocess(painter, photo, tmp_path / "b").outcome is Outcome.CANCELLED
    assert list((tmp_path / "b").iterdir()) == []


def test_it_says_how_it_was_made_unless_it_is_not_to(painter: Painter, photo: Path, tmp_path: Path) -> None:
    for metadata, keys in (("full", {"imagend", "XML:com.adobe.xmp"}), ("none", {"XML:com.adobe.xmp"})):
        preprocess(painter, photo, tmp_path / metadata, metadata=metadata)
        with Image.open(tmp_path / metadata / "0000.png") as image:
            assert set(image.text) == keys  # type: ignore[attr-defined]
            assert "algorithmicallyEnhanced" in image.text["XML:com.adobe.xmp"]  # type: ignore[attr-defined]


def test_without_a_model_for_it_the_job_says_what_to_get(painter: Painter, photo: Path, tmp_path: Path) -> None:
    ended = preprocess(painter, photo, tmp_path / "a", type="pose")
    assert ended.failure.error.code == "MODEL_NOT_FOUND"
    assert "imagend fetch https://huggingface.co/usyd-community/vitpose" in ended.failure.error.message


def test_a_picture_that_is_none_fails_the_job(painter: Painter, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    ended = preprocess(painter, tmp_path / "photo.png", tmp_path / "a")
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert NAME in ended.failure.error.message
