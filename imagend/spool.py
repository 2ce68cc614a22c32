"""spool/: where jobs lie. A job's state is the folder its file is in; only this module moves jobs.

    inbox/ ──accept──▶ pending/ ──claim──▶ active/ ──finish──▶ done/
                           ◀──requeue, release──┘

A job lies at <state>/<client>/<id>.json; its bytes are what its client signed and never change.
journal/<client>/<id>.jsonl tells its story and counts its attempts.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagend import files
from imagend.errors import SpoolLocked, SpoolUnusable
from imagend.job import Ref

if TYPE_CHECKING:
    from filelock import FileLock

VERSION = 1
STATUS = "status.json"
STALE_INTERVALS = 3
"""Readers take the daemon for dead when status.json's heartbeat is older than so many of its intervals."""


class State(enum.StrEnum):
    PENDING = "pending"
    ACTIVE = "active"
    DONE = "done"


class Ticket(NamedTuple):
    """A job in the queue; `accepted` is nanoseconds since the epoch, kept as the file's mtime over every rename."""

    accepted: int
    ref: Ref


class Spool:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: FileLock | None = None
        self._unsynced: set[Path] = set()
        self._latest = 0

    # One owner

    def open(self) -> None:
        """Create what is missing and become the only daemon here; the kernel drops the lock when we die."""
        for folder in (*State, "journal"):
            files.make_folder(self.root / folder)
        self._check_version()
        from filelock import FileLock, Timeout  # here: commands that only look need neither

        lock = FileLock(self.root / ".lock", timeout=0, fallback_to_soft=False)  # a soft lock outlives its holder
        try:
            lock.acquire()
        except Timeout:
            raise SpoolLocked(self._owner(), self.root) from None
        self._lock = lock
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
        """Queue the verified bytes; False if the job is here already. Durable once commit() has returned."""
        if self.where(ref) is not None:
            return False
        path = self._path(State.PENDING, ref)
        files.make_folder(path.parent)
        self._latest = max(self._latest + 1, time.time_ns())  # two jobs of one clock tick keep their order
        files.write_unsynced(path, raw, mtime_ns=self._latest)
        self._unsynced.add(path.parent)
        return True

    def commit(self) -> None:
        """One fsync per folder for all jobs accepted since the last commit."""
        while self._unsynced:
            folder = next(iter(self._unsynced))
            files.sync(folder)
            self._unsynced.discard(folder)

    def claim(self, ref: Ref) -> int:
        """Take a pending job; return which attempt this is, counting from 1.

        The journal says so before the rename and the work: a job that kills the machine must run out of attempts. But a
        claim that never got to its rename is taken up again, not counted twice.
        """
        events = self._events(ref)
        if events[-1:] == ["claimed"]:
            files.sync(self._journal(ref))
        else:
            self.note(ref, "claimed", durable=True)
            events.append("claimed")
        self._move(ref, State.PENDING, State.ACTIVE)
        return _attempts(events)

    def requeue(self, ref: Ref, why: str) -> None:
        """An attempt failed; another may do."""
        self.note(ref, "requeued", durable=True, why=why)
        self._move(ref, State.ACTIVE, State.PENDING)

    def release(self, ref: Ref) -> None:
        """Give a job back unharmed, as at a clean stop: this attempt does not count."""
        self.note(ref, "released", durable=True)
        self._move(ref, State.ACTIVE, State.PENDING)

    def finish(self, ref: Ref, outcome: str) -> None:
        """The job has ended (its manifest is published): put its file away."""
        self.note(ref, outcome)
        for state in (State.ACTIVE, State.PENDING):
            if self._path(state, ref).exists():
                self._move(ref, state, State.DONE)

    def where(self, ref: Ref) -> State | None:
        """The state of a job, None if there is no such job."""
        return next((state for state in State if self._path(state, ref).exists()), None)

    def tickets(self, state: State) -> list[Ticket]:
        """The jobs in a state, in the order in which they were accepted."""
        found = sorted(self._scan(state))
        self._latest = max(self._latest, found[-1].accepted if found else 0)  # whatever the clock says since
        return found

    def read(self, ref: Ref) -> bytes:
        for state in State:
            with contextlib.suppress(FileNotFoundError):
                return self._path(state, ref).read_bytes()
        raise FileNotFoundError(str(ref))

    def accepted(self, ref: Ref) -> int:
        """When the job was accepted, in nanoseconds since the epoch."""
        state = self.where(ref)
        return self._path(state, ref).stat().st_mtime_ns if state else 0

    def sweep(self) -> None:
        """Tidy what a crash left: half-written files, and the earlier of two places of a job (the later is true).

        First of all, what we see becomes durable: the dead may have renamed it and not lived to sync it.
        """
        files.sync(self.root.parent)
        files.sync(self.root)
        for folder in (*State, "journal"):  # not all of spool/: an inbox is its clients' and may hang or refuse us
            files.settle(self.root / folder, depth=1)
        for state in (State.PENDING, State.ACTIVE):
            for path in (self.root / state).glob("*/.*.tmp"):
                path.unlink()
        for earlier, later in ((State.ACTIVE, State.DONE), (State.PENDING, State.DONE), (State.PENDING, State.ACTIVE)):
            for _, ref in self.tickets(earlier):
                if self._path(later, ref).exists():
                    files.remove(self._path(earlier, ref))

    # The journal

    def note(self, ref: Ref, event: str, durable: bool = False, **details: Any) -> None:
        path = self._journal(ref)
        files.make_folder(path.parent)
        line = {"at": round(time.time(), 3), "event": event, **details}
        files.append(path, json.dumps(line).encode(), durable=durable)

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
        return [line["event"] for line in self.story(ref)]

    def _journal(self, ref: Ref) -> Path:
        return self.root / "journal" / ref.client / f"{ref.id}.jsonl"

    def _path(self, state: State, ref: Ref) -> Path:
        return self.root / state / ref.client / f"{ref.id}.json"

    def _move(self, ref: Ref, source: State, target: State) -> None:
        path = self._path(target, ref)
        files.make_folder(path.parent)
        files.move(self._path(source, ref), path)

    def _scan(self, state: State) -> Iterator[Ticket]:
        for client in os.scandir(self.root / state):
            for entry in os.scandir(client.path) if client.is_dir() else ():
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    ref = Ref(client.name, entry.name.removesuffix(".json"))
                    yield Ticket(entry.stat().st_mtime_ns, ref)


def _attempts(events: list[str]) -> int:
    return events.count("claimed") - events.count("released")
