"""imagend replay, as it is typed, against a daemon whose painter can be made to paint otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle
from fakes import FakeExecutor, paint

from imagend.daemon.executor import Heard, Mailbox
from imagend.daemon.loop import Daemon
from imagend.errors import UnsupportedSetting
from imagend.job import Outcome, Ref
from imagend.messages import Ended, Failure, Run


class Painter(FakeExecutor):
    """Paints by seed and by its engine; refuses when told to."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(mailbox)
        self.engine: dict[str, Any] = {"threads": 1, "model": {"name": "shapes-xl", "sha256": "0" * 64}}
        self.shift = 0
        self.refuses = False

    def attempt(self, worker: str, run: Run) -> None:
        if self.refuses:
            failure = Failure.of(UnsupportedSetting("not today"))
            self.mailbox.put(Heard(worker, Ended(job=run.job, outcome=Outcome.FAILED, failure=failure)))
            return
        artifacts = []
        for index, seed in enumerate(run.spec["seeds"]):
            shift = self.shift if index == 1 else 0
            artifacts.append(paint(Path(run.folder), index, seed + shift).model_copy(update={"seed": seed}))
        ended = Ended(job=run.job, outcome=Outcome.SUCCEEDED, artifacts=tuple(artifacts), engine=self.engine)
        self.mailbox.put(Heard(worker, ended))


def painter_of(daemon: Daemon) -> Painter:
    executor = daemon.executor
    assert isinstance(executor, Painter)
    return executor


def replay(home: Home, daemon: Daemon, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, while the daemon goes on."""
    command = [sys.executable, "-m", "imagend", "replay", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=home.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run_until(daemon, lambda: process.poll() is not None)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def daemon(home: Home) -> Daemon:
    return home.daemon(Painter)


@pytest.fixture
def ref(home: Home, daemon: Daemon) -> Ref:
    """A job that has ended well."""
    ref = home.drop(seed=7, count=2, label="mine", negative_prompt="blurry", priority=7)
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    return ref


def test_the_same_bits(home: Home, daemon: Daemon, ref: Ref) -> None:
    done = replay(home, daemon, ref.id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{ref}: painted again, the same bit for bit"
    first, second = painter_of(daemon).runs
    assert second.spec == first.spec
    assert second.job != first.job
    assert home.manifest(second.job)["label"] == f"replay of {ref}"


def test_other_bits_and_what_differs(home: Home, daemon: Daemon, ref: Ref) -> None:
    painter = painter_of(daemon)
    painter.shift = 1
    painter.engine = painter.engine | {"model": {"name": "shapes-xl", "sha256": "1" * 64}}
    done = replay(home, daemon, ref.id)
    assert done.returncode == 5
    assert done.stdout.splitlines()[-3:] == [
        "  0001.png (seed 8): other bits",
        f"{ref}: painted again, 1 of 2 pictures have other bits",
        f"  model.sha256 was {'0' * 60}…, is {'1' * 60}…",
    ]
    told = replay(home, daemon, ref.id, "--json")
    assert told.returncode == 5
    (line,) = told.stdout.splitlines()
    found = json.loads(line)
    assert (found["id"], found["client"], found["outcome"], found["equal"]) == (*ref[::-1], "succeeded", False)
    assert [picture["equal"] for picture in found["pictures"]] == [True, False]
    assert found["differences"] == [{"component": "model.sha256", "was": "0" * 64, "is": "1" * 64}]
    assert home.outcome(Ref(found["replay"]["client"], found["replay"]["id"])) == "succeeded"


def test_other_bits_for_a_reason_that_no_manifest_has(home: Home, daemon: Daemon, ref: Ref) -> None:
    painter_of(daemon).shift = 1
    done = replay(home, daemon, ref.id)
    assert done.returncode == 5
    assert "docs/determinism.md" in done.stdout


def test_the_same_bits_from_another_engine_says_so(home: Home, daemon: Daemon, ref: Ref) -> None:
    painter_of(daemon).engine = painter_of(daemon).engine | {"threads": 4}
    done = replay(home, daemon, ref.id)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == [
        f"{ref}: painted again, the same bit for bit",
        "  threads was 1, is 4",
    ]


def test_a_replay_that_fails(home: Home, daemon: Daemon, ref: Ref) -> None:
    painter_of(daemon).refuses = True
    done = replay(home, daemon, ref.id, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["outcome"], told["error"]["message"]) == ("failed", "not today")
    assert "equal" not in told


def test_a_replay_that_is_rejected(home: Home, daemon: Daemon, ref: Ref) -> None:
    home.config.allowed_signers.write_text("")
    (home.root / "config.yaml").touch()
    daemon.settings.read_keys()
    daemon.tell_doors()
    done = replay(home, daemon, ref.id)
    assert done.returncode == 3
    assert "rejected" in done.stdout


def test_another_clients_job_is_painted_as_ones_own(home: Home, daemon: Daemon) -> None:
    theirs = home.neighbour("bob").drop(seed=3)
    daemon.settings.read_keys()
    daemon.tell_doors()
    run_until_idle(daemon)
    for arguments in ((f"bob/{theirs.id}",), (theirs.id, "--client", "bob")):
        done = replay(home, daemon, *arguments)
        assert done.returncode == 0, done.stderr
        assert painter_of(daemon).runs[-1].job.client == CLIENT
    assert replay(home, daemon, theirs.id).returncode == 64


def test_a_manifest_of_an_older_imagend(home: Home, daemon: Daemon, ref: Ref) -> None:
    path = home.config.outputs / ref.client / ref.id / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["engine"]
    kept = ("prompt", "negative_prompt", "model", "width", "height", "seeds", "num_inference_steps", "guidance_scale")
    manifest["spec"] = {key: manifest["spec"][key] for key in kept} | {"gone": None}
    path.write_text(json.dumps(manifest))
    done = replay(home, daemon, ref.id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("the same bit for bit")


def test_a_manifest_of_a_newer_imagend_is_refused_and_nothing_is_sent(home: Home, daemon: Daemon, ref: Ref) -> None:
    path = home.config.outputs / ref.client / ref.id / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["spec"]["hologram"] = True
    path.write_text(json.dumps(manifest))
    done = replay(home, daemon, ref.id)
    assert done.returncode == 64
    assert "cannot paint" in done.stderr
    assert "hologram" in done.stderr
    assert list(home.config.inboxes[0].iterdir()) == []


def test_what_has_no_pictures_cannot_be_replayed(home: Home) -> None:
    failed, waiting = home.drop("a.json", prompt="fail"), home.drop("b.json", prompt="x", audience="imagend")
    (home.config.inboxes[0] / "b.json").rename(home.root / "b.json")
    run_until_idle(home.daemon())
    (home.root / "b.json").rename(home.config.inboxes[0] / f"{waiting.id}.json")
    for ref, words in (
        (failed, "outcome was failed"),
        (waiting, "has not ended yet"),
        (Ref(CLIENT, "0" * 20), "No manifest"),
    ):
        command = [sys.executable, "-m", "imagend", "replay", ref.id]
        done = subprocess.run(command, cwd=home.root, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 64
        assert words in done.stderr
    assert [path.name for path in home.config.inboxes[0].iterdir()] == [f"{waiting.id}.json"]


def test_timeout(home: Home, daemon: Daemon, ref: Ref) -> None:
    command = [sys.executable, "-m", "imagend", "replay", ref.id, "--timeout", "0.2", "--json"]
    done = subprocess.run(command, cwd=home.root, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert json.loads(done.stdout)["outcome"] is None
