"""The one loop. It alone owns spool and outputs; it decides and never paints: importing torch here is a bug.

All it hears comes through one mailbox, and hearing only hastens: look_around() is right even if no event ever comes.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

import structlog

from imagend.config import Config
from imagend.daemon.aftermath import Aftermath
from imagend.daemon.disk import Disk
from imagend.daemon.dispatch import Dispatch
from imagend.daemon.ending import Ending, load_whole
from imagend.daemon.executor import Arrived, Died, Event, Executor, Heard, Mailbox, ReloadRequested, StopRequested
from imagend.daemon.giving_way import GivingWay
from imagend.daemon.health import MIN_INTERVAL_S, Health
from imagend.daemon.installer import Installer
from imagend.daemon.intake import Door
from imagend.daemon.librarian import Librarian
from imagend.daemon.limits import Gate
from imagend.daemon.operator import Operator
from imagend.daemon.outlook import Outlook
from imagend.daemon.reception import Reception
from imagend.daemon.recovery import recover
from imagend.daemon.remembered import Remembered
from imagend.daemon.settings import Settings
from imagend.daemon.slots import Slot
from imagend.daemon.states import States
from imagend.daemon.turn import Turn
from imagend.daemon.unlisted import LOOK_S, Unlisted
from imagend.job import Ref
from imagend.messages import Ended, Made, MemoryShort, Message, Progress, Ready, Stop
from imagend.outputs import Outputs
from imagend.spool import Spool

log = structlog.get_logger()

TICK_S = 1.0
"""Deadlines are looked at this often when nothing happens."""
TIDY_S = 0.05
"""Jobs that ended are announced and put away together, at most this much later."""
MAX_UNTIDIED = 64


class Daemon:
    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        spool: Spool,
        outputs: Outputs,
        librarian: Librarian,
        executor: Executor,
        doors: Sequence[Door],
        mailbox: Mailbox,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.spool, self.outputs, self.librarian = spool, outputs, librarian
        self.executor, self.doors, self.mailbox = executor, doors, mailbox
        self.clock, self.wall = clock, wall
        self.turn = Turn(executor.slots().values())
        self.remembered = Remembered(config.spool)
        self.health = Health(config.spool, config.name, config.heartbeat_s, wall())
        self.slots = {name: Slot(name, device, self.health.events) for name, device in executor.slots().items()}
        self.health.count_in(config.metrics, spool, self.turn, self.slots.values(), doors)
        self.settings = Settings(config, reload, self.health)
        outlook = Outlook(config.spool, partial(load_whole, spool), librarian, lambda: self.settings.config)
        self.health.states = States(outputs, self.turn, self.slots.values(), outlook)
        self.ending = Ending(spool, outputs, self.health, wall)
        self.disk = Disk((config.spool, config.outputs), self.health, lambda: self.clock())
        self.reception = Reception(
            spool,
            outputs,
            self.turn,
            self.disk,
            self.ending,
            self.health,
            Gate(lambda: self.clock()),
            lambda: self.settings.config,
            self.stop_job,
        )
        unlisted = Unlisted(librarian, lambda: self.clock(), Installer(outputs, lambda: self.settings.config))
        self.aftermath = Aftermath(spool, outputs, self.turn, self.disk, self.ending, unlisted)
        self.operator = Operator(spool, outputs, self.turn, self.disk, self.ending, self.slots.values(), executor)
        self.giving_way = GivingWay(
            self.turn, self.slots.values(), self.settings, lambda: self.clock(), lambda: self.wall()
        )
        self.dispatch = Dispatch(
            spool,
            outputs,
            self.turn,
            self.giving_way,
            self.slots.values(),
            librarian,
            self.remembered,
            self.disk,
            self.ending,
            executor,
            lambda: self.settings.config,
            lambda: self.clock(),
            lambda: self.wall(),
        )
        self._stop_by = self._tidy_at = 0.0
        self.stopping, self._changed = False, True

    def run(self) -> None:
        """From recover() until asked to stop, every worker is gone, and what they left is written down."""
        while not self.stopped:
            self.look_around()
            self.wait()
        self.health.write(self.clock(), "stopped", self.slots.values(), self.turn, self.doors)
        log.info("stopped")

    @property
    def stopped(self) -> bool:
        down = not any(slot.up for slot in self.slots.values())
        hopeless = self.clock() > self._stop_by and not self.disk.well
        return self.stopping and down and (not self.unwritten or hopeless)

    def look_around(self) -> None:
        """Make the world what it should be."""
        now = self.clock()
        self.settings.reread_keys()
        self.tell_doors()
        room = self.disk.has_room(self.settings.config.reserve_mb)
        self.reception.open = room and not self.stopping
        self.operator.tend(self.settings.config, now)
        if not self.stopping:
            for slot in self.slots.values():
                slot.tend(self.executor, self.settings.config, now, wanted=self.turn.next(slot.lane) is not None)
            if room and self.disk.well and self.librarian.ready:
                self.dispatch.hand_out()
                self.giving_way.tend(self.executor, now)
        elif now > self._stop_by:
            self.kill_all()
        self.aftermath.tend(self.settings.config.max_attempts, self.stopping)
        self.disk.pay()  # after hand_out: the next job is painted while the last one is published
        self.tidy(now)
        self.librarian.yielding = any(slot.is_loading for slot in self.slots.values())
        self.health.observe(now, self.doors, self.slots.values(), self.librarian)
        if self.health.due(now, self._changed):
            self.health.write(now, self.state(), self.slots.values(), self.turn, self.doors)
            self._changed = False

    def tidy(self, now: float) -> None:
        due = now >= self._tidy_at or self.ending.untidied >= MAX_UNTIDIED or self.stopping
        if self.ending.untidied and due and not self.disk.owing:
            self.disk.owe(self.ending.tidy)
            self.disk.pay()
            self._tidy_at = now + TIDY_S

    def wait(self) -> None:
        """Sleep until something happens or it is time to look around, then handle all that has happened."""
        try:
            self.handle(self.mailbox.get(timeout=self._patience_s()))
            for _ in range(self.mailbox.qsize()):  # no more: who talks without end must not keep us from looking
                self.handle(self.mailbox.get_nowait())
        except queue.Empty:
            pass

    def _patience_s(self) -> float:
        now = self.clock()
        longest = MIN_INTERVAL_S if self._changed else min(TICK_S, self.settings.config.heartbeat_s)
        longest = min(longest, LOOK_S) if self.aftermath.unlisted else longest
        if self.dispatch.is_due and self.disk.well and self.reception.open and self.librarian.ready:
            return 0.0  # a job ended before it was painted: the next one waits
        if self.disk.owing:
            return max(0.0, min(longest, self.disk.again_at - now))
        return max(0.0, min(longest, self._tidy_at - now)) if self.ending.untidied else longest

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
                reply.put(self.reception.take_in(arrivals))
            case StopRequested():
                self.stop()
            case ReloadRequested():
                self.settings.reload()
                self.share()

    def stop_job(self, ref: Ref) -> bool:
        """Ask the worker that holds a job to let go of it; False if none does. OSError if the wish cannot be kept."""
        for slot in self.slots.values():
            if slot.holds(ref):
                self.spool.note(ref, "cancel", durable=True)  # a crash now must not forget it
                slot.cancel(self.executor, self.settings.config, self.clock())
                return True
        return False

    # From the workers to the outputs

    def hear(self, slot: Slot, message: Message) -> None:
        match message:
            case Ready():
                slot.ready = True
                log.info("worker ready", worker=slot.name, **message.model_dump(exclude={"type"}))
            case Progress() if slot.holds(message.job):
                slot.progressed(message, self.settings.config, self.clock())
            case MemoryShort() if slot.holds(message.job):
                slot.short_of_memory(message)
            case Made() if slot.holds(message.job):
                slot.made(message)
            case Ended() if slot.holds(message.job):
                self.remembered.learn(message.memory)
                running = slot.ended(message, self.executor, self.settings.config, self.clock())
                self.aftermath.ended(running, message, self.settings.config.max_attempts)
            case late:
                log.info("ignored a late word", worker=slot.name, word=late.type)

    def bury(self, slot: Slot, exit_status: int) -> None:
        """A worker is dead: what becomes of its job, and when does the next one start?"""
        expected, running = slot.leaving, slot.died(self.clock())
        cause = slot.cause_of_death(exit_status, running.attempt if running else 0)
        if not (self.stopping or expected):
            log.error("worker died", worker=slot.name, why=str(cause), deaths=slot.deaths)
        if running:
            self.aftermath.died(running, cause, self.stopping or expected, self.settings.config.max_attempts)

    # Beginning and end

    def share(self) -> None:
        """Open each client's results to its Unix group; what cannot be opened, the operator is told."""
        clients = self.settings.config.clients
        wrong = self.outputs.share({client: rights.group for client, rights in clients.items() if rights.group})
        self.health.trouble("groups", "; ".join(wrong) or None)

    def recover(self) -> None:
        self.share()
        for queued in recover(self.spool, self.outputs, self.ending, self.settings.config):
            self.turn.add(queued.ref, queued.priority, lane=queued.lane)

    def stop(self) -> None:
        """First: workers leave at their next step, jobs go back to the queue unharmed. Second: at once."""
        if self.stopping:
            self.kill_all()
            return
        log.info("stopping; ask again to stop at once")
        self.reception.open = False
        self.stopping, self._stop_by = True, self.clock() + self.settings.config.stop_grace_s
        for slot in self.slots.values():
            if slot.up:
                self.executor.send(slot.name, Stop())

    def kill_all(self) -> None:
        for slot in self.slots.values():
            if slot.up:
                self.executor.kill(slot.name)

    @property
    def unwritten(self) -> bool:
        """Whether something is yet to be written down."""
        return self.disk.owing or self.ending.untidied > 0 or len(self.aftermath.unlisted) > 0

    @property
    def busy(self) -> bool:
        return self.unwritten or any(slot.running for slot in self.slots.values())

    def state(self) -> str:
        if self.stopping:
            return "draining"
        return self.health.state(self.slots.values())
