"""imagend queue: the jobs that run and the next that wait, with their places and how long each will wait."""

from __future__ import annotations

import argparse
import json
from typing import Any

from imagend import config as configuration
from imagend.cli.look import PROGRESS, daemon_alive, megabytes, read, span
from imagend.cli.status import paused
from imagend.errors import Unreachable
from imagend.lanes import Lane
from imagend.spool import STATUS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="this client's jobs only; places stay those among all")
    parser.add_argument("--json", action="store_true", help="one JSON object: running, waiting, passed_over, pending")
    parser.epilog = (
        "Shown are the next 100 jobs, and the next 100 of each other lane (on the CPU, to be fetched), in the order in "
        "which they go if none comes and none is cancelled. Estimates are the mean of the last 20 durations per model, "
        "size and steps. exit status: 0, or 69 when no daemon runs"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    status = read(config.spool / STATUS)
    if not daemon_alive(status):
        raise Unreachable(
            f"The daemon of {config.spool} is not running, so no job has its turn. Start it: imagend serve"
        )
    running = [
        {"client": worker["client"], "id": worker["job"], "worker": name} | _progress(worker)
        for name, worker in status["workers"].items()
        if "job" in worker and arguments.client in (None, worker["client"])
    ]
    waiting = [job for job in status["queue"]["head"] if arguments.client in (None, job["client"])]
    passed = [job for job in status["queue"]["passed_over"] if arguments.client in (None, job["client"])]
    pending = status["queue"]["pending"]
    if arguments.json:
        document = {"at": status["heartbeat"], "running": running, "waiting": waiting, "passed_over": passed}
        document |= {"pending": pending}
        print(json.dumps(document, indent=1))
        return 0
    shown = len(status["queue"]["head"]) + len(status["queue"]["passed_over"])
    print("\n".join([*paused(status["queue"]), *_lines(running, waiting, passed, pending, shown)]))
    return 0


def _progress(worker: dict[str, Any]) -> dict[str, Any]:
    return {key: worker[key] for key in PROGRESS if key in worker}


_LANES = {Lane.CPU: "  on the CPU", Lane.FETCH: "  to be fetched"}
"""Each with an order of its own, beside the one of the painters."""
_Jobs = list[dict[str, Any]]


def _lines(running: _Jobs, waiting: _Jobs, passed: _Jobs, pending: int, shown: int) -> list[str]:
    lines = []
    for job in running:
        step = f" step {job['step']}/{job['steps']}" if job.get("steps") else ""
        step = f" {megabytes(job)}" if job.get("bytes_done") is not None else step
        lines.append(f"{job['worker']:>6}  {job['client']}/{job['id']}  {job.get('stage', 'starting')}{step}")
    for job in waiting:
        wait = job["estimated_wait_seconds"]
        about = "not known yet" if wait is None else f"about {span(wait)}"
        lane = _LANES.get(job.get("lane", ""), "")
        lines.append(f"{job['queue_position']:>6}  {job['client']}/{job['id']}  {about}{lane}")
    for job in passed:
        why = "held" if job["waits_for"] == "release" else "its client is paused"
        lines.append(f"     -  {job['client']}/{job['id']}  {why}")
    if pending > shown:
        lines.append(f"        and {pending - shown} more")
    return lines or ["nothing runs and nothing waits"]
