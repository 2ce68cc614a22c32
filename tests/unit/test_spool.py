"""The queue on disk, verb by verb. What a crash between two of them does is tests/test_crash.py's."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagend import files
from imagend.errors import SpoolLocked, SpoolUnusable
from imagend.job import Ref
from imagend.spool import Spool, State

REF = Ref("alice", "a" * 20)
OTHER = Ref("bob", "b" * 20)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = opened(tmp_path / "spool")
    yield spool
    spool.close()


def opened(root: Path) -> Spool:
    spool = Spool(root)
    spool.open()
    return spool


def reopened(spool: Spool) -> Spool:
    """The next daemon on this spool; it begins with sweep() and looks what there is."""
    spool.close()
    again = opened(spool.root)
    again.sweep()
    again.tickets(State.PENDING)
    return again


def accept(spool: Spool, *refs: Ref) -> None:
    for ref in refs:
        assert spool.accept(ref, b"job")
    spool.commit()


def put(spool: Spool, state: State, ref: Ref = REF) -> Path:
    path = spool.root / state / ref.client / f"{ref.id}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(state.encode())
    return path


def waiting(spool: Spool) -> list[Ref]:
    return [ticket.ref for ticket in spool.tickets(State.PENDING)]


# Accepting


def test_an_accepted_job_waits_with_the_bytes_it_came_with(spool: Spool) -> None:
    before = time.time_ns()
    assert spool.accept(REF, b"the very bytes")
    spool.commit()
    assert [(ticket.ref, ticket.accepted >= before) for ticket in spool.tickets(State.PENDING)] == [(REF, True)]
    assert spool.read(REF) == b"the very bytes"
    assert spool.where(REF) is State.PENDING
    assert spool.where(OTHER) is None
    assert spool.attempts(REF) == 0


@pytest.mark.parametrize("state", State)
def test_what_is_known_in_any_state_is_not_accepted_again(spool: Spool, state: State) -> None:
    put(spool, state)
    assert not spool.accept(REF, b"again")
    assert spool.where(REF) is state
    assert spool.read(REF) == state.encode()


def test_jobs_keep_their_order_within_a_tick_of_the_clock(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    refs = [Ref(client, letter * 20) for letter in "cab" for client in ("zoe", "alice")]
    accept(spool, *refs)
    assert waiting(spool) == refs
    assert waiting(reopened(spool)) == refs
    times = [spool.accepted(ref) for ref in refs]
    assert times == sorted(set(times))
    assert times[0] == 1_000_000_000  # ours, not the file system's, which ticks every few milliseconds


def test_jobs_keep_their_order_when_the_clock_is_set_back_between_two_daemons(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000_000)
    accept(spool, REF)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    again = reopened(spool)
    accept(again, OTHER)
    assert waiting(again) == [REF, OTHER]


def test_a_job_that_comes_back_keeps_its_place(spool: Spool) -> None:
    accept(spool, REF, OTHER)
    before = spool.accepted(REF)
    spool.claim(REF)
    assert spool.accepted(REF) == before
    spool.requeue(REF, "why not")
    assert waiting(spool) == [REF, OTHER]
    spool.claim(REF)
    spool.finish({REF: "succeeded"})
    assert spool.accepted(REF) == before


def test_one_sync_per_job_and_one_per_folder_commit_all(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(spool, REF, OTHER)  # makes the folders
    more = [Ref(ref.client, f"{number:020x}") for ref in (REF, OTHER) for number in range(8)]
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    for ref in more:
        spool.accept(ref, b"job")
    assert synced == []
    spool.commit()
    pending, journal = spool.root / "pending", spool.root / "journal"
    assert sorted(synced[:16]) == [pending / ref.client / f"{ref.id}.json" for ref in more]
    assert sorted(synced[16:]) == [journal / "alice", journal / "bob", pending / "alice", pending / "bob"]
    spool.commit()
    assert len(synced) == 20


def failing(*names: str) -> Callable[[Path], None]:
    def fail(path: Path) -> None:
        if path.name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    return fail


@pytest.mark.parametrize("refused", [f"{REF.id}.json", "alice"])
def test_a_commit_that_failed_accepted_nothing_and_leaves_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    accept(spool, OTHER)
    spool.accept(REF, b"job")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", failing(refused))
        with pytest.raises(OSError, match="Input/output"):
            spool.commit()
    assert spool.where(REF) is None
    assert waiting(spool) == [OTHER]
    accept(spool, REF)
    assert waiting(spool) == [OTHER, REF]


def test_what_the_disk_refused_and_would_not_let_go_is_written_anew(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may call its pages clean: a second fsync of the same file would say that all is well."""

    def no(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    spool.accept(REF, b"job")
    refused = (spool.root / "pending" / "alice" / f"{REF.id}.json").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", failing(f"{REF.id}.json"))
        patch.setattr(Path, "unlink", no)
        with pytest.raises(OSError, match="Input/output"):
            spool.commit()
    assert spool.where(REF) is State.PENDING
    assert spool.accept(REF, b"job")
    spool.commit()
    assert (spool.root / "pending" / "alice" / f"{REF.id}.json").stat().st_ino != refused
    assert not spool.accept(REF, b"job")


def test_what_is_known_is_made_durable_before_it_is_called_so(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wrote it may have been killed before its commit."""
    path = put(spool, State.PENDING)
    assert not spool.accept(REF, b"job")
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    spool.commit()
    assert synced == [path, path.parent]


def test_damaged_jobs_are_kept_out_of_the_way(spool: Spool) -> None:
    put(spool, State.PENDING)
    spool.set_aside(REF)
    assert spool.where(REF) is None
    assert (spool.root / "damaged" / REF.client / f"{REF.id}.json").read_bytes() == b"pending"


def test_jobs_are_for_the_daemons_eyes_only(spool: Spool) -> None:
    accept(spool, REF)
    spool.claim(REF)
    modes = {
        str(path.relative_to(spool.root)): oct(path.stat().st_mode & 0o777)
        for path in (spool.root / "active").rglob("*")
    }
    assert modes == {"active/alice": "0o711", f"active/alice/{REF.id}.json": "0o600"}
    assert (spool.root / "journal").stat().st_mode & 0o777 == 0o700
    assert (spool.root / "pending").stat().st_mode & 0o777 == 0o711


def test_what_is_no_job_file_is_no_ticket(spool: Spool) -> None:
    put(spool, State.PENDING)
    for name in ("README", "alice/.hidden.json", "alice/notes.txt"):
        (spool.root / "pending" / name).write_text("?")
    assert waiting(spool) == [REF]


# Attempts


def test_attempts_count_claims_and_not_those_given_back(spool: Spool) -> None:
    accept(spool, REF)
    assert spool.claim(REF) == 1
    assert (spool.where(REF), waiting(spool)) == (State.ACTIVE, [])
    spool.requeue(REF, "the worker died")
    assert (spool.where(REF), spool.attempts(REF)) == (State.PENDING, 1)
    assert spool.claim(REF) == 2
    spool.release(REF)
    assert (spool.where(REF), spool.attempts(REF)) == (State.PENDING, 1)
    assert spool.claim(REF) == 2
    assert [line["event"] for line in spool.story(REF)] == ["claimed", "requeued", "claimed", "released", "claimed"]
    assert spool.story(REF)[1]["why"] == "the worker died"
    assert spool.attempts(OTHER) == 0


def test_attempts_outlive_the_daemon(spool: Spool) -> None:
    accept(spool, REF)
    spool.claim(REF)
    again = reopened(spool)
    assert again.attempts(REF) == 1
    again.requeue(REF, "the daemon died")
    assert again.claim(REF) == 2


def test_a_wish_to_cancel_is_remembered(spool: Spool) -> None:
    accept(spool, REF, OTHER)
    assert not spool.cancel_wanted(REF)
    spool.note(REF, "cancel", durable=True)
    again = reopened(spool)
    assert (again.cancel_wanted(REF), again.cancel_wanted(OTHER)) == (True, False)


def test_a_journal_cut_anywhere_is_read_and_continued(spool: Spool) -> None:
    journal = spool.root / "journal" / REF.client / f"{REF.id}.jsonl"
    spool.note(REF, "claimed")
    first = journal.read_bytes()
    spool.note(REF, "requeued", why="it said {braces} and [brackets]")
    whole = journal.read_bytes()
    for length in range(len(first), len(whole)):
        journal.write_bytes(whole[:length])
        told = ["claimed", "requeued"] if length == len(whole) - 1 else ["claimed"]  # only the newline is missing
        assert [line["event"] for line in spool.story(REF)] == told
        spool.note(REF, "claimed")
        assert [line["event"] for line in spool.story(REF)] == [*told, "claimed"]
        assert spool.attempts(REF) == 2


def test_a_journal_with_zeros_at_its_end_is_read_and_continued(spool: Spool) -> None:
    """ext4 may keep a file's new size and lose its new bytes."""
    spool.note(REF, "claimed")
    with (spool.root / "journal" / REF.client / f"{REF.id}.jsonl").open("ab") as journal:
        journal.write(bytes(60))
    assert spool.attempts(REF) == 1
    spool.note(REF, "claimed")
    assert spool.attempts(REF) == 2


# The end


@pytest.mark.parametrize("claimed", [False, True])
def test_finish_puts_a_job_away_from_pending_and_from_active(spool: Spool, claimed: bool) -> None:
    accept(spool, REF, OTHER)
    if claimed:
        spool.claim(REF)
    spool.finish({REF: "cancelled"})
    assert spool.where(REF) is State.DONE
    assert spool.read(REF) == b"job"
    assert [line["event"] for line in spool.story(REF)][-1] == "cancelled"
    assert waiting(spool) == [OTHER]
    assert spool.tickets(State.ACTIVE) == []
    assert not spool.accept(REF, b"job")


def test_finish_twice_is_once(spool: Spool) -> None:
    accept(spool, REF)
    spool.finish({REF: "cancelled"})
    spool.finish({REF: "cancelled"})
    assert [ticket.ref for ticket in spool.tickets(State.DONE)] == [REF]


def test_a_job_that_is_nowhere_cannot_be_read(spool: Spool) -> None:
    with pytest.raises(FileNotFoundError, match=REF.id):
        spool.read(REF)


# After a crash


@pytest.mark.parametrize(
    ("states", "truth"),
    [
        ((State.PENDING, State.ACTIVE), State.ACTIVE),
        ((State.ACTIVE, State.DONE), State.DONE),
        ((State.PENDING, State.DONE), State.DONE),
        ((State.PENDING, State.ACTIVE, State.DONE), State.DONE),
    ],
)
def test_of_two_places_of_a_job_the_later_is_true(spool: Spool, states: tuple[State, ...], truth: State) -> None:
    for state in states:
        put(spool, state)
    put(spool, State.PENDING, OTHER)
    spool.sweep()
    assert [state for state in State if REF in [ticket.ref for ticket in spool.tickets(state)]] == [truth]
    assert spool.read(REF) == truth.encode()
    assert waiting(spool)[-1] == OTHER


def test_half_written_jobs_are_swept(spool: Spool) -> None:
    job = put(spool, State.PENDING)
    half = job.with_name(f".{job.name}.tmp")
    half.write_bytes(b"ha")
    spool.sweep()
    assert list(job.parent.iterdir()) == [job]


def test_recovery_leaves_the_inbox_alone(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders in there are their clients', who may forbid us to open them; one that is mounted may hang."""
    (spool.root / "inbox" / "bob").mkdir(parents=True)
    opened: list[str] = []
    monkeypatch.setattr(files, "settle", lambda path: opened.append(str(path)))
    monkeypatch.setattr(os, "scandir", _telling(os.scandir, opened))
    spool.sweep()
    assert [path for path in opened if path.startswith(str(spool.root / "inbox"))] == []
    assert str(spool.root) in opened


def _telling(scandir: Callable[[Any], Any], opened: list[str]) -> Callable[[Any], Any]:
    def call(path: Any) -> Any:
        opened.append(str(path))
        return scandir(path)

    return call


# One owner


def test_a_second_daemon_is_refused_and_told_of_the_first(spool: Spool) -> None:
    with pytest.raises(SpoolLocked, match=f"pid {os.getpid()}"):
        Spool(spool.root).open()
    spool.close()
    opened(spool.root).close()


def test_the_death_of_its_owner_frees_a_spool(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            owner = opened(root)
            os.write(writing, b"mine")
            while owner:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            assert pipe.read(4) == b"mine"
        with pytest.raises(SpoolLocked, match=f"pid {pid}"):
            Spool(root).open()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    spool = opened(root)
    assert (root / ".owner").read_text() == str(os.getpid())
    spool.close()


def test_a_spool_of_a_newer_format_is_refused_untouched(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / ".version").write_text("2\n")
    with pytest.raises(SpoolUnusable, match="format '2'"):
        Spool(tmp_path).open()
    (tmp_path / ".version").write_text("1\n")
    opened(tmp_path).close()  # the refused one holds no lock
