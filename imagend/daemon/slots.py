"""The places where workers stand. Workers come and go; slots stay.

A slot of the lane FETCH has a process only while it is wanted, and a new one for each job: it has the newest settings,
and nothing that knows the network outlives its work.
"""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from imagend.config import Config
from imagend.daemon.events import Events
from imagend.daemon.executor import Executor
from imagend.daemon.retry import restart_delay_s
from imagend.errors import DownloadFailed, ImagendError, NoSpace, TimeLimit, TrainingTooLong, WorkerDied, WorkerSilent
from imagend.job import Job, Kind, Ref, Spec
from imagend.lanes import Lane, lane_at
from imagend.manifest import Artifact
from imagend.memory_plan import Stage
from imagend.messages import Cancel, Ended, Made, MemoryShort, Progress, Stop
from imagend.router import Route
from imagend.status import Pipeline

log = structlog.get_logger()

NEVER = float("inf")


@dataclass
class Running:
    """A job in a worker's hands. `spec` has every default filled in; `until` is when its time is up."""

    job: Job
    spec: Spec
    attempt: int
    accepted_at: datetime
    started_at: datetime
    until: float
    route: Route | None = None
    """which way an edit goes"""
    otherwise: Spec | None = None
    """the spec of an edit for the complex way, which its worker may choose"""
    progress: Progress | None = None
    cancelled: bool = False
    released: bool = False  # it gives way, and goes on later
    made: tuple[Artifact, ...] = ()  # by the steps of a chain that are done: what stays if a later one fails
    withheld: tuple[int, ...] = ()  # pictures that are not among them


@dataclass
class Slot:
    """A slot is down (or resting, where that is as it should be), booting, idle or busy; which one follows from its
    fields."""

    name: str
    device: str
    events: Events
    up: bool = False
    ready: bool = False
    running: Running | None = None
    painted: int = 0  # jobs since its worker was started
    pipeline: Pipeline | None = None  # what the last of them left there
    taken: Counter[str] = field(default_factory=Counter)  # attempts, by kind
    upscales: int = 0  # begun: jobs of that kind, and steps of chains
    starts: int = 0
    deaths: int = 0  # in a row, without an ended job between them
    deadline: float = 0.0  # kill if up and not heard of by then; start again then if down
    killed: ImagendError | None = None  # why, if it was us
    leaving: bool = False  # we asked it to: no death

    @property
    def lane(self) -> Lane:
        return lane_at(self.device)

    @property
    def on_demand(self) -> bool:
        return self.lane is Lane.FETCH

    @property
    def state(self) -> str:
        if not self.up:
            return "resting" if self.on_demand and self.deaths < 2 else "down"
        if (
            not self.ready or self.killed or self.leaving
        ):  # the dying get no new job, even if the last one ended in time
            return "booting"
        return "busy" if self.running else "idle"

    @property
    def is_loading(self) -> bool:
        """Whether its worker is reading a model from disk, or about to."""
        if self.running is None:
            return False
        return self.running.progress is None or self.running.progress.stage == Stage.LOADING

    def tend(self, executor: Executor, config: Config, now: float, wanted: bool = True) -> None:
        """Start what is down and due, kill what is silent or late. Called at every look around; `wanted`: whether a job
        of its lane waits."""
        if not self.up:
            if now >= self.deadline and (wanted or not self.on_demand):
                self._start(executor, config, now)
        elif self.state == "booting" and now > self.deadline:
            limit = "stop_grace_s" if self.leaving else "boot_limit_s"
            self._kill(executor, WorkerSilent(self.name, getattr(config, limit), limit))
        elif self.state == "idle" and self.on_demand and (self.painted or not wanted):
            self._leave(executor, config, now)
        elif self.state == "idle" and self.painted:
            self._renew_if_due(executor, config, now)
        elif self.running and now > self.running.until:
            self._kill(executor, self._too_long(config))
        elif self.running and now > self.deadline:
            asked = self.running.cancelled or self.running.released
            limit = "cancel_grace_s" if asked else "silence_limit_s"
            self._kill(executor, WorkerSilent(self.name, getattr(config, limit), limit))

    def _start(self, executor: Executor, config: Config, now: float) -> None:
        self.up, self.deadline, self.painted = True, now + config.boot_limit_s, 0
        self.starts += 1
        executor.start(self.name)

    def limit_s(self, config: Config, kind: Kind) -> float:
        """How long an attempt may take."""
        own = {Kind.FETCH: config.fetch.time_limit_s, Kind.TRAIN: config.train.time_limit_s}
        return own.get(kind, config.time_limit_s)

    def _too_long(self, config: Config) -> ImagendError:
        if self.lane is Lane.FETCH:
            why = f"it took longer than {config.fetch.time_limit_s:g} s (fetch.time_limit_s in config.yaml)"
            return DownloadFailed("its source", f"{why}. What came is kept for some days: send the job again to go on")
        if self.running and self.running.job.kind is Kind.TRAIN:
            return TrainingTooLong(config.train.time_limit_s)
        return TimeLimit(config.time_limit_s)

    def _renew_if_due(self, executor: Executor, config: Config, now: float) -> None:
        """Renew a worker that has done its share, or has grown. Never one that paints."""
        if 0 < config.max_jobs_per_worker <= self.painted:
            why = f"it has painted {self.painted} jobs (max_jobs_per_worker)"
        elif config.worker_memory_mb and (held := executor.memory_mb(self.name) or 0.0) > config.worker_memory_mb:
            why = f"it holds {held:.0f} MB of memory (worker_memory_mb)"
        else:
            return
        self._renew(executor, config, now, why)

    def _renew(self, executor: Executor, config: Config, now: float, why: str) -> None:
        """Ask a worker to make room for a new one."""
        log.info("a worker is replaced", worker=self.name, why=why)
        self._leave(executor, config, now)

    def _leave(self, executor: Executor, config: Config, now: float) -> None:
        self.leaving, self.deadline = True, now + config.stop_grace_s
        executor.send(self.name, Stop())

    def give_back(self, executor: Executor, config: Config, now: float) -> None:
        """Ask a worker to leave at its next step: its job goes back to the queue, unharmed."""
        if self.running and not self.leaving and not self.killed:
            self._renew(executor, config, now, "an operator paused its job")

    def _kill(self, executor: Executor, why: ImagendError) -> None:
        self.killed, self.deadline = why, NEVER
        if self.running:
            self.running.until = NEVER
        executor.kill(self.name)  # Died will follow

    def holds(self, ref: Ref) -> bool:
        return self.running is not None and self.running.job.ref == ref

    def take(self, running: Running, config: Config, now: float) -> None:
        self.running, self.deadline = running, now + config.silence_limit_s
        self.events.started(self.name, running.job.ref, running.job.kind, running.attempt)
        self.taken[running.job.kind] += 1
        self.upscales += running.job.kind is Kind.UPSCALE

    def progressed(self, progress: Progress, config: Config, now: float) -> None:
        if self.running is None:
            return
        before, self.running.progress = self.running.progress, progress
        self.upscales += progress.chain_step == "upscale" and (before is None or before.chain_step != "upscale")
        self.events.progressed(self.name, progress, now)
        if not (
            self.running.cancelled or self.running.released or self.leaving or self.killed
        ):  # these set a deadline that progress must not move
            self.deadline = now + config.silence_limit_s

    def made(self, word: Made) -> None:
        if self.running is not None:
            self.running.made, self.running.withheld = word.artifacts, word.withheld

    def short_of_memory(self, word: MemoryShort) -> None:
        """Tell the operator: a rung of the ladder is a warning, its end an error."""
        told = {"worker": self.name, "job": str(word.job), "stage": word.stage, "rung": word.rung}
        if word.then:
            log.warning("out of memory; another way is tried", **told, then=word.then)
        else:
            log.error("out of memory; the job is given up", **told)

    def cancel(self, executor: Executor, config: Config, now: float) -> None:
        """Ask the worker to stop the job it holds; tend() kills it if it does not listen."""
        if self.running and not self.running.cancelled:
            self.running.cancelled, self.deadline = True, now + config.cancel_grace_s
            executor.send(self.name, Cancel(job=self.running.job.ref))

    def release(self, executor: Executor, config: Config, now: float) -> None:
        """Ask the worker to let go of its job, which goes back to the queue, unharmed; it itself stays."""
        if self.running and not self.running.cancelled and not self.running.released:
            self.running.released, self.deadline = True, now + config.cancel_grace_s
            executor.send(self.name, Cancel(job=self.running.job.ref))

    def ended(self, told: Ended, executor: Executor, config: Config, now: float) -> Running:
        """Hand back the job that the worker says has ended.

        A worker that met a bug or a fault of its device, or is worn, is replaced: its next job shall not meet it.
        """
        running, self.running, self.deaths = self.running, None, 0
        if running and running.otherwise and told.route:
            running.route = told.route
            running.spec = running.otherwise if told.route.path == "complex" else running.spec
        self.painted += 1
        self.events.left(self.name, now)
        if told.engine:
            self.pipeline = Pipeline.of(told.engine, told.memory)
        assert running is not None  # holds() said so
        failure = told.failure
        if self.on_demand:  # its next job meets another process in any case
            return running
        if failure and (failure.traceback or (failure.try_again and failure.error.code != NoSpace.code)):
            self._kill(executor, WorkerDied(self.name, "replaced", 1))
        elif told.worn:
            self._renew(executor, config, now, told.worn)
        return running

    def died(self, now: float) -> Running | None:
        """Empty the slot and hand back the job it held, if any."""
        self.deaths += not self.leaving
        self.up = self.ready = self.leaving = False
        self.pipeline = None
        self.deadline = now + restart_delay_s(self.deaths)
        running, self.running = self.running, None
        self.events.left(self.name, now)
        return running

    def cause_of_death(self, exit_status: int, attempt: int) -> ImagendError:
        cause, self.killed = self.killed or WorkerDied(self.name, describe(exit_status), attempt), None
        return cause


def describe(exit_status: int) -> str:
    """An exit status in words, as subprocess gives it: negative for a signal."""
    if exit_status >= 0:
        return f"exit status {exit_status}"
    try:
        return signal.Signals(-exit_status).name
    except ValueError:
        return f"signal {-exit_status}"
