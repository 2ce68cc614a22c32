"""How long until a waiting job's turn: the head of the queue, put before the workers one after the other.

Bounded: a few jobs are read from disk for each report, and what they are is remembered while they stand at the head;
those not yet read count as what any job took of late.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from imagend.config import Config
from imagend.daemon.durations import Durations, Work
from imagend.daemon.librarian import Librarian
from imagend.daemon.recipe import fill
from imagend.daemon.slots import Running, Slot
from imagend.errors import JobFailed, Rejected
from imagend.job import Job, Kind, Ref
from imagend.lanes import Lane

HEAD = 100
"""Of so many jobs the wait is told one by one."""
READ_AT_ONCE = 2
"""Jobs read for one report: with nine reports a second, some milliseconds of each second."""


class Outlook:
    def __init__(
        self, spool: Path, load: Callable[[Ref], Job], librarian: Librarian, config: Callable[[], Config]
    ) -> None:
        self.durations, self._load, self._librarian, self._config = Durations(spool), load, librarian, config
        self._works: dict[Lane, dict[Ref, Work | None]] = {lane: {} for lane in Lane}

    def waits(
        self, head: Sequence[Ref], slots: Iterable[Slot], wall: datetime, lane: Lane = Lane.PAINT
    ) -> list[float | None]:
        """For each job at the head of a lane, in order: seconds until one of its workers takes it. None while no
        duration is known."""
        works = self._works[lane] = self._read(head, self._works[lane])
        free: list[float] = []
        for slot in slots:
            left = self._left(slot.running, wall)
            if left is None:
                return [None] * len(head)
            free.append(left)
        heapq.heapify(free)
        waits: list[float | None] = []
        for ref in head:
            seconds = self.durations.expect(works.get(ref))
            if seconds is None or not free:
                return [None] * len(head)
            waits.append(round(free[0], 1))
            heapq.heapreplace(free, free[0] + seconds)
        return waits

    def _left(self, running: Running | None, wall: datetime) -> float | None:
        """Seconds until a worker has done what it does; one that takes longer than expected is about to end."""
        if running is None or (running.job.kind is Kind.TRAIN and self._config().train.share == 0):  # it gives way
            return 0.0
        if running.progress and running.progress.eta_s is not None:
            return running.progress.eta_s
        seconds = self.durations.expect(Work.of(running.spec.model_dump()))
        return None if seconds is None else max(0.0, seconds - (wall - running.started_at).total_seconds())

    def _read(self, head: Sequence[Ref], known: Mapping[Ref, Work | None]) -> dict[Ref, Work | None]:
        """Learn what some more jobs are; forget those that have left the head."""
        works = {ref: known[ref] for ref in head if ref in known}
        for ref in [ref for ref in head if ref not in works][:READ_AT_ONCE]:
            works[ref] = self._work(ref)
        return works

    def _work(self, ref: Ref) -> Work | None:
        """None for a job that will fail when its turn comes."""
        try:
            spec = fill(self._load(ref), self._config(), self._librarian).spec
            return Work.of(spec.model_dump())
        except (JobFailed, Rejected, OSError):
            return None
