"""results.jsonl and events.jsonl, read on from where a reader stopped: whole lines, over rotation, cuts and rewriting.

A place in it is kept as the last bytes that were read, not as an inode: ids make them unique, and they are still the
same after the file was renamed, copied or trimmed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

_TAIL = 512  # more than the line of a job with some pictures
_CHUNK = 1 << 20
_NUMBER = re.compile(r"[.-]\d[\d-]*")  # results.jsonl.1, results.jsonl-20261126: as logrotate names them


class Place(NamedTuple):
    """Between two lines."""

    offset: int
    """where to look first"""
    tail: bytes
    """what stands before it"""


class Lost(Exception):
    """The last lines that were read are nowhere any more: others may have gone that were never read."""


def lines(feed: Path, place: Place | None) -> Iterator[tuple[bytes, Place]]:
    """Each whole line after `place`, with the place after it; all that there are if it is None. Raises Lost."""
    with contextlib.ExitStack() as stack:
        current = _opened(feed, stack)
        if place and current and (at := _find(current[0], place)) is not None:
            yield from _whole(current[0], at, place.tail)
            return
        # Listed after the current one is open: what is rotated meanwhile is then found twice, and not missed.
        chain = [file for path in _rotated(feed) for file in _opened(path, stack) if not _same(file, current)]
        chain, at, tail = [*chain, *current], 0, b""
        if place:
            chain, at = _from(chain, place)
            tail = place.tail
        for file in chain:
            yield from _whole(file, at, tail)
            at, tail = 0, b""


def _opened(path: Path, stack: contextlib.ExitStack) -> Sequence[BinaryIO]:
    """One file, or none."""
    try:
        return [stack.enter_context(path.open("rb"))]
    except FileNotFoundError:
        return []


def _rotated(feed: Path) -> list[Path]:
    """What the feed was before, the oldest first. What is compressed is not read."""
    found = [path for path in feed.parent.glob(f"{feed.name}?*") if _NUMBER.fullmatch(path.name[len(feed.name) :])]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _same(file: BinaryIO, others: Sequence[BinaryIO]) -> bool:
    return any(os.path.sameopenfile(file.fileno(), other.fileno()) for other in others)


def _from(chain: list[BinaryIO], place: Place) -> tuple[list[BinaryIO], int]:
    """The files from the one with the place on, and where it is there. The newest are asked first."""
    for index in reversed(range(len(chain))):
        if (at := _find(chain[index], place)) is not None:
            return chain[index:], at
    raise Lost


def _find(file: BinaryIO, place: Place) -> int | None:
    """Where the place is in a file: where it was, or elsewhere, if the lines before it were trimmed."""
    file.seek(place.offset - len(place.tail))
    if file.read(len(place.tail)) == place.tail:
        return place.offset
    file.seek(0)
    at, last = 0, b""
    while chunk := file.read(_CHUNK):
        piece = last + chunk
        if (found := piece.find(place.tail)) >= 0:
            return at - len(last) + found + len(place.tail)
        at, last = at + len(chunk), piece[-len(place.tail) :]
    return None


def _whole(file: BinaryIO, at: int, tail: bytes) -> Iterator[tuple[bytes, Place]]:
    """The lines from `at` on; not one that is still being written, or was cut."""
    file.seek(at)
    for line in file:
        if not line.endswith(b"\n"):
            return
        at, tail = at + len(line), (tail + line)[-_TAIL:]
        yield line, Place(at, tail)
