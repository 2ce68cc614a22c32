"""From the queue to the workers: each that is free gets the job whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from functools import partial

import structlog

from imagend.config import Config
from imagend.daemon.disk import Disk
from imagend.daemon.ending import Ending, accepted_at, load_whole
from imagend.daemon.executor import Executor
from imagend.daemon.giving_way import GivingWay
from imagend.daemon.librarian import Librarian
from imagend.daemon.recipe import fill
from imagend.daemon.remembered import Remembered
from imagend.daemon.slots import Running, Slot
from imagend.daemon.turn import Turn
from imagend.errors import JobFailed, Rejected
from imagend.job import Outcome, Ref
from imagend.messages import Failure, Known, Run
from imagend.outputs import Outputs
from imagend.spool import Spool

log = structlog.get_logger()


class Dispatch:
    def __init__(
        self,
        spool: Spool,
        outputs: Outputs,
        turn: Turn,
        giving_way: GivingWay,
        slots: Collection[Slot],
        librarian: Librarian,
        remembered: Remembered,
        disk: Disk,
        ending: Ending,
        executor: Executor,
        config: Callable[[], Config],
        clock: Callable[[], float],
        wall: Callable[[], datetime],
    ) -> None:
        self.spool, self.outputs, self.turn, self.slots = spool, outputs, turn, slots
        self.giving_way = giving_way
        self.librarian, self.remembered, self.disk, self.ending = librarian, remembered, disk, ending
        self.executor, self.config, self.clock, self.wall = executor, config, clock, wall

    def next(self, slot: Slot) -> Ref | None:
        """The job that a worker gets now, if it is free."""
        return self.giving_way.next(slot) if slot.state == "idle" else None

    @property
    def is_due(self) -> bool:
        """Whether a worker is free for a job that waits."""
        return any(self.next(slot) for slot in self.slots)

    def hand_out(self) -> None:
        """Give each free worker one job; no more at once, so that the loop stays quick."""
        for slot in self.slots:
            if (ref := self.next(slot)) is not None:
                try:
                    self.start(slot, ref)
                except OSError as error:  # it keeps its place
                    self.disk.refused("claim", error)
                    return
                self.disk.worked("claim")
                self.turn.serve(ref)

    def start(self, slot: Slot, ref: Ref) -> None:
        """Claim a job and send it to a worker; one that cannot be painted ends here."""
        config = self.config()
        try:
            job = load_whole(self.spool, ref)
            spec, model, route, otherwise = fill(job, config, self.librarian)
            fields, accepted = spec.model_dump(mode="json"), accepted_at(self.spool, ref)
            self.librarian.check_active(fields, accepted)
            pictures = self.librarian.pictures(spec.pictures) | self.spool.attachments.places(ref, spec.pictures)
        except (JobFailed, Rejected) as error:  # Rejected: an older imagend took in what this one cannot read
            self.disk.owe(partial(self.ending.end, ref, Outcome.FAILED, failure=Failure.of(error)))
            return
        folder = str(self.outputs.draft(ref))
        attempt = self.ending.claim(ref)
        now = self.clock()
        until = now + slot.limit_s(config, job.kind)
        running = Running(job, spec, attempt, accepted, self.wall(), until, route, otherwise)
        slot.take(running, config, now)
        memory = self.remembered.of(model, fields.get("width"), fields.get("height"))
        run = Run(
            job=ref,
            kind=job.kind,
            spec=fields,
            folder=folder,
            pictures=pictures,
            known=Known(digests=self.librarian.known(fields), memory=memory),
            otherwise=otherwise.model_dump(mode="json") if otherwise else None,
            safety=config.filter_for(ref.client),
            last=attempt >= config.max_attempts,
        )
        self.executor.send(slot.name, run)
        log.info("started", job=str(ref), worker=slot.name, attempt=attempt)
