"""imagend beside other queues, in turns within one run, on one journalled disk, with the same durability.

The whole cycle, beside Celery. Ours: signed files appear in the inbox; `imagend serve` with the null painter verifies,
accepts (here a job becomes durable for the first time, as by Celery's put), claims, publishes a 1 KB picture with its
manifest and puts the job away, each step durable before the next. Once more with the sender's own part, which is two
fsyncs a job (temporary name, fsync, rename, fsync of the folder). Celery's: delay() puts the same bytes into Redis,
whose append-only file is synced at each command; one solo worker takes a task, publishes 1 KB (temporary name, fsync,
rename, fsync of the folder) and acknowledges late. Jobs per second from the first job put to the last one done.

The bare queue, beside persist-queue's SQLiteAckQueue (SQLite in WAL mode with synchronous=FULL, a commit each for put,
get and ack): N puts, then N times claim and finish, no results.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.disk import Disk
from benchmarks.figures import Row, ratios, spread
from benchmarks.place import REPOSITORY, Place, place, process, wait_until
from imagend import files
from imagend.daemon.intake import MAX_BATCH
from imagend.job import Ref
from imagend.spool import Spool

ROUNDS = 5
JOB_BYTES = 1024
CYCLE_JOBS = 300
BARE_JOBS = 500
GROUP_S = 0.05
"""The loop finishes jobs in groups, so much later at most."""

Seconds = float
Side = Callable[[int], Seconds]
"""Takes so many jobs through; how long it took."""


def rows(disk: Disk) -> Iterator[Row]:
    if lacking := [name for name in ("celery", "redis") if not _installed(name)] or _no_redis():
        yield "the whole cycle beside Celery", f"skipped: needs {' and '.join(lacking)}", "", "", ">= 1.2"
    else:
        yield from cycle(disk)
    if not _installed("persistqueue"):
        yield "bare put + claim + ack", "skipped: needs persist-queue", "", "", ">= 1.0"
    else:
        yield from bare(disk)


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _no_redis() -> list[str]:
    return [] if shutil.which("redis-server") else ["redis-server"]


class Course:
    """What one side did in all its rounds."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self.speeds: list[float] = []
        self._jobs, self._commits, self._flushes = 0, 0, 0

    def run(self, disk: Disk, jobs: int) -> None:
        disk.settle()
        commits, flushes = disk.work()
        self.speeds.append(jobs / self._side(jobs))
        self._jobs += jobs
        self._commits += disk.work()[0] - commits
        self._flushes += disk.work()[1] - flushes

    @property
    def work(self) -> str:
        return f"{self._commits / self._jobs:.1f} + {self._flushes / self._jobs:.1f}"


def in_turns(disk: Disk, jobs: int, *sides: Side) -> list[Course]:
    courses = [Course(side) for side in sides]
    for _ in range(ROUNDS):
        for course in courses:
            course.run(disk, jobs)
    return courses


def compare(what: str, ours: Course, theirs: Course, target: str) -> Iterator[Row]:
    yield f"{what}, jobs/s", spread(ours.speeds), spread(theirs.speeds), ratios(ours.speeds, theirs.speeds), target
    yield "and journal commits + cache flushes per job", ours.work, theirs.work, "", ""


# The whole cycle


def cycle(disk: Disk) -> Iterator[Row]:
    with place(disk.root) as here, serving(here) as ours, celery(disk.root / "celery", here) as theirs:
        ours(20, appear)
        theirs(20)
        sides = partial(ours, put=appear), theirs, partial(ours, put=submit)
        appearing, celerys, submitting = in_turns(disk, CYCLE_JOBS, *sides)
    peer = "Celery (acks_late, Redis AOF always)"
    yield from compare(f"whole cycle, from the inbox on; {peer}", appearing, celerys, ">= 1.2")
    yield from compare("the same, the sender's fsyncs among it", submitting, celerys, "")


def appear(here: Place, jobs: list[tuple[Ref, bytes]]) -> Seconds:
    """Files that are in the inbox at once; when the first of them was."""
    inbox = here.config.inboxes[0]
    for ref, raw in jobs:
        (inbox / f".{ref.id}").write_bytes(raw)
    os.sync()
    start = time.perf_counter()
    for ref, _ in jobs:
        (inbox / f".{ref.id}").rename(inbox / f"{ref.id}.json")
    return start


def submit(here: Place, jobs: list[tuple[Ref, bytes]]) -> Seconds:
    """As `imagend submit` does."""
    start = time.perf_counter()
    for ref, raw in jobs:
        files.write(here.config.inboxes[0] / f"{ref.id}.json", raw)
    return start


Put = Callable[[Place, list[tuple[Ref, bytes]]], Seconds]


@contextlib.contextmanager
def serving(here: Place) -> Iterator[Callable[[int, Put], Seconds]]:
    """`imagend serve` with the null painter; its side of the race."""

    def race(count: int, put: Put) -> Seconds:
        jobs = here.sealed_to(JOB_BYTES, count)
        before = here.files("done")
        start = put(here, jobs)
        wait_until(lambda: not any(here.files(state) for state in ("inbox", "pending", "active")), 0.005)
        seconds = time.perf_counter() - start
        assert here.files("done") == before + count
        return seconds

    with process(here, "-m", "benchmarks.service", here.root / "config.yaml"):
        yield race


@contextlib.contextmanager
def celery(folder: Path, here: Place) -> Iterator[Side]:
    """Redis and a Celery worker; their side of the race. `here` makes the jobs."""
    folder.mkdir()
    socket = folder / "socket"
    os.environ["BENCH_BROKER"] = f"redis+socket://{socket}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_background("redis-server", *_REDIS, "--dir", folder, "--unixsocket", socket))
        wait_until(socket.exists)
        worker = (sys.executable, "-m", "celery", "-A", "benchmarks.celery_app", "worker", *_WORKER)
        stack.enter_context(_background(*worker))
        paint = importlib.import_module("benchmarks.celery_app").paint
        broker = stack.enter_context(importlib.import_module("redis").Redis(unix_socket_path=str(socket)))
        rounds = iter(range(1000))

        def race(count: int) -> Seconds:
            jobs = here.sealed_to(JOB_BYTES, count)
            results = folder / f"results-{next(rounds)}"
            results.mkdir()
            start = time.perf_counter()
            for ref, raw in jobs:
                paint.delay(raw.decode(), str(results / ref.id))
            wait_until(lambda: sum(path.name[0] != "." for path in results.iterdir()) == count, 0.005)
            wait_until(lambda: not broker.llen("celery") and not broker.hlen("unacked"))
            return time.perf_counter() - start

        yield race


_REDIS = ("--port", "0", "--save", "", "--appendonly", "yes", "--appendfsync", "always")
_WORKER = ("-P", "solo", "-l", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat")


@contextlib.contextmanager
def _background(*command: object) -> Iterator[None]:
    words = [str(word) for word in command]
    environment, quiet = {**os.environ, "C_FORCE_ROOT": "1"}, subprocess.DEVNULL
    running = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        running.terminate()
        running.wait()


# The bare queue


def bare(disk: Disk) -> Iterator[Row]:
    with place(disk.root) as here:
        folders = (disk.root / f"bare-{number}" for number in range(1000))
        single, batch, theirs = in_turns(
            disk,
            BARE_JOBS,
            lambda count: spooled(next(folders), here.sealed_to(JOB_BYTES, count), batch=1, group_s=0),
            lambda count: spooled(next(folders), here.sealed_to(JOB_BYTES, count), batch=MAX_BATCH, group_s=GROUP_S),
            lambda count: persisted(next(folders), here.sealed_to(JOB_BYTES, count)),
        )
    what = "bare put + claim + ack, {}; persist-queue's SQLiteAckQueue"
    yield from compare(what.format("each by itself"), single, theirs, "")
    yield from compare(what.format("grouped as the daemon does"), batch, theirs, ">= 1.0")


def spooled(folder: Path, jobs: list[tuple[Ref, bytes]], batch: int, group_s: float) -> Seconds:
    """Accepted in batches as at the door, finished in groups as by the loop."""
    spool = Spool(folder)
    spool.open()
    start = time.perf_counter()
    for first in range(0, len(jobs), batch):
        for ref, raw in jobs[first : first + batch]:
            spool.accept(ref, raw)
        spool.commit()
    claimed, since = [], time.perf_counter()
    for ref, _ in jobs:
        assert spool.claim(ref) == 1
        claimed.append(ref)
        if time.perf_counter() - since >= group_s:
            _finish(spool, claimed)
            claimed, since = [], time.perf_counter()
    _finish(spool, claimed)
    seconds = time.perf_counter() - start
    assert sum(1 for _ in folder.glob("done/*/*.json")) == len(jobs)
    spool.close()
    return seconds


def _finish(spool: Spool, refs: list[Ref]) -> None:
    spool.finish(dict.fromkeys(refs, "succeeded"))


def persisted(folder: Path, jobs: list[tuple[Ref, bytes]]) -> Seconds:
    queue = importlib.import_module("persistqueue").SQLiteAckQueue(str(folder), auto_commit=True, multithreading=True)
    start = time.perf_counter()
    for _, raw in jobs:
        queue.put(raw)
    taken = []
    for _ in jobs:
        item = queue.get(block=False, raw=True)
        taken.append(item["data"])
        queue.ack(id=item["pqid"])
    seconds = time.perf_counter() - start
    assert taken == [raw for _, raw in jobs]
    queue.close()
    return seconds
