"""The door and a disk that refuses: nothing is lost, it is said and tried again, and the door lives. And its clock."""

from __future__ import annotations

import errno
import json
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until_idle
from test_door import GRACE_S, inbox, listing, make_door, rejected, take

from imagend import files
from imagend.attachments import Attachments
from imagend.daemon.intake import Arrival, Door
from imagend.inbox import PROBE
from imagend.job import MAX_JOB_BYTES, Ref

CALLS = ["open", "stat", "lstat", "scandir", "unlink", "rename", "mkdir", "fsync"]
ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES, errno.ESTALE]


def refusing(patch: pytest.MonkeyPatch, call: str, number: int) -> list[Any]:
    """From now on this call fails; what it was asked."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    patch.setattr(os, call, refuse)
    return asked


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_refuses_costs_nothing_and_is_said(call: str, number: int, home: Home) -> None:
    door = make_door(home)
    good = {home.drop("good.json"), home.drop("alice/good.json", nonce="2")}
    for name in ("bad.json", "alice/bad.json"):
        home.put(b"[" * (MAX_JOB_BYTES + 1), name)
    home.put(b"half", "unfinished.json")
    taken: set[Ref] = set()
    with pytest.MonkeyPatch.context() as patch:
        asked = refusing(patch, call, number)
        for now in range(0, 100, 10):
            taken |= set(take(door, float(now)))
        patch.undo()
        assert asked or call == "stat"
        left = {"good.json", "alice/good.json", "bad.json", "alice/bad.json"} & set(inbox(home))
        assert not left or door.trouble or door.stuck
    for now in range(100, 300, 5):
        taken |= set(take(door, float(now)))
    assert taken == good
    assert (inbox(home), door.trouble, door.stuck) == ([], None, 0)
    assert rejected(home) == ["alice/bad.json", "bad.json", "unfinished.json"]
    assert home.reason("alice/bad.json")["code"] == "PAYLOAD_TOO_LARGE"


@pytest.mark.parametrize("part", ["look", "settle", "measure"])
def test_no_error_ends_the_doors_thread(part: str, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that nobody foresaw."""
    home.drop("a.json")
    door = make_door(home, scan_interval_s=0.001)
    failed, done = threading.Event(), threading.Event()
    real = getattr(Door, part)

    def once(self: Door, *arguments: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "nobody foresaw this")
        return real(self, *arguments)

    class Enough(Exception):
        pass

    def ask(arrivals: tuple[Arrival, ...]) -> tuple[None, ...]:
        if done.is_set():
            raise Enough
        if failed.is_set():
            done.set()
            home.drop("b.json", nonce="2")
        return (None,) * len(arrivals)

    monkeypatch.setattr(Door, part, once)
    with pytest.raises(Enough):
        door.serve(ask)
    assert failed.is_set()
    assert "a.json" not in inbox(home)


def test_an_unforeseen_error_is_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    door = make_door(home, scan_interval_s=0.001)
    said: list[str | None] = []

    class Enough(Exception):
        pass

    def look(self: Door, now: float) -> None:
        said.append(self.trouble)
        if len(said) > 1:
            raise Enough
        raise OSError(errno.EIO, "nobody foresaw this")

    monkeypatch.setattr(Door, "look", look)
    with pytest.raises(Enough):
        door.serve(lambda arrivals: ())
    assert "nobody foresaw this" in str(said[1])


# rejected/


def test_rejected_that_is_a_link_is_not_followed(home: Home) -> None:
    """Who may write beside the inbox could have strangers' files moved to a place of his choice."""
    door = make_door(home)
    elsewhere = home.root / "elsewhere"
    elsewhere.mkdir()
    (door.inbox.parent / "rejected").symlink_to(elsewhere)
    home.put(home.sealed(width=1001), "a.json")
    take(door)
    assert (inbox(home), door.stuck, list(elsewhere.iterdir())) == (["a.json"], 1, [])
    (door.inbox.parent / "rejected").unlink()
    take(door, 9.0)
    assert (inbox(home), door.stuck, rejected(home)) == ([], 0, ["a.json"])


def test_a_clients_folder_in_rejected_that_is_a_link_is_not_followed(home: Home) -> None:
    door = make_door(home)
    elsewhere = home.root / "elsewhere"
    elsewhere.mkdir()
    (door.inbox.parent / "rejected").mkdir()
    (door.inbox.parent / "rejected" / "alice").symlink_to(elsewhere)
    home.put(home.sealed(width=1001), "alice/a.json")
    take(door)
    assert (inbox(home), door.stuck, list(elsewhere.iterdir())) == (["alice/a.json"], 1, [])


def test_a_place_in_rejected_is_found_without_counting(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    door = make_door(home)
    for number in range(50):
        home.drop("a.json", width=1001, nonce=str(number))
        take(door)
    looks: list[Any] = []
    lstat = os.lstat

    def counted(path: Any) -> os.stat_result:
        looks.append(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", counted)
    home.drop("a.json", width=1001)
    take(door)
    assert len(rejected(home)) == 51
    assert len(looks) < 10


def test_a_file_whose_move_failed_finds_its_reason_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as the second of its name, and by another door: a crash may lie between."""
    for _ in range(2):
        home.drop("a.json", width=1001, nonce=os.urandom(4).hex())
        with monkeypatch.context() as patch:

            def refuse(source: Path, target: Path) -> None:
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(files, "move", refuse)
            take(make_door(home))
        take(make_door(home))
    names = rejected(home)
    folder = home.config.inboxes[0].parent / "rejected"
    assert len(names) == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*names, *(f"{name}.reason.json" for name in names)]
    )


# Its clock


def test_the_clock_of_an_inbox_is_measured_and_leaves_no_trace(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    door = make_door(home)
    door.measure(0.0)
    assert door.skew_s is not None
    assert abs(door.skew_s) < 60.0
    assert list(door.inbox.iterdir()) == []
    (door.inbox / PROBE).write_text("left by a crash")
    fstat = os.fstat

    class Ahead:
        """A server whose clock is two hours ahead."""

        def __init__(self, fd: int) -> None:
            self.st_mtime = fstat(fd).st_mtime + 7200.0

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", Ahead)
        door.measure(59.0)
        assert abs(door.skew_s) < 60.0  # not so soon again
        door.measure(60.0)
    assert abs(door.skew_s - 7200.0) < 60.0
    assert list(door.inbox.iterdir()) == []
    with monkeypatch.context() as patch:
        refusing(patch, "utime", errno.EACCES)
        door.measure(120.0)
    assert door.skew_s is None


def test_the_longest_wait_is_told_by_the_inboxs_clock(home: Home) -> None:
    at = datetime.now(UTC)
    door = Door(
        home.config.inboxes[0],
        make_door(home).policy,
        Attachments(home.root / "none"),
        wall=lambda: at + timedelta(minutes=3),
    )
    home.drop("a.json")
    take(door)
    assert door.delay_s is None  # whose clock it is is not known
    door.skew_s = -100.0
    home.drop("b.json", nonce="2")
    take(door)
    assert door.delay_s is not None
    assert abs(door.delay_s - 80.0) < 30.0
    for number in range(100):
        home.drop(f"{number}.json", nonce=str(number))
    door.skew_s = -170.0
    take(door)
    assert abs(door.delay_s - 10.0) < 30.0  # of the last 100


def test_a_clients_own_time_is_never_believed(home: Home) -> None:
    """Files from 1970 and from 2099, and one of each that is unfinished: nothing is decided by it."""
    door = make_door(home)
    refs = []
    for number, year in enumerate((0, 4_000_000_000)):
        refs.append(home.drop(f"{number}.json", nonce=str(number)))
        home.put(b"half", f"half{number}.json")
        for name in (f"{number}.json", f"half{number}.json"):
            os.utime(door.inbox / name, (year, year))
    assert take(door, 0.0) == refs
    assert take(door, GRACE_S - 1) == []
    assert inbox(home) == ["half0.json", "half1.json"]
    take(door, GRACE_S)
    assert rejected(home) == ["half0.json", "half1.json"]


def test_status_tells_clock_and_wait_of_each_inbox(home: Home) -> None:
    daemon = home.daemon()
    run_until_idle(daemon)
    (told,) = json.loads((home.config.spool / "status.json").read_text())["inboxes"]
    assert (told["skew_s"], told["delay_s"]) == (None, None)
    daemon.doors[0].measure(0.0)
    home.drop()
    run_until_idle(daemon)
    daemon.health.write(0.0, "ready", (), daemon.turn, daemon.doors)
    (told,) = json.loads((home.config.spool / "status.json").read_text())["inboxes"]
    assert abs(told["skew_s"]) < 60.0
    assert abs(told["delay_s"]) < 60.0


# rejected/ stays bounded


def refuse(home: Home, door: Door, *names: str) -> list[float]:
    """One after the other, each with a time of its own; these times, by the clock of the disk."""
    times = []
    for name in names:
        home.put(b"[]", name)
        take(door)
        take(door, now=GRACE_S + 1)
        reason = home.config.inboxes[0].parent / "rejected" / f"{name}.reason.json"
        times.append(reason.stat().st_ctime)
        probe = home.root / "probe"
        while probe.touch() or probe.stat().st_ctime <= times[-1]:
            pass
    return times


def all_rejected(home: Home) -> list[str]:
    folder = home.config.inboxes[0].parent / "rejected"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_was_refused_goes_in_time_with_its_reason(home: Home) -> None:
    door = make_door(home)
    names = ("a.json", "b.json", "alice/c.json")
    times = refuse(home, door, *names)
    door._inbox.sweep_rejected(times[0], 100)
    assert rejected(home) == sorted(names)
    door._inbox.sweep_rejected(times[1], 100)
    assert rejected(home) == ["alice/c.json", "b.json"]
    folder = home.config.inboxes[0].parent / "rejected"
    (folder / "mine").symlink_to(home.root / "keys")
    (folder / "alice" / "kept").mkdir()
    (folder / "alice" / "kept" / "by-hand").touch()
    door._inbox.sweep_rejected(times[2] + 3600, 100)
    assert all_rejected(home) == ["alice", "alice/kept", "alice/kept/by-hand"]
    assert listing(home.root / "keys")


def test_each_folder_of_rejected_keeps_so_many(home: Home) -> None:
    door = make_door(home)
    refuse(home, door, *(f"{folder}{number}.json" for folder in ("", "alice/") for number in range(4)))
    door._inbox.sweep_rejected(0.0, 4)
    assert len(rejected(home)) == 8
    door._inbox.sweep_rejected(0.0, 2)
    left = [f"{folder}{number}.json" for folder in ("", "alice/") for number in (2, 3)]
    assert all_rejected(home) == sorted(["alice", *left, *(f"{name}.reason.json" for name in left)])


def test_it_is_swept_after_a_minute_then_each_hour_and_when_more_came_than_may_stay(home: Home) -> None:
    settings = home.config.retention.model_copy(update={"max_rejected": 1})
    door = make_door(home, retention=settings)
    began = door.looked_at
    refuse(home, door, "1.json")
    for now, name, left in (
        (began + 59, "2.json", ["1.json", "2.json"]),
        (began + 59, "3.json", ["2.json", "3.json"]),  # two had come since the last time
        (began + 3600, "4.json", ["2.json", "3.json", "4.json"]),
        (began + 3600, "5.json", ["4.json", "5.json"]),
        (began + 7201, "6.json", ["5.json", "6.json"]),
    ):
        door.measure(now)
        refuse(home, door, name)
        assert rejected(home) == left, name
