"""What has ended goes in time: a thread looks and removes; the loop alone takes things away, each in one step.

    look()  the thread finds what is due            tend()   the loop renames it into outputs/.trash, a few at a time
    clear() the thread removes what lies there      killed in between, the next start goes on

A disk that hangs stops the thread alone. However much there is, a look rests twenty times as long as it took.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from imagend import files, retention
from imagend.config import Config
from imagend.errors import Fatal
from imagend.job import Ref
from imagend.outputs import Outputs
from imagend.retention import Leaving, Stock
from imagend.spool import Spool, State

log = structlog.get_logger()

INTERVAL_S = 60.0
REST = 20
AT_ONCE = 16
"""So many the loop takes away in one look-around."""
JUMP_S = 60.0
"""A clock that jumps so far ahead is not believed for a while."""
DISBELIEF_S = 600.0
LIMIT_S = 900.0
"""A look that takes so long is reported."""
_BREATH_S = 0.002
_NICE = 10


class Retention:
    """The loop calls tend() and reads storage() and `trouble`; the thread does the rest."""

    def __init__(
        self,
        spool: Spool,
        outputs: Outputs,
        is_tidied: Callable[[Ref], bool],
        config: Callable[[], Config],
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool, self._outputs, self._is_tidied, self._config = spool, outputs, is_tidied, config
        self._wall, self._clock = wall, clock
        self._results: deque[tuple[Leaving, dict[str, Any]]] = deque()
        self._jobs: deque[Leaving] = deque()
        self._retired: deque[tuple[Ref, Path, int]] = deque()
        self._taken = threading.Event()
        self.stock, self.jobs_known = Stock(), 0
        self.removed: Counter[str] = Counter()
        """since the start: results, result_bytes, jobs"""
        self._forgotten = 0
        self._looked_at: float | None = None
        self._offset = wall() - clock()
        self._believe_at = self._alive_at = clock()
        self._refused: str | None = None

    # For the loop

    def tend(self) -> None:
        """Take some of what is due away. Never fails: what the disk refuses is found again by the next look."""
        results = [self._results.popleft() for _ in range(min(AT_ONCE, len(self._results)))]
        jobs = [self._jobs.popleft() for _ in range(min(AT_ONCE, len(self._jobs)))]
        try:
            self._retire([pair for pair in results if self._may_go(pair[0])])
            for job in jobs:
                if self._may_go(job):
                    self._spool.forget(job.ref)
                    self._forgotten += 1
        except OSError as error:
            self._refused = f"what has ended cannot be removed: {error}; it is tried again every minute"
        if results or jobs:
            self._taken.set()

    def _may_go(self, leaving: Leaving) -> bool:
        """What was found may have changed since: a job that is queued again keeps all that there is of it."""
        known = (State.DONE, None) if leaving.unknown else (State.DONE,)
        return self._is_tidied(leaving.ref) and self._spool.where(leaving.ref) in known

    def _retire(self, results: list[tuple[Leaving, dict[str, Any]]]) -> None:
        if not results:
            return
        at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds")
        try:
            self._outputs.tell_removed([told | {"removed_at": at} for _, told in results])
        except OSError as error:  # on a full disk this makes room
            log.warning("a removal is not told in removed.jsonl", why=error.strerror)
        for leaving, _ in results:
            if (path := self._outputs.retire(leaving.ref)) is not None:
                self._retired.append((leaving.ref, path, leaving.size))

    def storage(self) -> dict[str, Any]:
        """For status.json: as the last look found it, but for the free room."""
        stock = self.stock
        try:
            free_mb = files.free_bytes(self._outputs.root) >> 20
        except OSError:
            free_mb = None
        first = next(iter(stock.leaving), None)
        return {
            "at": _moment(self._looked_at),
            "outputs_count": stock.count,
            "outputs_size_mb": round(stock.size / 2**20, 1),
            "retrieved_count": stock.retrieved,
            "done_count": self.jobs_known,
            "free_mb": free_mb,
            "next_removal": {"client": first.ref.client, "id": first.ref.id, "at": _moment(first.at), "why": first.why}
            if first
            else None,
            "removed": {"results": self.removed["results"], "jobs": self.removed["jobs"]},
        }

    @property
    def trouble(self) -> str | None:
        """What the operator should know."""
        if self._clock() - self._alive_at > LIMIT_S:
            return f"{self._outputs.root} or the spool does not answer: nothing that has ended is removed"
        return self._refused

    # On its thread

    def serve(self) -> None:
        """Look, remove, rest, for ever."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        self._try(self._outputs.discard_the_rest)
        while True:
            began = self._clock()
            self._try(self.look)
            rest_until = self._clock() + max(INTERVAL_S, REST * (self._clock() - began))
            while (left := rest_until - self._clock()) > 0:
                self._alive_at = self._clock()
                if self._taken.wait(min(left, INTERVAL_S)):
                    self._try(self.clear)
                    if not (self._results or self._jobs) and len(self.stock.leaving) >= retention.LIMIT:
                        break  # there may be more that are due

    def look(self) -> None:
        """Find what is due, and hand it to the loop. Raises OSError."""
        self._alive_at = self._clock()
        if self._results or self._jobs:
            return  # the loop is at it
        config, now = self._config(), self._wall()
        free = files.free_bytes(config.outputs)
        heavy = None if self._looked_at is None else self.stock.heavy(config)
        stock = retention.look_at_results(config, self._spool, now, heavy, free, self._breathe)
        self.jobs_known, jobs = retention.look_at_jobs(config, self._spool, now, self._breathe)
        self.stock, self._looked_at = stock, now
        if not self._believable():
            return
        results = [one for one in stock.leaving if one.at <= now]
        if results:
            self._keep_history(config)
        self._results.extend((one, self._told(one)) for one in results)
        self._jobs.extend(one for one in jobs if one.at <= now)

    def clear(self) -> None:
        """Remove what the loop has taken away, and say so. Raises OSError."""
        self._taken.clear()
        retired = [self._retired.popleft() for _ in range(len(self._retired))]
        jobs, self._forgotten = self._forgotten, 0
        try:
            self._outputs.discard((ref, path) for ref, path, _ in retired)
        except OSError:
            self._retired.extendleft(reversed(retired))
            raise
        finally:
            self.removed["jobs"] += jobs
        size = sum(size for *_, size in retired)
        self.removed.update(results=len(retired), result_bytes=size)
        if retired or jobs:
            log.info("removed by retention", results=len(retired), mb=round(size / 2**20, 1), jobs=jobs)

    def _believable(self) -> bool:
        """Whether the clock has run evenly of late. What is removed by mistake is not to be had again."""
        offset = self._wall() - self._clock()
        if offset - self._offset > JUMP_S:
            self._believe_at = self._clock() + DISBELIEF_S
            log.warning("the clock jumped ahead: nothing is removed for a while", seconds=round(offset - self._offset))
        self._offset = offset
        return self._clock() >= self._believe_at

    def _keep_history(self, config: Config) -> None:
        """`imagend history` takes in what ended since it was asked last, while there are manifests to read."""
        from imagend import history  # here: it brings SQLite

        try:
            history.look(config.history or config.spool / history.FILE, config.outputs).close()
        except (Fatal, OSError) as error:  # on a full disk, too, there must be room again
            log.warning("the history misses what goes now", why=str(error))

    def _told(self, leaving: Leaving) -> dict[str, Any]:
        """What is told of a result when it has gone. Others read it: it repeats nothing that a client wrote."""
        told: dict[str, Any] = {"id": leaving.ref.id, "client": leaving.ref.client, "why": leaving.why}
        try:
            manifest = self._outputs.manifest(leaving.ref)
            return told | {key: manifest.get(key) for key in ("outcome", "ended_at")}
        except (OSError, ValueError, AttributeError):
            return told

    def _breathe(self) -> None:
        self._alive_at = self._clock()
        time.sleep(_BREATH_S)

    def _try(self, step: Callable[[], None]) -> None:
        """What the disk refuses is tried again at the next look."""
        try:
            step()
        except OSError as error:
            self._refused = f"what has ended cannot be removed: {error}; it is tried again every minute"
        else:
            self._refused = None


def _moment(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
