"""kind: mask: the mask that an edit would paint in, as a PNG, and laid over its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest
from engine_conftest import REF, Painter
from PIL import Image

from imagend.job import Outcome
from imagend.mask_field import Mask
from imagend.mask_spec import MakeMask
from imagend.messages import Progress, Run
from imagend.worker import masks
from imagend.worker.overlay import overlay

NAME = "leona/front"
NOISE = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    """A worker with detectors."""
    root = tmp_path_factory.mktemp("models")
    detectors.save(root)
    return Painter(root)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(NOISE).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def make(by: Painter, folder: Path, field: dict[str, Any], **pictures: Path) -> Any:
    """The worker's Ended."""
    by.said = []
    fields = {"image": NAME, "mask": field}
    spec = MakeMask.model_validate_json(json.dumps(fields)).model_dump(mode="json")
    folder.mkdir(exist_ok=True)
    places = {f"leona/{name}": str(path) for name, path in pictures.items()}
    run = Run(job=REF, kind="mask", spec=spec, folder=str(folder), pictures=places)
    return by.worker.attempt(run, by.worker.expect(run))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_boxes_make_the_mask_that_an_edit_paints_in(painter: Painter, photo: Path, tmp_path: Path) -> None:
    field = {"boxes": [[8, 8, 24, 24], [40, 4, 60, 20]], "expand": 3, "blur": 9}
    ended = make(painter, tmp_path / "a", field, front=photo)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    told = [(one.file, one.role, one.index, one.width, one.height, one.seed) for one in ended.artifacts]
    assert told == [("mask.png", None, 0, 64, 48, None), ("overlay.png", "overlay", 1, 64, 48, None)]
    expected = masks.combine((64, 48), Mask.model_validate_json(json.dumps(field)))
    assert (pixels(tmp_path / "a" / "mask.png") == np.asarray(expected)).all()
    laid = overlay(Image.fromarray(NOISE), expected, [((8, 8, 24, 24), ""), ((40, 4, 60, 20), "")])
    assert (pixels(tmp_path / "a" / "overlay.png") == np.asarray(laid)).all()
    assert not {"found", "detectors"} & ended.engine.keys()
    again = make(painter, tmp_path / "b", field, front=photo)
    assert [one.pixels_sha256 for one in again.artifacts] == [one.pixels_sha256 for one in ended.artifacts]


def test_an_overlay_changes_nothing_outside_the_mask(photo: Path) -> None:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (10, 10, 20, 20))
    laid = np.asarray(overlay(Image.fromarray(NOISE), mask, []))
    inside = np.asarray(mask) > 0
    assert (laid[~inside] == NOISE[~inside]).all()
    red = np.array([255, 0, 0])
    assert (abs(laid[inside].astype(int) - (NOISE[inside].astype(int) + red) / 2) <= 1).all()


def test_a_picture_makes_it_too_and_its_size_is_checked(painter: Painter, photo: Path, tmp_path: Path) -> None:
    given = Image.new("L", (64, 48))
    given.paste(255, (10, 10, 20, 20))
    given.save(tmp_path / "given.png")
    ended = make(painter, tmp_path / "a", {"image": "leona/mask", "blur": 0}, front=photo, mask=tmp_path / "given.png")
    assert (pixels(tmp_path / "a" / "mask.png") == np.asarray(given)).all()
    assert [one["name"] for one in ended.engine["pictures"]] == ["leona/front", "leona/mask"]
    given.resize((32, 32)).save(tmp_path / "given.png")
    ended = make(painter, tmp_path / "b", {"image": "leona/mask"}, front=photo, mask=tmp_path / "given.png")
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert "32x32" in ended.failure.error.message


def test_words_make_it_and_what_was_found_is_told(finder: Painter, photo: Path, tmp_path: Path) -> None:
    field = {"find": ["the car", "a dog"], "threshold": 0.5, "blur": 5, "invert": True}
    ended = make(finder, tmp_path / "a", field, front=photo)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    found = finder.pipelines.detectors.find(
        Image.fromarray(NOISE), ("the car", "a dog"), 0.5, 0.25, finder.worker.expect(run_of(tmp_path))
    )
    assert ended.engine["found"] == found.describe()
    assert {one["find"] for one in ended.engine["found"]} == {"the car", "a dog"}
    assert [one["name"] for one in ended.engine["detectors"]] == ["boxes", "masks"]
    expected = masks.combine((64, 48), Mask.model_validate_json(json.dumps(field)), found.mask)
    assert (pixels(tmp_path / "a" / "mask.png") == np.asarray(expected)).all()
    labels = [f"{text} {score:.2f}" for text, score in zip(found.texts, found.scores, strict=True)]
    laid = overlay(Image.fromarray(NOISE), expected, list(zip(found.boxes, labels, strict=True)))
    assert (pixels(tmp_path / "a" / "overlay.png") == np.asarray(laid)).all()
    assert finder.pipelines.switch.pipe is None


def run_of(folder: Path) -> Run:
    return Run(job=REF, kind="mask", spec={}, folder=str(folder))


def test_what_is_not_found_fails_with_what_was_tried(finder: Painter, photo: Path, tmp_path: Path) -> None:
    ended = make(finder, tmp_path / "a", {"find": "the car", "threshold": 1.0}, front=photo)
    assert ended.failure.error.code == "NOTHING_FOUND"
    assert "'the car' (best score " in ended.failure.error.message
    assert list((tmp_path / "a").iterdir()) == []


def test_without_detectors_it_says_what_to_fetch(tmp_path: Path, photo: Path) -> None:
    ended = make(Painter(tmp_path), tmp_path / "a", {"find": "the car"}, front=photo)
    assert ended.failure.error.code == "MODEL_NOT_FOUND"
    assert "imagend fetch https://huggingface.co/IDEA-Research/grounding-dino-tiny" in ended.failure.error.message


def test_its_words_are_cancel_points(finder: Painter, photo: Path, tmp_path: Path) -> None:
    make(finder, tmp_path / "a", {"find": "the car", "threshold": 0.1}, front=photo)
    stages = [one.stage for one in finder.said if isinstance(one, Progress)]
    for count in range(1, len(stages)):
        told: list[object] = []

        def hear(message: object, told: list[object] = told, count: int = count) -> None:
            told.append(message)
            if len(told) == count:
                finder.worker.stop()

        finder.hear = hear
        ended = make(finder, tmp_path / str(count), {"find": "the car", "threshold": 0.1}, front=photo)
        finder.hear = None
        assert ended.outcome is Outcome.CANCELLED
        assert list((tmp_path / str(count)).iterdir()) == []
    assert stages == ["masking", "detecting", "detecting", "detecting", "masking"]


def test_it_says_how_it_was_made(painter: Painter, photo: Path, tmp_path: Path) -> None:
    make(painter, tmp_path / "a", {"whole": True}, front=photo)
    for name in ("mask.png", "overlay.png"):
        with Image.open(tmp_path / "a" / name) as image:
            assert json.loads(image.text["imagend"])["spec"]["mask"]["whole"]  # type: ignore[attr-defined]
            assert "algorithmicallyEnhanced" in image.text["XML:com.adobe.xmp"]  # type: ignore[attr-defined]
