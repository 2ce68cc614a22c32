"""Kill the daemon in place of every single disk operation; the next start must lose nothing and repeat nothing.

A death here is the process's alone: what it wrote stays, in whatever order. Power cuts are test_fsync's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import structlog
from conftest import CLIENT, Home, make_home, step
from fakes import FakeExecutor

from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.loop import Daemon
from imagend.job import Ref
from imagend.messages import Message, Run
from imagend.signing import Key, job_id
from imagend.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12, where there are threads

KILLED = 9
MAX_ATTEMPTS = 3
_rename, _open, _write, _close = os.rename, os.open, os.write, os.close  # for the world outside of the daemon


# The disk, watched


class Op(NamedTuple):
    """A change of the disk, made by os, pathlib, shutil or open()."""

    name: str
    path: str
    target: str = ""
    data: bytes = b""


class Watcher:
    """Is told of every change before it is made and after it was made."""

    def before(self, op: Op) -> None: ...

    def before_write(self, op: Op, tear: Callable[[int], object]) -> None:
        """tear(n) writes the first n bytes only."""
        self.before(op)

    def after(self, op: Op) -> None: ...

    def fsync(self, fd: int) -> None:
        """Deaths of a process do not need the real one, and it takes most of the time."""


_BY_PATH = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate", "utime")
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


AnyScene = TypeVar("AnyScene", bound="Scene")


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While it lasts, `watcher` sees each change that this process makes.

    pathlib and shutil look their functions up in `os` (pathlib opens by io.open) at each call, so they are seen too;
    test_nothing_escapes_the_watcher holds that against Python's own audit events.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in _BY_PATH:
            patch.setattr(os, name, _by_path(name, getattr(os, name), watcher))
        patch.setattr(os, "fsync", _fsync(watcher))
        patch.setattr(os, "open", _os_open(os.open, watcher))
        patch.setattr(os, "write", _os_write(os.write, watcher))
        opened = _io_open(io.open, watcher)
        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        yield


def _where(path: Any, folder: int | None = None) -> str:
    """The absolute path of a path, a file descriptor, or a name in an open folder."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    if folder is not None:
        return f"{_where(folder)}/{os.fspath(path)}"
    above, _, name = os.path.abspath(path).rpartition("/")  # noqa: PTH100
    return f"{os.path.realpath(above) if above.startswith('/proc/') else above}/{name}"


def _by_path(name: str, real: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        two = name in ("rename", "replace", "link")
        op = Op(name, _where(path, kwargs.get("dir_fd")), _where(args[0]) if two else "")
        watcher.before(op)
        result = real(path, *args, **kwargs)
        watcher.after(op)
        return result

    return call


def _fsync(watcher: Watcher) -> Callable[[int], None]:
    def call(fd: int) -> None:
        op = Op("fsync", _where(fd))
        watcher.before(op)
        watcher.fsync(fd)
        watcher.after(op)

    return call


def _os_open(real: Callable[..., int], watcher: Watcher) -> Callable[..., int]:
    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & _CHANGING:
            return real(path, flags, *args, **kwargs)
        op = Op("open", _where(path, kwargs.get("dir_fd")))
        watcher.before(op)
        fd = real(path, flags, *args, **kwargs)
        watcher.after(op)
        return fd

    return call


def _os_write(real: Callable[[int, Any], int], watcher: Watcher) -> Callable[[int, Any], int]:
    def call(fd: int, data: Any) -> int:
        op = Op("write", _where(fd), data=bytes(data))
        if not op.path.startswith("/"):  # a pipe, not the disk
            return real(fd, data)
        watcher.before_write(op, lambda length: real(fd, op.data[:length]))
        written = real(fd, data)
        watcher.after(op)
        return written

    return call


def _io_open(real: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    class Raw(io.FileIO):
        """The lowest layer of a file object: its write() is the write(2) that a flush or a close makes."""

        def write(self, data: Any) -> int:
            op = Op("write", _where(self.fileno()), data=bytes(data))
            plain = super().write
            watcher.before_write(op, lambda length: plain(op.data[:length]))
            written = plain(op.data)
            watcher.after(op)
            return written

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        op = Op("open", _where(file))
        if not isinstance(file, int):
            watcher.before(op)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if not isinstance(file, int):
            watcher.after(op)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return call


class Recorder(Watcher):
    """Keeps what was done. `armed` is False while something is going on that does not matter."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.armed = True

    def before(self, op: Op) -> None:
        if self.armed:
            self.ops.append(op)


class Killer(Recorder):
    """Ends this process at the n-th point, counted from 0. Each operation is a point: the death comes in its place.

    A write is three: nothing of it is written, half of it, or all but its last byte. A sync is none: it changes nothing
    that the dead leave behind, so a death in its place is the death in place of what follows.
    """

    def __init__(self, point: int) -> None:
        super().__init__()
        self.left = point

    def die(self) -> None:
        os._exit(KILLED)

    def before(self, op: Op) -> None:
        super().before(op)
        if op.name != "fsync" and self._due():
            self.die()

    def before_write(self, op: Op, tear: Callable[[int], object]) -> None:
        self.before(op)
        for length in (len(op.data) // 2, len(op.data) - 1):
            if self._due():
                tear(length)
                self.die()

    def _due(self) -> bool:
        if not self.armed:
            return False
        self.left -= 1
        return self.left < 0


class ClaimKiller(Killer):
    """Ends this process when it would move a job to active/."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize)

    def before(self, op: Op) -> None:
        if op.name == "rename" and "/active/" in op.target:
            self.die()


def points(ops: Iterable[Op]) -> list[str]:
    """Where a Killer may strike, in words."""
    parts = {"fsync": (), "write": ("", " (half)", " (but for its last byte)")}
    return [f"{op.name} {op.path} {op.target}{part}" for op in ops for part in parts.get(op.name, ("",))]


# A scene: jobs, and what the world does to them while the daemon works


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

    def add(
        self, outcome: str, code: str | None = None, twins: int = 1, late_twin: bool = False, **fields: Any
    ) -> None:
        """A job. That it is to be cancelled tells the world to do so."""
        body = self.home.body(**fields)
        ref = Ref(CLIENT, job_id(CLIENT, body))
        self.files |= {f"{ref.id}.{twin}.json": self.home.seal(body) for twin in range(twins)}
        if late_twin:
            self.later[f"{ref.id}.{twins}.json"] = self.home.seal(body)
        if outcome == "cancelled":
            self.later[f"cancel.{ref.id}.json"] = self.home.sealed(kind="cancel", job=ref.id, prompt=...)
        self.expected[ref] = (outcome, code, fields.get("count", 1) if outcome == "succeeded" else 0)

    def add_junk(self, name: str, raw: bytes, code: str) -> None:
        self.files[name] = raw
        self.junk[name] = code

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
    scene.add("succeeded", prompt="two pictures", seed=7, count=2)
    scene.add("succeeded", prompt="dropped twice", twins=2)
    scene.add("failed", "INVALID_PARAMETERS", prompt="fail")
    scene.add("failed", "WORKER_DIED", prompt="die")
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


def check(scene: Scene, deaths: int = 1) -> None:
    """The promises, at the end of a life that nothing disturbed, after so many deaths."""
    check_nothing_is_half(scene)
    home, ids = scene.home, sorted(ref.id for ref in scene.expected)
    for folder in (scene.inbox, home.config.spool / "pending", home.config.spool / "active"):
        assert [str(path) for path in folder.rglob("*") if not path.is_dir()] == []
    assert sorted(path.name for path in (home.config.spool / "done" / CLIENT).iterdir()) == [f"{id}.json" for id in ids]
    assert sorted(path.name for path in (home.config.outputs / CLIENT).iterdir()) == ids
    assert list((home.config.outputs / ".drafts").glob("*/*")) == []
    lines = list(feed(scene))
    assert sorted(line["id"] for line in lines) == ids
    outcomes = {line["id"]: line["outcome"] for line in lines}
    for ref in scene.expected:
        check_end(scene, ref, deaths)
        assert outcomes[ref.id] == home.outcome(ref)
    check_rejected(scene)
    assert {when for _, when in scene.runs()} <= {"in time"}


def check_rejected(scene: Scene) -> None:
    """Each once, and with its reason."""
    folder = scene.home.config.spool / "rejected"
    reasons = {f"{name}.reason.json" for name in scene.junk}
    assert {path.name for path in folder.glob("[!.]*")} == reasons | scene.junk.keys()
    for name, code in scene.junk.items():
        assert scene.home.reason(name)["code"] == code
        assert (folder / name).read_bytes() == scene.files[name]


def check_end(scene: Scene, ref: Ref, deaths: int) -> None:
    spool, manifest = Spool(scene.home.config.spool), scene.home.manifest(ref)
    found = manifest["outcome"], manifest.get("error", {}).get("code"), len(manifest["artifacts"])
    worn_out = deaths >= MAX_ATTEMPTS == manifest["attempts"] and found == ("failed", "WORKER_DIED", 0)
    assert worn_out or found == scene.expected[ref]
    assert manifest["attempts"] == spool.attempts(ref) <= MAX_ATTEMPTS
    released = [line["event"] for line in spool.story(ref)].count("released")
    assert [id for id, _ in scene.runs()].count(ref.id) - released <= MAX_ATTEMPTS


def check_nothing_is_half(scene: Scene) -> None:
    """What holds at every moment: a result is whole or not there, and no job is nowhere."""
    for folder in (scene.home.config.outputs / CLIENT).glob("*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        digests = {item["file"]: item["sha256"] for item in manifest["artifacts"]}
        assert {path.name for path in folder.iterdir()} == {"manifest.json", *digests}
        for name, digest in digests.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    spool = Spool(scene.home.config.spool)
    for ref in scene.expected:
        assert spool.where(ref) or any(scene.inbox.glob(f"{ref.id}.*.json")), f"{ref} is lost"


def feed(scene: Scene) -> Iterator[dict[str, Any]]:
    """The lines of results.jsonl; a death in the middle of a write may leave a piece of one."""
    for line in (scene.home.config.outputs / "results.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def complaints(*claims: Callable[[], object]) -> str:
    """What the first claim that does not hold says."""
    for claim in claims:
        try:
            claim()
        except Exception as error:  # any, a missing file too
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


# The tests


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


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> Scene:
    scene = big_scene(quick_home, Scene)
    scene.litter = {
        f"outputs/.drafts/{CLIENT}/{'0' * 20}/0000.png": b"of a job that is no more",
        f"spool/pending/{CLIENT}/.{'0' * 20}.json.tmp": b"of a job that never was",
    }
    return scene


@dataclass
class Survey:
    """What came of a death at every point of a life."""

    ops: list[Op]
    complaints: list[str] = field(default_factory=list)
    recoveries: dict[tuple[str, ...], int] = field(default_factory=dict)
    """A way in which a recovery went, by its operations: a point of death that leads to it."""


@pytest.fixture(scope="module")
def survey(scene: Scene) -> Survey:
    recorder = Recorder()
    scene.refill()
    with watched(recorder):
        live(scene)
    result = Survey(recorder.ops)
    for point, place in enumerate(points(result.ops)):
        scene.refill()
        status = kill(scene, Killer(point))
        recovery: list[Op] = []
        found = complaints(
            lambda: check_nothing_is_half(scene),
            lambda: recovery.extend(survive(scene)),  # noqa: B023
            lambda: check(scene),
        )
        if status != KILLED or found:
            result.complaints.append(f"in place of {place}: {found or status}")
        else:
            result.recoveries.setdefault(signature(scene, recovery), point)
    return result


def signature(scene: Scene, ops: Iterable[Op]) -> tuple[str, ...]:
    """What happened and to what end, without what tells one job from another."""
    ids = re.compile("|".join(ref.id for ref in scene.expected))
    ends = re.compile(rb'"outcome": ?"\w+"|"code": ?"\w+"')
    return tuple(
        ids.sub("ID", f"{op.name} {op.path} {op.target} {ends.findall(op.data)}") for op in ops if op.name != "fsync"
    )


def test_a_life_without_a_death(scene: Scene) -> None:
    scene.refill()
    survive(scene)
    check(scene, deaths=0)
    manifests = [scene.home.manifest(ref) for ref in scene.expected]
    assert {manifest["spec"]["prompt"]: manifest["attempts"] for manifest in manifests} == {
        "stay": 1,
        "never painted": 0,
        "two pictures": 1,
        "dropped twice": 1,
        "fail": 1,
        "die": MAX_ATTEMPTS,
        "stop": 1,
    }
    assert len(scene.runs()) == 5 + MAX_ATTEMPTS + 1  # "stop" ran twice, "never painted" never


def test_nothing_escapes_the_watcher(scene: Scene) -> None:
    """Python tells its audit hooks of every change but writes and syncs; each must have passed the watcher."""
    names = {"os.rename": "rename", "os.remove": "unlink", "open": "open"} | {
        f"os.{name}": name for name in ("mkdir", "rmdir", "utime", "truncate", "link", "symlink")
    }

    def work() -> tuple[Counter[str], Counter[str]]:  # in a child: an audit hook stays for ever
        heard: Counter[str] = Counter()
        watcher = Recorder()

        def hook(event: str, args: tuple[Any, ...]) -> None:
            reads = event == "open" and (isinstance(args[0], int) or not args[2] & _CHANGING)  # an int is open already
            if event in names and not reads:
                heard[names[event]] += 1

        with watched(watcher):
            sys.addaudithook(hook)
            live(scene)
            told = heard.copy()
        told.subtract(open=len(scene.runs()), rename=len(scene.later) + 2)  # by the world, behind the watcher's back
        same = {"replace": "rename", "remove": "unlink"}
        seen = Counter(same.get(op.name, op.name) for op in watcher.ops if op.name not in ("write", "fsync"))
        return told, seen

    scene.refill()
    status, (heard, seen) = in_child(work)
    assert status == 0
    assert heard == seen
    assert seen["rename"] > 20


def test_every_point_of_death(survey: Survey) -> None:
    assert not survey.complaints, "\n" + "\n".join(survey.complaints)
    assert len(points(survey.ops)) > 300


def test_every_point_of_death_in_a_recovery(scene: Scene, survey: Survey) -> None:
    """Of all deaths that lead to the same recovery one stands for the rest; its recovery is killed at each point."""
    places, wrong, count = points(survey.ops), [], 0
    for first in survey.recoveries.values():
        for second in itertools.count():
            scene.refill()
            kill(scene, Killer(first))
            if kill(scene, Killer(second), only_recovery=True) == 0:
                break
            count += 1
            found = complaints(lambda: check_nothing_is_half(scene), lambda: survive(scene), lambda: check(scene))
            if found:
                wrong.append(f"in place of {places[first]}, then at point {second} of the recovery: {found}")
    assert not wrong, "\n" + "\n".join(wrong)
    assert count > 100


@pytest.mark.parametrize("seed", range(40))
def test_death_upon_death(scene: Scene, survey: Survey, seed: int) -> None:
    dice = random.Random(seed)
    scene.refill()
    for _ in range(dice.randint(2, 4)):
        assert kill(scene, Killer(dice.randrange(len(points(survey.ops))))) in (0, KILLED)
        check_nothing_is_half(scene)
    survive(scene)
    check(scene, deaths=4)


def test_deaths_during_a_claim_do_not_make_attempts_beyond_the_limit(scene: Scene) -> None:
    """Again and again between the journal's "claimed" and the rename."""
    scene.refill()
    for _ in range(MAX_ATTEMPTS + 1):
        kill(scene, ClaimKiller())
    survive(scene)
    check(scene, deaths=MAX_ATTEMPTS + 1)
