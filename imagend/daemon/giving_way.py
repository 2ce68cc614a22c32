"""Training gives way to painting, on the workers that do both.

While both want a worker, training has a `share` of its time, in turns of `turn_s`, and in quiet hours all of it. A
share of 0 is none: training is interrupted, unharmed, as soon as something waits that no free worker takes. It goes on
where nothing else was done for `rest_s`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from imagend.daemon.executor import Executor
from imagend.daemon.settings import Settings
from imagend.daemon.slots import Slot
from imagend.daemon.turn import Turn
from imagend.job import Kind, Ref
from imagend.lanes import Lane

MEMORY_S = 3600.0
"""So much of what was shared is remembered, the more of it the later it was."""


@dataclass
class _Shared:
    """A worker, and for how long it has done the one while the other waited for it."""

    slot: Slot
    training: float = 0.0
    painting: float = 0.0
    looked_at: float = 0.0
    painted_at: float = -math.inf

    @property
    def trains(self) -> bool:
        return self.slot.running is not None and self.slot.running.job.kind is Kind.TRAIN

    def look(self, now: float, wanted: bool) -> None:
        """Count the time since the last look; `wanted`: whether the other waited for it."""
        seconds, self.looked_at = now - self.looked_at, now
        if wanted and self.trains:
            self.training += seconds
        elif wanted and self.slot.running:
            self.painting += seconds
        if self.slot.running and not self.trains:
            self.painted_at = now
        if self.training + self.painting > MEMORY_S:
            self.training, self.painting = self.training / 2, self.painting / 2


class GivingWay:
    def __init__(
        self,
        turn: Turn,
        slots: Iterable[Slot],
        settings: Settings,
        clock: Callable[[], float],
        wall: Callable[[], datetime],
    ) -> None:
        self._turn, self._settings, self._clock, self._wall = turn, settings, clock, wall
        self._shared = {slot.name: _Shared(slot) for slot in slots if slot.lane is Lane.PAINT}

    def next(self, slot: Slot) -> Ref | None:
        """The job that a free worker is to take."""
        ref = self._turn.next(slot.lane)
        if slot.lane is not Lane.PAINT or (training := self._turn.next(Lane.TRAIN)) is None:
            return ref
        one = self._shared[slot.name]
        if ref is None:
            return training if self._clock() - one.painted_at >= self._settings.config.train.rest_s else None
        return training if self._is_first(one) else ref

    def tend(self, executor: Executor, now: float) -> None:
        """Interrupt training where it is to give way. Called when the free workers have got their jobs: what waits now,
        waits for those that are busy."""
        paint, train = (self._turn.next(lane) is not None for lane in (Lane.PAINT, Lane.TRAIN))
        going = any(one.slot.running and one.slot.running.released for one in self._shared.values())
        for one in self._shared.values():
            one.look(now, paint if one.trains else train)
            if one.trains and paint and not going and self._is_over(one):  # one at a time: it may do
                one.slot.release(executor, self._settings.config, now)
                going = True

    def _is_over(self, one: _Shared) -> bool:
        """Whether training has had its turn."""
        assert one.slot.running is not None
        settings, trained = self._settings.config.train, self._wall() - one.slot.running.started_at
        return not self._is_first(one) and (settings.share == 0 or trained.total_seconds() >= settings.turn_s)

    def _is_first(self, one: _Shared) -> bool:
        """Whether training comes first: in quiet hours, or because it has had no more than its share."""
        settings = self._settings.config.train
        within = one.training <= settings.share * (one.training + one.painting)
        return settings.is_quiet(self._wall()) or (settings.share > 0 and within)
