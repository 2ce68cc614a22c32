"""Input pictures from the inbox to the worker: what a job names is found, told to the worker, and never read."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Home, run_until_idle
from fakes import FakeExecutor

from imagend import references
from imagend.daemon.loop import Daemon
from imagend.job import Ref
from imagend.model_settings import ModelSettings


def runs(daemon: Daemon) -> list[dict[str, str]]:
    executor = daemon.executor
    assert isinstance(executor, FakeExecutor)
    return [run.pictures for run in executor.runs]


@pytest.fixture
def front(home: Home) -> Path:
    path = home.config.reference / "leona" / "front.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no picture at all: the daemon does not look")
    return path


def put_on_shelf(daemon: Daemon, home: Home) -> None:
    """What the librarian's thread would have seen."""
    daemon.librarian.library = references.look(home.config.reference)


def test_the_worker_is_told_where_a_reference_picture_is(home: Home, front: Path) -> None:
    daemon = home.daemon()
    put_on_shelf(daemon, home)
    ref, other = home.drop(image="leona/front"), home.drop()
    run_until_idle(daemon)
    assert sorted(runs(daemon), key=len) == [{}, {"leona/front": str(front)}]
    assert home.outcome(ref) == home.outcome(other) == "succeeded"
    assert home.manifest(ref)["spec"]["strength"] == 0.3
    assert home.manifest(other)["spec"]["strength"] is None


def test_a_missing_view_fails_the_job_and_the_message_lists_those_there_are(home: Home, front: Path) -> None:
    daemon = home.daemon()
    put_on_shelf(daemon, home)
    ref = home.drop(image="leona/back")
    run_until_idle(daemon)
    assert home.manifest(ref)["error"]["code"] == "PICTURE_NOT_FOUND"
    assert "Of leona there are: front." in home.manifest(ref)["error"]["message"]
    assert runs(daemon) == []


def test_steps_of_a_preset_and_strength_must_leave_a_step(home: Home, front: Path) -> None:
    daemon = home.daemon(model_settings={"shapes-xl": ModelSettings(preset="lightning")})
    put_on_shelf(daemon, home)
    ref = home.drop(image="leona/front", strength=0.1)
    run_until_idle(daemon)
    assert "strength" in home.manifest(ref)["error"]["message"]
    assert home.manifest(ref)["error"]["code"] == "INVALID_PARAMETERS"


def test_imagend_references_lists_them(home: Home, front: Path) -> None:
    def command(*arguments: str) -> str:
        line = [sys.executable, "-m", "imagend", "references", *arguments]
        return subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=True).stdout

    assert command() == "leona: front\n"
    assert json.loads(command("--json")) == [{"name": "leona", "views": ["front"]}]
    front.unlink()
    assert "put some under" in command()


def test_a_picture_is_upscaled_without_a_model_or_a_seed(home: Home, front: Path) -> None:
    daemon = home.daemon(default_model="none-of-these")
    put_on_shelf(daemon, home)
    ref = home.drop(kind="upscale", image="leona/front", prompt=...)
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["kind"]) == ("succeeded", "upscale")
    assert manifest["spec"] == {"image": "leona/front", "upscaler": "Lanczos", "scale": 2, "metadata": "full"}
    assert "seed" not in manifest["artifacts"][0]
    assert runs(daemon) == [{"leona/front": str(front)}]


def test_a_client_may_be_kept_from_a_kind_and_rights_to_models_do_not_matter_to_it(home: Home, front: Path) -> None:
    daemon = home.daemon(limits=home.config.limits.model_copy(update={"models": (), "kinds": ("upscale",)}))
    put_on_shelf(daemon, home)
    ref = home.drop(kind="upscale", image="leona/front", prompt=...)
    home.drop("b.json")
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert home.reason("b.json")["code"] == "FORBIDDEN"


def test_submit_upscale_as_it_is_typed(home: Home, front: Path) -> None:
    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "imagend", "submit", "upscale", "--image", "leona/front", *options]
        return subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=False)

    daemon = home.daemon()
    put_on_shelf(daemon, home)
    done = submit("--scale", "4")
    assert done.returncode == 0, done.stderr
    run_until_idle(daemon)
    assert home.manifest(Ref("alice", done.stdout.strip()))["spec"]["scale"] == 4
    done = submit("--seed", "4")
    assert done.returncode == 64
    assert "seed: is not a field" in done.stderr


def test_submit_edit_as_it_is_typed(home: Home, front: Path) -> None:
    """Pictures that are files here are sent along, the mask too; the worker is told where both are."""
    (home.root / "mask.png").write_bytes(b"a mask")
    sent = f"sha256:{hashlib.sha256(b'a mask').hexdigest()}"

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "imagend", "submit", "edit", "--prompt", "x", "--image", "leona/front", *options]
        return subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=False)

    daemon = home.daemon()
    put_on_shelf(daemon, home)
    typed = [
        (("--mask", "mask.png", "--mask-blur", "3", "--mask-invert"), {"image": sent, "blur": 3, "invert": True}),
        (("--mask", "leona/front", "--mask-expand", "-2"), {"image": "leona/front", "expand": -2}),
        (("--mask", "1,2,30,40", "--mask", "5,6,7,8"), {"boxes": [[1, 2, 30, 40], [5, 6, 7, 8]]}),
        (("--mask", "whole", "--transparency", "white"), {"whole": True}),
        (
            ("--mask", "the car", "--mask-threshold", "0.5", "--strength", "0.5"),
            {"find": ["the car"], "threshold": 0.5},
        ),
    ]
    for options, expected in typed:
        done = submit(*options)
        assert done.returncode == 0, done.stderr
        run_until_idle(daemon)
        manifest = home.manifest(Ref("alice", done.stdout.strip()))
        assert (manifest["outcome"], manifest["kind"]) == ("succeeded", "edit")
        spec = manifest["spec"]
        assert {name: spec["mask"][name] for name in expected} == expected
        assert (spec["width"], spec["height"], spec["model"]) == (None, None, "shapes-xl")
        assert spec["strength"] == (0.5 if "--strength" in options else 1.0)
    assert runs(daemon)[0].keys() == {"leona/front", sent}
    for options, says in [
        ((), "mask: is missing"),
        (("--mask", "no-such.png"), "mask.image: .* must be ENTITY/VIEW"),
        (("--mask", "whole", "--mask", "the car"), "not find and whole"),
        (("--mask", "whole", "--width", "64"), "an edit has the size of its picture"),
    ]:
        done = submit(*options)
        assert done.returncode == 64
        assert re.search(says, done.stderr)


def test_submit_mask_as_it_is_typed(home: Home, front: Path) -> None:
    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "imagend", "submit", "mask", "--image", "leona/front", *options]
        return subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=False)

    daemon = home.daemon(default_model="none-of-these")
    put_on_shelf(daemon, home)
    typed = [
        (("--find", "the car", "--find", "a dog", "--mask-threshold", "0.3"), {"find": ["the car", "a dog"]}),
        (("--mask", "the car", "--find", "a dog"), {"find": ["the car", "a dog"]}),
        (("--mask", "1,2,30,40", "--mask-expand", "8"), {"boxes": [[1, 2, 30, 40]], "expand": 8}),
    ]
    for options, expected in typed:
        done = submit(*options)
        assert done.returncode == 0, done.stderr
        run_until_idle(daemon)
        manifest = home.manifest(Ref("alice", done.stdout.strip()))
        assert (manifest["outcome"], manifest["kind"]) == ("succeeded", "mask")
        assert {name: manifest["spec"]["mask"][name] for name in expected} == expected
        told = [(one["file"], one.get("role")) for one in manifest["artifacts"]]
        assert told == [("mask.png", None), ("overlay.png", "overlay")]
    for options, says in [
        ((), "mask: is missing"),
        (("--find", "..."), "mask.find.0: must say what to find"),
        (("--find", "x", "--mask", "whole"), "not find and whole"),
        (("--find", "x", "--seed", "4"), "seed: is not a field"),
    ]:
        done = submit(*options)
        assert done.returncode == 64
        assert re.search(says, done.stderr)


def test_submit_preprocess_as_it_is_typed(home: Home, front: Path) -> None:
    daemon = home.daemon(default_model="none-of-these")
    put_on_shelf(daemon, home)
    line = [sys.executable, "-m", "imagend", "submit", "preprocess", "--image", "leona/front", "--type", "canny"]
    done = subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_until_idle(daemon)
    manifest = home.manifest(Ref("alice", done.stdout.strip()))
    assert (manifest["outcome"], manifest["kind"]) == ("succeeded", "preprocess")
    told = {"type": "canny", "image": "leona/front", "width": None, "height": None, "metadata": "full"}
    assert manifest["spec"] == told
    assert runs(daemon) == [{"leona/front": str(front)}]
