"""A scene: jobs, what the world does to them while the daemon works, and what must hold whatever befalls the daemon."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from conftest import CLIENT, Home, make_home, step
from disk import Killer, Op, Recorder, watched
from fakes import FakeExecutor

from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.loop import Daemon
from imagend.feed import lines
from imagend.job import Ref
from imagend.messages import Message, Run
from imagend.signing import Key, job_id
from imagend.spool import Spool

MAX_ATTEMPTS = 3
AnyScene = TypeVar("AnyScene", bound="Scene")
_rename, _open, _write, _close = os.rename, os.open, os.write, os.close  # for the world outside of the daemon


# The world


class Painter(FakeExecutor):
    """Notes each Run where no fault reaches it, and lets the world act while a job runs."""

    def __init__(self, mailbox: Mailbox, scene: Scene) -> None:
        super().__init__(mailbox)
        self.scene = scene

    def send(self, worker: str, message: Message) -> None:
        if isinstance(message, Run):
            self.scene.note_run(message.job)
        super().send(worker, message)

    def attempt(self, worker: str, run: Run) -> None:
        prompt = run.spec["prompt"]
        if prompt == "stay":
            self.scene.deliver()
        if prompt == "stop" and self.scene.happens_once("stop"):
            self.mailbox.put(StopRequested())
            return
        super().attempt(worker, run)


@dataclass
class Scene:
    """One home, refilled for each life. Bodies stay the same, so ids do."""

    home: Home
    files: dict[str, bytes] = field(default_factory=dict)
    later: dict[str, bytes] = field(default_factory=dict)
    """comes to the inbox while a job stays in the worker's hands"""
    litter: dict[str, bytes] = field(default_factory=dict)
    """by its path: what earlier crashes left"""
    expected: dict[Ref, tuple[str, str | None, int]] = field(default_factory=dict)
    """outcome, error code, number of pictures"""
    junk: dict[str, str] = field(default_factory=dict)
    """file name: error code"""
    others: dict[str, Key] = field(default_factory=dict)
    """clients besides the usual one"""

    def add(
        self,
        outcome: str,
        code: str | None = None,
        twins: int = 1,
        late_twin: bool = False,
        client: str = CLIENT,
        **fields: Any,
    ) -> None:
        """A job. That it is to be cancelled tells the world to do so."""
        home = replace(self.home, key=self.others.get(client, self.home.key))
        body = home.body(**fields)
        ref = Ref(client, job_id(client, body))
        self.files |= {f"{ref.id}.{twin}.json": home.seal(body) for twin in range(twins)}
        if late_twin:
            self.later[f"{ref.id}.{twins}.json"] = home.seal(body)
        if outcome == "cancelled":
            self.later[f"cancel.{ref.id}.json"] = home.sealed(kind="cancel", job=ref.id, prompt=...)
        steps = 0 if outcome != "succeeded" else 2 if "chain" in fields else 1
        if fields["prompt"] == "upscaling fails":
            steps = 1
        self.expected[ref] = (outcome, code, steps * fields.get("count", 1))

    def add_junk(self, name: str, raw: bytes, code: str) -> None:
        self.files[name] = raw
        self.junk[name] = code

    @property
    def clients(self) -> list[str]:
        return sorted({ref.client for ref in self.expected})

    @property
    def inbox(self) -> Path:
        return self.home.config.inboxes[0]

    @property
    def world(self) -> Path:
        """A folder of the test's own: what the world has yet to do, and what it saw."""
        return self.home.root / "world"

    def refill(self) -> None:
        """The state before the first life."""
        for folder in (self.home.config.spool, self.home.config.outputs, self.world):
            shutil.rmtree(folder, ignore_errors=True)
        self.inbox.mkdir(parents=True)
        for name, raw in self.files.items():
            (self.inbox / name).write_bytes(raw)
        self.world.mkdir()
        for name, raw in self.later.items():
            (self.world / name).write_bytes(raw)
        for name, raw in self.litter.items():
            (self.home.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home.root / name).write_bytes(raw)
        (self.world / "stop").touch()
        (self.world / "runs").touch()

    def deliver(self) -> None:
        for name in self.later:
            with contextlib.suppress(FileNotFoundError):  # it was delivered before
                _rename(self.world / name, self.inbox / name)
                self.note_delivery(name)

    def deliver_the_rest(self) -> None:
        """The world does not die with the daemon in whose process it acts: it finishes what it began."""
        if not all((self.world / name).exists() for name in self.later):
            self.deliver()

    def note_delivery(self, name: str) -> None: ...

    def happens_once(self, name: str) -> bool:
        try:
            _rename(self.world / name, self.world / f"{name} was")
        except FileNotFoundError:
            return False
        return True

    def note_run(self, ref: Ref) -> None:
        again = (self.home.config.outputs / ref.client / ref.id).exists()
        fd = _open(self.world / "runs", os.O_WRONLY | os.O_APPEND)
        _write(fd, f"{ref.id} {'after its end' if again else 'in time'}\n".encode())
        _close(fd)

    def note_stop(self) -> None: ...

    def runs(self) -> list[tuple[str, str]]:
        lines = (self.world / "runs").read_text().splitlines()
        return [(id, when) for id, _, when in (line.partition(" ") for line in lines)]


def big_scene(home: Home, kind: type[AnyScene]) -> AnyScene:
    """Every way a job can go, in one life."""
    scene = kind(home)
    scene.add("cancelled", prompt="stay", priority=9, late_twin=True)  # while running
    scene.add("cancelled", prompt="never painted", priority=0)  # while queued
    scene.add("succeeded", prompt="two pictures", seed=7, count=2, priority=8)  # these three one after the other
    scene.add("succeeded", prompt="dropped twice", twins=2, priority=7)
    scene.add("failed", "INVALID_PARAMETERS", prompt="fail", priority=6)
    scene.add("failed", "WORKER_DIED", prompt="die")
    scene.add("succeeded", prompt="two steps", priority=4, chain={"upscale": {}})
    scene.add("failed", "INVALID_PARAMETERS", prompt="upscaling fails", priority=3, chain={"upscale": {}})
    scene.add("succeeded", prompt="stop", priority=1)  # meets a clean stop of the daemon
    scene.add_junk("refused.json", home.sealed(widht=64), "INVALID_PARAMETERS")
    scene.add_junk("unfinished.json", b"{}", "UNAUTHORIZED")
    return scene


def start(scene: Scene) -> Daemon:
    """A daemon whose waits take no time: the clock jumps a second whenever it is read."""
    daemon = scene.home.daemon(
        lambda mailbox: Painter(mailbox, scene), heartbeat_s=1e-9, file_grace_s=1e-9, max_attempts=MAX_ATTEMPTS
    )
    seconds = itertools.count()
    daemon.clock = lambda: float(next(seconds))
    daemon._patience_s = lambda: 0.0  # type: ignore[method-assign]
    return daemon


def live(scene: Scene) -> None:
    """One life: until nothing is left to do. A clean stop on the way is followed by a new start."""
    daemon = start(scene)
    for _ in range(300):
        more = step(daemon)
        stopped = daemon.stopped
        done = not daemon.stopping and not more and not any(scene.inbox.iterdir())
        if stopped or done:
            daemon.spool.close()
            scene.note_stop()
        if done:
            return
        if stopped:
            daemon = start(scene)
    raise AssertionError(f"never done; inbox: {os.listdir(scene.inbox)}, busy: {daemon.busy}")  # noqa: PTH208


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run work() in a forked process: its exit status, and what it returned if it lived so long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _write(writing, pickle.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pickle.loads(told) if told else None  # noqa: S301


def dies_at(point: int, work: Callable[[], object]) -> int:
    """Run work() in a child that is killed at that point; its exit status, 0 if it lived."""

    def until_then() -> None:
        with watched(Killer(point)):
            work()

    return in_child(until_then)[0]


def kill(scene: Scene, killer: Recorder, only_recovery: bool = False) -> int:
    """A life that the killer ends, perhaps; the exit status, 0 if it did not."""

    def work() -> None:
        with armed_in_recovery(killer) if only_recovery else contextlib.nullcontext(), watched(killer):
            live(scene)

    return in_child(work)[0]


def survive(scene: Scene) -> list[Op]:
    """A life that nothing disturbs, in this process; what its recovery did."""
    recorder = Recorder()
    with armed_in_recovery(recorder), watched(recorder):
        live(scene)
    return recorder.ops


@contextlib.contextmanager
def armed_in_recovery(watcher: Recorder) -> Iterator[None]:
    recover = Daemon.recover

    def armed(daemon: Daemon) -> None:
        watcher.armed = True
        recover(daemon)
        watcher.armed = False

    watcher.armed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Daemon, "recover", armed)
        yield


# What must hold


def check_rejected(scene: Scene) -> None:
    """Each once, and with its reason."""
    folder = scene.home.config.spool / "rejected"
    reasons = {f"{name}.reason.json" for name in scene.junk}
    assert {path.name for path in folder.glob("[!.]*")} == reasons | scene.junk.keys()
    check_answered(scene)
    for name in scene.junk:
        assert (folder / name).read_bytes() == scene.files[name]


def check_answered(scene: Scene) -> None:
    """Each has a reason at least; a power cut may have taken either end of its rename, and it was refused again."""
    for name, code in scene.junk.items():
        assert scene.home.reason(name)["code"] == code


def check_end(scene: Scene, ref: Ref, deaths: int) -> None:
    spool, manifest = Spool(scene.home.config.spool), scene.home.manifest(ref)
    found = manifest["outcome"], manifest.get("error", {}).get("code"), len(manifest["artifacts"])
    worn_out = deaths >= MAX_ATTEMPTS == manifest["attempts"] and found == ("failed", "WORKER_DIED", 0)
    assert worn_out or found == scene.expected[ref]
    assert manifest["attempts"] == spool.attempts(ref) <= MAX_ATTEMPTS
    released = [line["event"] for line in spool.story(ref)].count("released")
    assert [id for id, _ in scene.runs()].count(ref.id) - released <= MAX_ATTEMPTS


def check(scene: Scene, deaths: int = 1, refused: Callable[[Scene], None] = check_rejected) -> None:
    """The promises, at the end of a life that nothing disturbed, after so many deaths."""
    check_nothing_is_half(scene)
    home, ids = scene.home, sorted(ref.id for ref in scene.expected)
    for folder in (scene.inbox, home.config.spool / "pending", home.config.spool / "active"):
        assert [str(path) for path in folder.rglob("*") if not path.is_dir()] == []
    for client in scene.clients:
        theirs = sorted(ref.id for ref in scene.expected if ref.client == client)
        done = sorted(path.name for path in (home.config.spool / "done" / client).iterdir())
        assert done == [f"{id}.json" for id in theirs]
        assert sorted(path.name for path in (home.config.outputs / client).iterdir()) == theirs
    assert list((home.config.outputs / ".drafts").glob("*/*")) == []
    lines = list(feed(scene))
    assert sorted(line["id"] for line in lines) == ids
    outcomes = {line["id"]: line["outcome"] for line in lines}
    for ref in scene.expected:
        check_end(scene, ref, deaths)
        assert outcomes[ref.id] == home.outcome(ref)
    refused(scene)
    assert {when for _, when in scene.runs()} <= {"in time"}


def check_nothing_is_half(scene: Scene) -> None:
    """What holds at every moment: a result is whole or not there, and no job is nowhere."""
    for folder in scene.home.config.outputs.glob("[!.]*/*/"):
        manifest = json.loads((folder / "manifest.json").read_text())
        digests = {item["file"]: item["sha256"] for item in manifest["artifacts"]}
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        assert there == {"manifest.json", *digests}
        for name, digest in digests.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    spool = Spool(scene.home.config.spool)
    for ref in scene.expected:
        assert spool.where(ref) or any(scene.inbox.glob(f"{ref.id}.*.json")), f"{ref} is lost"


def feed(scene: Scene) -> Iterator[dict[str, Any]]:
    """The lines of results.jsonl, and of those before it; a death in the middle of a write may leave a piece of one."""
    for line, _ in lines(scene.home.config.outputs / "results.jsonl", None):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def complaints(*claims: Callable[[], object]) -> str:
    """What the first claim that does not hold says."""
    for claim in claims:
        try:
            claim()
        except Exception as error:  # any, a missing file too
            said = str(error).splitlines() or [str(traceback.extract_tb(error.__traceback__)[-1].line)]
            return f"{type(error).__name__}: {said[0]}"
    return ""


# For the tests that play it


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Logging costs more than the disk, and the complaints tell where it went wrong."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def quick_home(key: Key) -> Iterator[Home]:
    memory = Path("/dev/shm")  # a disk that takes no time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield make_home(Path(folder).resolve(), key)
