"""spool/memory.json: what attempts have told of memory, kept over restarts for the workers' planners. Hints only.

A file that is missing, damaged or of another version costs the planners their memory and nothing else. Bounded: what
was told of longest ago is forgotten first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from imagend import files, hints
from imagend.memory_plan import Experience

log = structlog.get_logger()

FILE = "memory.json"
SCHEMA = "imagend.memory/v1"
MAX_ENTRIES = 512
MAX_TOLD = 64
MAX_KEY = 256
MAX_BYTES = 4 << 20


class Remembered:
    def __init__(self, spool: Path) -> None:
        self._path = spool / FILE
        self._entries: dict[str, Experience] = {}
        if lost := hints.read(self._path, MAX_BYTES, SCHEMA, self._recall):
            log.warning("what was remembered of memory is lost", why=lost)

    def of(self, model: str | None, width: int | None = None, height: int | None = None) -> dict[str, Any]:
        """What is known of a model, by the workers' own keys; of this size first, and no more than MAX_TOLD."""
        known = [(key, entry) for key, entry in self._entries.items() if entry.model == model]
        known.sort(key=lambda pair: pair[0].endswith(f"|{width}x{height}"))  # stable: the newest stay last
        return {key: entry.model_dump() for key, entry in known[-MAX_TOLD:]}

    def learn(self, memory: dict[str, Any] | None) -> None:
        """Keep what an attempt has told (Ended.memory), if it is news. Never fails: a full disk forgets it, too."""
        seen = dict((memory or {}).get("seen") or {})
        key = seen.pop("key", None)
        if not isinstance(key, str) or len(key) > MAX_KEY:
            return
        try:
            entry = Experience.model_validate(seen)
        except ValidationError:
            log.warning("a worker tells nonsense of memory")
            return
        if self._entries.get(key) == entry:
            return
        self._keep(key, entry)
        entries = {key: entry.model_dump() for key, entry in self._entries.items()}
        try:
            document = json.dumps({"schema": SCHEMA, "entries": entries}).encode()
            files.replace_hint(self._path, document, 0o600)  # sizes that clients asked for
        except OSError as error:
            log.warning("what was seen of memory cannot be kept", why=error.strerror)

    def _recall(self, document: dict[str, Any]) -> None:
        for key, value in document["entries"].items():
            self._keep(key, Experience.model_validate(value))

    def _keep(self, key: str, entry: Experience) -> None:
        self._entries.pop(key, None)
        self._entries[key] = entry
        while len(self._entries) > MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
