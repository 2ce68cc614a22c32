"""The safety filter on real pictures: a classifier that calls unsafe what is red, and says how red it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import classifiers
import numpy as np
import pytest
import torch
from engine_conftest import EMBEDDED, REF, Painter
from PIL import Image

from imagend.config import Config
from imagend.daemon.recipe import complete
from imagend.generate_spec import Generate
from imagend.job import Outcome
from imagend.manifest import Verdict
from imagend.messages import Made, Progress, Run
from imagend.safety_settings import Classifier, Filter

RED, BLUE = "a large red circle on a red background", "a large blue circle on a blue background"
QUICK = {"num_inference_steps": 6, "guidance_scale": 5.0}
ITEMS = [{"name": "red", "seed": 7, "values": {"c": "red"}}, {"name": "blue", "seed": 7, "values": {"c": "blue"}}]
SET = QUICK | {"prompt": "a large {c} circle on a {c} background", "items": ITEMS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    classifiers.save(root / "safety" / "redness", at=0.3)
    return root


@pytest.fixture(scope="module")
def guarded(place: Path) -> Painter:
    return Painter(place)


def paint(painter: Painter, folder: Path, mode: str | None, classifier: Classifier | None = None, **fields: Any) -> Any:
    painter.said = []
    asked = Generate.model_validate_json(json.dumps(QUICK | fields))
    spec = complete(asked, REF, Config(), painter.models.find("shapes-xl"))
    folder.mkdir(parents=True, exist_ok=True)
    filter_ = Filter(mode=mode, classifier=classifier or Classifier()) if mode else None  # type: ignore[arg-type]
    run = Run(job=REF, kind="generate", spec=spec.model_dump(mode="json"), folder=str(folder), safety=filter_)
    return painter.worker.attempt(run, painter.worker.expect(run))


def shown(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.fixture(scope="module")
def plain(guarded: Painter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pixels of both pictures where nobody looks."""
    pixels = {}
    for prompt in (RED, BLUE):
        ended = paint(guarded, tmp_path_factory.mktemp("plain"), None, prompt=prompt, seed=7)
        assert (ended.safety, ended.artifacts[0].safety) == (None, None)
        pixels[prompt] = ended.artifacts[0].pixels_sha256
    return pixels


@pytest.mark.parametrize(("prompt", "unsafe"), [(RED, True), (BLUE, False)])
def test_a_flagged_picture_is_marked_and_has_the_same_pixels(
    guarded: Painter, plain: dict[str, str], tmp_path: Path, prompt: str, unsafe: bool
) -> None:
    ended = paint(guarded, tmp_path, "flag", prompt=prompt, seed=7)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    (artifact,) = ended.artifacts
    assert artifact.pixels_sha256 == plain[prompt]
    assert (artifact.safety.label, artifact.safety.unsafe) == ("nsfw", unsafe)
    assert (ended.safety.mode, ended.safety.classifier, ended.safety.withheld) == ("flag", "redness", ())


def test_the_verdict_is_that_of_a_plain_transformers_call(guarded: Painter, place: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    ended = paint(guarded, tmp_path, "flag", prompt=RED, seed=7)
    image = Image.open(tmp_path / "0000.png").convert("RGB")
    network = ViTForImageClassification.from_pretrained(place / "safety" / "redness").eval()
    pixels = ViTImageProcessorPil.from_pretrained(place / "safety" / "redness")(images=image, return_tensors="pt")
    with torch.no_grad():
        score = float(network(**pixels).logits[0].softmax(-1)[1])
    assert ended.artifacts[0].safety == Verdict(label="nsfw", score=round(score, 4), unsafe=True)
    red = np.asarray(image)[..., 0].mean() / 255
    assert red > 0.5


def test_a_withheld_picture_is_nowhere_and_the_others_are_shown(guarded: Painter, tmp_path: Path) -> None:
    """Of two seeds at least; the threshold lies between what the classifier says of them."""
    ended = paint(guarded, tmp_path / "flag", "flag", prompt="a small red circle on a white background", seeds=[1, 2])
    scores = [artifact.safety.score for artifact in ended.artifacts]
    assert scores[0] != scores[1]
    between = Classifier(threshold=sum(scores) / 2)
    unsafe = scores.index(max(scores))
    folder = tmp_path / "block"
    again = paint(guarded, folder, "block", between, prompt="a small red circle on a white background", seeds=[1, 2])
    assert again.outcome is Outcome.PARTIAL
    assert [artifact.index for artifact in again.artifacts] == [1 - unsafe]
    assert again.artifacts[0].pixels_sha256 == ended.artifacts[1 - unsafe].pixels_sha256
    (withheld,) = again.safety.withheld
    assert (withheld.index, withheld.seed, withheld.score) == (unsafe, [1, 2][unsafe], max(scores))
    assert shown(folder) == [f"000{1 - unsafe}.png"]


def test_a_job_of_which_all_is_withheld_has_failed(guarded: Painter, tmp_path: Path) -> None:
    ended = paint(guarded, tmp_path, "block", prompt=RED, seed=7)
    assert (ended.outcome, ended.failure.error.code) == (Outcome.FAILED, "WITHHELD")
    assert "picture 0: nsfw, " in ended.failure.error.message
    assert shown(tmp_path) == []


def test_a_withheld_picture_is_not_painted_again_by_another_attempt(guarded: Painter, tmp_path: Path) -> None:
    first = paint(guarded, tmp_path, "block", prompt=RED, seed=7)
    again = paint(guarded, tmp_path, "block", prompt=RED, seed=7)
    assert again.failure == first.failure
    assert not [word for word in guarded.said if isinstance(word, Progress) and word.stage == "painting"]


@pytest.mark.parametrize("before", [None, "flag"])
def test_what_was_painted_before_the_filter_is_not_shown(guarded: Painter, tmp_path: Path, before: str | None) -> None:
    paint(guarded, tmp_path, before, prompt=RED, seed=7)
    ended = paint(guarded, tmp_path, "block", prompt=RED, seed=7)
    assert (ended.outcome, ended.artifacts) == (Outcome.FAILED, ())


def test_an_item_of_a_set_fails_whose_picture_is_withheld(guarded: Painter, tmp_path: Path) -> None:
    ended = paint(guarded, tmp_path, "block", **SET)
    assert ended.outcome is Outcome.PARTIAL
    assert [one.file for one in ended.artifacts] == ["blue.png", "contact.png"]
    assert {name: error.code for name, error in ended.failed.items()} == {"red": "WITHHELD"}
    assert [(one.index, one.item) for one in ended.safety.withheld] == [(0, "red")]
    assert shown(tmp_path) == ["blue.png", "contact.png"]


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_chain_lacks_in_both_steps_what_is_withheld_in_one(
    guarded: Painter, tmp_path: Path, strength: float | None
) -> None:
    chain = {"chain": {"upscale": {"strength": strength}}}
    small = {"prompt": "a small red circle on a white background", "seeds": [1, 2]}
    flagged = paint(guarded, tmp_path / "flag", "flag", **chain, **small)
    assert (flagged.artifacts[2].safety is None) == (strength is None)  # what is only enlarged was looked at before
    both = [[one.safety.score for one in flagged.artifacts if one.safety and one.index == index] for index in (0, 1)]
    scores = list(map(max, both))
    unsafe, between = scores.index(max(scores)), Classifier(threshold=sum(scores) / 2)
    ended = paint(guarded, tmp_path / "block", "block", between, **chain, **small)
    assert ended.outcome is Outcome.PARTIAL, ended.failure
    assert unsafe not in {one.index for one in ended.artifacts}
    assert [one.file.partition("/")[0] for one in ended.artifacts] == ["generate", "upscale"]
    made = next(word for word in guarded.said if isinstance(word, Made))
    assert made.withheld == ((unsafe,) if both[unsafe][0] >= between.threshold else ())
    again = paint(guarded, tmp_path / "none", "block", Classifier(threshold=0.001), **chain, **small)
    assert (again.outcome, again.failure.error.code) == (Outcome.FAILED, "WITHHELD")
    assert shown(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("classifier", "words"),
    [
        (Classifier(model="other"), "other"),
        (Classifier(labels=("gore",)), "has none of the labels gore; it has normal, nsfw"),
    ],
)
def test_nothing_is_painted_that_nobody_can_look_at(
    guarded: Painter, tmp_path: Path, classifier: Classifier, words: str
) -> None:
    ended = paint(guarded, tmp_path, "flag", classifier, prompt=BLUE, seed=7)
    assert ended.outcome is Outcome.FAILED
    assert words in ended.failure.error.message
    assert shown(tmp_path) == []


def test_without_a_classifier_jobs_fail_and_say_what_to_fetch(painter: Painter, tmp_path: Path) -> None:
    ended = paint(painter, tmp_path, "block", prompt=BLUE, seed=7)
    assert (ended.outcome, ended.failure.error.code) == (Outcome.FAILED, "SAFETY_FILTER_MISSING")
    assert "imagend fetch https://huggingface.co/Falconsai/nsfw_image_detection" in ended.failure.error.message


def test_a_classifier_that_gives_no_numbers_lets_nothing_through(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    weights = classifiers.save(root / "safety" / "redness") / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"classifier.bias": torch.full((2,), float("nan"))}, weights, metadata={"format": "pt"})
    ended = paint(Painter(root), tmp_path / "draft", "flag", prompt=BLUE, seed=7)
    assert (ended.outcome, ended.failure.error.code) == (Outcome.FAILED, "MODEL_UNUSABLE")
    assert shown(tmp_path / "draft") == []
