"""status.json as a value: what Health and the loop know, put together. Bounded in size however long the queue is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

from imagend import __version__
from imagend.daemon.gpus import Driver
from imagend.daemon.intake import Door
from imagend.daemon.outlook import HEAD
from imagend.daemon.retention import Retention
from imagend.daemon.slots import Slot
from imagend.daemon.states import States
from imagend.daemon.turn import Turn
from imagend.job import Outcome
from imagend.lanes import Lane
from imagend.manifest import Manifest
from imagend.orders import Pause, Wishes
from imagend.spool import STALE_INTERVALS, Spool
from imagend.status import ErrorReport, Rates, Status

_HOUR_MIN = 60


class Tempo:
    """What ended in the last hour, counted by the minute."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, int, int, int]] = deque(maxlen=_HOUR_MIN)  # minute, jobs, pictures, failed

    def count(self, manifest: Manifest) -> None:
        minute, failed = int(manifest.ended_at.timestamp() // 60), manifest.outcome is Outcome.FAILED
        last = self._minutes.pop() if self._minutes and self._minutes[-1][0] == minute else (minute, 0, 0, 0)
        self._minutes.append((minute, last[1] + 1, last[2] + manifest.pictures, last[3] + failed))

    def rates(self, now: datetime) -> Rates:
        since = int(now.timestamp() // 60) - _HOUR_MIN
        recent = [counted for counted in self._minutes if counted[0] > since]
        jobs, pictures, failed = (sum(counted[column] for counted in recent) for column in (1, 2, 3))
        return Rates(jobs_per_hour=jobs, pictures_per_hour=pictures, failed_per_hour=failed)


def oldest(spool: Spool, turn: Turn) -> datetime | None:
    """When the oldest of the jobs that wait was accepted. Costs a stat() for each client and priority that waits."""
    since = min(filter(None, map(spool.accepted, turn.firsts())), default=0)
    return datetime.fromtimestamp(since / 1e9, UTC) if since else None


class Known(Protocol):
    """What Health knows."""

    name: str
    interval_s: float
    started_at: datetime
    reasons: dict[str, str]
    totals: dict[str, int]
    tempo: Tempo
    last_errors: deque[ErrorReport]
    oldest: datetime | None
    max_queued: int
    driver: Driver
    states: States | None
    retention: Retention | None
    wishes: Wishes


def report(health: Known, now: float, state: str, slots: tuple[Slot, ...], turn: Turn, doors: Iterable[Door]) -> Status:
    """`now` by the loop's clock."""
    at = datetime.now(UTC)
    return Status.model_validate(
        {
            "schema": "imagend.status/v1",
            "name": health.name,
            "version": __version__,
            "pid": os.getpid(),
            "state": state,
            "reasons": tuple(sorted(health.reasons.values())),
            "heartbeat": stamp(at),
            "interval_s": health.interval_s,
            "stale": f"dead if heartbeat is older than {STALE_INTERVALS} x interval_s and state is not stopped",
            "started_at": stamp(health.started_at),
            "queue": {
                "pending": len(turn),
                "active": sum(slot.running is not None for slot in slots),
                "max_size": health.max_queued,
                "oldest": stamp(health.oldest) if health.oldest else None,
                "per_client": turn.per_client(),
                "paused": health.wishes.pause and _paused(health.wishes.pause),
                "paused_clients": {name: _paused(pause) for name, pause in sorted(health.wishes.paused.items())},
                "held": turn.held,
                "passed_over": tuple(
                    {"client": ref.client, "id": ref.id, "waits_for": word}
                    for ref, word in turn.passed_over(HEAD).items()
                ),
                "head": tuple(one for lane in Lane for one in _head(health, turn, lane, at)),
            },
            "workers": {slot.name: _worker(slot) for slot in slots},
            "gpu": health.driver.seen,
            "storage": health.retention.storage() if health.retention else None,
            "inboxes": tuple(_inbox(door, now) for door in doors),
            "totals": health.totals,
            "rates": health.tempo.rates(at),
            "last_errors": tuple(health.last_errors),
        }
    )


def _head(health: Known, turn: Turn, lane: Lane, at: datetime) -> Iterator[dict[str, Any]]:
    """The next jobs of a lane in the order in which they will be served if none comes and none goes."""
    head = turn.head(HEAD, lane)
    waits = health.states.waits(head, lane, at) if health.states else [None] * len(head)
    for place, (ref, wait) in enumerate(zip(head, waits, strict=True), 1):
        yield {
            "client": ref.client,
            "id": ref.id,
            "lane": lane,
            "queue_position": place,
            "queue_length": turn.length(lane),
            "estimated_wait_seconds": wait,
        }


def _paused(pause: Pause) -> dict[str, str]:
    return {"at": pause.at, "reason": pause.reason}


def _worker(slot: Slot) -> dict[str, Any]:
    worker: dict[str, Any] = {"state": slot.state, "lane": slot.lane, "device": slot.device}
    worker |= {"starts": slot.starts, "deaths": slot.deaths, "painted": slot.painted, "pipeline": slot.pipeline}
    if slot.running is not None:
        ref, progress = slot.running.job.ref, slot.running.progress
        worker |= {"job": ref.id, "client": ref.client, "attempt": slot.running.attempt}
        worker |= {"since": stamp(slot.running.started_at)} | (progress.told() if progress else {})
    return worker


def _inbox(door: Door, now: float) -> dict[str, Any]:
    return {
        "path": str(door.inbox),
        "scan_age_s": round(now - door.looked_at, 3),
        "stuck": door.stuck,
        "trouble": door.trouble,
        "skew_s": None if door.skew_s is None else round(door.skew_s, 3),
        "delay_s": None if door.delay_s is None else round(door.delay_s, 3),
    }


def stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")
