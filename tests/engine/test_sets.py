"""Sets: each picture is that of the plain job it stands for, whatever fails or stops beside it. And contact sheets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_conftest import REF, Painter
from PIL import Image

from imagend.errors import UnsupportedSetting
from imagend.job import Outcome
from imagend.messages import Progress
from imagend.worker import contact_sheet, images, paint

TEMPLATE = "a large {colour} {shape} on a {ground} background"
QUICK = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
ITEMS = [
    {"name": "red-circle", "values": {"colour": "red", "shape": "circle", "ground": "blue"}},
    {"name": "green-star", "values": {"colour": "(green)1.4", "shape": "star", "ground": "{grey}"}, "seed": 99},
    {"name": "blue_square", "values": {"colour": "blue", "shape": "square", "ground": "white"}},
]
PROMPTS = {item["name"]: TEMPLATE.format(**item["values"]) for item in ITEMS}
TOO_LONG = {"name": "long", "values": {"colour": "red " * 990, "shape": "very " * 790, "ground": "big " * 990}}
SET = QUICK | {"prompt": TEMPLATE, "items": ITEMS, "seed": 7}
SHEET = "contact.png"


def of(ended: Any) -> dict[str, Any]:
    return {artifact.file: artifact for artifact in ended.artifacts}


def test_each_picture_is_that_of_the_plain_job_bit_for_bit(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path / "set", **SET, count=2)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    made = of(ended)
    assert list(made) == [f"{item['name']}-000{i}.png" for item in ITEMS for i in range(2)] + [SHEET]
    for item in ITEMS:
        seed = item.get("seed", 7)
        plain = painter.run(tmp_path / item["name"], **QUICK, prompt=PROMPTS[item["name"]], seed=seed, count=2)
        for i, alone in enumerate(plain.artifacts):
            one = made[f"{item['name']}-000{i}.png"]
            assert (one.pixels_sha256, one.seed, one.item) == (alone.pixels_sha256, seed + i, item["name"])
            shown = Image.open(tmp_path / "set" / one.file).text  # type: ignore[attr-defined]
            assert shown["parameters"].splitlines()[0] == PROMPTS[item["name"]]
            assert json.loads(shown["imagend"])["spec"]["prompt"] == PROMPTS[item["name"]]
    assert len({artifact.pixels_sha256 for artifact in ended.artifacts}) == 7


def test_of_one_picture_each_files_have_the_names_of_items(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **SET | {"items": [{"name": "a.b"}, {"name": "C_d"}], "prompt": "the word {name}"})
    assert list(of(ended)) == ["a.b.png", "C_d.png", SHEET]
    assert of(ended)[SHEET].role == "contact_sheet"
    assert [of(ended)[SHEET].seed, of(ended)[SHEET].item, of(ended)["a.b.png"].role] == [None, None, None]


def test_a_set_of_which_an_item_fails_is_partial_and_the_others_are_whole(painter: Painter, tmp_path: Path) -> None:
    whole = painter.run(tmp_path / "whole", **SET)
    ended = painter.run(tmp_path / "some", **SET | {"items": [ITEMS[0], TOO_LONG, *ITEMS[1:]]})
    assert ended.outcome is Outcome.PARTIAL
    assert ["4096" in error.message for item, error in ended.failed.items() if item == "long"] == [True]
    made = of(ended)
    assert list(made) == ["red-circle.png", "green-star.png", "blue_square.png", SHEET]
    for file in list(made)[:-1]:
        assert made[file].pixels_sha256 == of(whole)[file].pixels_sha256
    sheet = np.asarray(Image.open(tmp_path / "some" / SHEET))
    place = sheet[8 : 8 + 160, 8 + 168 : 8 + 168 + 160]  # the second of two in a row
    assert (place == 0xD9).all()


def test_a_set_of_which_all_fail_has_failed(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, **SET | {"items": [TOO_LONG, TOO_LONG | {"name": "longer"}]})
    assert ended.outcome is Outcome.FAILED
    assert ("4096" in ended.failure.error.message, list(ended.failed)) == (True, ["long", "longer"])
    assert ended.artifacts == ()


def test_an_embedding_that_is_not_there_fails_the_item_that_names_it(painter: Painter, tmp_path: Path) -> None:
    missing = {"name": "missing", "values": {"colour": "embedding:nowhere", "shape": "a", "ground": "b"}}
    ended = painter.run(tmp_path, **SET | {"items": [missing, ITEMS[0]]})
    assert (ended.outcome, {item: error.code for item, error in ended.failed.items()}) == (
        Outcome.PARTIAL,
        {"missing": "MODEL_NOT_FOUND"},
    )


def test_an_interrupted_set_paints_only_what_is_missing(painter: Painter, tmp_path: Path) -> None:
    def interrupt(message: Any) -> None:
        if isinstance(message, Progress) and message.picture == 2 and message.stage == "painting":
            painter.worker.cancel(REF)

    undisturbed = painter.run(tmp_path / "whole", **SET)
    painter.hear = interrupt
    assert painter.run(tmp_path / "some", **SET).outcome is Outcome.CANCELLED
    painter.hear = None
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "some").glob("*.png")}
    assert set(before) == {"red-circle.png", "green-star.png"}
    ended = painter.run(tmp_path / "some", **SET)
    assert {one.picture for one in painter.said if isinstance(one, Progress) and one.stage == "painting"} == {2}
    assert {name: (tmp_path / "some" / name).stat().st_mtime_ns for name in before} == before
    assert [one.pixels_sha256 for one in ended.artifacts] == [one.pixels_sha256 for one in undisturbed.artifacts]
    assert of(ended)[SHEET].sha256 == of(undisturbed)[SHEET].sha256


def test_a_picture_to_begin_with_is_shared(painter: Painter, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "front.png")
    begin = {"image": "leona/front", "strength": 0.5, "num_inference_steps": 4}
    pictures = {"leona/front": tmp_path / "front.png"}
    ended = painter.run(tmp_path / "set", pictures, **SET | begin)
    alone = painter.run(tmp_path / "one", pictures, **QUICK | begin, prompt=PROMPTS["green-star"], seed=99)
    assert of(ended)["green-star.png"].pixels_sha256 == alone.artifacts[0].pixels_sha256


def test_affixes_of_an_image_type_are_no_template(painter: Painter) -> None:
    from imagend.config import Config
    from imagend.daemon.recipe import complete
    from imagend.generate_spec import Generate
    from imagend.model_settings import ImageType

    preset = ImageType(width=64, height=64, prompt_prefix="{x} ", prompt_suffix=" {", negative_prompt="}")
    asked = Generate.model_validate_json(json.dumps(SET | {"image_type": "odd"}))
    config = Config(image_types={"odd": preset})
    spec = complete(asked, REF, config, painter.models.find("shapes-xl"))
    part = spec.parts["red-circle"]
    assert (part.prompt, part.negative_prompt) == (f"{{x}} {PROMPTS['red-circle']} {{", "}")
    again = complete(spec, REF, config, painter.models.find("shapes-xl"))
    assert again == spec  # a manifest's spec is a job


def colours(count: int, folder: Path) -> list[tuple[str, Path | None]]:
    places: list[tuple[str, Path | None]] = []
    for number in range(count):
        path = folder / f"{number}.png"
        shape = ((320, 160), (100, 400), (64, 64))[number % 3]
        Image.linear_gradient("L").resize(shape).convert("RGB").point(lambda value, n=number: value * n % 256).save(
            path
        )
        places.append((f"item-{number}" * (1 + number * 5 % 17), path))
    return places


def test_a_contact_sheet_is_drawn_as_it_was(tmp_path: Path) -> None:
    """The golden picture was looked at: to see another one, remove it and run this."""
    golden = Path(__file__).with_name("contact_sheet.png")
    places = [*colours(6, tmp_path), ("broken: PROMPT_TOO_LONG", None)]
    images.save_png(contact_sheet.draw(places), tmp_path / SHEET, images.mark(made_by_ai=True, item=None))
    if not golden.exists():
        golden.write_bytes((tmp_path / SHEET).read_bytes())
        pytest.fail("it was drawn anew: look at it")
    assert (np.asarray(Image.open(tmp_path / SHEET)) == np.asarray(Image.open(golden))).all()
    assert "trainedAlgorithmicMedia" in Image.open(golden).text["XML:com.adobe.xmp"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "size"), [(1, (272, 294)), (2, (536, 294)), (5, (800, 580)), (64, (2120, 2296))])
def test_a_contact_sheet_is_bounded(tmp_path: Path, count: int, size: tuple[int, int]) -> None:
    assert contact_sheet.draw(colours(count, tmp_path)).size == size


def test_of_an_item_that_fails_at_its_second_picture_none_is_shown(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = paint.decode, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise UnsupportedSetting("no")
        return decode(*arguments)

    monkeypatch.setattr(paint, "decode", failing)
    ended = painter.run(tmp_path, **SET, count=2)
    assert (ended.outcome, list(ended.failed)) == (Outcome.PARTIAL, ["green-star"])
    assert [one.item for one in ended.artifacts] == ["red-circle"] * 2 + ["blue_square"] * 2 + [None]
    assert len(calls) == 6
