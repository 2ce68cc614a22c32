"""spool/durations.json: how long pictures took of late, per model, size and steps; kept over restarts. Hints only.

A file that is missing or damaged costs the estimates and nothing else. Bounded: of each key the last 20 are kept, and
the keys that were used longest ago are forgotten first.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from imagend import files, hints
from imagend.job import Outcome
from imagend.manifest import Manifest

log = structlog.get_logger()

FILE = "durations.json"
SCHEMA = "imagend.durations/v1"
WINDOW = 20
MAX_KEYS = 256
MAX_BYTES = 1 << 20
KEEP_S = 5.0
"""The file is written at most this often: a crash costs the hints of a few seconds."""
_JOBS = ""  # the key of whole jobs of any model: no model has this name


class Work(NamedTuple):
    """What decides how long a job takes."""

    model: str
    size_and_steps: str
    pictures: int

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Work:
        """Of a spec with every default filled in. Kinds that need no model (upscale, preprocess) count as one."""
        chained = (spec.get("chain") or {}).get("upscale") or {}
        scale = spec.get("scale", chained.get("scale"))
        decisive = [*map(spec.get, ("width", "height", "num_inference_steps")), scale]
        if chained.get("strength") is not None:
            decisive.append(chained["strength"])
        kind = "x".join(map(str, decisive))
        pictures = len(spec.get("items") or (None,)) * (spec.get("count") or 1)
        return cls(spec.get("model") or "-", kind, len(spec.get("seeds") or ()) or pictures)


class Durations:
    def __init__(self, spool: Path) -> None:
        self._path = spool / FILE
        self._seconds: dict[str, deque[float]] = {}
        self._changed = False
        self._kept: float | None = None
        if lost := hints.read(self._path, MAX_BYTES, SCHEMA, self._recall):
            log.warning("what was known of durations is lost", why=lost)

    def learn(self, manifest: Manifest) -> None:
        """From a job that was painted; one that failed tells nothing of how long another will take."""
        if manifest.outcome is not Outcome.SUCCEEDED or manifest.started_at is None:
            return
        work = Work.of(manifest.spec)
        seconds = max(0.0, (manifest.ended_at - manifest.started_at).total_seconds())
        self._add(_JOBS, seconds)
        for key in (work.model, f"{work.model}|{work.size_and_steps}"):
            self._add(key, seconds / work.pictures)
        self._changed = True

    def expect(self, work: Work | None) -> float | None:
        """Seconds that a job will take; by its model, size and steps, else by its model, else by what any job took."""
        if work is not None:
            for key in (f"{work.model}|{work.size_and_steps}", work.model):
                if key in self._seconds:
                    return self._mean(key) * work.pictures
        return self._mean(_JOBS) if _JOBS in self._seconds else None

    def keep(self, now: float, at_once: bool = False) -> None:
        """Write the file if there is news and it is time. Never fails: a full disk forgets it."""
        if not self._changed:
            return
        self._kept = now if self._kept is None else self._kept
        if now - self._kept < KEEP_S and not at_once:
            return
        self._kept, self._changed = now, False
        seconds = {key: [round(value, 3) for value in values] for key, values in self._seconds.items()}
        try:
            files.replace_hint(self._path, json.dumps({"schema": SCHEMA, "seconds": seconds}).encode(), 0o600)
        except OSError as error:
            log.warning("what was seen of durations cannot be kept", why=error.strerror)

    def _recall(self, document: dict[str, Any]) -> None:
        for key, values in document["seconds"].items():
            for value in values:
                self._add(key, max(0.0, float(value)))

    def _mean(self, key: str) -> float:
        return sum(self._seconds[key]) / len(self._seconds[key])

    def _add(self, key: str, seconds: float) -> None:
        values = self._seconds.pop(key, None) or deque(maxlen=WINDOW)
        values.append(seconds)
        self._seconds[key] = values
        while len(self._seconds) > MAX_KEYS:
            del self._seconds[next(iter(self._seconds))]
