"""outputs/<client>/<id>.state.json: where a job is, for whoever sees only outputs/. Hints; gone when the job ends.

Bounded: so many files in a quarter of a second, the running jobs first, then the head of the queue, then the rest,
whose places are true of the moment in `at`: a newcomer behind 10,000 others is told of within two minutes, not at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from imagend.daemon.outlook import HEAD, Outlook
from imagend.daemon.slots import Slot
from imagend.daemon.turn import Turn
from imagend.job import Kind, Ref
from imagend.lanes import Lane
from imagend.manifest import Manifest
from imagend.outputs import Outputs

SCHEMA = "imagend.state/v1"
PERIOD_S = 0.25
FILES = 50
"""At most so many are written in each period."""
FRESH_S = 10.0
"""One whose place is the same is written anew after so long, for its estimate."""

_Place = tuple[Lane, int, Ref]


class States:
    def __init__(self, outputs: Outputs, turn: Turn, slots: Iterable[Slot], outlook: Outlook) -> None:
        self._outputs, self._turn, self._slots, self.outlook = outputs, turn, tuple(slots), outlook
        self._told: dict[Ref, tuple[Any, float]] = {}  # what was told of a job, and when
        self._gone: set[Ref] = set()
        self.trouble: str | None = None
        self._slots_of = {lane: [slot for slot in self._slots if slot.lane is lane] for lane in Lane}
        self._walk: Iterator[_Place] = iter(())
        self._began = datetime.now(UTC)
        self._walked = self._again = -FRESH_S
        self._left, self._recovered = 0, False

    def _recover(self) -> None:
        """After any death: what is told of a job that does not wait is not true."""
        for ref in self._outputs.shown():
            if ref in self._turn:
                self._told[ref] = (None, 0.0)
            else:
                self._outputs.hide(ref)

    def ended(self, manifest: Manifest) -> None:
        """It is published: a reader needs no hint any more."""
        if manifest.kind not in (Kind.FETCH, Kind.TRAIN):  # how long these take tells nothing of pictures
            self.outlook.durations.learn(manifest)
        ref = Ref(manifest.client, manifest.id)
        if self._told.pop(ref, None):
            self._gone.add(ref)

    def tidy(self) -> None:
        """Remove what is told of jobs that have ended. May be repeated after an OSError."""
        for ref in tuple(self._gone):
            self._outputs.hide(ref)
            self._gone.discard(ref)

    def tend(self, now: float) -> None:
        """Tell some of what is new, if it is time. Never fails: what was told grows old, and `trouble` says why."""
        self.outlook.durations.keep(now)
        if now < self._again:
            return
        self._again, self._left = now + PERIOD_S, FILES // 2
        try:
            if not self._recovered:
                self._recover()
                self._recovered = True
            self._tell(now)
            self.trouble = None
        except OSError as error:
            self.trouble = f"state files in outputs/ cannot be written: {error.strerror}"

    def stop(self, now: float) -> None:
        self.outlook.durations.keep(now, at_once=True)

    def _tell(self, now: float) -> None:
        at = datetime.now(UTC)
        for slot in self._slots:
            if slot.running is not None:
                step = slot.running.progress.told() if slot.running.progress else {}
                self._show(slot.running.job.ref, {"state": "running"} | step, {}, now, at)
        last: dict[Lane, float | None] = {}
        for lane in Lane:
            head = self._turn.head(HEAD, lane)
            waits = self.waits(head, lane, at)
            last[lane] = waits[-1] if waits else None
            for place, (ref, wait) in enumerate(zip(head, waits, strict=True), 1):
                self._queued(ref, lane, place, wait, now, at)
        self._left += FILES // 2  # kept for the rest, however fast the head moves
        for ref, word in self._turn.passed_over(HEAD).items():
            self._show(ref, {"state": "queued", "waits_for": word}, {}, now, at)
        if any(self._turn.length(lane) > HEAD for lane in Lane):
            self._tell_the_rest(last, now, at)

    def waits(self, head: list[Ref], lane: Lane, at: datetime) -> list[float | None]:
        """Of each job at the head: seconds until its turn, if that is known and no operator stands before it. How long
        a fetch takes, nobody knows."""
        if self._turn.halted or lane is Lane.FETCH:
            return [None] * len(head)
        return self.outlook.waits(head, self._slots_of[lane], at, lane)

    def _tell_the_rest(self, last: Mapping[Lane, float | None], now: float, at: datetime) -> None:
        """Go on with a walk through the queue as it stood when the walk began; then begin anew."""
        mean = self.outlook.durations.expect(None)
        for _ in range(self._left):
            if (one := next(self._walk, None)) is None:
                if now - self._walked < FRESH_S:
                    return
                self._walk, self._walked, self._began = self._places(), now, at
                continue
            lane, place, ref = one
            if place > HEAD and ref in self._turn:
                known, each = last[lane], None if mean is None else mean / max(1, len(self._slots_of[lane]))
                wait = None if known is None or each is None else round(known + (place - HEAD) * each, 1)
                self._queued(ref, lane, place, wait, now, self._began)

    def _places(self) -> Iterator[_Place]:
        """Of all that wait now, lane after lane."""
        walks = [(lane, self._turn.snapshot(lane)) for lane in Lane]
        return ((lane, place, ref) for lane, walk in walks for place, ref in enumerate(walk, 1))

    def _queued(self, ref: Ref, lane: Lane, place: int, wait: float | None, now: float, at: datetime) -> None:
        told = {"state": "queued", "queue_position": place}
        more = {"queue_length": self._turn.length(lane), "estimated_wait_seconds": wait}
        self._show(ref, told, more, now, at)

    def _show(self, ref: Ref, told: dict[str, Any], more: dict[str, Any], now: float, at: datetime) -> None:
        before, when = self._told.get(ref, (None, 0.0))
        if self._left <= 0 or (before == told and now - when < FRESH_S):
            return
        self._left -= 1
        head = {"schema": SCHEMA, "id": ref.id, "client": ref.client, "at": at.isoformat(timespec="milliseconds")}
        self._told[ref] = (None, 0.0)  # even if this fails: there may be a file to remove
        self._outputs.show(ref, head | told | more)
        self._told[ref] = (told, now)
