"""Does a long queue cost more per job than a short one? The real loop and spool with a painter that takes no time."""

from __future__ import annotations

import hashlib
import queue
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.place import Place
from imagend.daemon.executor import Heard, Mailbox
from imagend.daemon.loop import Daemon
from imagend.job import Artifact, Outcome
from imagend.messages import Ended, Message, Ready, Run
from imagend.models import Models
from imagend.outputs import Outputs
from imagend.spool import Spool


class NullPainter:
    """An executor whose pictures are 1 KB of nothing, at once."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def slots(self) -> Mapping[str, str]:
        return {"cpu0": "cpu"}

    def start(self, worker: str) -> None:
        self._mailbox.put(Heard(worker, Ready(device="cpu", versions={})))

    def kill(self, worker: str) -> None: ...

    def memory_mb(self, worker: str) -> float | None:
        return None

    def send(self, worker: str, message: Message) -> None:
        if isinstance(message, Run):
            data = bytes(1024)
            (Path(message.folder) / "0000.png").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            sizes = {"index": 0, "width": 8, "height": 8, "size": len(data), "seed": 0, "seconds": 0.0}
            artifact = Artifact(file="0000.png", sha256=digest, pixels_sha256=digest, **sizes)
            self._mailbox.put(Heard(worker, Ended(job=message.job, outcome=Outcome.SUCCEEDED, artifacts=(artifact,))))


def filled(here: Place, queued: int) -> Daemon:
    """A daemon with that many jobs in its queue, its worker ready."""
    mailbox: Mailbox = queue.SimpleQueue()
    spool, outputs = Spool(here.config.spool), Outputs(here.config.outputs)
    spool.open()
    outputs.open()
    for number in range(queued):
        ref, raw = here.sealed(prompt="nothing", seed=number, priority=number % 10)
        spool.accept(ref, raw)
    spool.commit()
    models, painter = Models(here.config.models), NullPainter(mailbox)
    daemon = Daemon(here.config, lambda: here.config, spool, outputs, models, painter, (), mailbox)
    daemon.recover()
    daemon.look_around()
    daemon.wait()
    return daemon


def cycles_ms(short: Daemon, long: Daemon, jobs: int) -> tuple[float, float]:
    """Median milliseconds of a job's whole way, claimed to done, in a short and in a long queue, taken in turns."""
    times: dict[Daemon, list[float]] = {short: [], long: []}
    for _ in range(jobs):
        for daemon in times:
            start = time.perf_counter()
            daemon.look_around()
            daemon.wait()
            times[daemon].append(time.perf_counter() - start)
    return statistics.median(times[short]) * 1000, statistics.median(times[long]) * 1000
