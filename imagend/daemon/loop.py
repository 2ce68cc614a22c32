"""The one loop. It alone owns spool and outputs; it decides and never paints: importing torch here is a bug.

All it hears comes through one mailbox, and hearing only hastens: look_around() is right even if no event ever comes.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog

from imagend.config import Config
from imagend.daemon.ending import Ending, accepted_at, load
from imagend.daemon.executor import (
    Arrived,
    Died,
    Event,
    Executor,
    Heard,
    Mailbox,
    ReloadRequested,
    StopRequested,
)
from imagend.daemon.health import MIN_INTERVAL_S, Health
from imagend.daemon.intake import LATER, MAX_BATCH, Arrival, Door, Verdict
from imagend.daemon.recipe import complete
from imagend.daemon.recovery import recover
from imagend.daemon.retry import worth_another_attempt
from imagend.daemon.settings import Settings
from imagend.daemon.slots import Running, Slot
from imagend.daemon.turn import Turn
from imagend.errors import JobFailed, MissingOutput, Rejected, UnknownJob
from imagend.job import CancelRequest, Job, Outcome, Ref
from imagend.messages import Ended, Failure, Message, Progress, Ready, Run, Stop
from imagend.models import Models
from imagend.outputs import Outputs
from imagend.spool import Spool

log = structlog.get_logger()

TICK_S = 1.0
"""Deadlines are looked at this often when nothing happens."""


class Daemon:
    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        spool: Spool,
        outputs: Outputs,
        models: Models,
        executor: Executor,
        doors: Sequence[Door],
        mailbox: Mailbox,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.spool, self.outputs, self.models = spool, outputs, models
        self.executor, self.doors, self.mailbox = executor, doors, mailbox
        self.clock, self.wall = clock, wall
        self.turn = Turn()
        self.slots = {name: Slot(name, device) for name, device in executor.slots().items()}
        self.health = Health(config.spool, config.name, config.heartbeat_s, wall())
        self.settings = Settings(config, reload, self.health)
        self.ending = Ending(spool, outputs, self.health, wall)
        self.stopping = False
        self._stop_by = 0.0
        self._changed = True

    def run(self) -> None:
        """From recover() until asked to stop and every worker is gone."""
        while not (self.stopping and all(slot.state == "down" for slot in self.slots.values())):
            self.look_around()
            self.wait()
        self.health.write(self.clock(), "stopped", self.slots.values(), self.turn, self.doors)
        log.info("stopped")

    def look_around(self) -> None:
        """Make the world what it should be."""
        now = self.clock()
        self.settings.reread_keys()
        self.tell_doors()
        if not self.stopping:
            for slot in self.slots.values():
                slot.tend(self.executor, self.settings.config, now)
            self.hand_out()
        elif now > self._stop_by:
            self.kill_all()
        self.health.observe(now, self.doors, self.slots.values())
        if self.health.due(now, self._changed):
            self.health.write(now, self.state(), self.slots.values(), self.turn, self.doors)
            self._changed = False

    def wait(self) -> None:
        """Sleep until something happens or it is time to look around, then handle all that has happened."""
        try:
            self.handle(self.mailbox.get(timeout=self._patience_s()))
            while True:
                self.handle(self.mailbox.get_nowait())
        except queue.Empty:
            pass

    def _patience_s(self) -> float:
        if len(self.turn) and not self.stopping and any(slot.state == "idle" for slot in self.slots.values()):
            return 0.0  # a job ended before it was painted: the next one waits
        return MIN_INTERVAL_S if self._changed else min(TICK_S, self.settings.config.heartbeat_s)

    def tell_doors(self) -> None:
        for door in self.doors:
            if door.policy is not self.settings.policy:
                door.policy = self.settings.policy

    def handle(self, event: Event) -> None:
        self._changed = True
        match event:
            case Heard(name, message):
                self.hear(self.slots[name], message)
            case Died(name, exit_status):
                self.bury(self.slots[name], exit_status)
            case Arrived(arrivals, reply):
                reply.put(self.take_in(arrivals))
            case StopRequested():
                self.stop()
            case ReloadRequested():
                self.settings.reload()

    # From the doors to the queue

    def take_in(self, arrivals: Sequence[Arrival]) -> tuple[Verdict, ...]:
        """Queue jobs, then act on cancels, so that a cancel finds the job it came with. Durable when it returns."""
        if self.stopping:
            return (LATER,) * len(arrivals)
        verdicts: dict[int, Verdict] = {}
        try:
            for number, arrival in enumerate(arrivals):
                if isinstance(arrival.item, Job):
                    self.accept(arrival.item, arrival.raw)
                    verdicts[number] = None
            self.spool.commit()
            self.health.trouble("intake", None)
        except OSError as error:  # the files stay where they are and are asked about again
            self.health.trouble("intake", f"no job can be accepted: {error}")
            return (LATER,) * len(arrivals)
        for number, arrival in enumerate(arrivals):
            if isinstance(arrival.item, CancelRequest):
                verdicts[number] = None
                try:
                    self.cancel(arrival.item.ref)
                except UnknownJob as reason:  # in a full batch its job may stand behind it
                    verdicts[number] = LATER if len(arrivals) == MAX_BATCH else reason
        return tuple(verdicts[number] for number in range(len(arrivals)))

    def accept(self, job: Job, raw: bytes) -> None:
        if self.outputs.ended(job.ref) or not self.spool.accept(job.ref, raw):
            log.info("known already", job=str(job.ref))
            return
        self.turn.add(job.ref, job.header.priority)
        log.info("accepted", job=str(job.ref))

    def cancel(self, ref: Ref) -> None:
        """Stop a job wherever it is. A job that has ended stays as it is. Raises UnknownJob."""
        if ref in self.turn:
            self.turn.remove(ref)
            self.ending.end(ref, Outcome.CANCELLED)
            return
        for slot in self.slots.values():
            if slot.holds(ref):
                self.spool.note(ref, "cancel", durable=True)  # a crash now must not forget the wish
                slot.cancel(self.executor, self.settings.config, self.clock())
                return
        if self.spool.where(ref) is None and not self.outputs.ended(ref):
            raise UnknownJob(ref.id, ref.client)

    # From the queue to the workers

    def hand_out(self) -> None:
        """Give each idle worker the job whose turn it is; no more at once, so that the loop stays quick."""
        for slot in self.slots.values():
            if slot.state == "idle" and (ref := self.turn.next()) is not None:
                self.turn.remove(ref)
                self.start(slot, ref)

    def start(self, slot: Slot, ref: Ref) -> None:
        """Claim a job and send it to a worker; one that cannot be painted ends here."""
        try:
            job = load(self.spool, ref)
            spec = complete(
                job.spec,
                ref,
                self.settings.config,
                self.models.find(job.spec.model or self.settings.config.default_model),
            )
        except (JobFailed, Rejected) as error:  # Rejected: an older imagend took in what this one cannot read
            self.ending.end(ref, Outcome.FAILED, failure=Failure.of(error))
            return
        accepted = accepted_at(self.spool, ref)
        attempt = self.spool.claim(ref)
        now = self.clock()
        until = now + self.settings.config.time_limit_s
        slot.take(Running(job, spec, attempt, accepted, self.wall(), until), self.settings.config, now)
        folder = str(self.outputs.draft(ref))
        self.executor.send(slot.name, Run(job=ref, kind=job.kind, spec=spec.model_dump(mode="json"), folder=folder))
        log.info("started", job=str(ref), worker=slot.name, attempt=attempt)

    # From the workers to the outputs

    def hear(self, slot: Slot, message: Message) -> None:
        match message:
            case Ready():
                slot.ready = True
                log.info("worker ready", worker=slot.name, device=message.device, versions=message.versions)
            case Progress() if slot.holds(message.job):
                slot.progressed(message, self.settings.config, self.clock())
            case Ended() if slot.holds(message.job):
                running = slot.ended()
                if message.failure and (message.failure.traceback or message.failure.try_again):
                    slot.retire(self.executor)
                self.attempt_over(running, message)
            case late:
                log.info("ignored a late word", worker=slot.name, word=late.type)

    def attempt_over(self, running: Running, ended: Ended) -> None:
        ref = running.job.ref
        if ended.outcome is Outcome.SUCCEEDED:
            try:
                self.outputs.seal(ref, ended.artifacts, len(running.spec.seeds or ()))
                self.ending.end(ref, Outcome.SUCCEEDED, running, ended)
            except MissingOutput as error:
                self.ending.end(ref, Outcome.FAILED, running, ended, Failure.of(error))
        elif ended.outcome is Outcome.CANCELLED or running.cancelled:
            self.ending.end(ref, Outcome.CANCELLED, running, ended)
        else:
            assert ended.failure is not None
            if ended.failure.traceback:
                log.error("a worker met a bug", job=str(ref), traceback=ended.failure.traceback)
            self.fail(running, ended.failure, ended)

    def bury(self, slot: Slot, exit_status: int) -> None:
        """A worker is dead: what becomes of its job, and when does the next one start?"""
        running = slot.died(self.clock())
        cause = slot.cause_of_death(exit_status, running.attempt if running else 0)
        if self.stopping:
            if running and running.cancelled:
                self.ending.end(running.job.ref, Outcome.CANCELLED, running)
            elif running:
                self.spool.release(running.job.ref)
                self.turn.add(running.job.ref, running.job.header.priority, first=True)
            return
        log.error("worker died", worker=slot.name, why=str(cause), deaths=slot.deaths)
        if running and running.cancelled:
            self.ending.end(running.job.ref, Outcome.CANCELLED, running)
        elif running:
            self.fail(running, Failure.of(cause))

    def fail(self, running: Running, failure: Failure, ended: Ended | None = None) -> None:
        """An attempt failed; has the job?"""
        job = running.job
        if worth_another_attempt(failure, running.attempt, self.settings.config.max_attempts):
            self.spool.requeue(job.ref, failure.error.message)
            self.turn.add(job.ref, job.header.priority, first=True)
        else:
            self.ending.end(job.ref, Outcome.FAILED, running, ended, failure)

    # Beginning and end

    def recover(self) -> None:
        for queued in recover(self.spool, self.outputs, self.ending, self.settings.config.max_attempts):
            self.turn.add(queued.ref, queued.priority)

    def stop(self) -> None:
        """First: workers leave at their next step, jobs go back to the queue unharmed. Second: at once."""
        if self.stopping:
            self.kill_all()
            return
        log.info("stopping; ask again to stop at once")
        self.stopping, self._stop_by = True, self.clock() + self.settings.config.stop_grace_s
        for slot in self.slots.values():
            if slot.up:
                self.executor.send(slot.name, Stop())

    def kill_all(self) -> None:
        for slot in self.slots.values():
            if slot.up:
                self.executor.kill(slot.name)

    @property
    def busy(self) -> bool:
        return any(slot.running for slot in self.slots.values())

    def state(self) -> str:
        if self.stopping:
            return "draining"
        return self.health.state(self.slots.values())
