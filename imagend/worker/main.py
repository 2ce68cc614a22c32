"""A worker: one job at a time, whatever happens. It knows no spool, and not how it is reached."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagend import __version__, messages
from imagend.errors import Bug, ImagendError, Interrupt, NoSpace, PictureWithheld
from imagend.job import Outcome, Ref
from imagend.manifest import Artifact, Safety, Withheld
from imagend.messages import Cancel, Ended, Failure, Made, MemoryShort, Message, Progress, Ready, Run, Stop
from imagend.router import Route

if TYPE_CHECKING:
    from imagend.worker.pipelines import Pipelines


PROGRESS_INTERVAL_S = 0.1
"""Steps are told of at most this often."""


class _ChainStep:
    """Where an attempt at a chain is: a step, of so many, and what part of all of them is done."""

    def __init__(self, name: str, number: int, steps: int) -> None:
        self._name, self._number, self._steps, self._done = name, number, steps, 0.0

    def over(self, told: Progress) -> Progress:
        part = (told.picture + told.step / max(1, told.steps)) / max(1, told.pictures)
        self._done = max(self._done, (self._number + part) / self._steps)  # a shortage of memory paints a picture again
        return told.model_copy(update={"chain_step": self._name, "progress": round(min(1.0, self._done), 4)})


class Context:
    """What a kind may use besides its spec. `progress` is heartbeat and cancel point in one."""

    def __init__(self, run: Run, pipelines: Pipelines, say: Callable[[Message], None], interval_s: float) -> None:
        self.job, self.folder, self.pictures = run.job, Path(run.folder), run.pictures
        self.known, self.pipelines = run.known, pipelines
        self.safety, self.otherwise = run.safety, run.otherwise
        self.route: Route | None = None  # which way an edit goes, where the worker decides
        self.timings: dict[str, float] = {}
        self.engine: dict[str, Any] = {}  # what decides the pixels
        self.loading: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.failed: dict[str, ImagendError] = {}  # items of a set
        self.withheld: dict[int, Withheld] = {}  # pictures by index
        self.judged: Safety | None = None  # by whom
        self.worn = ""  # why this process should paint no more
        self.interrupted = threading.Event()
        self._say, self._interval_s = say, interval_s
        self._said_at = 0.0
        self._chain_step: _ChainStep | None = None

    def progress(
        self, stage: str, picture: int = 0, pictures: int = 0, step: int = 0, steps: int = 0, **more: float | None
    ) -> None:
        """Say how far we are; `more`: the loss of a training, and eta_s. Raises Interrupt when the job was cancelled or
        the worker is to stop."""
        if self.interrupted.is_set():
            raise Interrupt
        now = time.monotonic()
        if 0 < step < steps and now - self._said_at < self._interval_s:
            return  # a small model makes a hundred steps a second; nobody can read that, and it costs the painter time
        self._said_at = now
        place = {"picture": picture, "pictures": pictures, "step": step, "steps": steps}
        told = Progress(job=self.job, stage=stage, **place, **more)  # type: ignore[arg-type]
        self._say(self._chain_step.over(told) if self._chain_step else told)

    @contextmanager
    def chain_step(self, name: str, number: int, steps: int) -> Iterator[None]:
        """A block in which the draft is the folder `name` in it, and all is a part of so many steps. Raises NoSpace."""
        draft = self.folder
        try:
            (draft / name).mkdir(exist_ok=True)
        except OSError as error:
            raise NoSpace(error.strerror) from None
        self.folder, self._chain_step = draft / name, _ChainStep(name, number, steps)
        try:
            yield
        finally:
            self.folder, self._chain_step = draft, None

    def made(self, artifacts: tuple[Artifact, ...]) -> None:
        """Say what stays even if the job fails from here on."""
        self._say(Made(job=self.job, artifacts=artifacts, withheld=tuple(self.withheld)))

    def withhold(self, pictures: Iterable[Withheld]) -> None:
        """These are not shown; the item of a set that lacks one has failed."""
        for one in pictures:
            self.withheld[one.index] = one
            if one.item is not None:
                self.failed[one.item] = PictureWithheld(_why([one]))

    def short_of_memory(self, stage: str, rung: str, then: str | None) -> None:
        """Say that memory ran out, and what is tried instead (None: nothing more)."""
        self._say(MemoryShort(job=self.job, stage=stage, rung=rung, then=then))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to the job's timings."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - start, 6)


def _why(withheld: Iterable[Withheld]) -> str:
    return ", ".join(f"picture {one.index}: {one.label}, {one.score:.0%}" for one in withheld)


class Worker:
    def __init__(
        self,
        pipelines: Pipelines,
        say: Callable[[Message], None],
        package: str = "imagend.worker",
        interval_s: float = PROGRESS_INTERVAL_S,
    ) -> None:
        self._pipelines, self._say, self._package, self._interval_s = pipelines, say, package, interval_s
        self._context: Context | None = None

    def expect(self, run: Run) -> Context:
        """From now on cancel() and stop() reach this job, also before attempt() begins."""
        self._context = Context(run, self._pipelines, self._say, self._interval_s)
        return self._context

    def attempt(self, run: Run, context: Context) -> Ended:
        """Run one job and say how it ended."""
        try:
            kind = importlib.import_module(f"{self._package}.{run.kind}")
            artifacts: tuple[Artifact, ...] = kind.run(run.spec, context)
            if context.withheld and not artifacts:
                raise PictureWithheld(_why(context.withheld.values()))
            return self._ended(
                context, Outcome.PARTIAL if context.failed or context.withheld else Outcome.SUCCEEDED, artifacts
            )
        except Interrupt:
            return self._ended(context, Outcome.CANCELLED)
        except ImagendError as error:
            failure = Failure.of(error)
        except Exception as bug:
            where = "".join(traceback.format_tb(bug.__traceback__))  # without its message: a prompt may stand in it
            failure = Failure.of(Bug(type(bug).__name__)).model_copy(update={"traceback": where})
        finally:
            self._context = None
        return self._ended(context, Outcome.FAILED, failure=failure)

    def cancel(self, ref: Ref) -> None:
        """May come from another thread, and late: it must never hit the next job."""
        context = self._context
        if context is not None and context.job == ref:
            context.interrupted.set()

    def stop(self) -> None:
        context = self._context
        if context is not None:
            context.interrupted.set()

    def _ended(
        self, context: Context, outcome: Outcome, artifacts: tuple[Artifact, ...] = (), failure: Failure | None = None
    ) -> Ended:
        failed = {} if outcome is Outcome.CANCELLED else context.failed
        return Ended(
            job=context.job,
            outcome=outcome,
            artifacts=artifacts,
            failed={item: Failure.of(error).error for item, error in failed.items()},
            timings=context.timings,
            engine=context.engine or None,
            loading=context.loading or None,
            memory=context.memory or None,
            safety=context.judged and context.judged.model_copy(update={"withheld": tuple(context.withheld.values())}),
            route=context.route,
            worn=context.worn,
            failure=failure,
        )


def serve(connection: socket.socket, pipelines: Pipelines, package: str = "imagend.worker") -> None:
    """Serve at the end of a socket until told to stop, or until the daemon is gone."""
    runs: queue.SimpleQueue[tuple[Run, Context] | None] = queue.SimpleQueue()
    stopping = threading.Event()

    def say(message: Message) -> None:
        connection.sendall(messages.encode(message))

    def listen() -> None:
        try:
            for line in connection.makefile("rb"):
                match messages.decode(line):
                    case Run() as run:
                        runs.put((run, worker.expect(run)))
                    case Cancel(job=ref):
                        worker.cancel(ref)
                    case Stop():
                        stopping.set()
                        worker.stop()
                        runs.put(None)
        finally:
            os._exit(0)  # the daemon is gone or not to be understood; a new one must find the device free

    worker = Worker(pipelines, say, package)
    threading.Thread(target=listen, name="listen", daemon=True).start()
    versions = {"imagend": __version__, **pipelines.versions}
    say(Ready(device=pipelines.device, versions=versions, memory=pipelines.memory()))
    while (job := runs.get()) is not None:
        ended = worker.attempt(*job)
        if stopping.is_set() and ended.outcome is Outcome.CANCELLED:
            break  # not cancelled but released: say nothing, the daemon sees us go
        say(ended)
