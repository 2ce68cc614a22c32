"""imagend watch: follow a job to its end. On a terminal one live line, otherwise a line per change."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend import config as configuration
from imagend.cli.look import PROGRESS, Sight, learning, look, megabytes, removed, span
from imagend.config import Config
from imagend.errors import Unreachable, UsageError
from imagend.job import Ref

EXIT_STATUS = {"succeeded": 0, "failed": 1, "rejected": 3, "cancelled": 4, "removed": 6, "partial": 7}
TIMED_OUT = 75
OVER = ("ended", "removed", "rejected")
_POLL_S = 0.1
_UNKNOWN_LIMIT_S = 5.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job's id, or CLIENT/ID")
    parser.epilog = (
        "exit status: 0 succeeded, 1 failed, 3 rejected, 4 cancelled, 6 its result was removed, 7 a set of which "
        "some items failed or pictures were withheld, 75 --timeout passed"
    )
    add_watch_options(parser)


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON line per change, the manifest last")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="stop watching after so many seconds; the job goes on"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    return follow(config, parse_ref(arguments.id, config), arguments)


def parse_ref(text: str, config: Config) -> Ref:
    """ID, or CLIENT/ID. Raises UsageError."""
    client, _, job = text.rpartition("/")
    if not re.fullmatch(r"[0-9a-f]{20}", job):
        raise UsageError(f"{text!r} is no job id: that is 20 of 0-9 and a-f, as `imagend submit` prints it.")
    return Ref(client or config.client.name, job)


def follow(config: Config, ref: Ref, arguments: argparse.Namespace, wish: Ref | None = None) -> int:
    """Show each change until the job has ended, or until a `wish` about it was rejected; return the exit status that
    tells how."""
    show = _json_shower(ref) if arguments.json else shower(config, ref)
    sight = wait(config, ref, arguments.timeout, show, wish)
    return exit_status(sight)


def exit_status(sight: Sight | None) -> int:
    """None: it took too long."""
    if sight is None:
        return TIMED_OUT
    return EXIT_STATUS["removed" if sight.state == "removed" else sight.outcome]


def wait(
    config: Config, ref: Ref, timeout_s: float | None, show: Callable[[Sight], None], wish: Ref | None = None
) -> Sight | None:
    """Show how a job looks, again and again, until it has ended; None if that takes too long. When a `wish` about it
    is rejected, that is the end, too."""
    start = time.monotonic()
    last_known = start
    while True:
        sight = look(config, ref)
        if wish and sight.state not in OVER and (refused := look(config, wish)).state == "rejected":
            sight = refused
        show(sight)
        if sight.state in OVER:
            return sight
        now = time.monotonic()
        if sight.state != "unknown":
            last_known = now
        elif now - last_known > _UNKNOWN_LIMIT_S:
            raise Unreachable(f"No job {ref.id} of {ref.client} is known here. Whose is it? Write CLIENT/ID.")
        if timeout_s is not None and now - start > timeout_s:
            return None
        time.sleep(_POLL_S)


def shower(config: Config, ref: Ref) -> Callable[[Sight], None]:
    """Prints what has changed, for people."""
    live = sys.stdout.isatty()
    shown = ""

    def show(sight: Sight) -> None:
        nonlocal shown
        ended = sight.state in OVER
        text = _final(sight, config, ref) if ended else f"{ref.id}  {_sentence(sight, steps=live, estimate=True)}"
        seen = text if ended or live else _sentence(sight, steps=False, estimate=False)  # no line per new estimate
        if seen == shown:
            return
        shown = seen
        if live and not ended:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(("\r\x1b[K" if live else "") + text, flush=True)

    return show


def _json_shower(ref: Ref) -> Callable[[Sight], None]:
    last: dict[str, Any] = {}

    def show(sight: Sight) -> None:
        nonlocal last
        event: dict[str, Any] = {"id": ref.id, "client": ref.client, "state": sight.state}
        event |= {"position": sight.position} if sight.position else {}
        event |= {key: sight.worker[key] for key in PROGRESS if key in sight.worker}
        event |= {"document": sight.document} if sight.document else {}
        if event != last:
            last = event
            estimate = {} if sight.wait_s is None else {"estimated_wait_seconds": sight.wait_s}
            at = {"at": datetime.now(UTC).isoformat(timespec="milliseconds")}
            print(json.dumps(at | event | estimate), flush=True)

    return show


def _sentence(sight: Sight, steps: bool, estimate: bool) -> str:
    if sight.state == "running":
        return _progress(sight.worker, steps)
    note = "" if sight.alive else "  (the daemon is not running; start it: imagend serve)"
    if sight.waits_for:
        return f"queued, {'held' if sight.waits_for == 'release' else 'paused'} by an operator{note}"
    match sight.state:
        case "queued" if sight.position:
            about = f", {span(sight.wait_s)} to wait" if estimate and sight.wait_s is not None else ""
            return f"queued, {sight.position} of {sight.waiting}{about}{note}"
        case "queued":
            return f"queued{note}"
        case "inbox":
            return f"in the inbox{note}"
    return f"looking for it{note}"


def _progress(worker: dict[str, Any], steps: bool) -> str:
    stage = str(worker.get("stage", "starting")).replace("_", " ")
    if worker.get("bytes_done") is not None:
        return f"{stage}  {megabytes(worker)}" if steps else stage
    if not worker.get("steps"):
        return stage
    if not worker.get("pictures"):
        return f"{stage}  {learning(worker)}" if steps else stage
    picture = f"{stage} picture {worker['picture'] + 1} of {worker['pictures']}"
    if not steps:
        return picture
    done = round(20 * worker["step"] / worker["steps"])
    return f"{picture}  [{'#' * done}{'.' * (20 - done)}]  step {worker['step']}/{worker['steps']}"


def _final(sight: Sight, config: Config, ref: Ref) -> str:
    document = sight.document
    if sight.state == "rejected":
        return f"{ref.id}  rejected: {document.get('error', {}).get('message', 'see rejected/')}"
    if sight.state == "removed":
        return removed(ref, document)
    folder = config.outputs / ref.client / ref.id
    error = document.get("error")
    lines = [f"{ref.id}  {document['outcome']}" + (f": {error['message']}" if error else f" in {_took(document)}")]
    lines += [f"  {_short(folder / artifact['file'])}" for artifact in document.get("artifacts", ())]
    if model := document.get("installed"):
        lines.append(f"  {model['kind']} {model['name']}; pin it as {model['name']}@{model['sha256'][:10]}")
    if why := document.get("not_installed"):
        lines.append(f"  not installed: {why}; copy lora.safetensors to models/loras/ by hand, or ask the operator")
    lines += [f"  {one['name']}: {one['error']['message']}" for one in document.get("items", ()) if "error" in one]
    safety = document.get("safety") or {}
    for one in safety.get("withheld", ()):
        seed = "" if one["seed"] is None else f" (seed {one['seed']})"
        lines.append(f"  picture {one['index']}{seed} is withheld: {one['label']}, {one['score']:.0%}")
    return "\n".join([*lines, f"  {_short(folder / 'manifest.json')}"])


def _took(document: dict[str, Any]) -> str:
    span = datetime.fromisoformat(document["ended_at"]) - datetime.fromisoformat(document["accepted_at"])
    return f"{span.total_seconds():.1f} s"


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
