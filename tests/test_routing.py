"""Which way an edit goes: as its job, its words and the models there are say it; told in spec and manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until_idle

from imagend import references
from imagend.architecture import Architecture, ModelKind
from imagend.catalog import Entry
from imagend.config import Config
from imagend.control import Control, ControlType
from imagend.daemon.loop import Daemon
from imagend.daemon.routing import routed
from imagend.edit_settings import Edit as Settings
from imagend.edit_spec import Edit
from imagend.mask_field import Mask
from imagend.models import Model
from imagend.router import guides

POSE, DEPTH = ControlType.POSE, ControlType.DEPTH
BOTH = {POSE: "an/openpose", DEPTH: "depth"}
DRESS, REPLACE, SIT, RED = "put a hat on her", "replace the cup with a vase", "let her sit down", "make it red"


def edit(prompt: str, **fields: Any) -> Edit:
    return Edit(prompt=prompt, image="leona/front", mask=Mask(whole=True), **fields)


def added(spec: Edit) -> list[tuple[ControlType | None, str | None]]:
    assert all((one.image, one.preprocess) == ("leona/front", True) for one in spec.control)
    return [(one.type, one.model) for one in spec.control]


@pytest.mark.parametrize(
    ("prompt", "fields", "able", "path", "controls"),
    [
        (RED, {}, BOTH, "simple", []),
        (DRESS, {}, BOTH, "complex", [(POSE, "an/openpose")]),
        (REPLACE, {}, BOTH, "complex", [(DEPTH, "depth")]),
        (SIT, {}, BOTH, "complex", []),
        (DRESS, {"path": "simple"}, BOTH, "simple", []),
        (RED, {"path": "complex"}, BOTH, "complex", [(POSE, "an/openpose"), (DEPTH, "depth")]),
        (RED, {"path": "complex"}, {DEPTH: "depth"}, "complex", [(DEPTH, "depth")]),
        (RED, {"path": "complex"}, {}, "complex", [(POSE, None), (DEPTH, None)]),
        (DRESS, {}, {DEPTH: "depth"}, "simple", []),
        (RED, {"guide": ("depth",)}, BOTH, "complex", [(DEPTH, "depth")]),
        (RED, {"guide": ("depth",)}, {}, "complex", [(DEPTH, None)]),
        (DRESS, {"guide": ()}, BOTH, "complex", []),
    ],
)
def test_it_is_guided_by_what_stays_as_far_as_there_are_models(
    prompt: str, fields: dict[str, Any], able: dict[ControlType, str], path: str, controls: list[Any]
) -> None:
    """What a job asks for by name and is not there is left to the worker, which says what to fetch."""
    spec, route = routed(edit(prompt, **fields), Config(), able)
    assert (route.path, spec.path, added(spec)) == (path, path, controls)
    again, once_more = routed(spec, Config(), {})
    assert again == spec
    assert once_more.reason == "the job says so"


def test_why_it_is_not_guided_is_told() -> None:
    _, route = routed(edit(DRESS), Config(), {})
    lacking = "for pose there is no ControlNet with a preprocessor here"
    assert route.reason == f"it dresses somebody (put a hat on); but {lacking}"


def test_what_the_job_names_stays_alone() -> None:
    own = Control(type=DEPTH, image="leona/depth")
    spec, route = routed(edit(DRESS, control=(own,)), Config(), BOTH)
    assert (spec.control, route.path, route.reason) == ((own,), "complex", "it names ControlNets")
    spec, _ = routed(edit(DRESS, control=(own,), guide=("pose",)), Config(), BOTH)
    assert [one.type for one in spec.control] == [DEPTH, POSE]


def test_references_go_with_what_the_words_leave() -> None:
    reference = {"references": ({"image": "clothes/hat"},)}
    spec, route = routed(Edit.model_validate(edit(DRESS).model_dump() | reference), Config(), BOTH)
    assert (added(spec), route.reason) == ([(POSE, "an/openpose")], "it names reference pictures")
    spec, route = routed(Edit.model_validate(edit(DRESS).model_dump() | reference), Config(), {})
    assert (added(spec), route.path) == ([], "complex")


def test_rules_of_config_yaml_count() -> None:
    config = Config(edit=Settings(complex=("make|paint * red",)))
    spec, route = routed(edit(RED), config, BOTH)
    assert (added(spec), route.reason) == ([*BOTH.items()], "a rule of config.yaml (make it red)")
    assert guides(RED, config.edit.rules) == (POSE, DEPTH)


def put_into_catalogue(daemon: Daemon, *models: tuple[ModelKind, str, str, int]) -> None:
    catalog = daemon.librarian.catalog
    entries = dict(catalog.entries)
    for kind, name, form, width in models:
        judged = Architecture(kind, form, cross_attention_dim=width)
        entries[kind, name] = Entry(Model(kind, name, Path("/nowhere"), 0, judged, is_file=False, version=()))
    daemon.librarian.catalog = replace(catalog, entries=entries)


def shelved(home: Home, *models: tuple[ModelKind, str, str, int]) -> Daemon:
    """A daemon that knows a picture, and these models beside its own."""
    front = home.config.reference / "leona" / "front.png"
    front.parent.mkdir(parents=True)
    front.touch()
    daemon = home.daemon()
    daemon.librarian.library = references.look(home.config.reference)
    put_into_catalogue(daemon, *models)
    return daemon


def test_the_manifest_says_which_way_and_the_spec_how(home: Home) -> None:
    daemon = shelved(home)
    base = daemon.librarian.find("shapes-xl")
    width = base.architecture.cross_attention_dim
    put_into_catalogue(
        daemon,
        (ModelKind.CONTROLNET, "small-pose", "diffusers", width),
        (ModelKind.CONTROLNET, "large-pose", "diffusers", 2048),
        (ModelKind.CONTROLNET, "depth-a", "diffusers", width),
        (ModelKind.CONTROLNET, "depth-b", "diffusers", width),
        (ModelKind.PREPROCESSOR, "people", "pose", 0),
        (ModelKind.PREPROCESSOR, "distance", "depth", 0),
    )
    assert daemon.librarian.guides(base) == {POSE: "small-pose"}
    asked = {"kind": "edit", "image": "leona/front", "mask": {"whole": True}}
    dressed, red = home.drop(**asked, prompt=DRESS), home.drop("b.json", **asked, prompt=RED)
    other = home.drop("c.json")
    run_until_idle(daemon)
    manifest = home.manifest(dressed)
    assert manifest["route"] == {"path": "complex", "reason": "it dresses somebody (put a hat on)", "confidence": 0.9}
    assert manifest["spec"]["path"] == "complex"
    (control,) = manifest["spec"]["control"]
    assert (control["model"], control["image"], control["preprocess"]) == ("small-pose", "leona/front", True)
    assert home.manifest(red)["route"]["path"] == home.manifest(red)["spec"]["path"] == "simple"
    assert "route" not in home.manifest(other)


CLIP = (ModelKind.CLIP, "clip", "CLIPModel", 0)
GUIDE = ((ModelKind.CONTROLNET, "depth-a", "diffusers", 0), (ModelKind.PREPROCESSOR, "distance", "depth", 0))


@pytest.mark.parametrize(
    ("models", "prompt", "path", "reason"),
    [
        ((CLIP, *GUIDE), "una silla", "complex", "CLIP"),
        ((CLIP, *GUIDE), "mejor", "simple", "CLIP"),
        ((CLIP, *GUIDE), RED, "simple", "it changes a colour (red)"),
        ((CLIP,), "una silla", "simple", "no rule says more"),
        (GUIDE, "una silla", "simple", "no rule says more"),
    ],
)
def test_where_no_rule_says_anything_a_clip_may(
    home: Home, models: tuple[Any, ...], prompt: str, path: str, reason: str
) -> None:
    daemon = shelved(home, *models)
    ref = home.drop(kind="edit", image="leona/front", mask={"whole": True}, prompt=prompt)
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert (manifest["route"]["path"], manifest["route"]["reason"]) == (path, reason)
    assert manifest["spec"]["path"] == path
    assert [one["model"] for one in manifest["spec"]["control"]] == (["depth-a"] if path == "complex" else [])


def test_a_job_that_says_its_path_needs_no_opinion(home: Home) -> None:
    daemon = shelved(home, CLIP, *GUIDE)
    home.drop(kind="edit", image="leona/front", mask={"whole": True}, prompt="una silla", path="simple")
    run_until_idle(daemon)
    (run,) = daemon.executor.runs  # type: ignore[attr-defined]
    assert run.otherwise is None
