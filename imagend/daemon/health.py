"""spool/status.json: what the daemon is doing, replaced whole. Bounded in size however long the queue is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from imagend import __version__, files
from imagend.daemon.events import Events
from imagend.daemon.intake import Door
from imagend.daemon.librarian import Librarian
from imagend.daemon.outlook import HEAD
from imagend.daemon.slots import Slot
from imagend.daemon.states import States
from imagend.daemon.turn import Turn
from imagend.job import Ref
from imagend.manifest import Manifest
from imagend.spool import STALE_INTERVALS, STATUS, Spool

if TYPE_CHECKING:
    from imagend.daemon.metrics import Metrics

log = structlog.get_logger()

STATUS_SCHEMA = "imagend.status/v1"
DOOR_LIMIT_S = 30.0
"""An inbox that has not answered for so long is reported."""
_BALLAST_BYTES = 1 << 17
MIN_INTERVAL_S = 0.2
"""The file is rewritten at most this often: a fast painter makes progress a hundred times a second."""


class Supervisor(Protocol):
    """Who started us and wants to know how we are (notify.py)."""

    def tend(self, now: float) -> None: ...

    def reloading(self) -> None: ...


@dataclass
class Health:
    """Gathers what the loop tells it and writes the file."""

    spool: Path
    name: str
    interval_s: float
    started_at: datetime
    reasons: dict[str, str] = field(default_factory=dict)  # what is wrong, by its part of the daemon
    totals: dict[str, int] = field(default_factory=lambda: {"succeeded": 0, "failed": 0, "cancelled": 0})
    last_error: dict[str, Any] | None = None
    events: Events = field(init=False)
    metrics: Metrics | None = None
    states: States | None = None
    supervisor: Supervisor | None = None
    _written: float = 0.0
    _measured: float = 0.0

    def __post_init__(self) -> None:
        self.events = Events(self.spool, self.name)
        self.events.tell("daemon.started", version=__version__)

    def failed(self, code: str, message: str, job: str | None = None) -> None:
        """Remember an error; its message holds the remedy, and nothing that a client wrote."""
        self.last_error = {"at": _now(), "code": code, "message": message, "job": job}

    def ended(self, manifest: Manifest) -> None:
        self.totals[manifest.outcome] += 1
        self.events.ended(manifest)
        if self.metrics:
            self.metrics.ended(manifest)
        if self.states:
            self.states.ended(manifest)

    def tidy(self) -> None:
        """What has ended is durable: now it is told, and of its way there nothing is any more. Raises OSError."""
        self.events.confirmed()
        if self.states:
            self.states.tidy()

    def trouble(self, part: str, why: str | None) -> None:
        """Something in a part of the daemon needs the operator, or (None) does no more. imagend goes on."""
        if why is None:
            if self.reasons.pop(part, None):
                self.events.tell("mended", part)
        elif self.reasons.get(part) != why:
            self.reasons[part] = why
            self.failed("DEGRADED", why)
            self.events.tell("degraded", part, why=why)
            log.error("degraded", part=part, why=why)

    def observe(self, now: float, doors: Iterable[Door], slots: Iterable[Slot], librarian: Librarian) -> None:
        """Troubles that come and go by themselves; and the metrics, and what systemd is told."""
        self.trouble("models", librarian.trouble(now))
        for door in doors:
            late = now - door.looked_at > DOOR_LIMIT_S
            unanswered = f"{door.inbox} does not answer: is its file system there?" if late else None
            self.trouble(f"inbox {door.inbox}", door.trouble or unanswered)
            stuck = f"{door.stuck} files cannot be moved out of {door.inbox}: see the log" if door.stuck else None
            self.trouble(f"stuck {door.inbox}", stuck)
        for slot in slots:
            dying = (
                f"worker {slot.name} died {slot.deaths} times in a row: see the log; it is started again with delays"
            )
            self.trouble(slot.name, dying if slot.deaths > 1 and not slot.ready else None)
        self._measure(now)
        if self.states:
            self.states.tend(now)
            self.trouble("states", self.states.trouble)
        if self.supervisor:
            self.supervisor.tend(now)
        self.events.write(now)
        self.trouble("events", self.events.trouble)

    def reloading(self) -> None:
        """The configuration is about to be read again."""
        if self.supervisor:
            self.supervisor.reloading()

    def state(self, slots: Iterable[Slot]) -> str:
        """One word for the whole: degraded, starting, busy or ready."""
        states = {slot.state for slot in slots}
        if self.reasons:
            return "degraded"
        if states & {"down", "booting"}:
            return "starting"
        return "busy" if "busy" in states else "ready"

    def due(self, now: float, changed: bool) -> bool:
        """Write at every change, but at most every MIN_INTERVAL_S, and at least every heartbeat."""
        return now - self._written >= (MIN_INTERVAL_S if changed else self.interval_s)

    def count_in(
        self, path: Path | None, spool: Spool, turn: Turn, slots: Iterable[Slot], doors: Iterable[Door]
    ) -> None:
        """Keep metrics in a file from now on, if there is a path."""
        if path is not None:
            from imagend.daemon.metrics import Metrics  # here: it brings a library of some MB

            self.metrics = Metrics(path, spool, turn, slots, doors)

    def _measure(self, now: float) -> None:
        """Write the metrics, once a heartbeat."""
        if self.metrics is None or now - self._measured < self.interval_s:
            return
        self._measured = now
        try:
            self.metrics.write(degraded=bool(self.reasons))
            self.trouble("metrics", None)
        except OSError as error:
            self.trouble("metrics", f"{self.metrics.path} cannot be written: {error.strerror}")

    def write(self, now: float, state: str, slots: Iterable[Slot], turn: Turn, doors: Iterable[Door]) -> None:
        self._written = now
        if state == "stopped":
            if self.states:
                self.states.stop(now)
            self.events.tell("daemon.stopped")
            self.events.write(now, at_once=True)
        document = self.report(now, state, tuple(slots), turn, doors)
        try:
            self._replace(json.dumps(document, indent=1).encode() + b"\n")
            self.trouble("status", None)
        except OSError as error:  # a full disk: those who read it see it grow stale, the log says why
            self.trouble("status", f"{STATUS} cannot be written: {error.strerror}")

    def _replace(self, document: bytes) -> None:
        """Write status.json; on a full disk in the room of a file that is kept for this, so that it can say so."""
        ballast = self.spool / ".ballast"
        try:
            files.replace_hint(self.spool / STATUS, document)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not ballast.exists():
                raise
            ballast.unlink()
            files.replace_hint(self.spool / STATUS, document)
        if not ballast.exists():
            with contextlib.suppress(OSError):  # the room there is, if not all: status.json has been written
                ballast.write_bytes(bytes(_BALLAST_BYTES))

    def report(
        self, now: float, state: str, slots: tuple[Slot, ...], turn: Turn, doors: Iterable[Door]
    ) -> dict[str, Any]:
        return {
            "schema": STATUS_SCHEMA,
            "name": self.name,
            "version": __version__,
            "pid": os.getpid(),
            "state": state,
            "reasons": sorted(self.reasons.values()),
            "heartbeat": _now(),
            "interval_s": self.interval_s,
            "stale": f"dead if heartbeat is older than {STALE_INTERVALS} x interval_s and state is not stopped",
            "started_at": self.started_at.isoformat(timespec="milliseconds"),
            "queue": {
                "pending": len(turn),
                "active": sum(slot.running is not None for slot in slots),
                "per_client": turn.per_client(),
                "head": self._head(turn.head(HEAD), slots),
            },
            "workers": {slot.name: _worker(slot) for slot in slots},
            "inboxes": [
                {
                    "path": str(d.inbox),
                    "scan_age_s": round(now - d.looked_at, 3),
                    "stuck": d.stuck,
                    "trouble": d.trouble,
                    "skew_s": None if d.skew_s is None else round(d.skew_s, 3),
                    "delay_s": None if d.delay_s is None else round(d.delay_s, 3),
                }
                for d in doors
            ],
            "totals": self.totals,
            "last_error": self.last_error,
        }

    def _head(self, head: list[Ref], slots: tuple[Slot, ...]) -> list[dict[str, Any]]:
        """The next jobs in the order in which they will be served if none comes and none goes."""
        waits = self.states.outlook.waits(head, slots, datetime.now(UTC)) if self.states else [None] * len(head)
        return [
            {"client": ref.client, "id": ref.id, "queue_position": place, "estimated_wait_seconds": wait}
            for place, (ref, wait) in enumerate(zip(head, waits, strict=True), 1)
        ]


def _worker(slot: Slot) -> dict[str, Any]:
    report: dict[str, Any] = {"state": slot.state, "device": slot.device}
    if slot.running is not None:
        job, progress = slot.running.job, slot.running.progress
        report |= {
            "job": job.ref.id,
            "client": job.ref.client,
            "attempt": slot.running.attempt,
            "since": slot.running.started_at.isoformat(timespec="milliseconds"),
        }
        if progress is not None:
            report |= progress.told()
    return report


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
