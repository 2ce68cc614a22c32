"""outputs/<client>/<id>/ as its readers see it: found, copied and checked, marked as retrieved; or gone, and why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imagend import files
from imagend.errors import ResultDamaged
from imagend.job import JOB_ID, Ref
from imagend.outputs import MANIFEST, MAX_PICTURE_BYTES, REMOVED, RETRIEVED

_GONE = (FileNotFoundError, NotADirectoryError)
_NAME = re.compile(r"(generate/|upscale/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Result(NamedTuple):
    """Times are seconds since the epoch, by the clock of the disk."""

    ref: Ref
    ended: float
    retrieved: float | None
    size: int
    """bytes"""


def found(outputs: Path) -> Iterator[Result]:
    """Every result there is; one that goes meanwhile is left out. Raises OSError."""
    for client in _folders(outputs):
        for folder in _folders(client.path) if not client.name.startswith(".") else ():
            if re.match(JOB_ID, folder.name):
                with contextlib.suppress(*_GONE):
                    yield from _result(Ref(client.name, folder.name), folder.path)


def _folders(path: Path | str) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(*_GONE), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry


def _result(ref: Ref, folder: str) -> Iterator[Result]:
    """One, or none where there is no manifest."""
    size, ended, marked = 0, 0, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            size += status.st_size
            if entry.is_dir(follow_symlinks=False):  # of a chain's step
                size += sum(one.stat(follow_symlinks=False).st_size for one in Path(entry.path).iterdir())
            elif entry.name == MANIFEST:
                ended = status.st_mtime_ns
            elif entry.name == RETRIEVED:
                marked = status.st_mtime_ns
    if ended:
        yield Result(ref, ended / 1e9, marked / 1e9 if marked > ended else None, size)


def removal(outputs: Path, ref: Ref) -> dict[str, Any]:
    """What is told of a result that has been removed; {} if nothing is."""
    for name in (REMOVED, f"{REMOVED}.1"):
        with contextlib.suppress(OSError):
            for line in reversed((outputs / name).read_bytes().splitlines()):
                if ref.id.encode() in line:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        told: dict[str, Any] = json.loads(line)
                        if (told["client"], told["id"]) == ref:
                            return told
    return {}


def copy(source: Path, target: Path, manifest: dict[str, Any]) -> list[Path]:
    """Copy a result's files, the manifest last; each durable and as the manifest says. Raises ResultDamaged, OSError.

    Copied again, it is what it was: each file is replaced whole.
    """
    told = {str(one["file"]): one for one in manifest.get("artifacts", ())}
    target.mkdir(parents=True, exist_ok=True)
    for name, artifact in told.items():
        data = _checked(source / name, name, artifact)
        if "/" in name:
            files.make_folder((target / name).parent, 0o755)
        files.write(target / name, data)
    files.write(target / MANIFEST, files.read_untrusted(source / MANIFEST, MAX_PICTURE_BYTES)[0])
    return [*(target / name for name in told), target / MANIFEST]


def mark(folder: Path) -> None:
    """From now on it counts as retrieved, and goes the sooner. Raises OSError."""
    files.touch(folder / RETRIEVED, 0o660, now=True)


def _checked(path: Path, name: str, artifact: dict[str, Any]) -> bytes:
    if not _NAME.fullmatch(name):  # a manifest leads nowhere else
        raise ResultDamaged(path, "its name is none of ours")
    data, _ = files.read_untrusted(path, MAX_PICTURE_BYTES)
    if len(data) != artifact["size"] or hashlib.sha256(data).hexdigest() != artifact["sha256"]:
        raise ResultDamaged(path, f"its SHA-256 is not {artifact['sha256']}, as its manifest says")
    return data
