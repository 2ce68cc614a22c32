"""How a job and the daemon look from outside: folders and status.json, read only. Light, so that it is quick."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from imagend.config import Config
from imagend.job import Ref
from imagend.outputs import MANIFEST, STATE
from imagend.results import removal
from imagend.spool import STALE_INTERVALS, STATUS, State

_STEPS = ("stage", "picture", "pictures", "step", "steps", "chain_step", "progress")
PROGRESS = (*_STEPS, "bytes_done", "bytes_total", "loss", "eta_s")
"""What status.json and state files say of how far a running job is."""
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Sight:
    """How a job looks from outside. `state`: inbox, queued, running, ended, removed, rejected or unknown."""

    state: str
    alive: bool = True
    """whether the daemon is"""
    worker: dict[str, Any] = field(default_factory=dict)
    position: int | None = None
    waiting: int = 0
    wait_s: float | None = None
    """estimated, until its turn"""
    waits_for: str = ""
    """an operator's word: release, of a held job, or resume"""
    document: dict[str, Any] = field(default_factory=dict)
    """the manifest of an ended job, what is told of a removed one, the reason of a rejected one"""

    @property
    def outcome(self) -> str:
        return str(self.document.get("outcome", "rejected" if self.state == "rejected" else ""))


def look(config: Config, ref: Ref) -> Sight:
    """Where a job is now. Later places are asked first: a job that moves meanwhile is not missed."""
    if manifest := read(config.outputs / ref.client / ref.id / MANIFEST):
        return Sight("ended", document=manifest)
    status = read(config.spool / STATUS)
    alive = daemon_alive(status)
    for worker in status.get("workers", {}).values() if alive else ():
        if (worker.get("client"), worker.get("job")) == tuple(ref):
            return Sight("running", worker=worker)
    queue = status.get("queue", {})
    named = (*queue.get("head", ()), *queue.get("passed_over", ()))
    head = {Ref(entry["client"], entry["id"]): entry for entry in named}
    told = read(config.outputs / ref.client / f"{ref.id}{STATE}")
    if told and not status:  # a host that sees the outputs only: whether the daemon lives, it cannot know
        if told.get("state") == "running":
            return Sight("running", worker=told)
        return _waiting(told, told.get("queue_length", 0), alive=True)
    states = [state for state in State if (config.spool / state / ref.client / f"{ref.id}.json").exists()]
    if State.DONE in states:  # its result is there, or was
        if manifest := read(config.outputs / ref.client / ref.id / MANIFEST):
            return Sight("ended", document=manifest)
        return Sight("removed", alive, document=removal(config.outputs, ref))
    if states:
        halted = {"waits_for": "resume"} if queue.get("paused") else {}
        entry = head.get(ref) or told
        return _waiting(entry | halted, entry.get("queue_length", queue.get("pending", 0)), alive)
    if any(path.exists() for path in _places(config, ref, "{inbox}/{client}{id}.json")):
        return Sight("inbox", alive)
    if reasons := [
        path for path in _places(config, ref, "{inbox}/../rejected/{client}{id}*.reason.json") if path.exists()
    ]:
        return Sight("rejected", document=read(max(reasons, key=lambda path: path.stat().st_mtime)))
    if told := removal(config.outputs, ref):
        return Sight("removed", alive, document=told)
    return Sight("unknown", alive)


def removed(ref: Ref, told: dict[str, Any]) -> str:
    """What to say of a result that has been removed."""
    how = f" {told['outcome']}" if told.get("outcome") else " ended"
    when = f" at {told['removed_at']}, {told['why']}" if "removed_at" in told else ""
    return f"{ref.id}{how}; its result was removed{when}"


def _waiting(told: dict[str, Any], waiting: int, alive: bool) -> Sight:
    position, wait_s = told.get("queue_position"), told.get("estimated_wait_seconds")
    word = str(told.get("waits_for", ""))
    return Sight("queued", alive, position=position, waiting=waiting, wait_s=wait_s, waits_for=word)


def _places(config: Config, ref: Ref, pattern: str) -> list[Path]:
    found: list[Path] = []
    for inbox in config.inboxes:
        for client in ("", f"{ref.client}/"):
            path = Path(pattern.format(inbox=inbox, client=client, id=ref.id))
            found += path.parent.glob(path.name)
    return found


def span(seconds: float) -> str:
    """A rough length of time, for people."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def megabytes(worker: dict[str, Any]) -> str:
    """How much of what is fetched has come."""
    done, total = worker["bytes_done"] / 1e6, worker.get("bytes_total")
    return f"{done:.1f} of {total / 1e6:.1f} MB" if total else f"{done:.1f} MB"


def learning(worker: dict[str, Any]) -> str:
    """How a training fares."""
    left = f"  {span(worker['eta_s'])} left" if worker.get("eta_s") is not None else ""
    loss = f"  loss {worker['loss']:.4g}" if worker.get("loss") is not None else ""
    return f"step {worker['step']}/{worker['steps']}{loss}{left}"


def shown(text: str) -> str:
    """For a terminal: what could control it is shown as a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def moment(text: str) -> datetime:
    """What --since takes. Raises ArgumentTypeError."""
    now = datetime.now(UTC)
    try:
        if ago := re.fullmatch(r"(\d{1,5})([mhdw])", text):
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        when = datetime.fromisoformat(text)
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 24h, 7d or 2026-11-26T15:00") from None


def daemon_alive(status: dict[str, Any]) -> bool:
    """The rule that status.json itself states."""
    if not status or status.get("state") == "stopped":
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
    return age.total_seconds() <= STALE_INTERVALS * float(status["interval_s"])


def read(path: Path) -> dict[str, Any]:
    """A JSON object from a file that others replace; {} when it is not there."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
