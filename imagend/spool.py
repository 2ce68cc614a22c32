"""spool/: where jobs lie. A job's state is the folder its file is in; only this module moves jobs.

    inbox/ ──accept──▶ pending/ ──claim──▶ active/ ──finish──▶ done/
                           ◀──requeue, release──┘

A job lies at <state>/<client>/<id>.json; its bytes are what its client signed and never change.
journal/<client>/<id>.jsonl tells its story and counts its attempts.

A job never moves by rename: it gets its name in the next folder, that becomes durable, then it loses the old name. No
file system may lose it between the two (POSIX lets each end of a rename reach the disk alone); found in two folders,
the later one is true. Every step may be repeated after an error or a crash.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagend import attachments, files
from imagend.errors import SpoolLocked, SpoolUnusable
from imagend.job import Ref

if TYPE_CHECKING:
    from filelock import FileLock

VERSION = 1
STATUS = "status.json"
EVENTS = "events.jsonl"
DAMAGED = "damaged"
REOPENED = "reopened"
STALE_INTERVALS = 3
"""Readers take the daemon for dead when status.json's heartbeat is older than so many of its intervals."""


class State(enum.StrEnum):
    PENDING = "pending"
    ACTIVE = "active"
    DONE = "done"


_LATEST_FIRST = tuple(reversed(State))


class Ticket(NamedTuple):
    """A job in the queue; `accepted` is nanoseconds since the epoch, kept as the file's mtime over every rename."""

    accepted: int
    ref: Ref


class Spool:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.attachments = attachments.Attachments(root / attachments.FOLDER)
        self._lock: FileLock | None = None
        self._new: list[Path] = []
        self._known: list[Path] = []
        self._folders: set[Path] = set()
        self._distrusted: set[Path] = set()
        self._latest = 0

    # One owner

    def open(self) -> None:
        """Create what is missing and become the only daemon here; the kernel drops the lock when we die."""
        for folder in (*State, DAMAGED):
            files.make_folder(self.root / folder, 0o711)  # who knows a job's id may see where it is, not what it says
        files.make_folder(self.root / "journal", 0o700)
        self._check_version()
        from filelock import FileLock, Timeout  # here: commands that only look need neither

        lock = FileLock(self.root / ".lock", timeout=0, fallback_to_soft=False)  # a soft lock outlives its holder
        try:
            lock.acquire()
        except Timeout:
            raise SpoolLocked(self._owner(), self.root) from None
        self._lock = lock
        with contextlib.suppress(OSError):  # only told to a second daemon
            files.replace_hint(self.root / ".owner", str(os.getpid()).encode())

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _owner(self) -> str:
        try:
            return (self.root / ".owner").read_text()
        except OSError:
            return "unknown"

    def _check_version(self) -> None:
        path = self.root / ".version"
        if not path.exists():
            files.write(path, f"{VERSION}\n".encode())
        elif (found := path.read_text().strip()) != str(VERSION):
            raise SpoolUnusable(path, f"this spool has format {found!r}, this imagend knows format {VERSION}")

    # The queue

    def accept(self, ref: Ref, raw: bytes) -> bool:
        """Queue the verified bytes; False if the job is here already. Either way durable once commit() has returned."""
        state = self.where(ref)
        if state is not None and self._path(state, ref) not in self._distrusted:
            self._known.append(self._path(state, ref))  # perhaps by one who died before its commit()
            return False
        path, journal = self._path(State.PENDING, ref), self._journal(ref)
        files.make_folder(path.parent, 0o711)
        files.make_folder(journal.parent, 0o700)
        self._new.append(path)
        files.touch(journal, 0o600)  # now, because one sync of its folder is enough for the whole batch
        self._folders |= {path.parent, journal.parent}
        files.write_unsynced(path, raw, 0o600, mtime_ns=self._time_ns())
        return True

    def _time_ns(self) -> int:
        """For a job that is queued now: two of one clock tick keep their order."""
        self._latest = max(self._latest + 1, time.time_ns())
        return self._latest

    def commit(self) -> None:
        """Make all durable that was accepted since the last commit; one fsync per folder. Else none was accepted."""
        try:
            known = [path for path in self._known if path.exists()]  # it may have moved on meanwhile
            files.sync_all(known + self._new)
            files.sync_all(self._folders | {path.parent for path in known})
        except OSError:
            self.abandon()
            raise
        self._distrusted.difference_update(self._new)
        self._new, self._known, self._folders = [], [], set()

    def abandon(self) -> None:
        """Take back what was accepted since the last commit; should that fail, too, it is not taken for known."""
        self._distrusted.update(self._new)
        for path in self._new:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._new, self._known, self._folders = [], [], set()

    def claim(self, ref: Ref, sync_too: Iterable[Path] = ()) -> int:
        """Take a pending job; return which attempt this is, counting from 1. Durable, so before the work: a job that
        kills the machine must run out of attempts. But a claim that never got so far is taken up again, not counted.

        `sync_too`: other paths that shall be durable, in the same commit of a journalled file system.
        """
        events, journal = self._events(ref), self._journal(ref)
        first = [journal] if journal.exists() else [journal, journal.parent]
        if events[-1:] == ["claimed"]:
            files.write(journal, journal.read_bytes(), 0o600)
        else:
            self.note(ref, "claimed")
            events.append("claimed")
        self._move([ref], State.PENDING, State.ACTIVE, sync_first=[*first, *sync_too])
        return _attempts(events)

    def requeue(self, ref: Ref, why: str) -> None:
        """An attempt failed; another may do."""
        self.note(ref, "requeued", durable=True, why=why)
        self._move([ref], State.ACTIVE, State.PENDING)

    def release(self, ref: Ref) -> None:
        """Give a job back unharmed, as at a clean stop: this attempt does not count."""
        self.note(ref, "released", durable=True)
        self._move([ref], State.ACTIVE, State.PENDING)

    def finish(self, outcomes: Mapping[Ref, str]) -> None:
        """These jobs have ended (their manifests are published): put their files away, all in one go."""
        for ref, outcome in outcomes.items():
            self.note(ref, outcome)
        self._move(outcomes, State.ACTIVE, State.DONE)
        for ref in outcomes:  # an interrupted claim left both names
            self._path(State.PENDING, ref).unlink(missing_ok=True)
            self.attachments.release(ref)

    def reopen(self, ref: Ref, manifest: Mapping[str, Any]) -> None:
        """Note, durably, how a job had ended that is to be tried again: attempts count anew from here."""
        error = manifest.get("error") or {}
        told = {"outcome": manifest.get("outcome"), "ended_at": manifest.get("ended_at"), "code": error.get("code")}
        self.note(ref, REOPENED, durable=True, **told, message=error.get("message"))

    def is_reopened(self, ref: Ref) -> bool:
        """Whether nothing has happened to the job since reopen()."""
        story = self.story(ref)
        return bool(story) and story[-1]["event"] == REOPENED

    def requeue_ended(self, ref: Ref) -> None:
        """Put a job that was reopened back into the queue, behind those that wait."""
        here, there = self._path(State.DONE, ref), self._path(State.PENDING, ref)
        files.make_folder(there.parent, 0o711)
        files.write(there, files.read(self._place(State.DONE, ref)), 0o600, mtime_ns=self._time_ns())
        files.remove(here)

    def bury(self, ref: Ref) -> None:
        """Forget all of an ended job but its id: an empty file, as old as the job is, in the place of its own."""
        path, journal = self._path(State.DONE, ref), self._journal(ref)
        accepted = self.accepted(ref) or time.time_ns()
        files.make_folder(path.parent, 0o711)
        files.write(path, b"", 0o600, mtime_ns=accepted)
        if journal.parent.is_dir():
            files.remove(journal)

    def where(self, ref: Ref) -> State | None:
        """The state of a job, the latest if it stands in two; None if there is no such job."""
        return next((state for state in _LATEST_FIRST if files.exists(self._place(state, ref))), None)

    def tickets(self, state: State) -> list[Ticket]:
        """The jobs in a state, in the order in which they were accepted."""
        found = sorted(Ticket(entry.stat().st_mtime_ns, _ref(entry, client)) for entry, client in self._entries(state))
        self._latest = max(self._latest, found[-1].accepted if found else 0)  # whatever the clock says since
        return found

    def read(self, ref: Ref) -> bytes:
        for state in State:
            with contextlib.suppress(FileNotFoundError):
                return files.read(self._place(state, ref))
        raise FileNotFoundError(str(ref))

    def read_pending(self, refs: Iterable[Ref]) -> Iterator[bytes]:
        """What read() says of each; they must be pending. For 100,000 of them."""
        return files.read_many([self._place(State.PENDING, ref) for ref in refs])

    def accepted(self, ref: Ref) -> int:
        """When the job was accepted, in nanoseconds since the epoch."""
        state = self.where(ref)
        return self._path(state, ref).stat().st_mtime_ns if state else 0

    def sweep(self) -> None:
        """Tidy what a crash left: half-written files, and the earlier of two places of a job (the later is true).

        First of all, what we see becomes durable: the dead may have written it and not lived to sync it.
        """
        files.settle(self.root)
        for folder in (State.PENDING, "journal"):
            for path in (self.root / folder).glob("*/.*.tmp"):
                path.unlink()
        for earlier, later in ((State.ACTIVE, State.DONE), (State.PENDING, State.DONE), (State.PENDING, State.ACTIVE)):
            few, other = (later, earlier) if later is State.ACTIVE else (earlier, later)  # 100,000 may be pending
            for entry, client in self._entries(few):
                ref = _ref(entry, client)
                if files.exists(self._place(other, ref)):
                    files.remove(self._path(earlier, ref))

    def set_aside(self, ref: Ref) -> None:
        """Keep a job's file where nothing reads it: its bytes are not those of its id."""
        target = self.root / DAMAGED / ref.client / f"{ref.id}.json"
        files.make_folder(target.parent, 0o711)
        files.move(self._path(State.PENDING, ref), target)

    def ended(self) -> Iterator[tuple[float, Ref]]:
        """Each job in done/, with when it came there; in no order."""
        for entry, client in self._entries(State.DONE):
            with contextlib.suppress(FileNotFoundError):
                yield entry.stat().st_ctime, _ref(entry, client)

    def forget(self, ref: Ref) -> None:
        """Remove what is left of a job that has ended. Its file last, because by that it is found again."""
        self._journal(ref).unlink(missing_ok=True)
        self._path(State.DONE, ref).unlink(missing_ok=True)

    # The journal

    def note(self, ref: Ref, event: str, durable: bool = False, **details: Any) -> None:
        path = self._journal(ref)
        files.make_folder(path.parent, 0o700)
        line = {"at": round(time.time(), 3), "event": event, **details}
        files.append(path, json.dumps(line).encode() + b"\n", 0o600, durable=durable)

    def story(self, ref: Ref) -> list[dict[str, Any]]:
        """What happened to a job, oldest first; a line cut by a crash is left out."""
        try:
            lines = self._journal(ref).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        story = []
        for line in lines:
            with contextlib.suppress(ValueError):
                story.append(json.loads(line))
        return story

    def attempts(self, ref: Ref) -> int:
        return _attempts(self._events(ref))

    def cancel_wanted(self, ref: Ref) -> bool:
        return "cancel" in self._events(ref)

    def _events(self, ref: Ref) -> list[str]:
        """Since the job was accepted, or reopened."""
        events = [line["event"] for line in self.story(ref)]
        began = max((place for place, event in enumerate(events, 1) if event == REOPENED), default=0)
        return events[began:]

    def _journal(self, ref: Ref) -> Path:
        return Path(f"{self.root}/journal/{ref.client}/{ref.id}.jsonl")

    def _path(self, state: State, ref: Ref) -> Path:
        return Path(self._place(state, ref))

    def _place(self, state: State, ref: Ref) -> str:
        return f"{self.root}/{state}/{ref.client}/{ref.id}.json"

    def _move(self, refs: Iterable[Ref], source: State, target: State, sync_first: Iterable[Path] = ()) -> None:
        moves = []
        for ref in refs:
            here, there = self._path(source, ref), self._path(target, ref)
            if target is State.DONE and not here.exists():
                here = self._path(State.PENDING, ref)  # it ended while it was queued
            if here.exists():  # else this was interrupted, and is done
                files.make_folder(there.parent, 0o711)
                files.link(here, there)
                moves.append((here, there))
        files.sync_all([*sync_first, *{there.parent for _, there in moves}])
        for here, _ in moves:
            here.unlink()

    def _entries(self, state: State) -> Iterator[tuple[os.DirEntry[str], str]]:
        """Each job's file, and whose it is."""
        for client in os.scandir(self.root / state):
            for entry in os.scandir(client.path) if client.is_dir() else ():
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    yield entry, client.name


def _ref(entry: os.DirEntry[str], client: str) -> Ref:
    return Ref(client, entry.name.removesuffix(".json"))


def _attempts(events: list[str]) -> int:
    return events.count("claimed") - events.count("released")
