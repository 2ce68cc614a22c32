"""python -m benchmarks: every figure of the README's table, as a table. Run it on a quiet machine."""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import structlog

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.overhead import bare_pipeline, per_job, per_picture
from benchmarks.place import Place, daemon, place
from benchmarks.queue import cycles_ms, filled

JOBS = 200


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = []
    with place() as here, daemon(here) as process:
        pipe = bare_pipeline(here)
        job = per_job(here, pipe)
        rows.append(
            (
                "a job of one picture, more than bare diffusers (median)",
                f"{job['more_ms']:.1f} ms on {job['bare_ms']:.0f} ms",
            )
        )
        picture = per_picture(here, pipe)
        rows.append(
            ("a picture, more than bare diffusers", f"{picture['more_percent']:+.1f} % of {picture['bare_s']:.2f} s")
        )
        rows.append(("drop → handed to the worker, p50 / p95", "{:.1f} / {:.1f} ms".format(*latency_ms(here))))
        rows.append(("the daemon's memory (RSS)", f"{resident_mb(process.pid):.0f} MB"))
        status, python = command_ms("-m", "imagend", "status", cwd=here.root), command_ms("-c", "pass", cwd=here.root)
        rows.append(("`imagend status` / a bare `python -c pass`", f"{status:.0f} / {python:.0f} ms"))
    with place() as few, place() as many:
        short, long = cycles_ms(filled(few, 10 + JOBS), filled(many, 10_000 + JOBS), JOBS)
        rows.append(
            (
                "one job's way through the spool, 10,000 queued / 10 queued",
                f"{long:.2f} / {short:.2f} ms = {long / short:.2f}",
            )
        )
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


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
