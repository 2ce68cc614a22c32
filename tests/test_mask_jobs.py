"""kind: mask, whole: the daemon as people run it, real workers, tiny untrained detectors; killed, and again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Home
from test_cli import imagend

pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
import detectors
from PIL import Image
from test_service import serving, wait_for

FIND = ("--find", "the car", "--find", "a dog", "--mask-threshold", "0.5")


@pytest.fixture
def photo(home: Home) -> Path:
    models = home.root / "models"  # not the repository's, into which nothing is written
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(REPOSITORY / "models" / "diffusers" / "shapes-xl")
    detectors.save(models)
    settings = home.root / "config.yaml"
    settings.write_text(settings.read_text().replace(f"models: {REPOSITORY / 'models'}", f"models: {models}"))
    path = home.root / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
    return path


def manifest(home: Home, id_: str) -> dict[str, Any]:
    folder = home.config.outputs / "alice" / id_
    found: dict[str, Any] = wait_for(
        lambda: json.loads((folder / "manifest.json").read_text()) if folder.exists() else None, home
    )
    return found


def test_a_mask_by_words_is_the_same_after_any_death(home: Home, photo: Path) -> None:
    with serving(home):
        done = imagend("submit", "mask", "--image", photo, *FIND, "--wait", "--json", cwd=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        first = json.loads(done.stdout.splitlines()[-1])["document"]
    assert [(one["file"], one.get("role")) for one in first["artifacts"]] == [
        ("mask.png", None),
        ("overlay.png", "overlay"),
    ]
    assert {one["find"] for one in first["engine"]["found"]} == {"the car", "a dog"}
    assert set(first["timings"]) == {"model_loading", "detecting", "masking", "saving"}
    with serving(home) as daemon:
        done = imagend("submit", "mask", "--image", photo, *FIND, "--label", "again", cwd=home.root)
        id_ = done.stdout.strip()
        wait_for(lambda: was_begun(home, id_), home)
        os.killpg(daemon.pid, signal.SIGKILL)
    with serving(home):
        second = manifest(home, id_)
    assert second["outcome"] == "succeeded"
    for key in ("found", "detectors", "pictures"):
        assert second["engine"][key] == first["engine"][key]
    same = [[one["pixels_sha256"] for one in told["artifacts"]] for told in (first, second)]
    assert same[0] == same[1]
    assert not list((home.config.outputs / ".drafts").rglob("*.png"))
    assert "the car" not in (home.root / "serve.log").read_text()


def was_begun(home: Home, id_: str) -> bool:
    """It may be over already."""
    return any((home.config.spool / state / "alice" / f"{id_}.json").exists() for state in ("active", "done"))


def test_a_mask_is_painted_again_by_its_manifest(home: Home, photo: Path) -> None:
    with serving(home):
        done = imagend("submit", "mask", "--image", photo, *FIND, "--wait", "--json", cwd=home.root)
        id_ = json.loads(done.stdout.splitlines()[-1])["id"]
        again = imagend("replay", id_, "--image", photo, cwd=home.root)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same bit for bit" in again.stdout
