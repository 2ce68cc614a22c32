"""A reader of recorded lives: was all on which a step relies synced before it?

It follows a disk that keeps only what was synced, and says where a step was taken too early.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from conftest import CLIENT
from disk import KILLED, SYNCS, Op, Recorder
from scene import Scene

import imagend
from imagend import files
from imagend.job import Outcome, Ref
from imagend.outputs import MANIFEST
from imagend.spool import EVENTS, State

# The record


class Step(NamedTuple):
    """Something that was done. `point` names the place in imagend that asked for a sync."""

    op: Op
    point: str = ""


class Tracer(Recorder):
    """Records what was done, paths relative to the home."""

    def __init__(self, scene: TracedScene) -> None:
        super().__init__()
        self.scene = scene

    def after(self, op: Op) -> None:
        op = op._replace(path=self._relative(op.path), target=self._relative(op.target))
        self.scene.trace.append(Step(op, sync_point(op) if op.name in SYNCS else ""))

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.scene.home.root) if path else path


class SyncKiller(Tracer):
    """Ends this process in place of the n-th sync, counted from 0, and leaves its record behind."""

    def __init__(self, scene: TracedScene, point: int) -> None:
        super().__init__(scene)
        self.left = point

    def before(self, op: Op) -> None:
        if self.armed and op.name in SYNCS:
            self.left -= 1
        if self.left < 0:
            self.left = sys.maxsize
            self.scene.will.write_bytes(pickle.dumps(self.scene.trace))
            os._exit(KILLED)


@dataclass
class TracedScene(Scene):
    trace: list[Step] = field(default_factory=list)

    @property
    def will(self) -> Path:
        return self.home.root / "will"

    def refill(self) -> None:
        super().refill()
        self.trace.clear()

    def note_run(self, ref: Ref) -> None:
        super().note_run(ref)
        self.trace.append(Step(Op("run", ref.id)))

    def note_delivery(self, name: str) -> None:
        path = self.inbox / name
        self.trace.append(Step(Op("deliver", str(path.relative_to(self.home.root)), data=path.read_bytes())))

    def note_stop(self) -> None:
        self.trace.append(Step(Op("stop", "")))


_HOUSE = str(Path(imagend.__file__).parent)
_HELPERS = ("note", "_move", "_check", "_folder_of")


def sync_point(op: Op) -> str:
    """The verb that asked for this sync, and of what. A thread syncs for a verb that waits in the main thread."""
    for thread in (threading.get_ident(), threading.main_thread().ident):
        frame = sys._current_frames().get(thread or 0)
        while frame is not None:
            code = frame.f_code
            house = code.co_filename.startswith(_HOUSE) and code.co_filename != files.__file__
            if house and code.co_name not in _HELPERS:
                return f"{code.co_name}: {anonymous(op.path)}"
            frame = frame.f_back
    raise AssertionError(f"{op.path} is synced from outside of imagend")


def anonymous(text: str) -> str:
    return re.sub(r"/\d{4}\.png", "/PICTURE", re.sub("[0-9a-f]{20}", "ID", text))


# The reader


class Disk:
    """What of the disk would not survive a power cut now."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.unsynced: set[str] = set()
        """files with bytes that were not synced"""
        self.names: set[str] = set()
        """paths that came or went since their folder was synced"""

    def does(self, op: Op) -> None:
        match op.name:
            case "open" if op.path not in self.files:
                self.files.add(op.path)
                self.names.add(op.path)
            case "open" | "write" | "utime" | "truncate":
                self.unsynced.add(op.path)
            case "mkdir":
                self.names.add(op.path)
            case "rmdir":  # what had been in it goes with it
                self.names -= {path for path in self.names if path.startswith(f"{op.path}/")}
                self.names.add(op.path)
            case "unlink" | "remove":
                self.names.add(op.path)
                self.files.discard(op.path)
                self.unsynced.discard(op.path)
            case "link":
                self.files.add(op.target)
                self.names.add(op.target)
                if op.path in self.unsynced:
                    self.unsynced.add(op.target)
            case "rename" | "replace":
                for paths in (self.files, self.unsynced, self.names):
                    moved = {path for path in paths if path == op.path or path.startswith(f"{op.path}/")}
                    paths -= moved
                    paths |= {op.target + path.removeprefix(op.path) for path in moved}
                self.names |= {op.path, op.target}
            case "fsync":
                self.unsynced.discard(op.path)
                self.names -= {path for path in self.names if _folder(path) == op.path}
            case "syncfs":
                for paths in (self.unsynced, self.names):
                    paths -= {path for path in paths if f"{path}/".startswith(f"{op.path}/")}

    def safe(self, path: str) -> bool:
        """Whether it is there and would survive, with its bytes and with every folder on the way."""
        if path not in self.files or path in self.unsynced:
            return False
        while path != ".":
            if path in self.names:
                return False
            path = _folder(path)
        return True

    def all_safe_in(self, folder: str) -> bool:
        return not any(path.startswith(f"{folder}/") for path in self.unsynced | self.names)


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "."


FEED = "outputs/results.jsonl"
_JOB = re.compile(rf"spool/(pending|active|done)/{CLIENT}/([0-9a-f]{{20}})\.json")
_DROPPED = re.compile(r"spool/inbox/(cancel\.)?([0-9a-f]{20})\.[0-9.]*json")
_TEMPORARY = re.compile(r".*/\.[^/]*\.tmp")
_NAMED_FIRST = re.compile(r"spool/pending/.*|outputs/\.drafts/.*")
"""Synced after they got their names: nobody takes the first for a job before, nor looks into the second."""
_HINT = re.compile(
    r"spool/\.+(lock|owner|owner\.tmp|ballast|ballast\.tmp)|spool/\.?(status|durations)\.json(\.tmp)?"
    r"|outputs/\w+/\.?\w+\.state\.json(\.tmp)?|spool/events\.jsonl"
)
_MAY_BE_LOST = re.compile(rf"{_HINT.pattern}|outputs/\.drafts/.*|spool/journal/.*")
"""Stale after a crash anyway; painted again; the words of the journal on which nothing depends."""


def violations(trace: Iterable[Step]) -> list[str]:
    """Where a step was taken before that on which it relies was safe. The record begins with an empty spool."""
    reader = Reader()
    for step in trace:
        reader.reads(step.op)
    return reader.found


class Reader:
    def __init__(self) -> None:
        self.disk = Disk()
        self.events: dict[str, list[str]] = {}
        """of a job's journal"""
        self.runs: Counter[str] = Counter()
        self.announced: set[str] = set()
        self.refused: set[str] = set()
        self.found: list[str] = []

    def demand(self, holds: bool, what: str, op: Op) -> None:
        if not holds:
            self.found.append(f"{what}: {op.name} {op.path} {op.target}".rstrip())

    def reads(self, op: Op) -> None:
        match op.name:
            case "rename" | "replace":
                self.rename(op)
            case "link":
                self.link(op)
            case "unlink":
                self.unlink(op)
            case "write":
                self.write(op)
            case "run":
                self.run(op)
            case "stop":
                self.stop()
        self.disk.does(op)

    def rename(self, op: Op) -> None:
        if _TEMPORARY.fullmatch(op.path) and not _HINT.fullmatch(op.path) and not _NAMED_FIRST.fullmatch(op.target):
            self.demand(op.path not in self.disk.unsynced, "published before its bytes were safe", op)
        elif op.path.startswith("outputs/.drafts/") and not _NAMED_FIRST.fullmatch(op.target):
            self.demand(self.disk.all_safe_in(op.path), "published before all of the draft was safe", op)
            self.demand(f"{op.path}/{MANIFEST}" in self.disk.files, "published without its manifest", op)
        elif op.path.startswith("spool/inbox/"):
            self.refused.add(op.path)
            self.demand(self.disk.safe(f"{op.target}.reason.json"), "rejected before the reason was safe", op)
        else:
            self.demand(_JOB.fullmatch(op.target) is None or _TEMPORARY.fullmatch(op.path), "moved by a rename", op)

    def link(self, op: Op) -> None:
        """A job gets its name in the next state."""
        if (job := _JOB.fullmatch(op.target)) is None:
            return
        told = {State.ACTIVE: ("claimed",), State.PENDING: ("released", "requeued"), State.DONE: tuple(Outcome)}
        state, id = State(job[1]), job[2]
        self.demand(self.events.get(id, [""])[-1] in told[state], "moved before the journal told of it", op)
        if state is State.DONE:
            self.demand(self.published(id), "put away before the result was safe", op)
            self.demand(id in self.announced and self.disk.safe(FEED), "put away before the feed told of it", op)
        elif state is State.PENDING:
            self.demand(self.disk.safe(_journal(id)), "moved before the journal was safe", op)

    def unlink(self, op: Op) -> None:
        """A file leaves a state, or the inbox, for good."""
        if (job := _JOB.fullmatch(op.path)) is not None:
            elsewhere = (state for state in State if state != job[1])
            safe = any(self.disk.safe(_place(state, job[2])) for state in elsewhere)
            self.demand(safe, "left its state before it was safe in the next", op)
        if (dropped := _DROPPED.fullmatch(op.path)) is None:
            return
        is_cancel, id = dropped.groups()
        if is_cancel:
            wished = "cancel" in self.events.get(id, ()) and self.disk.safe(_journal(id))
            self.demand(wished or self.published(id), "left the inbox before the wish was safe", op)
        else:
            queued = any(self.disk.safe(_place(state, id)) for state in State)
            self.demand(queued or self.published(id), "left the inbox before it was safe in the queue", op)

    def write(self, op: Op) -> None:
        folder, _, name = op.path.rpartition("/")
        if folder == f"spool/journal/{CLIENT}":
            events = re.findall(r'"event": "(\w+)"', op.data.decode())
            self.events.setdefault(name.removesuffix(".jsonl"), []).extend(events)
        elif op.path == FEED:
            for id in re.findall(r'"id": "(\w+)"', op.data.decode()):
                self.announced.add(id)
                self.demand(self.published(id), "announced before the result was safe", op)
        elif op.path == f"spool/{EVENTS}":
            self.told(op)
        elif not _MAY_BE_LOST.fullmatch(op.path):
            self.demand(_TEMPORARY.fullmatch(op.path) is not None, "written in place", op)

    def told(self, op: Op) -> None:
        """The live feed may be lost, but what it tells is true."""
        for line in op.data.splitlines():
            event = json.loads(line)
            word, id = event["type"].removeprefix("imagend."), event["data"].get("id")
            if word in ("completed", "failed", "cancelled"):
                self.demand(self.published(id), "told before the result was safe", op)
            if word == "queued":
                safe = any(self.disk.safe(_place(state, id)) for state in State)
                self.demand(safe or self.published(id), "told before it was safe in the queue", op)

    def run(self, op: Op) -> None:
        """The work begins: a job that kills the machine must run out of attempts."""
        id = op.path
        self.runs[id] += 1
        self.demand(self.events.get(id, []).count("claimed") >= self.runs[id], "run without a claim", op)
        self.demand(self.disk.safe(_journal(id)), "run before the claim was safe", op)
        self.demand(self.disk.safe(_place(State.ACTIVE, id)), "run before it was safe in active", op)

    def stop(self) -> None:
        """A daemon that leaves in peace leaves nothing behind."""
        for path in sorted(self.disk.unsynced | self.disk.names):
            taken_in = path.startswith("spool/inbox/") and path not in self.refused  # would be known when it came back
            left = _JOB.fullmatch(path) and path not in self.disk.files  # the later of two places is true
            if not taken_in and not left and not _MAY_BE_LOST.fullmatch(path) and not _TEMPORARY.fullmatch(path):
                self.demand(False, "never synced", Op("stop", path))

    def published(self, id: str) -> bool:
        return self.disk.safe(f"outputs/{CLIENT}/{id}/{MANIFEST}")


def _place(state: State, id: str) -> str:
    return f"spool/{state}/{CLIENT}/{id}.json"


def _journal(id: str) -> str:
    return f"spool/journal/{CLIENT}/{id}.jsonl"
