"""imagend status: what the daemon is doing, from spool/status.json."""

from __future__ import annotations

import argparse
import json
from typing import Any

from imagend import config as configuration
from imagend.cli.look import daemon_alive, learning, megabytes, read, shown
from imagend.errors import Unreachable
from imagend.spool import STATUS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="status.json itself, with `alive` added")
    parser.epilog = "exit status: 0 when the daemon runs, 69 when it does not"


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    status = read(config.spool / STATUS)
    alive = daemon_alive(status)
    if arguments.json:
        print(json.dumps({"alive": alive} | status, indent=1))
        return 0 if alive else Unreachable.exit_status
    if not alive:
        last = f" (last heartbeat {status['heartbeat']}, state {status['state']})" if status else ""
        raise Unreachable(f"The daemon of {config.spool} is not running{last}. Start it: imagend serve")
    print("\n".join(_lines(status)))
    return 0


def _lines(status: dict[str, Any]) -> list[str]:
    queue, totals, rates = status["queue"], status["totals"], status["rates"]
    held = f", {queue['held']} held" if queue["held"] else ""
    lines = [
        f"{status['name']} is {status['state']} (pid {status['pid']}, imagend {status['version']})",
        *(f"  ! {reason}" for reason in status["reasons"]),
        f"queue    {queue['pending']} pending, {queue['active']} active{held}",
        *paused(queue),
    ]
    for name, worker in status["workers"].items():
        if worker["state"] != "resting":
            lines.append(f"{name:8} {worker['state']} on {worker['device']}{_doing(worker)}")
    for gpu in status["gpu"].get("devices", ()):
        heat = "" if gpu["temperature_c"] is None else f", {gpu['temperature_c']} °C"
        lines.append(
            f"GPU {gpu['index']}    {gpu['name']}, {gpu['vram_used_mb']} of {gpu['vram_total_mb']} MB used{heat}"
        )
    ended = ", ".join(f"{count} {outcome}" for outcome, count in totals.items())
    lines.append(f"ended    {ended} since start; {rates['pictures_per_hour']} pictures in the last hour")
    for error in status["last_errors"][:1]:
        lines.append(f"last error, {error['at']}: {error['code']}: {error['message']}")
    return lines


def paused(queue: dict[str, Any]) -> list[str]:
    """What an operator has paused, a line each; the words are the operator's own."""
    all_jobs = {"all jobs": queue["paused"]} if queue.get("paused") else {}
    return [
        f"paused   {whom} since {pause['at']}" + (f": {shown(pause['reason'])}" if pause["reason"] else "")
        for whom, pause in (all_jobs | queue["paused_clients"]).items()
    ]


def _doing(worker: dict[str, Any]) -> str:
    if "job" not in worker:
        return ""
    step = (
        f" {worker['picture'] + 1}/{worker['pictures']} step {worker['step']}/{worker['steps']}"
        if worker.get("steps")
        else ""
    )
    step = f" {learning(worker)}" if worker.get("steps") and not worker.get("pictures") else step
    step = f" {megabytes(worker)}" if worker.get("bytes_done") is not None else step
    return f": {worker['client']}/{worker['job']} {worker.get('stage', 'starting')}{step}"
