"""How the daemon is: what is wrong, what ended, what people and machines are told of it (status.json: report.py)."""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from imagend import __version__, files
from imagend.daemon.events import Events
from imagend.daemon.gpus import Driver
from imagend.daemon.intake import Door
from imagend.daemon.librarian import Librarian
from imagend.daemon.report import Tempo, oldest, report, stamp
from imagend.daemon.retention import Retention
from imagend.daemon.slots import Slot
from imagend.daemon.states import States
from imagend.daemon.turn import Turn
from imagend.job import Outcome
from imagend.lanes import Lane
from imagend.manifest import Manifest
from imagend.orders import Wishes
from imagend.spool import STATUS, Spool
from imagend.status import MAX_ERRORS, ErrorReport

if TYPE_CHECKING:
    from imagend.daemon.metrics import Metrics

log = structlog.get_logger()

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
    totals: dict[str, int] = field(default_factory=lambda: {outcome.value: 0 for outcome in Outcome})
    events: Events = field(init=False)
    tempo: Tempo = field(default_factory=Tempo)
    last_errors: deque[ErrorReport] = field(default_factory=lambda: deque(maxlen=MAX_ERRORS))  # newest first
    oldest: datetime | None = None  # when the oldest waiting job was accepted, looked at once a heartbeat
    driver: Driver = field(default_factory=Driver)
    wishes: Wishes = field(default_factory=Wishes)  # an operator's
    max_queued: int = 0  # config.yaml's
    metrics: Metrics | None = None
    states: States | None = None
    supervisor: Supervisor | None = None
    retention: Retention | None = None
    _look_oldest: Callable[[], datetime | None] = lambda: None
    _written: float = 0.0
    _measured: float = float("-inf")

    def __post_init__(self) -> None:
        self.events = Events(self.spool, self.name)
        self.events.tell("daemon.started", version=__version__)

    def failed(self, code: str, message: str, job: str | None = None) -> None:
        """Remember an error; its message holds the remedy, and nothing that a client wrote."""
        self.last_errors.appendleft(ErrorReport(at=stamp(datetime.now(UTC)), code=code, message=message, job=job))

    def ended(self, manifest: Manifest) -> None:
        self.totals[manifest.outcome] += 1
        self.events.ended(manifest)
        self.tempo.count(manifest)
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
            while door.untold:
                self.events.tell("rejected", **door.untold.popleft())
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
        if self.retention:
            self.retention.tend()
            self.trouble("retention", self.retention.trouble)
        self.events.write(now)
        self.trouble("events", self.events.trouble)

    def reloading(self) -> None:
        """The configuration is about to be read again."""
        if self.supervisor:
            self.supervisor.reloading()

    def state(self, slots: Iterable[Slot]) -> str:
        """One word for the whole: degraded, starting, busy or ready."""
        lanes: dict[Lane, set[str]] = {lane: set() for lane in Lane}
        for slot in slots:
            lanes[slot.lane].add(slot.state)
        if self.reasons:
            return "degraded"
        if lanes[Lane.PAINT] & {"down", "booting"}:
            return "starting"
        return "busy" if any("busy" in states for states in lanes.values()) else "ready"

    def due(self, now: float, changed: bool) -> bool:
        """Write at every change, but at most every MIN_INTERVAL_S, and at least every heartbeat."""
        return now - self._written >= (MIN_INTERVAL_S if changed else self.interval_s)

    def count_in(
        self, path: Path | None, spool: Spool, turn: Turn, slots: Iterable[Slot], doors: Iterable[Door]
    ) -> None:
        """Look at these once a heartbeat from now on, and keep metrics in a file if there is a path."""
        self._look_oldest = partial(oldest, spool, turn)
        if path is not None:
            from imagend.daemon.metrics import Metrics  # here: it brings a library of some MB

            self.metrics = Metrics(path, turn, slots, doors)

    def retain(self, retention: Retention) -> None:
        """From now on what has ended goes in time."""
        self.retention = retention
        if self.metrics:
            self.metrics.storage = retention.storage

    def _measure(self, now: float) -> None:
        """What is too dear for each look around; and the metrics."""
        if now - self._measured < self.interval_s:
            return
        self._measured, self.oldest = now, self._look_oldest()
        if self.metrics is None:
            return
        try:
            self.metrics.write(bool(self.reasons), self.oldest, self.driver.seen)
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
        document = report(self, now, state, tuple(slots), turn, doors)
        try:
            self._replace(document.model_dump_json(indent=1, exclude_unset=True).encode() + b"\n")
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
