"""spool/events.jsonl: what happens to jobs, as it happens, for `tail -F` and `imagend tail`. A feed, not a promise.

Each line is a CloudEvent (https://github.com/cloudevents/spec, JSON format 1.0), of names, ids, codes and numbers:
nothing that a client wrote. It is not synced, and what a full disk refuses is lost in the end: a gap in `seq` tells.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imagend import files
from imagend.job import Job, Outcome, Ref
from imagend.manifest import Manifest
from imagend.memory_plan import Stage
from imagend.messages import Progress
from imagend.spool import EVENTS

MAX_BYTES = 8 << 20
"""A file that is larger gives its name to the next one."""
KEPT = 3
"""So many older files stay: events.jsonl.1 (the youngest) to events.jsonl.3."""
MAX_WAITING = 10_000
"""So many lines wait for a disk that refuses; then the oldest are lost."""
RETRY_S = 1.0
GENERATING_S = 0.5
"""Of each worker, how far it is is told at most this often."""
_OF_A_PICTURE = {"index", "file", "width", "height", "size", "sha256"}
_TAIL_BYTES = 1 << 16
ENDS: Mapping[str, str] = {**{outcome: outcome.value for outcome in Outcome}, Outcome.SUCCEEDED: "completed"}


@dataclass
class _Step:
    """What a worker is at. `told_at`: when it was last told how far it is."""

    begun: Progress
    since: float
    told_at: float = float("-inf")


class Events:
    """Gathers lines as they are told, and writes them together. Nothing is told before it is durable."""

    def __init__(self, spool: Path, name: str) -> None:
        self._path, self._source = spool / EVENTS, f"/imagend/{quote(name, safe='')}"
        self._life = f"{time.time_ns() // 1_000_000:x}"
        self._seq = _last_seq(self._path)
        self._lines: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._ended: list[Manifest] = []
        self._steps: dict[str, _Step] = {}
        self._chain_steps: dict[str, _Step] = {}
        self._again = float("-inf")
        self.trouble: str | None = None

    def tell(self, word: str, subject: Ref | str | None = None, **data: Any) -> None:
        """`subject` is a job, or a part of the daemon."""
        self._seq += 1
        event: dict[str, Any] = {"specversion": "1.0", "id": f"{self._life}-{self._seq}", "source": self._source}
        event |= {"type": f"imagend.{word}", "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        event |= {"seq": self._seq} if subject is None else {"subject": str(subject), "seq": self._seq}
        whose = {"client": subject.client, "id": subject.id} if isinstance(subject, Ref) else {}
        self._lines.append(json.dumps(event | {"data": whose | data}).encode() + b"\n")

    # A job, from its acceptance to its end

    def queued(self, job: Job) -> None:
        self.tell("queued", job.ref, kind=job.kind, priority=job.header.priority)

    def started(self, worker: str, ref: Ref, kind: str, attempt: int) -> None:
        self.tell("started", ref, kind=kind, worker=worker, attempt=attempt)

    def progressed(self, worker: str, progress: Progress, now: float) -> None:
        step, told = self._steps.get(worker), {"worker": worker} | progress.told()
        chain_step = self._chain_steps.get(worker)
        if progress.chain_step and (chain_step is None or chain_step.begun.chain_step != progress.chain_step):
            self.left(worker, now)
            self._chain_steps[worker] = _Step(progress, since=now)
            self.tell("step.start", progress.job, worker=worker, chain_step=progress.chain_step)
        if step is None or _place(step.begun) != _place(progress):
            self._leave_stage(worker, now)
            step = self._steps[worker] = _Step(progress, since=now)
            self.tell("step.start", progress.job, **told)
            if progress.stage == Stage.LOADING:
                self.tell("model_loading", progress.job, worker=worker)
        if progress.steps and now - step.told_at >= GENERATING_S:
            step.told_at = now
            self.tell("generating", progress.job, **told)

    def left(self, worker: str, now: float) -> None:
        """The worker does no more what it did: it goes on to a chain's next step, or the attempt is over."""
        self._leave_stage(worker, now)
        if step := self._chain_steps.pop(worker, None):
            told = {"worker": worker, "chain_step": step.begun.chain_step}
            self.tell("step.finish", step.begun.job, **told, seconds=round(now - step.since, 3))

    def _leave_stage(self, worker: str, now: float) -> None:
        if step := self._steps.pop(worker, None):
            told = step.begun.model_dump(include={"stage", "picture", "pictures", "chain_step"}, exclude_none=True)
            self.tell("step.finish", step.begun.job, worker=worker, **told, seconds=round(now - step.since, 3))

    def ended(self, manifest: Manifest) -> None:
        """It is published; confirmed() tells of it."""
        self._ended.append(manifest)

    def confirmed(self) -> None:
        """What ended() was told is durable."""
        for manifest in self._ended:
            ref = Ref(manifest.client, manifest.id)
            for artifact in manifest.artifacts:
                told = artifact.model_dump(mode="json", include=_OF_A_PICTURE, exclude_none=True)
                told |= {"file": None} if artifact.item else {}  # a client named it
                self.tell("artifact.written", ref, **told)
            self.tell(ENDS[manifest.outcome], ref, **_summary(manifest))
        self._ended.clear()

    def ended_before(self, ref: Ref, outcome: str) -> None:
        """A crash came after its end and before that was told."""
        self.tell(ENDS.get(outcome, "ended"), ref, after_crash=True)

    # To the disk

    def write(self, now: float, at_once: bool = False) -> None:
        """Append what was told, if anything was. Never fails: what the disk refuses waits, and `trouble` says why."""
        if not self._lines or (now < self._again and not at_once):
            return
        try:
            files.rotate(self._path, MAX_BYTES, KEPT)
            files.append(self._path, b"".join(self._lines), durable=False)
        except OSError as error:
            self._again = now + RETRY_S
            self.trouble = f"{EVENTS} cannot be written: {error.strerror}"
            return
        self._lines.clear()
        self.trouble = None


def _names(path: Path) -> list[Path]:
    """The files of the feed, the youngest first."""
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT + 1))]


def _place(progress: Progress) -> tuple[Ref, str, int]:
    return progress.job, progress.stage, progress.picture


def _summary(manifest: Manifest) -> Mapping[str, Any]:
    told: dict[str, Any] = {"kind": manifest.kind, "attempts": manifest.attempts, "pictures": manifest.pictures}
    model = (manifest.engine or {}).get("model") or {}
    if "name" in model:  # as it lies in models/, not as a client wrote it
        told["model"] = model["name"]
    if manifest.started_at is not None:
        told["seconds"] = round((manifest.ended_at - manifest.started_at).total_seconds(), 3)
        told["waited_seconds"] = round((manifest.started_at - manifest.accepted_at).total_seconds(), 3)
    return told | ({"code": manifest.error["code"]} if manifest.error else {})


def _last_seq(path: Path) -> int:
    """Where the last daemon stopped counting; 0 where nothing is left of it."""
    for name in _names(path):
        with contextlib.suppress(OSError), name.open("rb") as file:
            file.seek(max(0, name.stat().st_size - _TAIL_BYTES))
            for line in reversed(file.read(_TAIL_BYTES).splitlines()):
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    return int(json.loads(line)["seq"])
    return 0
