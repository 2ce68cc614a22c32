"""The real thing: the daemon's process killed by SIGKILL at its system calls, by strace; and its worker, and both.

Nothing of imagend is replaced here but the painter, and in the second half not even that.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Home, step
from disk import Op, Recorder, watched
from scene import (
    MAX_ATTEMPTS,
    Scene,
    big_scene,
    check,
    check_nothing_is_half,
    complaints,
    in_child,
    live,
    quick_home,
    quiet,
)

from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import LocalExecutor

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
__all__ = ["quick_home", "quiet"]  # fixtures

CALLS = (
    "openat", "write", "pwrite64", "fsync", "syncfs", "rename", "renameat", "renameat2", "link", "linkat", "unlink",
    "unlinkat", "mkdir", "mkdirat", "ftruncate", "utimensat",
)  # fmt: skip
SAMPLE = 48
_PR_SET_PTRACER = 0x59616D61  # prctl(2): where Yama is in force, a tracer must be allowed


class Point(NamedTuple):
    call: str
    number: int
    """counted from 1, in each thread"""


def traced(scene: Scene, *options: str) -> int:
    """A life under strace; its exit status. Skips where nothing may be traced."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
            os.close(writing)
            os.read(reading, 1)
            live(scene)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(reading)
    strace = subprocess.Popen(["strace", "-f", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline()
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    strace.communicate()
    if "attached" not in said:
        pytest.skip(f"strace may not trace here: {said.strip()}")
    return status


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> Scene:
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")
    return big_scene(quick_home, Scene)


@pytest.fixture(scope="module")
def points(scene: Scene) -> list[Point]:
    """Every call that a life makes, of those that CALLS names."""
    scene.refill()
    live(scene)  # imports what is imported late
    scene.refill()
    record = scene.home.root / "calls"
    asked = ",".join(f"?{call}" for call in CALLS)  # not every machine has each
    assert traced(scene, "-o", str(record), "-e", f"trace={asked}") == 0
    check(scene, deaths=0)
    calls = Counter(re.findall(r"^(\d+) +(\w+)\(", record.read_text(), re.M))
    most: dict[str, int] = {}
    for (_, call), count in calls.items():
        most[call] = max(count, most.get(call, 0))
    return [Point(call, number) for call in sorted(most) for number in range(1, most[call] + 1)]


def killed_at(scene: Scene, point: Point) -> str:
    """What does not hold after a death at one system call."""
    scene.refill()
    kill = f"inject={point.call}:signal=KILL:when={point.number}"
    status = traced(scene, "-o", "/dev/null", "-e", f"trace={point.call}", "-e", kill)
    if status != -signal.SIGKILL:
        return f"it was not killed: {status}"
    scene.deliver_the_rest()
    return complaints(lambda: check_nothing_is_half(scene), lambda: live(scene), lambda: check(scene))


def spread(points: list[Point], count: int) -> list[Point]:
    """The first and the last of each call, and evenly what is between."""
    ends = [[*group] for _, group in itertools.groupby(points, lambda point: point.call)]
    return sorted(
        {*points[:: max(1, len(points) // count)], *(group[0] for group in ends), *(group[-1] for group in ends)}
    )


def test_killed_at_system_calls(scene: Scene, points: list[Point]) -> None:
    chosen = spread(points, SAMPLE)
    assert len(chosen) >= 40
    assert {"openat", "write", "fsync", "utimensat"} <= {point.call for point in chosen}
    found = {point: killed_at(scene, point) for point in chosen}
    assert {point: complaint for point, complaint in found.items() if complaint} == {}


@pytest.mark.torture
def test_killed_at_every_system_call(scene: Scene, points: list[Point]) -> None:
    found = {point: killed_at(scene, point) for point in points}
    assert {point: complaint for point, complaint in found.items() if complaint} == {}


# Real workers


class Slayer(Recorder):
    """Kills the worker in place of one disk operation of the daemon, and the daemon in place of another."""

    def __init__(self, worker_at: int, daemon_at: int) -> None:
        super().__init__()
        self.worker_at, self.daemon_at = worker_at, daemon_at
        self.executor: LocalExecutor | None = None

    def before(self, op: Op) -> None:
        super().before(op)
        if len(self.ops) == self.worker_at and self.executor:
            self.executor.kill("cpu0")
        if len(self.ops) == self.daemon_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(scene: Scene, slayer: Slayer) -> None:
    """A life with a worker process, until nothing is left to do. A fast clock: no restart is waited for."""

    def local(mailbox: Mailbox) -> LocalExecutor:
        command = (sys.executable, str(Path(__file__).parent / "kinds"))
        slayer.executor = LocalExecutor({"cpu0": "cpu"}, Path("models"), mailbox, command=command)
        return slayer.executor

    long = {"silence_limit_s": 1e6, "boot_limit_s": 1e6, "time_limit_s": 1e6, "stop_grace_s": 1e6}
    daemon = scene.home.daemon(local, file_grace_s=1e-9, max_attempts=MAX_ATTEMPTS, **long)
    daemon.clock = lambda: 100 * time.monotonic()
    end = time.monotonic() + 60.0
    while step(daemon) or any(scene.inbox.iterdir()):
        assert time.monotonic() < end, "never done"
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()


@pytest.fixture
def workshop(quick_home: Home, capfd: pytest.CaptureFixture[str]) -> Scene:
    """capfd: the workers need a real stderr to inherit."""
    scene = Scene(quick_home)
    scene.add("succeeded", prompt="paint", count=2)
    scene.add("succeeded", prompt="take time", num_inference_steps=20)
    scene.add("failed", "INVALID_PARAMETERS", prompt="refuse")
    scene.add("failed", "WORKER_DIED", prompt="kill")
    scene.add("succeeded", prompt="paint again")
    return scene


LONGEST = 250
"""Operations of a life, more or less."""


def slain(workshop: Scene, seed: int, worker: bool, daemon: bool) -> None:
    dice = random.Random(seed)
    workshop.refill()
    slayer = Slayer(dice.randrange(LONGEST) if worker else 0, dice.randrange(LONGEST) if daemon else 0)

    def first() -> None:
        with watched(slayer):
            work(workshop, slayer)

    assert in_child(first)[0] in (0, -signal.SIGKILL)
    check_nothing_is_half(workshop)
    assert in_child(lambda: work(workshop, Slayer(0, 0)))[0] == 0
    check(workshop, deaths=2)


BOTH = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("worker", "daemon"), BOTH, ids=["worker", "daemon", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_worker_and_daemon_killed(workshop: Scene, seed: int, worker: bool, daemon: bool) -> None:
    slain(workshop, seed, worker, daemon)


@pytest.mark.torture
@pytest.mark.parametrize(("worker", "daemon"), BOTH, ids=["worker", "daemon", "both"])
@pytest.mark.parametrize("seed", range(3, 103))
def test_worker_and_daemon_killed_again(workshop: Scene, seed: int, worker: bool, daemon: bool) -> None:
    slain(workshop, seed, worker, daemon)
