"""What image encoders made of pictures, kept on disk: a .safetensors file each, and index.json, which says what it is.

It may be removed at any time. Several workers share it: a file is whole or not there, and its name says all that
decided its bits; what is written is written under a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save

from imagend import files

INDEX = "index.json"
_LOCK_S = 10.0


class EmbeddingCache:
    """At most `limit_bytes`, the least recently used go first. What the disk refuses costs only the work again."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def get(self, about: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
        """What put() was given for just this, bit for bit."""
        path = self._path(about)
        try:
            found: dict[str, torch.Tensor] = load(path.read_bytes())
            os.utime(path)
        except OSError:
            return None
        except (SafetensorError, ValueError):  # cut by a power failure
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return found

    def put(self, about: Mapping[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Keep it. `about` is all that decides the bits, in words; by `name`, which decides nothing, the embedding of a
        picture that was replaced is known, and goes."""
        data = save(tensors)
        if len(data) > self._limit_bytes:
            return
        try:
            files.make_folder(self._folder, 0o700)
            with FileLock(self._folder / ".lock", timeout=_LOCK_S):
                files.replace_hint(self._path(about), data, 0o600)
                self._sweep(dict(about), self._path(about).name)
        except (OSError, Timeout):
            return

    def _path(self, about: Mapping[str, str]) -> Path:
        deciding = {key: text for key, text in about.items() if key != "name"}
        return self._folder / f"{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()}.safetensors"

    def _sweep(self, about: dict[str, str], file: str) -> None:
        """Take up what is new, let go of what it replaces and of what is too much."""
        states = {path.name: path.stat() for path in self._folder.glob("*.safetensors")}
        index = {name: told for name, told in self._index().items() if name in states} | {file: about}
        gone = {name for name, told in index.items() if _replaced(told, about)}
        left = sum(states[name].st_size for name in states.keys() - gone)
        for name in sorted(states.keys() - gone - {file}, key=lambda name: states[name].st_mtime_ns):
            if left > self._limit_bytes:
                gone.add(name)
                left -= states[name].st_size
        for name in gone:
            (self._folder / name).unlink(missing_ok=True)
        told = {name: one for name, one in index.items() if name not in gone}
        files.replace_hint(self._folder / INDEX, json.dumps(told, indent=1).encode() + b"\n", 0o600)

    def _index(self) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / INDEX).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _replaced(told: Any, by: Mapping[str, str]) -> bool:
    """Whether it was made of a picture, or by an encoder, whose name now means another one."""
    if not isinstance(told, dict):
        return True
    picture = told.get("name") == by["name"] and told.get("picture") != by["picture"]
    return picture or (told.get("encoder_name") == by["encoder_name"] and told.get("encoder") != by["encoder"])
