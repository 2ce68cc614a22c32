"""imagend tail: what happens to jobs, as it happens: spool/events.jsonl, followed over rotations and restarts."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime

from imagend import config as configuration
from imagend.cli.look import daemon_alive, moment, read, shown, span
from imagend.errors import UsageError
from imagend.live import Event, Follower
from imagend.spool import EVENTS, STATUS

_POLL_S = 0.2
_NAMES = ("kind", "file", "model", "worker", "code", "version", "why")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="what happens to this client's jobs only")
    parser.add_argument("--job", metavar="ID", help="what happens to this job only; ID or CLIENT/ID")
    parser.add_argument("-n", "--lines", metavar="N", type=int, default=10, help="begin with the last N of them (10)")
    parser.add_argument(
        "--since", metavar="TIME", type=moment, help="begin with all since: 30m, 24h, or 2026-11-26T15:00 (UTC)"
    )
    parser.add_argument("--no-follow", action="store_true", help="stop after those that there are")
    parser.add_argument("--json", action="store_true", help="CloudEvents, one a line, as they stand in events.jsonl")
    parser.epilog = "Ends with Ctrl-C, or when nobody reads on. Times are UTC. The words: docs/spool.md, Events"


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    if arguments.lines < 0:
        raise UsageError("-n takes 0 or more.")
    wanted = _wanted(arguments)
    path = config.spool / EVENTS
    follower = Follower(path)
    if not path.exists() and not daemon_alive(read(config.spool / STATUS)):
        print(f"imagend: no daemon has told anything in {config.spool} yet. Start it: imagend serve", file=sys.stderr)
    show = _show_json if arguments.json else _show
    for event in deque(filter(wanted, _news(follower)), maxlen=None if arguments.since else arguments.lines):
        show(event)
    while not arguments.no_follow:
        sys.stdout.flush()
        time.sleep(_POLL_S)
        for event in filter(wanted, _news(follower)):
            show(event)
    return 0


def _news(follower: Follower) -> Iterator[Event]:
    missed = follower.missed
    for event in follower.news():
        if missed != follower.missed:
            missed = follower.missed
            print("imagend: events were missed: those that are left follow", file=sys.stderr)
        yield event


def _wanted(arguments: argparse.Namespace) -> Callable[[Event], bool]:
    client, _, job = (arguments.job or "").rpartition("/")
    if job and not re.fullmatch(r"[0-9a-f]{20}", job):
        raise UsageError(f"{arguments.job!r} is no job id: that is 20 of 0-9 and a-f, as `imagend submit` prints it.")
    about = {"client": arguments.client or client or None, "id": job or None}
    if client and arguments.client not in (None, client):
        raise UsageError(f"--client {arguments.client} and --job {arguments.job} are two clients: leave one out.")

    def wanted(event: Event) -> bool:
        data = event["data"]
        if any(value is not None and data.get(key) != value for key, value in about.items()):
            return False
        return arguments.since is None or datetime.fromisoformat(event["time"]) >= arguments.since

    return wanted


def _show_json(event: Event) -> None:
    print(json.dumps(event))


def _show(event: Event) -> None:
    word = event["type"].removeprefix("imagend.")
    told = "  ".join(_details(event["data"]))
    whose = event.get("subject") or event["data"].get("client") or "-"
    line = f"{event['time'][:19].replace('T', ' ')}  {whose:37}  {word:15}  {told}".rstrip()
    print(shown(line))


def _details(data: Event) -> Iterator[str]:
    """In words, what the event tells beside its job."""
    if data.get("chain_step") and "stage" not in data:
        yield data["chain_step"]
    if "stage" in data:
        yield data["stage"] + (f" {data['picture'] + 1}/{data['pictures']}" if data.get("pictures") else "")
    elif data.get("pictures"):
        yield f"{data['pictures']} {'picture' if data['pictures'] == 1 else 'pictures'}"
    if data.get("steps"):
        yield f"step {data['step']}/{data['steps']}"
    if "seconds" in data:
        yield f"in {data['seconds']:.1f} s"
    if data.get("waited_seconds"):
        yield f"after {span(data['waited_seconds'])}"
    if data.get("attempt", 1) > 1:
        yield f"attempt {data['attempt']}"
    yield from (str(data[key]) for key in _NAMES if data.get(key))
