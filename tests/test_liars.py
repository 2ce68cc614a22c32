"""Workers that say or show what is not so: real processes. What they say reaches their own job at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle
from test_worker import end, local

from imagend.daemon.executor import Event, Heard
from imagend.job import Ref
from imagend.messages import Cancel, Progress
from imagend.spool import State

LIES = [
    "lie about a path",
    "lie about a folder",
    "lie about a file",
    "lie about its name",
    "lie about bytes",
    "lie about size",
    "lie about the seed",
    "show nothing",
    "show too much",
    "show one twice",
    "show a link",
    "show a link within",
    "show a hard link",
    "show a pipe",
    "show a folder",
    "show a huge file",
    "remove the draft",
    "replace the draft by a file",
    "cancel unasked",
]


@pytest.fixture(autouse=True)
def _loud(capfd: pytest.CaptureFixture[str]) -> None:
    """Give the workers a real stderr to inherit."""


@pytest.mark.parametrize("prompt", LIES)
def test_a_lie_fails_its_job_publishes_nothing_and_spares_the_next(home: Home, prompt: str) -> None:
    ref, after = home.drop("a.json", prompt=prompt), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["error"]["code"], manifest["attempts"]) == ("failed", "INTERNAL", 1)
    assert manifest["artifacts"] == []
    assert published(home, ref) == {"manifest.json"}
    assert home.outcome(after) == "succeeded"
    assert home.manifest(after)["attempts"] == 1


def published(home: Home, ref: Any) -> set[str]:
    return {path.name for path in (home.config.outputs / ref.client / ref.id).iterdir()}


def test_a_draft_that_became_a_link_is_not_followed(home: Home, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    ref = home.drop(prompt="replace the draft by a link", negative_prompt=str(elsewhere))
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "failed"
    assert published(home, ref) == {"manifest.json"}
    assert (elsewhere / "precious").read_text() == "kept"


def test_strays_in_a_draft_are_not_published(home: Home) -> None:
    ref = home.drop(prompt="strew strays", count=2)
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "succeeded"
    assert published(home, ref) == {"0000.png", "0001.png", "manifest.json"}
    assert Path("/etc/passwd").exists()


def test_what_a_worker_says_of_another_job_is_not_heard(home: Home) -> None:
    other = home.drop("z.json", prompt="paint", priority=0)
    ref = home.drop("a.json", prompt="speak of another job", negative_prompt=other.id)
    daemon = home.daemon(local)
    run_until(daemon, lambda: home.where(ref) is State.DONE)
    assert home.manifest(ref)["artifacts"][0]["file"] == "0000.png"
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == home.outcome(other) == "succeeded"
    assert home.manifest(other)["attempts"] == 1
    assert [line["id"] for line in home.feed()] == [ref.id, other.id]


def test_a_job_that_is_said_to_end_three_times_ends_once_and_never_reaches_the_next(home: Home) -> None:
    first = home.drop("a.json", prompt="end twice")
    second = home.drop("b.json", prompt="end the former job")
    third = home.drop("c.json", prompt="get ready again")
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    assert [(line["id"], line["outcome"]) for line in home.feed()] == [
        (ref.id, "succeeded") for ref in (first, second, third)
    ]
    assert [home.manifest(ref)["attempts"] for ref in (first, second, third)] == [1, 1, 1]


def test_a_late_cancel_never_hits_the_next_job(home: Home) -> None:
    """Cancels of a job that has ended, sent straight to its worker: before, with and after the next job."""
    first = home.drop("a.json", prompt="paint")
    daemon = home.daemon(local)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: home.where(first) is State.DONE)

    def cancel_the_first() -> None:
        for _ in range(100):
            daemon.executor.send("cpu0", Cancel(job=first))

    cancel_the_first()
    second = home.drop("b.json", prompt="take time", num_inference_steps=50)
    run_until(daemon, lambda: slot.running is not None)
    cancel_the_first()
    run_until(daemon, lambda: slot.running is None or slot.running.progress is not None)
    cancel_the_first()
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(second) == "succeeded"
    assert home.manifest(second)["attempts"] == 1


def test_who_talks_without_end_does_not_keep_the_daemon_from_looking_around(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = home.daemon()
    word = Heard("cpu0", Progress(job=Ref("alice", "0" * 20), stage="painting"))
    heard: list[Event] = []

    def echo(event: Event) -> None:
        heard.append(event)
        if len(heard) < 1000:
            daemon.mailbox.put(word)

    monkeypatch.setattr(daemon, "handle", echo)
    daemon.mailbox.put(word)
    daemon.wait()
    assert len(heard) < 1000
