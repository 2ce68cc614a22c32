"""What becomes of a job after an attempt: published, failed, cancelled, or back to the queue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog

from imagend.daemon.disk import Disk
from imagend.daemon.ending import Ending
from imagend.daemon.retry import worth_another_attempt
from imagend.daemon.slots import Running
from imagend.daemon.turn import Turn
from imagend.daemon.unlisted import Unlisted
from imagend.errors import Bug, DiskLost, ImagendError, MissingOutput, NoSpace
from imagend.fields import Planned
from imagend.job import Kind, Outcome
from imagend.lanes import lane_by
from imagend.messages import Ended, Failure
from imagend.outputs import Outputs
from imagend.spool import Spool

log = structlog.get_logger()


class Aftermath:
    """Decides; what is to be written is owed to the disk."""

    def __init__(
        self, spool: Spool, outputs: Outputs, turn: Turn, disk: Disk, ending: Ending, unlisted: Unlisted
    ) -> None:
        self.spool, self.outputs, self.turn, self.disk, self.ending = spool, outputs, turn, disk, ending
        self.unlisted = unlisted

    def tend(self, max_attempts: int, stopping: bool) -> None:
        """Go on with what waited for the catalogue."""
        for running, ended in self.unlisted.listed(all_of_them=stopping):
            self.disk.owe(partial(self.publish, running, ended, max_attempts))

    def ended(self, running: Running, ended: Ended, max_attempts: int) -> None:
        """The worker says that the attempt is over."""
        well = ended.outcome in (Outcome.SUCCEEDED, Outcome.PARTIAL)
        if running.job.kind is Kind.TRAIN:  # what is installed, we say
            ended = ended.model_copy(update={"installed": None, "not_installed": None})
        if well and running.job.kind is Kind.TRAIN:
            self.disk.owe(partial(self._install, running, ended, max_attempts))
        elif ended.outcome is Outcome.SUCCEEDED and running.job.kind is Kind.FETCH:
            self.unlisted.add(running, ended)
        elif well:
            self.disk.owe(partial(self.publish, running, ended, max_attempts))
        elif running.cancelled:
            self.disk.owe(partial(self.ending.end, running.job.ref, Outcome.CANCELLED, running, ended))
        elif ended.outcome is Outcome.CANCELLED and running.released:
            self.disk.owe(partial(self.put_back, running, partial(self.spool.release, running.job.ref)))
        elif ended.outcome is Outcome.CANCELLED:
            self.fail(running, Failure.of(Bug("the worker gave up, unasked")), max_attempts, ended)
        else:
            assert ended.failure is not None
            if ended.failure.traceback:
                log.error("a worker met a bug", job=str(running.job.ref), traceback=ended.failure.traceback)
            if ended.failure.error.code == NoSpace.code:
                self.disk.refused("outputs", ended.failure.error.message)  # the next attempt needs it, too
            self.fail(running, ended.failure, max_attempts, ended)

    def died(self, running: Running, cause: ImagendError, stopping: bool, max_attempts: int) -> None:
        """The worker died with the job; when we stop that is what we asked for, and does not count."""
        ref = running.job.ref
        if running.cancelled:
            self.disk.owe(partial(self.ending.end, ref, Outcome.CANCELLED, running))
        elif stopping:
            self.disk.owe(partial(self.put_back, running, partial(self.spool.release, ref)))
        else:
            self.fail(running, Failure.of(cause), max_attempts)

    def _install(self, running: Running, ended: Ended, max_attempts: int) -> None:
        """What was trained goes into models/ before it is published. Nothing leaves the draft: whatever happens now,
        the next attempt finds its work done."""
        try:
            self.outputs.check(running.job.ref, ended.artifacts, _there(running, ended), running.spec.chain_steps)
        except (DiskLost, MissingOutput):
            self.disk.owe(partial(self.publish, running, ended, max_attempts))  # which tells
        else:
            self.unlisted.install(running, ended)

    def publish(self, running: Running, ended: Ended, max_attempts: int) -> Callable[[], None] | None:
        ref = running.job.ref
        try:
            if not self.outputs.ended(ref):
                self.outputs.seal(ref, ended.artifacts, _there(running, ended), running.spec.chain_steps)
        except DiskLost as error:
            self.fail(running, Failure.of(error), max_attempts)
        except MissingOutput as error:
            self.disk.owe(partial(self.ending.end, ref, Outcome.FAILED, running, ended, Failure.of(error)))
        else:
            complete = self.ending.succeed(running, ended)
            return partial(self._published, complete)
        return None

    def _published(self, complete: Callable[[], None]) -> None:
        complete()
        self.disk.worked("outputs")

    def fail(self, running: Running, failure: Failure, max_attempts: int, ended: Ended | None = None) -> None:
        """An attempt failed; has the job?"""
        job = running.job
        if worth_another_attempt(failure, running.attempt, max_attempts):
            again = partial(self.spool.requeue, job.ref, failure.error.message)
            self.disk.owe(partial(self.put_back, running, again, failure.error.code))
        else:
            self.disk.owe(partial(self.ending.end, job.ref, Outcome.FAILED, running, ended, failure))

    def put_back(self, running: Running, on_disk: Callable[[], None], code: str | None = None) -> None:
        """Back to the queue, for another attempt; without a code unharmed, because we stop or it gives way."""
        on_disk()
        job = running.job
        self.ending.health.events.tell("requeued", job.ref, attempt=running.attempt, code=code)
        spec = running.spec  # every default is filled in there
        lane = lane_by(job.kind, getattr(spec, "upscaler", None), mask=getattr(spec, "mask", None))
        self.turn.add(job.ref, job.header.priority, first=True, lane=lane)


def _there(running: Running, ended: Ended) -> list[Planned]:
    """What is to be published of what was planned. Raises MissingOutput where the worker's words do not fit it."""
    planned = running.spec.planned
    items = {plan.item for plan in planned if plan.item}
    if ended.failed and not ended.failed.keys() < items:
        raise MissingOutput(planned[0].file)
    withheld = {one.index for one in ended.safety.withheld} if ended.safety else set[int]()
    return [plan for index, plan in enumerate(planned) if plan.item not in ended.failed and index not in withheld]
