"""Jobs of kind train through the service as people run it: told, stopped, killed, gone on; and who may."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home
from test_cli import imagend
from test_service import log, serving, wait_for, worker

pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
from datasets import circles

from imagend import config as configuration

TRAIN: dict[str, Any] = {
    "kind": "train",
    "prompt": ...,
    "name": "circle",
    "dataset": "circles",
    "resolution": 64,
    "rank": 2,
    "max_train_steps": 60,
    "checkpointing_steps": 5,
    "seed": 1,
}
LONG = {"max_train_steps": 4000}


@pytest.fixture
def hall(home: Home) -> Home:
    """A home with a dataset and models of its own, whose client may train."""
    source = REPOSITORY / "models"
    shutil.copytree(source / "diffusers" / "shapes-xl", home.root / "models" / "diffusers" / "shapes-xl")
    circles(home.root / "reference" / "datasets" / "circles", 4)
    path = home.root / "config.yaml"
    text = path.read_text().replace(f"models: {source}", "models: models")
    path.write_text(f"{text}reserve_mb: 0\nclients: {{{home.client}: {{train: true}}}}\n")
    return replace(home, config=configuration.load(path))


def train(home: Home, **fields: Any) -> Any:
    return home.drop_body(home.body(**TRAIN | fields))


def ended(home: Home, ref: Any) -> dict[str, Any]:
    path = home.config.outputs / ref.client / ref.id / "manifest.json"
    wait_for(path.exists, home)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def at_step(home: Home, least: int) -> bool:
    now = worker(home)
    return now.get("stage") == "training" and now.get("step", 0) >= least


def test_a_training_is_told_as_it_goes_and_its_manifest_is_its_record(hall: Home) -> None:
    with serving(hall):
        ref = train(hall, **LONG)
        wait_for(lambda: at_step(hall, 30), hall)
        now = worker(hall)
        assert now["steps"] == 4000
        assert 0 < now["loss"] < 1
        assert now["eta_s"] > 0
        shown = imagend("status", cwd=hall.root).stdout
        assert "training step " in shown
        assert "/4000  loss 0." in shown
        assert " left" in shown
        assert imagend("cancel", ref.id, cwd=hall.root).returncode == 0
        assert ended(hall, ref)["outcome"] == "cancelled"
        second = train(hall, seed=2, validation_prompts=["a red circle"], trigger_words=["ohwx"])
        manifest = ended(hall, second)
        assert manifest["outcome"] == "succeeded", manifest
        taken = ended(hall, train(hall, nonce="of the same name"))
        assert taken["error"]["code"] == "CONFLICT"
        job = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "width": 64, "height": 64}
        plain = ended(hall, hall.drop(**job))
        styled = ended(hall, hall.drop(**job, loras=[{"name": "circle"}]))
        shown = imagend("models", "show", "circle", cwd=hall.root).stdout
        history = json.loads(imagend("history", "--kind", "train", "--json", cwd=hall.root).stdout)
    assert (manifest["spec"]["model"], manifest["spec"]["alpha"]) == ("shapes-xl", 2.0)
    assert manifest["engine"]["dataset"]["name"] == "circles"
    folder = hall.config.outputs / second.client / second.id
    files = ["lora.safetensors", "lora-kohya.safetensors", "loss.png", "loss.jsonl", "sample-000060-0.png"]
    assert [one["file"] for one in manifest["artifacts"]] == files
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "manifest.json"])
    assert manifest["installed"]["name"] == "circle"
    installed = hall.config.models / "loras" / "circle.safetensors"
    assert hashlib.sha256(installed.read_bytes()).hexdigest() == manifest["artifacts"][0]["sha256"]
    assert styled["engine"]["loras"][0]["sha256"] == manifest["installed"]["sha256"]
    assert styled["artifacts"][0]["pixels_sha256"] != plain["artifacts"][0]["pixels_sha256"]
    assert str(second) in shown
    assert "ohwx" in shown
    assert [(one["id"], one["kind"], one["outcome"], one["pictures"]) for one in history["jobs"][1:]] == [
        (second.id, "train", "succeeded", 0),
        (ref.id, "train", "cancelled", 0),
    ]
    refused = imagend("replay", second.id, cwd=hall.root)
    assert (refused.returncode, "trained a LoRA" in refused.stderr) == (64, True)


def test_stopped_and_killed_it_goes_on_with_the_bits_of_an_uninterrupted_one(hall: Home) -> None:
    """The daemon stops, and is started again; then its worker is killed."""
    steps = {"max_train_steps": 300, "nonce": "interrupted"}
    with serving(hall) as daemon:
        ref = train(hall, **steps)
        wait_for(lambda: at_step(hall, 50), hall)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(60) == 0
    draft = hall.config.outputs / ".drafts" / ref.client / ref.id
    assert (draft / ".checkpoint.safetensors").exists()
    with serving(hall):
        wait_for(lambda: at_step(hall, 1), hall)
        assert worker(hall)["step"] >= 50
        pid = next(child for child in _children(hall) if "imagend.worker" in child[1])[0]
        wait_for(lambda: at_step(hall, 100), hall)
        os.kill(pid, signal.SIGKILL)
        manifest = ended(hall, ref)
        assert manifest["outcome"] == "succeeded", manifest
        assert manifest["attempts"] == 2  # that it was told to stop does not count
        whole = ended(hall, train(hall, name="whole", **steps | {"nonce": "whole"}))
    for index in (1, 3):  # but for its metadata, which has its name, the LoRA is the same
        assert manifest["artifacts"][index]["file"] == whole["artifacts"][index]["file"]
    assert manifest["artifacts"][3]["sha256"] == whole["artifacts"][3]["sha256"]
    starts = [one for one in log(hall) if one.get("event") == "started" and one.get("job") == str(ref)]
    assert len(starts) == 3


def test_it_gives_way_to_a_picture_and_goes_on_with_the_bits_of_an_uninterrupted_one(hall: Home) -> None:
    path = hall.root / "config.yaml"
    path.write_text(f"{path.read_text()}train: {{rest_s: 0.0}}\n")
    steps = {"max_train_steps": 300, "nonce": "interrupted"}
    with serving(hall):
        ref = train(hall, **steps)
        wait_for(lambda: at_step(hall, 50), hall)
        picture = ended(hall, hall.drop(prompt="a red circle", num_inference_steps=3, seed=7))
        assert picture["outcome"] == "succeeded", picture
        manifest = ended(hall, ref)
        assert manifest["outcome"] == "succeeded", manifest
        assert (manifest["attempts"], worker(hall)["starts"]) == (1, 1)
        whole = ended(hall, train(hall, name="whole", **steps | {"nonce": "whole"}))
        again = ended(hall, hall.drop("again.json", prompt="a red circle", num_inference_steps=3, seed=7, nonce="2"))
    assert datetime.fromisoformat(picture["started_at"]) < datetime.fromisoformat(manifest["started_at"])
    assert manifest["artifacts"][3]["sha256"] == whole["artifacts"][3]["sha256"]  # the losses
    assert picture["artifacts"][0]["pixels_sha256"] == again["artifacts"][0]["pixels_sha256"]


def _children(home: Home) -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home.config.models) in command and " --fd " in command:
            found.append((int(path.parent.name), command))
    return found


def test_who_has_not_the_right_is_refused_and_an_unknown_dataset_fails_at_once(home: Home) -> None:
    with serving(home):
        ref = train(home)
        reason = home.config.inboxes[0].parent / "rejected"
        found = wait_for(lambda: list(reason.rglob("*.reason.json")), home)
        assert "train is not allowed" in json.loads(found[0].read_text())["error"]["message"]
        assert ref
    path = home.root / "config.yaml"
    path.write_text(f"{path.read_text()}clients: {{{home.client}: {{train: true}}}}\n")
    with serving(home):
        manifest = ended(home, train(home, dataset="none", nonce="again"))
    assert manifest["error"]["code"] == "DATASET_NOT_FOUND"
    assert "started_at" not in manifest


def test_a_training_that_takes_too_long_fails_and_says_so(hall: Home) -> None:
    path = hall.root / "config.yaml"
    path.write_text(f"{path.read_text()}train: {{time_limit_s: 2.0}}\n")
    with serving(hall):
        manifest = ended(hall, train(hall, **LONG))
    assert manifest["error"]["code"] == "TIMEOUT"
    assert "train.time_limit_s" in manifest["error"]["message"]
