"""The real loop and spool with a painter that takes no time: does a long queue cost more per job than a short one?"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.place import Place
from imagend.daemon.executor import Died, Heard, Mailbox
from imagend.daemon.intake import MAX_BATCH
from imagend.daemon.librarian import Librarian
from imagend.daemon.loop import Daemon
from imagend.job import Outcome
from imagend.manifest import Artifact
from imagend.messages import Ended, Message, Ready, Run, Stop
from imagend.models import Models
from imagend.outputs import Outputs
from imagend.spool import Spool
from imagend.survey import Survey

PICTURE = bytes(1024)


class NullPainter:
    """An executor whose pictures are 1 KB of nothing, at once; publishing makes them durable. `busy`: never done."""

    def __init__(self, mailbox: Mailbox, busy: bool = False) -> None:
        self._mailbox, self._busy = mailbox, busy
        self.painted = 0

    def slots(self) -> Mapping[str, str]:
        return {"cpu0": "cpu"}

    def start(self, worker: str) -> None:
        self._mailbox.put(Heard(worker, Ready(device="cpu", versions={})))

    def kill(self, worker: str) -> None:
        self._mailbox.put(Died(worker, -9))

    def memory_mb(self, worker: str) -> float | None:
        return None

    def send(self, worker: str, message: Message) -> None:
        if isinstance(message, Stop):
            self._mailbox.put(Died(worker, 0))
        elif isinstance(message, Run) and not self._busy:
            (Path(message.folder) / "0000.png").write_bytes(PICTURE)
            digest = hashlib.sha256(PICTURE).hexdigest()
            sizes = {
                "seed": message.spec["seeds"][0],
                "index": 0,
                "width": 8,
                "height": 8,
                "size": len(PICTURE),
                "seconds": 0.0,
            }
            artifact = Artifact(file="0000.png", sha256=digest, pixels_sha256=digest, **sizes)
            self._mailbox.put(Heard(worker, Ended(job=message.job, outcome=Outcome.SUCCEEDED, artifacts=(artifact,))))
            self.painted += 1


def opened(here: Place) -> Daemon:
    """A daemon with what it finds in its spool in its queue."""
    mailbox: Mailbox = queue.SimpleQueue()
    spool, outputs = Spool(here.config.spool), Outputs(here.config.outputs)
    spool.open()
    outputs.open()
    librarian = Librarian(
        Survey(Models(here.config.models)), here.config.reference, here.config.spool, lambda: None, time.monotonic
    )
    librarian.look()
    daemon = Daemon(here.config, lambda: here.config, spool, outputs, librarian, NullPainter(mailbox), (), mailbox)
    daemon.recover()
    return daemon


def filled(here: Place, queued: int) -> Daemon:
    """A daemon with that many jobs in its queue, its worker ready."""
    spool = Spool(here.config.spool)
    spool.open()
    for number in range(queued):
        ref, raw = here.sealed(prompt="nothing", seed=number, priority=number % 10)
        spool.accept(ref, raw)
        if number % MAX_BATCH == 0:
            spool.commit()
    spool.commit()
    spool.close()
    daemon = opened(here)
    daemon.look_around()
    daemon.wait()
    return daemon


def cycles_ms(short: Daemon, long: Daemon, turns: int = 20, jobs: int = 10) -> list[list[float]]:
    """Milliseconds of a job's whole way, claimed to done, in a short and in a long queue, taken in turns."""
    times: dict[Daemon, list[float]] = {short: [], long: []}
    for _ in range(turns):
        for daemon in times:
            start = time.perf_counter()
            paint(daemon, jobs)
            times[daemon].append((time.perf_counter() - start) / jobs * 1000)
    return list(times.values())


def paint(daemon: Daemon, jobs: int) -> None:
    """Let the loop run until so many jobs more are painted."""
    painter = daemon.executor
    assert isinstance(painter, NullPainter)
    until = painter.painted + jobs
    while painter.painted < until:
        daemon.look_around()
        daemon.wait()
