"""Whose turn it is: the pending jobs in memory, highest priority first, then in order of acceptance.

The spool on disk is the truth; this index is rebuilt from it at start. Nothing here costs more when more jobs wait.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import islice

from imagend.job import Ref


class Turn:
    def __init__(self) -> None:
        self._lines: dict[int, OrderedDict[Ref, None]] = {}
        self._priority: dict[Ref, int] = {}
        self._clients: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._priority)

    def __contains__(self, ref: Ref) -> bool:
        return ref in self._priority

    def __iter__(self) -> Iterator[Ref]:
        for priority in sorted(self._lines, reverse=True):
            yield from self._lines[priority]

    def add(self, ref: Ref, priority: int, first: bool = False) -> None:
        """Queue a job; `first` for one that comes back and keeps its place."""
        if ref in self._priority:
            return
        line = self._lines.setdefault(priority, OrderedDict())
        line[ref] = None
        line.move_to_end(ref, last=not first)
        self._priority[ref] = priority
        self._clients[ref.client] += 1

    def remove(self, ref: Ref) -> None:
        priority = self._priority.pop(ref, None)
        if priority is None:
            return
        del self._lines[priority][ref]
        if not self._lines[priority]:
            del self._lines[priority]
        self._clients[ref.client] -= 1
        if not self._clients[ref.client]:
            del self._clients[ref.client]

    def next(self) -> Ref | None:
        """The job to hand out now; it stays until it is removed."""
        return next(iter(self), None)

    def head(self, count: int) -> list[Ref]:
        """The next `count` jobs in order."""
        return list(islice(self, count))

    def per_client(self) -> dict[str, int]:
        return dict(self._clients)
