"""A worker process without its daemon: started, told and heard as the daemon does, watched while it paints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from imagend.config import Config
from imagend.daemon.executor import Died, Heard, Mailbox
from imagend.daemon.local import LocalExecutor
from imagend.daemon.recipe import complete, complete_training
from imagend.generate_spec import Generate
from imagend.job import SPECS, Kind, Outcome, Ref
from imagend.messages import Ended, Known, Message, Ready, Run, Stop, WorkerSettings
from imagend.models import Models
from imagend.train_spec import Train

LIMIT_S = 1800.0
EVERY_S = 0.02
_GB = 1 << 30


@dataclass
class Peak:
    """The most memory that was in use while a job was painted, in GiB."""

    process: float = 0.0
    """resident, of the worker; mapped files are counted"""
    device: float | None = None
    """of the whole device, more than before the worker was started: what a card must have"""


@dataclass
class Painted:
    """What one job cost, as the worker tells it and as we saw it."""

    ended: Ended
    seconds: float
    peak: Peak = field(default_factory=Peak)

    @property
    def per_picture(self) -> list[float]:
        return [artifact.seconds for artifact in self.ended.artifacts]

    @property
    def pixels(self) -> tuple[str, ...]:
        return tuple(str(artifact.pixels_sha256) for artifact in self.ended.artifacts)


class Studio:
    """One worker on one device. Use it in a `with` block; its start is timed until it is ready."""

    def __init__(
        self, device: str, models: Path, settings: WorkerSettings | None = None, command: Sequence[str] = ()
    ) -> None:
        self.device, self._models = device, Models(models)
        self._mailbox: Mailbox = queue.SimpleQueue()
        self._executor = LocalExecutor({"it": device}, models, self._mailbox, settings, command)
        self._jobs = 0
        self.start_s = 0.0

    def __enter__(self) -> Studio:
        self._folder = tempfile.TemporaryDirectory(prefix="imagend-studio-")
        self._before = _device_gb(self.device)
        start = time.perf_counter()
        self._executor.start("it")
        self._hear(Ready)
        self.start_s = time.perf_counter() - start
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._executor.send("it", Stop())
        with contextlib.suppress(TimeoutError, RuntimeError):
            self._hear(Ended, limit_s=30.0)  # there is none: it dies
        self._executor.kill("it")
        self._folder.cleanup()

    def paint(self, known: Known | None = None, pictures: dict[str, str] | None = None, **fields: Any) -> Painted:
        """One job that paints, given as in a job file; its kind is generate if it says no other. Raises RuntimeError
        with the worker's message if it fails."""
        painted = self.attempt(known, pictures, **fields)
        if painted.ended.outcome is not Outcome.SUCCEEDED:
            raise RuntimeError(_why(painted.ended))
        return painted

    def attempt(self, known: Known | None = None, pictures: dict[str, str] | None = None, **fields: Any) -> Painted:
        """The same, but a job may fail. `pictures`: where the input pictures are that it names."""
        ref = Ref("bench", hashlib.sha256(str(self._jobs).encode()).hexdigest()[:20])
        self._jobs += 1
        kind = fields.pop("kind", Kind.GENERATE)
        wish = SPECS[kind].model_validate_json(json.dumps(fields))
        assert isinstance(wish, Generate | Train)
        assert wish.model
        given = ref, Config(), self._models.find(wish.model)
        whole = complete_training(wish, *given) if isinstance(wish, Train) else complete(wish, *given)
        spec = whole.model_dump(mode="json")
        folder = Path(self._folder.name, ref.id)
        folder.mkdir()
        with self._watched() as peak:
            start = time.perf_counter()
            run = Run(
                job=ref, kind=kind, spec=spec, folder=str(folder), pictures=pictures or {}, known=known or Known()
            )
            self._executor.send("it", run)
            ended = self._hear(Ended)
            seconds = time.perf_counter() - start
        assert isinstance(ended, Ended)
        return Painted(ended, seconds, peak)

    def device_gb(self) -> float | None:
        """What is in use on the device now, more than before the worker was started."""
        return None if self._before is None else round((_device_gb(self.device) or 0.0) - self._before, 2)

    def _hear(self, wanted: type[Message], limit_s: float = LIMIT_S) -> Message:
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                match self._mailbox.get(timeout=left):
                    case Heard(message=message) if isinstance(message, wanted):
                        return message
                    case Died(exit_status=status):
                        raise RuntimeError(f"the worker died with exit status {status}")
        raise TimeoutError(f"the worker said no {wanted.__name__} in {limit_s:.0f} s")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Peak]:
        """Memory by looking often: what lives for less than 20 ms may be missed."""
        peak, done = Peak(), threading.Event()

        def look() -> None:
            while True:
                peak.process = max(peak.process, (self._executor.memory_mb("it") or 0.0) / 1024)
                if self._before is not None:
                    peak.device = max(peak.device or 0.0, (_device_gb(self.device) or 0.0) - self._before)
                if done.wait(EVERY_S):
                    return

        watcher = threading.Thread(target=look, name="watch")
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()


def _device_gb(device: str) -> float | None:
    """What is in use on the whole device, by everybody."""
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / _GB


def _why(ended: Ended) -> str:
    return ended.failure.error.message + ended.failure.traceback if ended.failure else f"it was {ended.outcome}"
