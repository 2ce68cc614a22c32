"""imagend with many jobs, on a journalled disk: a burst, a long queue, a start with a long queue or a full inbox."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from benchmarks.disk import Disk
from benchmarks.figures import Row, ratios, spread
from benchmarks.peers import JOB_BYTES
from benchmarks.place import Place, place, process, wait_until
from benchmarks.queue import cycles_ms, filled, opened

BURST = 1_000
SHORT, LONG = 100, 100_000
TURNS, JOBS = 20, 10
ROUNDS = 5


def rows(disk: Disk) -> Iterator[Row]:
    for mode, meaning in (("busy", "the worker paints one"), ("quick", "the null painter takes them as they come")):
        what = f"{BURST:,} files at once, all accepted on disk ({meaning}), s"
        yield what, spread(bursts_s(disk, mode), 2), "", "", "<= 1"
    with place(disk.root) as few, place(disk.root) as many:
        extra = TURNS * JOBS + 1
        daemons = filled(few, SHORT + extra), filled(many, LONG + extra)
        disk.settle()
        short, long = cycles_ms(*daemons, turns=TURNS, jobs=JOBS)
        for daemon in daemons:
            daemon.spool.close()
        what = f"a job's way through the spool, ms; {LONG:,} pending beside {SHORT}"
        yield what, spread(long, 2), spread(short, 2), ratios(long, short), "<= 1.2"
        disk.forget()
        for memory in ("not in memory", "in memory"):
            yield f"start with {LONG:,} pending, their files {memory}, s", f"{start_s(many):.1f}", "", "", "<= 10"
        what = f"start with {LONG:,} in the inbox, the process's start to the first job painting, s"
        yield what, f"{first_job_s(disk, many):.1f}", "", "", "<= 2"


def bursts_s(disk: Disk, mode: str) -> list[float]:
    """From the first of the renames that bring the files into the inbox, until it is empty."""
    found = []
    with place(disk.root) as here, process(here, "-m", "benchmarks.service", here.root / "config.yaml", mode):
        staged, inbox = here.root / "staged", here.config.inboxes[0]
        staged.mkdir()
        here.drop(prompt="warm")
        for _ in range(ROUNDS):
            wait_until(lambda: here.files("inbox") == 0 and (mode == "busy" or not pending(here)))
            names = []
            for ref, raw in here.sealed_to(JOB_BYTES, BURST):
                names.append(f"{ref.id}.json")
                (staged / names[-1]).write_bytes(raw)
            disk.settle()
            start = time.perf_counter()
            for name in names:
                (staged / name).rename(inbox / name)
            wait_until(lambda: here.files("inbox") == 0)
            found.append(time.perf_counter() - start)
    return found


def pending(here: Place) -> int:
    return here.files("pending") + here.files("active")


def start_s(here: Place) -> float:
    """From opening the spool until every job is in its place and in the queue."""
    start = time.perf_counter()
    daemon = opened(here)
    seconds = time.perf_counter() - start
    assert len(daemon.turn) >= LONG
    daemon.spool.close()
    return seconds


def first_job_s(disk: Disk, here: Place) -> float:
    """All that is pending is put back into the inbox: as if it came while no daemon ran."""
    for path in (here.config.spool / "pending" / here.config.client.name).glob("[!.]*.json"):
        path.rename(here.config.inboxes[0] / path.name)
    ended = here.config.outputs / here.config.client.name
    before = set(ended.glob("*/manifest.json"))
    disk.forget()
    start = time.time()
    with process(here, "-m", "benchmarks.service", here.root / "config.yaml"):
        wait_until(lambda: bool(set(ended.glob("*/manifest.json")) - before))
        first = min(_started_at(path) for path in set(ended.glob("*/manifest.json")) - before)
    return first - start


def _started_at(path: Path) -> float:
    manifest = json.loads(path.read_bytes())
    return datetime.fromisoformat(manifest["started_at"]).timestamp()
