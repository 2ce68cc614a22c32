"""dm-log-writes: every write to a disk, in the order in which the disk must have kept it, and replays of any part.

The log, from the kernel's Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c: a
super block, then entries, each a header of one sector, and its data. A write enters the log only when a FLUSH (or the
write's own FUA) has made it safe; so the log up to a FLUSH is what a power cut after that FLUSH leaves at least.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
END = "dm-log-writes-end"
"""The mark that stands at the end of every log."""
SECTOR = 512
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    offset: int
    """in bytes, as `length`"""
    length: int
    flags: int
    at: int
    """where in the log its data lies"""
    mark: str = ""

    @property
    def makes_safe(self) -> bool:
        """Whether all before it is on the disk for good."""
        return bool(self.flags & (FLUSH | FUA))


def entries(log: Path) -> Iterator[Entry]:
    """All entries of a log. Raises ValueError if it is none."""
    with log.open("rb") as file:
        magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        if magic != MAGIC or version != 1:
            raise ValueError(f"{log} is no log of dm-log-writes")
        at = sector
        for _ in range(count):
            file.seek(at)
            head = file.read(sector)
            place, sectors, flags, length = _ENTRY.unpack_from(head)
            mark = head[_ENTRY.size : _ENTRY.size + length].decode() if flags & MARK else ""
            yield Entry(place * SECTOR, sectors * SECTOR, flags, at + sector, mark.rstrip("\0"))
            at += sector + (0 if flags & (DISCARD | MARK) else sectors * SECTOR)


class Replay:
    """A disk that is brought forward entry by entry; `disk` holds at first what it held when the log began."""

    def __init__(self, log: Path, disk: Path) -> None:
        self._log, self._disk = log.open("rb"), os.open(disk, os.O_RDWR | os.O_CLOEXEC)

    def apply(self, entry: Entry) -> None:
        if entry.flags & DISCARD:
            self._write(entry.offset, bytes(entry.length))
        elif entry.length and not entry.flags & MARK:
            self._log.seek(entry.at)
            self._write(entry.offset, self._log.read(entry.length))

    def _write(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self._disk, data, offset) == len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        os.close(self._disk)
