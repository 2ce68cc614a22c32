"""What an operator wishes (spool/orders/), carried out: pause, hold; a job again, or nothing left of it.

Every step may be repeated after an error or a crash: the wish lies there until all is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial

import structlog

from imagend.config import Config
from imagend.daemon.disk import Disk
from imagend.daemon.ending import Ending, load
from imagend.daemon.executor import Executor
from imagend.daemon.slots import Slot
from imagend.daemon.turn import Turn
from imagend.errors import Rejected
from imagend.job import Outcome, Ref
from imagend.lanes import lane_of
from imagend.orders import Orders, name_of
from imagend.outputs import Outputs
from imagend.spool import Spool, State
from imagend.upscaling import LANCZOS

log = structlog.get_logger()

SETTLED_NS = 10**9
"""A folder's time may stand still for some ms while it changes: it is read again until it is so old."""


class Operator:
    """Looks at the orders: one stat() a look-around while nothing changes."""

    def __init__(
        self,
        spool: Spool,
        outputs: Outputs,
        turn: Turn,
        disk: Disk,
        ending: Ending,
        slots: Iterable[Slot],
        executor: Executor,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.orders = Orders(spool.root)
        self.spool, self.outputs, self.turn, self.disk, self.ending = spool, outputs, turn, disk, ending
        self._slots, self._executor, self._wall_ns = tuple(slots), executor, wall_ns
        self._seen: int | None = None
        self._default_upscaler = LANCZOS
        self._owed: set[str] = set()

    def tend(self, config: Config, now: float) -> None:
        """Carry out what is new."""
        self._default_upscaler = config.default_upscaler
        version = self.orders.version()
        if version == self._seen and self._wall_ns() - version > SETTLED_NS:
            return
        try:
            wishes = self.ending.health.wishes = self.orders.read()
        except OSError as error:
            self.disk.refused("orders", error)
            return
        self.disk.worked("orders")
        self._seen = version
        self.turn.halted = wishes.pause is not None
        self.turn.pause(set(wishes.paused))
        self.turn.hold(wishes.held)
        for slot in self._slots:
            if slot.running and wishes.stop(slot.running.job.ref.client):
                slot.give_back(self._executor, config, now)
        for ref in filter(self.outputs.ended, wishes.held):
            self._owe(name_of("hold", ref), lambda: None)
        for verb, refs, carry_out in (
            ("requeue", wishes.requeue, self._requeue),
            ("purge", wishes.purge, self._purge),
        ):
            for ref in refs:
                self._owe(name_of(verb, ref), partial(carry_out, ref))

    def _owe(self, name: str, carry_out: Callable[[], None]) -> None:
        if name not in self._owed:
            self._owed.add(name)
            self.disk.owe(self.ending.tidy)  # what has just ended is put away first
            self.disk.owe(partial(self._once, name, carry_out))

    def _once(self, name: str, carry_out: Callable[[], None]) -> None:
        carry_out()
        self.orders.take_back(name)
        self._owed.discard(name)

    def _requeue(self, ref: Ref) -> None:
        """Queue a job again that ended without pictures. What its manifest said goes to its story."""
        if self.spool.where(ref) is not State.DONE:
            return
        ended = self.outputs.ended(ref)
        manifest = self.outputs.manifest(ref) if ended else {}
        try:
            job = load(self.spool, ref)
        except Rejected:
            return self._refuse("requeue", ref, "its file cannot be read any more")
        if manifest.get("outcome") in (Outcome.SUCCEEDED, Outcome.PARTIAL):
            return self._refuse("requeue", ref, "it has pictures")
        if not ended and not self.spool.is_reopened(ref):
            return self._refuse("requeue", ref, "its result has been removed")
        if ended:
            self.spool.reopen(ref, manifest)
            self.outputs.withdraw(ref)
        self.spool.requeue_ended(ref)
        self.turn.add(ref, job.header.priority, lane=lane_of(job, self._default_upscaler))
        self.ending.health.events.tell("requeued", ref, attempt=0, code=None)
        log.info("queued again by the operator", job=str(ref))

    def _purge(self, ref: Ref) -> None:
        """Leave nothing of an ended job but its id, which must be known until its file has expired."""
        if self.spool.where(ref) not in (State.DONE, None):
            return self._refuse("purge", ref, "it has not ended")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.spool.bury(ref)
        self.outputs.tell_removed([{"id": ref.id, "client": ref.client, "why": "purged", "removed_at": at}])
        self.outputs.withdraw(ref)
        log.info("purged by the operator", job=str(ref))

    def _refuse(self, verb: str, ref: Ref, why: str) -> None:
        log.warning("an order is not carried out", order=verb, job=str(ref), why=why)
