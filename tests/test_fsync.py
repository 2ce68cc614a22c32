"""What a power cut may take: at each step, all that the step relies on has been synced before.

Nothing is cut here. A life is recorded, and one function reads the record as a disk that keeps only what was synced.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from conftest import CLIENT, Home
from test_crash import KILLED, Op, Painter, Recorder, Scene, big_scene, check, kill, live, quick_home, quiet, watched

import imagend
from imagend import files
from imagend.daemon.ending import Ending
from imagend.daemon.intake import Arrival, Door
from imagend.job import Manifest, Outcome, Ref
from imagend.messages import Message
from imagend.outputs import MANIFEST, Outputs
from imagend.spool import Spool, State

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
__all__ = ["quick_home", "quiet"]  # fixtures


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
        self.scene.trace.append(Step(op, sync_point(op, sys._getframe(1)) if op.name == "fsync" else ""))

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.scene.home.root) if path else path


class SyncKiller(Tracer):
    """Ends this process in place of the n-th sync, counted from 0, and leaves its record behind."""

    def __init__(self, scene: TracedScene, point: int) -> None:
        super().__init__(scene)
        self.left = point

    def before(self, op: Op) -> None:
        if self.armed and op.name == "fsync":
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

    def note_stop(self) -> None:
        self.trace.append(Step(Op("stop", "")))


_HOUSE = str(Path(imagend.__file__).parent)
_HELPERS = ("note", "_move", "_check")


def sync_point(op: Op, frame: FrameType | None) -> str:
    """The verb that asked for this sync, and of what."""
    while frame is not None:
        code = frame.f_code
        house = code.co_filename.startswith(_HOUSE) and code.co_filename != files.__file__
        if house and code.co_name not in _HELPERS:
            break
        frame = frame.f_back
    assert frame is not None, f"{op.path} is synced from outside of imagend"
    return f"{frame.f_code.co_name}: {anonymous(op.path)}"


def anonymous(text: str) -> str:
    return re.sub("[0-9a-f]{20}", "ID", text)


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
            case "mkdir" | "rmdir":
                self.names.add(op.path)
            case "unlink" | "remove":
                self.names.add(op.path)
                self.files.discard(op.path)
                self.unsynced.discard(op.path)
            case "link":
                self.files.add(op.target)
                self.names.add(op.target)
            case "rename" | "replace":
                for paths in (self.files, self.unsynced, self.names):
                    moved = {path for path in paths if path == op.path or path.startswith(f"{op.path}/")}
                    paths -= moved
                    paths |= {op.target + path.removeprefix(op.path) for path in moved}
                self.names |= {op.path, op.target}
            case "fsync":
                self.unsynced.discard(op.path)
                self.names -= {path for path in self.names if _folder(path) == op.path}

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
_HINT = re.compile(r"spool/\.+(lock|owner|owner\.tmp|status\.json\.tmp)|spool/status\.json")
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
        if _TEMPORARY.fullmatch(op.path) and not _HINT.fullmatch(op.path):
            self.demand(op.path not in self.disk.unsynced, "published before its bytes were safe", op)
        elif op.path.startswith("outputs/.drafts/"):
            self.demand(self.disk.all_safe_in(op.path), "published before all of the draft was safe", op)
            self.demand(f"{op.path}/{MANIFEST}" in self.disk.files, "published without its manifest", op)
        elif op.path.startswith("spool/inbox/"):
            self.refused.add(op.path)
            self.demand(self.disk.safe(f"{op.target}.reason.json"), "rejected before the reason was safe", op)
        elif (job := _JOB.fullmatch(op.target)) is not None:
            self.move(op, job[2], State(job[1]))

    def move(self, op: Op, id: str, state: State) -> None:
        """A job goes from one state to the next."""
        told = {State.ACTIVE: ("claimed",), State.PENDING: ("released", "requeued"), State.DONE: tuple(Outcome)}
        self.demand(self.at_rest(), "moved before the last move was safe", op)
        self.demand(self.events.get(id, [""])[-1] in told[state], "moved before the journal told of it", op)
        if state is State.DONE:
            self.demand(self.published(id), "put away before the result was safe", op)
            self.demand(id in self.announced and self.disk.safe(FEED), "put away before the feed told of it", op)
        else:
            self.demand(self.disk.safe(_journal(id)), "moved before the journal was safe", op)

    def unlink(self, op: Op) -> None:
        """A file leaves the inbox for good."""
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
        elif not _MAY_BE_LOST.fullmatch(op.path):
            self.demand(_TEMPORARY.fullmatch(op.path) is not None, "written in place", op)

    def run(self, op: Op) -> None:
        """The work begins: a job that kills the machine must run out of attempts."""
        id = op.path
        self.runs[id] += 1
        self.demand(self.events.get(id, []).count("claimed") >= self.runs[id], "run without a claim", op)
        self.demand(self.disk.safe(_journal(id)), "run before the claim was safe", op)
        active = self.disk.safe(_place(State.ACTIVE, id)) and self.at_rest()
        self.demand(active, "run before it was safe in active", op)

    def stop(self) -> None:
        """A daemon that leaves in peace leaves nothing behind."""
        for path in sorted(self.disk.unsynced | self.disk.names):
            taken_in = path.startswith("spool/inbox/") and path not in self.refused  # would be known when it came back
            if not taken_in and not _MAY_BE_LOST.fullmatch(path) and not _TEMPORARY.fullmatch(path):
                self.demand(False, "never synced", Op("stop", path))

    def published(self, id: str) -> bool:
        return self.disk.safe(f"outputs/{CLIENT}/{id}/{MANIFEST}")

    def at_rest(self) -> bool:
        """Whether no job would be found elsewhere, or in two places."""
        return not any(_JOB.fullmatch(path) for path in self.disk.names)


def _place(state: State, id: str) -> str:
    return f"spool/{state}/{CLIENT}/{id}.json"


def _journal(id: str) -> str:
    return f"spool/journal/{CLIENT}/{id}.jsonl"


# A good life


def record(scene: TracedScene) -> list[Step]:
    scene.refill()
    with watched(Tracer(scene)):
        live(scene)
    return list(scene.trace)


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> TracedScene:
    return big_scene(quick_home, TracedScene)


@pytest.fixture(scope="module")
def trace(scene: TracedScene) -> list[Step]:
    return record(scene)


def test_nothing_relies_on_what_a_power_cut_may_take(scene: TracedScene, trace: list[Step]) -> None:
    check(scene, deaths=0)
    assert {anonymous(violation) for violation in violations(trace)} == set()
    assert len(trace) > 300


def test_nor_after_a_death(scene: TracedScene, trace: list[Step]) -> None:
    """The next life must not rely on what the dead one wrote and did not live to sync."""
    found: dict[str, str] = {}
    for point in range(sum(step.op.name == "fsync" for step in trace)):
        scene.refill()
        assert kill(scene, SyncKiller(scene, point)) == KILLED
        before = pickle.loads(scene.will.read_bytes())  # noqa: S301
        with watched(Tracer(scene)):
            live(scene)
        last = before[-1].op
        for violation in violations(before + scene.trace):
            if not re.match("never synced: stop spool/(inbox|rejected)/", violation):  # it would be refused again
                found.setdefault(anonymous(violation), anonymous(f"{last.name} {last.path} {last.target}"))
    assert not found, "".join(f"\n{violation}, after a death upon {last}" for violation, last in found.items())


# One sync less


SYNC_POINTS = (
    "_check_version: spool/..version.tmp",
    "_open_or_make: spool",
    "reject: spool/rejected/.refused.json.reason.json.tmp",
    "reject: spool/rejected/.unfinished.json.reason.json.tmp",
    "reject: spool/rejected",
    "reject: spool/inbox",
    "accept: spool/pending",
    "accept: spool/pending/alice/.ID.json.tmp",
    "commit: spool/pending/alice",
    "claim: spool/journal",
    "claim: spool/journal/alice",
    "claim: spool/journal/alice/ID.jsonl",
    "claim: spool/active",
    "claim: spool/active/alice",
    "claim: spool/pending/alice",
    "requeue: spool/journal/alice/ID.jsonl",
    "requeue: spool/pending/alice",
    "requeue: spool/active/alice",
    "release: spool/journal/alice/ID.jsonl",
    "release: spool/pending/alice",
    "release: spool/active/alice",
    "cancel: spool/journal/alice/ID.jsonl",
    "seal: outputs/.drafts/alice/ID/0000.png",
    "seal: outputs/.drafts/alice/ID/0001.png",
    "publish: outputs/.drafts/alice/ID/.manifest.json.tmp",
    "publish: outputs/.drafts/alice/ID",
    "publish: outputs",
    "publish: outputs/alice",
    "announce: outputs",
    "announce: outputs/results.jsonl",
    "finish: spool/done",
    "finish: spool/done/alice",
    "finish: spool/active/alice",
    "finish: spool/pending/alice",
)
SPARE = {
    "open: .": "recovery syncs it again, before anything lies in outputs/",
    "open: spool": "the folders made later sync it again, before anything relies on it",
    "_check_version: spool": "the same; and without .version the file is written anew",
    "open: outputs": "publish syncs it again; before that, nothing of worth is in it",
    "publish: outputs/.drafts/alice": "a draft that comes back is swept",
}
AT_START = re.compile(r"(open|sweep|settle|recover): .*")
"""For what a dead daemon left behind: test_nor_after_a_death needs them, a good life does not."""


@pytest.mark.parametrize("point", SYNC_POINTS)
def test_one_sync_less_is_seen(trace: list[Step], point: str) -> None:
    less = [step for step in trace if step.point != point]
    assert less != trace
    assert len(violations(less)) > len(violations(trace))


def test_every_sync_is_known(trace: list[Step]) -> None:
    """A sync that nobody would miss is a cost, or a promise that no test keeps."""
    known = {*SYNC_POINTS, *SPARE}
    assert {step.point for step in trace if step.point not in known and not AT_START.fullmatch(step.point)} == {""}


# Two steps swapped, or one left out


Breaks = Callable[[pytest.MonkeyPatch], None]


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    def write_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
        path.write_bytes(data)
        files.sync(path)

    patch.setattr(files, "write_unsynced", write_unsynced)


def set_the_time_after_the_sync(patch: pytest.MonkeyPatch) -> None:
    real = files.write_unsynced

    def write_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        real(temporary, data)
        os.utime(temporary, ns=(mtime_ns or 0, mtime_ns or 0))
        temporary.rename(path)

    patch.setattr(files, "write_unsynced", write_unsynced)


def never_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spool, "commit", lambda self: None)


def empty_the_inbox_first(patch: pytest.MonkeyPatch) -> None:
    real = Door._examine

    def examine(self: Door, name: str, now: float) -> Arrival | None:
        arrival = real(self, name, now)
        if arrival is not None:
            (self.inbox / name).unlink()
        return arrival

    patch.setattr(Door, "_examine", examine)


def reject_before_the_reason(patch: pytest.MonkeyPatch) -> None:
    real = files.write
    late: list[tuple[Path, bytes]] = []

    def move(source: Path, target: Path) -> None:
        _move(source, target)
        while late:
            real(*late.pop())

    def write(path: Path, data: bytes) -> None:
        if path.name.endswith(".reason.json"):
            late.append((path, data))
        else:
            real(path, data)

    _move = files.move
    patch.setattr(files, "write", write)
    patch.setattr(files, "move", move)


def claim_after_the_move(patch: pytest.MonkeyPatch) -> None:
    def claim(self: Spool, ref: Ref) -> int:
        self._move(ref, State.PENDING, State.ACTIVE)
        self.note(ref, "claimed", durable=True)
        return self.attempts(ref)

    patch.setattr(Spool, "claim", claim)


def run_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    real, send = Spool.claim, Painter.send
    late: list[Callable[[], object]] = []

    def claim(self: Spool, ref: Ref) -> int:
        late.append(lambda: real(self, ref))
        return self.attempts(ref) + 1

    def claim_late(self: Painter, worker: str, message: Message) -> None:
        send(self, worker, message)
        while late:
            late.pop()()

    patch.setattr(Spool, "claim", claim)
    patch.setattr(Painter, "send", claim_late)


def requeue_before_the_journal(patch: pytest.MonkeyPatch) -> None:
    def requeue(self: Spool, ref: Ref, why: str) -> None:
        self._move(ref, State.ACTIVE, State.PENDING)
        self.note(ref, "requeued", durable=True, why=why)

    patch.setattr(Spool, "requeue", requeue)


def forget_cancels(patch: pytest.MonkeyPatch) -> None:
    _note_otherwise(patch, lambda event, durable: None if event == "cancel" else durable)


def note_in_passing(patch: pytest.MonkeyPatch) -> None:
    _note_otherwise(patch, lambda event, durable: False)


def _note_otherwise(patch: pytest.MonkeyPatch, how: Callable[[str, bool], bool | None]) -> None:
    real = Spool.note

    def note(self: Spool, ref: Ref, event: str, durable: bool = False, **details: Any) -> None:
        if (durably := how(event, durable)) is not None:
            real(self, ref, event, durably, **details)

    patch.setattr(Spool, "note", note)


def never_seal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outputs, "seal", lambda *arguments: None)


def manifest_after_the_move(patch: pytest.MonkeyPatch) -> None:
    def publish(self: Outputs, ref: Ref, manifest: Manifest) -> None:
        target = self.root / ref.client / ref.id
        files.make_folder(target.parent)
        files.sync(self.draft(ref))
        files.move(self.draft(ref), target)
        files.write(target / MANIFEST, manifest.model_dump_json().encode())

    patch.setattr(Outputs, "publish", publish)


def put_away_before_publishing(patch: pytest.MonkeyPatch) -> None:
    publish = Outputs.publish
    late: list[Callable[[], None]] = []

    def finish(self: Ending, ref: Ref, manifest: Manifest) -> None:
        self.spool.finish(ref, manifest.outcome)
        while late:
            late.pop()()
        self.outputs.announce(ref)

    patch.setattr(Outputs, "publish", lambda *arguments: late.append(lambda: publish(*arguments)))
    patch.setattr(Ending, "finish", finish)


def put_away_before_announcing(patch: pytest.MonkeyPatch) -> None:
    finish, announce = Spool.finish, Outputs.announce
    late: list[Callable[[], None]] = []

    def finish_first(self: Spool, ref: Ref, outcome: str) -> None:
        finish(self, ref, outcome)
        while late:
            late.pop()()

    patch.setattr(Outputs, "announce", lambda *arguments: late.append(lambda: announce(*arguments)))
    patch.setattr(Spool, "finish", finish_first)


MUTANTS: dict[Breaks, str] = {
    write_in_place: "written in place",
    set_the_time_after_the_sync: "published before its bytes were safe",
    never_commit: "left the inbox before it was safe in the queue",
    empty_the_inbox_first: "left the inbox before it was safe in the queue",
    reject_before_the_reason: "rejected before the reason was safe",
    claim_after_the_move: "moved before the journal told of it",
    run_before_the_claim: "run without a claim",
    requeue_before_the_journal: "moved before the journal told of it",
    forget_cancels: "left the inbox before the wish was safe",
    note_in_passing: "run before the claim was safe",
    never_seal: "published before all of the draft was safe",
    manifest_after_the_move: "published without its manifest",
    put_away_before_publishing: "put away before the result was safe",
    put_away_before_announcing: "put away before the feed told of it",
}


@pytest.mark.parametrize("breaks", MUTANTS, ids=lambda breaks: breaks.__name__)
def test_a_wrong_order_is_seen(scene: TracedScene, breaks: Breaks) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        found = violations(record(scene))
    assert {violation.partition(":")[0] for violation in found} >= {MUTANTS[breaks]}
