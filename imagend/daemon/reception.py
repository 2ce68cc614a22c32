"""From the doors to the queue: takes verified jobs in and acts on cancels; one verdict for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import structlog

from imagend.config import Config
from imagend.daemon.disk import Disk
from imagend.daemon.ending import Ending
from imagend.daemon.health import Health
from imagend.daemon.intake import LATER, Arrival, Verdict
from imagend.daemon.limits import Gate
from imagend.daemon.turn import Turn
from imagend.errors import QueueFull, RateLimited, UnknownJob
from imagend.job import CancelRequest, Job, Outcome, Ref
from imagend.lanes import lane_of
from imagend.outputs import Outputs
from imagend.spool import Spool, State

log = structlog.get_logger()


class Reception:
    """`stop_job` asks the worker that holds a job to let go of it."""

    def __init__(
        self,
        spool: Spool,
        outputs: Outputs,
        turn: Turn,
        disk: Disk,
        ending: Ending,
        health: Health,
        gate: Gate,
        config: Callable[[], Config],
        stop_job: Callable[[Ref], bool],
    ) -> None:
        self.spool, self.outputs, self.turn, self.disk = spool, outputs, turn, disk
        self.ending, self.health, self.gate, self.config, self.stop_job = ending, health, gate, config, stop_job
        self.open = True

    def take_in(self, arrivals: Sequence[Arrival]) -> tuple[Verdict, ...]:
        """Queue jobs, then act on cancels, so that a cancel finds the job it came with. Durable when it returns."""
        if not self.open:
            return (LATER,) * len(arrivals)
        verdicts: dict[int, Verdict] = {}
        accepted: list[Job] = []
        try:
            for number, arrival in enumerate(arrivals):
                if isinstance(arrival.item, Job):
                    verdicts[number] = self.accept(arrival.item, arrival.raw, accepted)
            self.spool.commit()
            self.health.trouble("intake", None)
        except OSError as error:  # the files stay where they are and are asked about again
            self.spool.abandon()
            for job in accepted:
                self.turn.remove(job.ref)
                self.gate.give_back(job.signer, self.config())
            self.health.trouble("intake", f"no job can be accepted: {error}")
            return (LATER,) * len(arrivals)
        for job in accepted:
            log.info("accepted", job=str(job.ref))
            self.health.events.queued(job)
        cancels = {number: one.item for number, one in enumerate(arrivals) if isinstance(one.item, CancelRequest)}
        for number, wish in cancels.items():
            verdicts[number] = self.heed(wish)
        try:
            if cancels:
                self.outputs.confirm()  # else a power cut could bring back what was cancelled, without its wish
        except OSError as error:
            self.disk.refused("disk", error)
            verdicts |= dict.fromkeys(cancels, LATER)
        return tuple(verdicts[number] for number in range(len(arrivals)))

    def accept(self, job: Job, raw: bytes, accepted: list[Job]) -> Verdict:
        """Queue a job and add it to `accepted`; a refusal is the verdict on this one alone."""
        ended = self.outputs.ended(job.ref)
        if not ended and self.spool.where(job.ref) is None:
            try:
                self.gate.admit(job.signer, self.turn, self.config())
            except (QueueFull, RateLimited) as refusal:
                self.spool.attachments.release(job.ref)
                return refusal
        if ended or not self.spool.accept(job.ref, raw):
            log.info("known already", job=str(job.ref))
            if ended or self.spool.where(job.ref) is State.DONE:
                self.spool.attachments.release(job.ref)
        else:
            self.turn.add(job.ref, job.header.priority, lane=lane_of(job, self.config().default_upscaler))
            accepted.append(job)
        return None

    def heed(self, wish: CancelRequest) -> Verdict:
        """Act on a wish to cancel. One that finds no job costs no rate: it may have to be looked at many times."""
        try:
            self.gate.admit_cancel(wish.signer, self.config())
        except RateLimited as refusal:
            return refusal
        try:
            verdict = self.cancel(wish.ref)
        except UnknownJob as reason:
            verdict = reason  # the door asks again if its job may stand behind it
        if verdict is not None:
            self.gate.give_back_cancel(wish.signer, self.config())
        return verdict

    def cancel(self, ref: Ref) -> Verdict:
        """Stop a job wherever it is. A job that has ended stays as it is. Raises UnknownJob.

        LATER while the disk refuses to keep the wish: its file must stay.
        """
        if ref in self.turn:
            self.turn.remove(ref)
            self.disk.owe(partial(self.ending.end, ref, Outcome.CANCELLED))
            self.disk.pay(at_once=True)
        else:
            try:
                if self.stop_job(ref):
                    return None
            except OSError as error:
                self.disk.refused("disk", error)
                return LATER
            if self.spool.where(ref) is None and not self.outputs.ended(ref):
                raise UnknownJob(ref.id, ref.client)
        return LATER if self.disk.owing else None
