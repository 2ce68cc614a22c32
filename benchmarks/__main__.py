"""Every figure of the README, as tables: python -m benchmarks [overhead] [peers] [scale]. Run it on a quiet machine.

overhead: what imagend costs beside bare diffusers. peers: beside other queues. scale: with many jobs. The last two need
a disk of their own (root), peers also the peers: apt-get install redis-server; pip install -e '.[bench]'
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import structlog

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import disk, peers, scale
from benchmarks.figures import circumstances, show
from benchmarks.place import Place, daemon, place
from benchmarks.queue import cycles_ms, filled

PARTS = ("overhead", "peers", "scale")


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    wanted = sys.argv[1:] or PARTS
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"There is no {', '.join(unknown)}: say {' or '.join(PARTS)}, or nothing for all.")
    print(circumstances(), end="\n\n", flush=True)
    if "overhead" in wanted:
        show(("what", "measured"), overhead())
    rows = {"peers": peers.rows, "scale": scale.rows}
    for part in wanted:
        if part not in rows:
            continue
        if lacking := disk.missing():
            print(f"{part}: skipped: a journalled disk of its own needs {lacking}")
            continue
        print(f"{part}, {disk.MEANING}:\n")
        with disk.disk() as own:
            show(("what", "imagend", "beside it", "ratio", "target"), rows[part](own))


def overhead() -> Iterator[tuple[str, str]]:
    from benchmarks.overhead import bare_pipeline, per_job, per_picture  # here: it brings torch

    with place() as here, daemon(here) as process:
        pipe = bare_pipeline(here)
        job = per_job(here, pipe)
        what = "a job of one picture, more than bare diffusers (median)"
        yield what, f"{job['more_ms']:.1f} ms on {job['bare_ms']:.0f} ms"
        picture = per_picture(here, pipe)
        yield "a picture, more than bare diffusers", f"{picture['more_percent']:+.1f} % of {picture['bare_s']:.2f} s"
        yield "drop → handed to the worker, p50 / p95", "{:.1f} / {:.1f} ms".format(*latency_ms(here))
        yield "the daemon's memory (RSS)", f"{resident_mb(process.pid):.0f} MB"
        status, python = command_ms("-m", "imagend", "status", cwd=here.root), command_ms("-c", "pass", cwd=here.root)
        yield "`imagend status` / a bare `python -c pass`", f"{status:.0f} / {python:.0f} ms"
    with place() as few, place() as many:
        short, long = map(statistics.median, cycles_ms(filled(few, 10 + 201), filled(many, 10_000 + 201)))
        what = "one job's way through the spool, 10,000 queued / 10 queued"
        yield what, f"{long:.2f} / {short:.2f} ms = {long / short:.2f}"


def latency_ms(here: Place, rounds: int = 60) -> tuple[float, float]:
    """From the end of the client's rename to the moment when the job is sent to an idle worker."""
    found = []
    for _ in range(rounds):
        ref, dropped = here.drop(prompt="nothing", num_inference_steps=1, width=64, height=64)
        manifest = here.wait(ref)
        found.append((datetime.fromisoformat(manifest["started_at"]).timestamp() - dropped) * 1000)
        time.sleep(0.02)  # let the daemon tidy up: an idle one is what is asked about
    found.sort()
    return statistics.median(found), found[int(len(found) * 0.95)]


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def command_ms(*arguments: str, cwd: Path, rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    main()
