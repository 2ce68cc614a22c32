"""spool/hashes.json: the digests of weight files, hashed once for as long as they are unchanged, over restarts.

A file that is missing or damaged costs hashing again, and nothing else. Bounded: the oldest are forgotten first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imagend import files, hints

FILE = "hashes.json"
SCHEMA = "imagend.hashes/v1"
MAX_ENTRIES = 50_000
CHUNK_BYTES = 8 << 20
_MAX_BYTES = 32 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Hashes(NamedTuple):
    """`sha256` of the whole file (its first 10 digits are AutoV2), `weights_sha256` of what follows the header (its
    first 12 are AutoV3)."""

    sha256: str
    weights_sha256: str


def stamp(status: os.stat_result) -> str:
    """What tells one state of a file from another without reading it: device, inode, size and time of change."""
    return f"{status.st_dev:x}:{status.st_ino:x}:{status.st_size}:{status.st_mtime_ns}"


def hash_file(path: Path, pause: Callable[[], None]) -> tuple[str, Hashes] | None:
    """The stamp and the hashes of a weight file; None if it changed meanwhile. `pause` is called after each chunk.

    Raises OSError.
    """
    with open(path, "rb", opener=files.no_waiting) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        start = file.read(8)
        whole, after = hashlib.sha256(start), hashlib.sha256()
        rest = int.from_bytes(start, "little")  # of the header
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            after.update(memoryview(chunk)[min(rest, len(chunk)) :])
            rest -= min(rest, len(chunk))
            pause()
        same = stamp(os.fstat(file.fileno())) == stamp(before)
    return (stamp(before), Hashes(whole.hexdigest(), after.hexdigest())) if same else None


class HashFile:
    """What is known by stamp, and its file."""

    def __init__(self, spool: Path) -> None:
        self._path = spool / FILE
        self._known: dict[str, Hashes] = {}
        if hints.read(self._path, _MAX_BYTES, SCHEMA, self._recall):
            self._known = {}

    def _recall(self, document: dict[str, Any]) -> None:
        for key, (sha256, weights_sha256) in document["files"].items():
            if _SHA256.fullmatch(sha256) and _SHA256.fullmatch(weights_sha256):
                self._known[key] = Hashes(sha256, weights_sha256)

    def get(self, key: str) -> Hashes | None:
        return self._known.get(key)

    def of(self, keys: tuple[str, ...]) -> Mapping[str, str]:
        """SHA-256 by stamp, of those that are known."""
        return {key: self._known[key].sha256 for key in keys if key in self._known}

    def add(self, key: str, hashes: Hashes) -> None:
        self._known[key] = hashes
        while len(self._known) > MAX_ENTRIES:
            del self._known[next(iter(self._known))]

    def save(self) -> None:
        """Durably: to hash a folder of models takes hours. Raises OSError."""
        document = {"schema": SCHEMA, "files": {key: list(hashes) for key, hashes in self._known.items()}}
        files.write(self._path, json.dumps(document).encode(), 0o600)
