"""spool/events.jsonl and `imagend tail`: what happens, once and in order, over rotations, restarts and full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step
from fakes import FakeExecutor
from test_cli import imagend

from imagend import feed, files
from imagend.daemon import events
from imagend.daemon.events import Events
from imagend.daemon.executor import Heard, StopRequested
from imagend.daemon.loop import Daemon
from imagend.job import Ref
from imagend.messages import Message, Progress, Run
from imagend.outputs import Outputs
from imagend.spool import EVENTS

REF = Ref(CLIENT, "0" * 20)


def told(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.config.spool / EVENTS).read_text().splitlines()]


def words(home: Home, ref: Ref) -> list[str]:
    return [event["type"].removeprefix("imagend.") for event in told(home) if event.get("subject") == str(ref)]


class Slow(FakeExecutor):
    """Says where it is before it paints; `clock` is the daemon's, moved on by an eighth of a second at each word."""

    now = 0.0

    def send(self, worker: str, message: Message) -> None:
        if isinstance(message, Run):
            for progress in self.way(message.job):
                self.mailbox.put(Heard(worker, progress))
        super().send(worker, message)

    def way(self, ref: Ref) -> Iterator[Progress]:
        yield Progress(job=ref, stage="model_loading")
        yield Progress(job=ref, stage="encoding", picture=0, pictures=2)
        for picture in (0, 1):
            for number in range(21):
                yield Progress(job=ref, stage="painting", picture=picture, pictures=2, step=number, steps=20)


def slow_daemon(home: Home) -> Daemon:
    daemon = home.daemon(Slow)
    hear, now = daemon.hear, [0.0]

    def heard(slot: Any, message: Message) -> None:
        now[0] += 0.125 * isinstance(message, Progress)
        hear(slot, message)

    daemon.hear = heard  # type: ignore[method-assign]
    daemon.clock = lambda: now[0]
    daemon._patience_s = lambda: 0.0  # type: ignore[method-assign]
    return daemon


def stop(daemon: Daemon) -> None:
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()


# What is told


def test_a_job_from_its_acceptance_to_its_end(home: Home) -> None:
    ref = home.drop(count=2)
    daemon = slow_daemon(home)
    run_until(daemon, lambda: "completed" in words(home, ref) if (home.config.spool / EVENTS).exists() else False)
    happened = words(home, ref)
    assert [word for word in happened if word != "generating"] == [
        "queued",
        "started",
        "step.start",
        "model_loading",
        "step.finish",
        *("step.start", "step.finish"),  # encoding
        *("step.start", "step.finish"),
        *("step.start", "step.finish"),
        *("artifact.written", "artifact.written"),
        "completed",
    ]
    of = {word: [event["data"] for event in told(home) if event["type"] == f"imagend.{word}"] for word in happened}
    assert [(data["picture"], data["step"]) for data in of["generating"]] == [
        (picture, number)  # a word each eighth of a second, told at most each half
        for picture in (0, 1)
        for number in (0, 4, 8, 12, 16, 20)
    ]
    assert [data["stage"] for data in of["step.finish"]] == ["model_loading", "encoding", "painting", "painting"]
    assert [data["seconds"] for data in of["step.finish"]] == [0.125, 0.125, 21 * 0.125, 20 * 0.125]
    manifest = home.manifest(ref)
    assert [(data["file"], data["sha256"]) for data in of["artifact.written"]] == [
        (artifact["file"], artifact["sha256"]) for artifact in manifest["artifacts"]
    ]
    (completed,) = of["completed"]
    assert (completed["kind"], completed["attempts"], completed["pictures"]) == ("generate", 1, 2)
    assert of["queued"] == [{"client": CLIENT, "id": ref.id, "kind": "generate", "priority": 5}]


@pytest.mark.parametrize(
    ("prompt", "happened"),
    [
        ("fail", ["queued", "started", "failed"]),
        ("die", ["queued", "started", "requeued", "started", "failed"]),
    ],
)
def test_jobs_that_fail(home: Home, prompt: str, happened: list[str]) -> None:
    ref = home.drop(prompt=prompt)
    run_until_idle(home.daemon(max_attempts=2))
    assert words(home, ref) == happened
    error = home.manifest(ref)["error"]
    assert [event["data"]["code"] for event in told(home) if event["type"] == "imagend.failed"] == [error["code"]]
    assert error["message"] not in (home.config.spool / EVENTS).read_text()


def test_what_is_rejected(home: Home) -> None:
    home.put(b"{}", "a secret.json")
    ref = home.drop(widht=64)
    daemon = home.daemon(file_grace_s=1e-9)
    run_until_idle(daemon)
    run_until(daemon, lambda: not any(home.config.inboxes[0].iterdir()))
    step(daemon)
    rejected = [event["data"] for event in told(home) if event["type"] == "imagend.rejected"]
    assert {"file": f"{ref.id}.json", "client": CLIENT, "code": "INVALID_PARAMETERS"} in rejected
    (other,) = (data for data in rejected if data["client"] is None)
    assert (other["code"], "secret" in other["file"]) == ("UNAUTHORIZED", False)


def test_a_job_that_is_cancelled_and_one_that_a_stop_puts_back(home: Home) -> None:
    ref = home.drop(prompt="stay")
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.slots["cpu0"].running is not None)
    stop(daemon)
    assert words(home, ref) == ["queued", "started", "requeued"]
    home.drop(kind="cancel", job=ref.id, prompt=...)
    run_until_idle(home.daemon())
    assert words(home, ref)[3:] in (["cancelled"], ["started", "cancelled"])
    (requeued,) = (event["data"] for event in told(home) if event["type"] == "imagend.requeued")
    assert requeued["code"] is None


def test_what_befalls_the_daemon(home: Home) -> None:
    daemon = home.daemon()
    daemon.health.trouble("models", "no model is there")
    step(daemon)
    stop(daemon)
    happened = [(event["type"], event.get("subject")) for event in told(home)]
    assert happened == [
        ("imagend.daemon.started", None),
        ("imagend.degraded", "models"),
        ("imagend.mended", "models"),
        ("imagend.daemon.stopped", None),
    ]


def test_each_line_is_a_cloudevent(home: Home) -> None:
    """As https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md has it."""
    home.drop(count=2)
    home.drop(prompt="die")
    run_until_idle(home.daemon(Slow, max_attempts=1))
    happened = told(home)
    assert len({(event["source"], event["id"]) for event in happened}) == len(happened)
    for event in happened:
        assert event["specversion"] == "1.0"
        assert re.fullmatch(r"[!-~]+", event["source"])
        assert re.fullmatch(r"imagend\.[a-z._]+", event["type"])
        assert datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0)
        assert event.get("subject") != ""
        assert all(re.fullmatch("[a-z0-9]{1,20}", name) for name in event)  # of attributes
        assert isinstance(event["data"], dict)
    assert [event["seq"] for event in happened] == list(range(1, len(happened) + 1))


def test_a_name_that_is_no_uri_is_quoted(tmp_path: Path) -> None:
    feed_of = Events(tmp_path, "la déesse")
    feed_of.tell("queued", REF)
    feed_of.write(0.0)
    assert json.loads((tmp_path / EVENTS).read_text())["source"] == "/imagend/la%20d%C3%A9esse"


# When it is told


def test_nothing_is_told_before_it_is_durable(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = home.drop()
    daemon = home.daemon()

    def refusing(self: Outputs) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "confirm", refusing)
        run_until(daemon, lambda: "disk" in daemon.health.reasons)
        assert home.outcome(ref) == "succeeded"
        assert words(home, ref) == ["queued", "started"]
    run_until_idle(daemon)
    assert words(home, ref)[2:] == ["artifact.written", "completed"]


def test_an_end_that_a_crash_kept_from_being_told_is_told_at_the_next_start(home: Home) -> None:
    ref = home.drop()
    daemon = home.daemon()
    daemon.tidy = lambda now: None  # type: ignore[method-assign]
    run_until(daemon, lambda: daemon.ending.untidied > 0)
    daemon.spool.close()  # dead: the manifest is there, and nothing was told
    assert words(home, ref) == ["queued", "started"]
    run_until_idle(home.daemon())
    assert words(home, ref) == ["queued", "started", "completed"]


def test_the_count_goes_on_after_a_restart_and_a_crash(home: Home) -> None:
    for end in (stop, lambda daemon: daemon.spool.close()):
        home.drop(nonce=str(end))
        daemon = home.daemon()
        run_until_idle(daemon)
        step(daemon)
        end(daemon)
    step(home.daemon())
    happened = told(home)
    assert [event["seq"] for event in happened] == list(range(1, len(happened) + 1))
    assert [event["type"] for event in happened].count("imagend.daemon.started") == 3


@pytest.mark.parametrize("litter", [b'{"seq": 9', b"[]\n", b"\xff\n", b"[" * 60_000, b'{"seq": "x"}\n'])
def test_the_count_goes_on_after_a_line_that_a_crash_cut(tmp_path: Path, litter: bytes) -> None:
    for _ in range(2):
        feed_of = Events(tmp_path, "imagend")
        feed_of.tell("queued", REF)
        feed_of.write(0.0)
        with (tmp_path / EVENTS).open("ab") as file:
            file.write(litter)
    lines = [line for line in (tmp_path / EVENTS).read_bytes().splitlines() if line.endswith(b"}}")]
    assert [json.loads(line)["seq"] for line in lines] == [1, 2]


# Its files


def fill(feed_of: Events, count: int) -> None:
    for _ in range(count):
        feed_of.tell("queued", REF)
        feed_of.write(0.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of five lines."""
    monkeypatch.setattr(events, "MAX_BYTES", 1000)


@pytest.mark.usefixtures("small")
def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    fill(Events(tmp_path, "imagend"), 100)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [EVENTS, f"{EVENTS}.1", f"{EVENTS}.2", f"{EVENTS}.3"]
    assert all(path.stat().st_size < 1000 + 300 for path in tmp_path.iterdir())
    lines = [json.loads(line)["seq"] for line, _ in feed.lines(tmp_path / EVENTS, None)]
    assert lines == list(range(lines[0], 101))
    (tmp_path / EVENTS).unlink()  # a crash between rotation and the first line
    feed_of = Events(tmp_path, "imagend")
    fill(feed_of, 1)
    assert json.loads((tmp_path / EVENTS).read_text())["seq"] > 90


@pytest.mark.usefixtures("small")
def test_a_reader_misses_nothing_over_rotations(tmp_path: Path) -> None:
    feed_of, place, seen = Events(tmp_path, "imagend"), None, []
    for count in (1, 3, 9, 2, 0, 12, 1, 1, 1, 7):
        fill(feed_of, count)
        read = list(feed.lines(tmp_path / EVENTS, place))
        seen += [json.loads(line)["seq"] for line, _ in read]
        place = read[-1][1] if read else place
    assert seen == list(range(1, 38))


@pytest.mark.usefixtures("small")
def test_tail_of_coreutils_follows_over_rotations(tmp_path: Path) -> None:
    feed_of = Events(tmp_path, "imagend")
    fill(feed_of, 1)
    command = ["timeout", "60", "tail", "-n", "+1", "-s", "0.1", "-F", str(tmp_path / EVENTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tail:
        assert tail.stdout is not None
        for number in range(1, 20):
            assert json.loads(tail.stdout.readline())["seq"] == number
            fill(feed_of, 1)
        tail.terminate()
    assert (tmp_path / f"{EVENTS}.1").exists()


# Disks that refuse


def full(path: Path, data: bytes, mode: int = 0o644, durable: bool = True) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def full_for_events(path: Path, data: bytes, mode: int = 0o644, durable: bool = True) -> None:
    (full if path.name == EVENTS else append)(path, data, mode, durable)


append: Callable[..., None] = files.append


def test_a_full_disk_degrades_it_and_stops_no_job(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = home.drop()
    daemon = home.daemon()
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", full_for_events)
        run_until(daemon, lambda: bool(daemon.health.totals["succeeded"] and daemon.health.reasons))
        assert daemon.health.reasons == {"events": "events.jsonl cannot be written: No space left on device"}
    run_until(daemon, lambda: not daemon.health.reasons)
    run_until(daemon, lambda: told(home)[-1]["type"] == "imagend.mended")
    assert words(home, ref) == ["queued", "started", "artifact.written", "completed"]
    assert [event["seq"] for event in told(home)] == list(range(1, len(told(home)) + 1))


def test_what_does_not_fit_in_memory_is_lost_the_oldest_first_and_the_count_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 5)
    feed_of = Events(tmp_path, "imagend")
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", full)
        fill(feed_of, 1)
        for _ in range(6):
            feed_of.tell("queued", REF)
        assert feed_of.trouble
    feed_of.write(0.5)
    assert not (tmp_path / EVENTS).exists()  # the disk is left alone for a second
    feed_of.write(1.5)
    assert feed_of.trouble is None
    assert [json.loads(line)["seq"] for line in (tmp_path / EVENTS).read_bytes().splitlines()] == [3, 4, 5, 6, 7]


# imagend tail


@pytest.fixture
def past(home: Home) -> tuple[Ref, Ref]:
    """Alice's job, and bob's that failed."""
    refs = home.drop(prompt="a secret"), home.neighbour("bob").drop(prompt="fail")
    run_until_idle(home.daemon())
    return refs


def tail(home: Home, *options: object) -> list[dict[str, Any]]:
    done = imagend("tail", "--no-follow", "--json", *options, cwd=home.root)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tail_shows_what_is_asked_for(home: Home, past: tuple[Ref, Ref]) -> None:
    alices, bobs = past
    everything = told(home)
    assert tail(home) == everything[-10:]
    assert tail(home, "-n", 3) == everything[-3:]
    assert tail(home, "-n", 0) == []
    assert tail(home, "-n", 100) == tail(home, "--since", "1h") == everything
    assert tail(home, "--since", (datetime.now(UTC) + timedelta(hours=1)).isoformat()) == []
    for options in [("--client", "bob"), ("--job", bobs.id), ("--job", f"bob/{bobs.id}")]:
        assert [event["type"] for event in tail(home, *options)] == [
            "imagend.queued",
            "imagend.started",
            "imagend.failed",
        ]
    assert tail(home, "--client", "bob", "-n", 1)[0]["type"] == "imagend.failed"
    assert tail(home, "--job", f"bob/{alices.id}") == []


def test_tail_for_people(home: Home, past: tuple[Ref, Ref]) -> None:
    done = imagend("tail", "--no-follow", "-n", 100, cwd=home.root)
    lines = [line.split()[2:] for line in done.stdout.splitlines()]
    assert lines[0] == ["-", "daemon.started", "0.1.0"]
    assert [str(past[0]), "completed", "1", "picture"] in [line[:4] for line in lines]
    assert [str(past[1]), "failed"] in [line[:2] for line in lines]
    assert "INVALID_PARAMETERS" in done.stdout
    assert "secret" not in done.stdout


@pytest.mark.parametrize(
    "options", [("--job", "17"), ("-n", "-1"), ("--since", "soon"), ("--client", "bob", "--job", f"alice/{'0' * 20}")]
)
def test_tail_with_wrong_words(home: Home, options: tuple[str, ...]) -> None:
    done = imagend("tail", "--no-follow", *options, cwd=home.root)
    assert (done.returncode, done.stdout) == (64, "")


def test_tail_before_anything_was_told_names_the_next_step(home: Home) -> None:
    done = imagend("tail", "--no-follow", cwd=home.root)
    assert (done.returncode, done.stdout) == (0, "")
    assert "imagend serve" in done.stderr


def test_tail_passes_over_what_is_no_event_and_shows_no_control_characters(home: Home) -> None:
    event = {"type": "imagend.queued", "time": "2026-11-26T15:00:00.000+00:00", "data": {"kind": "\x1b[2J"}}
    home.config.spool.mkdir(exist_ok=True)
    (home.config.spool / EVENTS).write_text('[]\n17\n{"time": 1}\n\n' + json.dumps(event) + "\n{")
    done = imagend("tail", "--no-follow", cwd=home.root)
    assert done.stdout.split() == ["2026-11-26", "15:00:00", "-", "queued", "?[2J"]


@pytest.mark.usefixtures("small")
def test_tail_follows_over_rotations_restarts_and_loss(home: Home) -> None:
    command = ["timeout", "60", sys.executable, "-m", "imagend", "tail", "--json", "-n", "1000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=home.root, stdout=pipe, stderr=pipe, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert "imagend serve" in follower.stderr.readline()  # nobody has told anything yet
        number = 0
        for life in range(3):
            feed_of = Events(home.config.spool, f"life {life}")
            for _ in range(7):
                fill(feed_of, 1)
                number += 1
                assert json.loads(follower.stdout.readline())["seq"] == number
        for path in home.config.spool.glob(f"{EVENTS}*"):
            path.unlink()
        fill(feed_of, 1)
        assert "missed" in follower.stderr.readline()
        assert json.loads(follower.stdout.readline())["seq"] == number + 1
        follower.terminate()
