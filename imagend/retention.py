"""What is to go, when and why: results by age and size, the files of ended jobs by age and number. Only looks.

A job file that comes again before it has expired is known by its result or by done/: one of the two stays until then.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from imagend import results, signing
from imagend.config import Config
from imagend.errors import Rejected
from imagend.job import DEFAULT_LIFETIME, MAX_LIFETIME, Ref
from imagend.results import Result
from imagend.spool import Spool, State

LIMIT = 1000
"""So many at most are told of in one look: those that go first."""
_HOUR_S, _DAY_S, _GB = 3600.0, 86400.0, 10**9
MARGIN_S = _HOUR_S
"""A job file is taken for expired so long after its time: clocks are set."""
EXPIRED_S = MAX_LIFETIME.total_seconds() + 24 * _HOUR_S
"""So long after its job was accepted each job file has expired."""
_BREATH = 256


class Leaving(NamedTuple):
    """What goes: a result, or the file and story of an ended job."""

    at: float
    ref: Ref
    why: str
    size: int = 0
    unknown: bool = False
    """whether it may go even if done/ does not know its job"""


@dataclass
class Stock:
    """What a look found. `leaving`: those that go first, soonest first."""

    count: int = 0
    size: int = 0
    retrieved: int = 0
    per_client: Counter[str] = field(default_factory=Counter)
    """bytes"""
    leaving: list[Leaving] = field(default_factory=list)

    def heavy(self, config: Config) -> Collection[str]:
        """The clients that have more than an equal share of what all may have."""
        share = _most(config) / max(1, len(self.per_client))
        return {client for client, size in self.per_client.items() if size > share}


class _First:
    """The LIMIT smallest of all that were added, by their keys."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, Any]] = []

    def add(self, key: Any, item: Any) -> None:
        self._found.append((key, item))
        if len(self._found) >= 4 * LIMIT:
            self._found = heapq.nsmallest(LIMIT, self._found, key=lambda pair: pair[0])

    def sorted(self) -> list[tuple[Any, Any]]:
        return heapq.nsmallest(LIMIT, self._found, key=lambda pair: pair[0])


def due(result: Result, config: Config) -> tuple[float, str]:
    """When a result goes for its age, and why; math.inf: never."""
    unretrieved_h, retrieved_h = (_kept_h(config, result.ref.client, key) for key in ("unretrieved_h", "retrieved_h"))
    at, why = math.inf, ""
    if unretrieved_h is not None:
        at, why = result.ended + unretrieved_h * _HOUR_S, f"{unretrieved_h:g} h after its job ended"
    if result.retrieved is not None and retrieved_h is not None and result.retrieved + retrieved_h * _HOUR_S < at:
        at, why = result.retrieved + retrieved_h * _HOUR_S, f"{retrieved_h:g} h after it was retrieved"
    return at, why


def look_at_results(
    config: Config,
    spool: Spool,
    now: float,
    heavy: Collection[str] | None = None,
    free: int | None = None,
    breathe: Callable[[], None] = lambda: None,
) -> Stock:
    """All results. `free`: bytes on the disk. `heavy`: as an earlier look found them; without, none goes for its size.
    Raises OSError."""
    stock, by_age, by_size, leaving = Stock(), _First(), _First(), 0
    for result in results.found(config.outputs):
        stock.count += 1
        stock.size += result.size
        stock.retrieved += result.retrieved is not None
        stock.per_client[result.ref.client] += result.size
        at, why = due(result, config)
        if at <= now:
            at = max(at, _safe_at(result, spool))
        if at < math.inf:
            by_age.add(at, Leaving(at, result.ref, why, result.size, _is_old(result, now)))
        if at <= now:
            leaving += result.size
        elif heavy is not None:
            by_size.add((result.retrieved is None, result.ref.client not in heavy, result.ended), result)
        if stock.count % _BREATH == 0:
            breathe()
    over, short = stock.size - leaving - _most(config), (config.reserve_mb << 20) - leaving
    short = short - free if free is not None else 0
    pressed = list(_pressed((result for _, result in by_size.sorted()), config, spool, now, over, short))
    gone = {one.ref for one in pressed}
    stock.leaving = [*pressed, *(one for _, one in by_age.sorted() if one.ref not in gone)]
    stock.leaving.sort()
    return stock


def _pressed(
    found: Iterable[Result], config: Config, spool: Spool, now: float, over: float, short: float
) -> Iterable[Leaving]:
    """Those that go because there are too many bytes, or too few are free: then only what was retrieved."""
    for result in found:
        if over <= 0 and (short <= 0 or result.retrieved is None):
            return
        if _safe_at(result, spool) <= now:
            why = f"it was retrieved, and less than {config.reserve_mb} MB are free (reserve_mb)"
            if over > 0:
                why = f"results have more than {config.retention.outputs_gb:g} GB (retention.outputs_gb)"
            yield Leaving(now, result.ref, why, result.size, _is_old(result, now))
            over, short = over - result.size, short - result.size


def look_at_jobs(
    config: Config, spool: Spool, now: float, breathe: Callable[[], None] = lambda: None
) -> tuple[int, list[Leaving]]:
    """How many ended jobs are known, and which of them will be forgotten, soonest first. Raises OSError."""
    oldest, count = _First(), 0
    for ended, ref in spool.ended():
        count += 1
        oldest.add(ended, ref)
        if count % _BREATH == 0:
            breathe()
    leaving = []
    days = config.retention.done_days
    for number, (ended, ref) in enumerate(oldest.sorted()):
        at, why = ended + days * _DAY_S, f"{days:g} days after its job ended (retention.done_days)"
        if number < count - config.retention.max_done and at > now:
            at, why = now, f"more than {config.retention.max_done} ended jobs are known (retention.max_done)"
        if at <= now:
            at = max(at, _expired_at(spool, ref, ended))
        leaving.append(Leaving(at, ref, why))
    return count, sorted(leaving)


def _kept_h(config: Config, client: str, key: str) -> float | None:
    own = config.clients.get(client)
    value: float | None = getattr(own if own and key in own.model_fields_set else config.retention, key)
    return value


def _most(config: Config) -> float:
    return math.inf if config.retention.outputs_gb is None else config.retention.outputs_gb * _GB


def _is_old(result: Result, now: float) -> bool:
    return result.ended + EXPIRED_S <= now


def _safe_at(result: Result, spool: Spool) -> float:
    """From when on a copy of the job's file does no harm when the result has gone."""
    return 0.0 if spool.where(result.ref) is State.DONE else result.ended + EXPIRED_S


def _expired_at(spool: Spool, ref: Ref, ended: float) -> float:
    """From when on the job's file is surely refused as expired."""
    try:
        body, _ = signing.split(spool.read(ref))
        told = json.loads(body)
        issued = datetime.fromisoformat(told["issued_at"])
        expires = told.get("expires_at")
        deadline = datetime.fromisoformat(expires) if expires else issued + DEFAULT_LIFETIME
        return (deadline + timedelta(seconds=MARGIN_S)).timestamp()
    except (FileNotFoundError, Rejected, ValueError, KeyError, TypeError):
        return ended + EXPIRED_S
