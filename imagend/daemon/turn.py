"""Whose turn it is: the pending jobs in memory. Highest priority first, and within a priority the clients take turns.

Every fourth turn is free of priority: it goes to the client that was served longest ago, so that no flood of urgent
jobs keeps another client waiting for ever: at most four turns for each client that waits. A client's own jobs go by
priority, then in order of acceptance. The spool on disk is the truth; this index is rebuilt from it at start. Nothing
here costs more when more jobs wait; it grows with the clients that wait.

An operator may halt all, pause a client, hold a job: what is passed over waits on, and has no place meanwhile.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from imagend.job import Ref

FREE_TURN = 4
"""Every so many turns one is free of priority."""

_Line = tuple[int, str]
"""A priority and a client: the jobs of one line go in order."""


@dataclass
class _Round:
    """Which line is next. The policy needs to know no more than how many jobs wait in each line, and who was served."""

    waiting: dict[int, Counter[str]] = field(default_factory=dict)
    served: dict[str, tuple[int, int]] = field(default_factory=dict)  # at which turn; who never was, in order of coming
    turns: int = 0
    paused: dict[str, Counter[int]] = field(default_factory=dict)  # of clients that are passed over: jobs by priority

    def copy(self) -> _Round:
        return _Round(
            {priority: counts.copy() for priority, counts in self.waiting.items()}, dict(self.served), self.turns
        )

    def next(self) -> _Line | None:
        if not self.waiting:
            return None
        levels = self.waiting.items()
        if (self.turns + 1) % FREE_TURN:
            priority = max(self.waiting)
            return priority, min(self.waiting[priority], key=self.served.__getitem__)
        client = min({name for _, counts in levels for name in counts}, key=self.served.__getitem__)
        return max(priority for priority, counts in levels if client in counts), client

    def join(self, line: _Line) -> None:
        priority, client = line
        self.served.setdefault(client, (0, len(self.served)))
        if client in self.paused:
            self.paused[client][priority] += 1
        else:
            self.waiting.setdefault(priority, Counter())[client] += 1

    def leave(self, line: _Line) -> None:
        priority, client = line
        if client in self.paused:
            self.paused[client][priority] -= 1
            return
        self.waiting[priority][client] -= 1
        if not self.waiting[priority][client]:
            del self.waiting[priority][client]
        if not self.waiting[priority]:
            del self.waiting[priority]

    def pause(self, client: str) -> None:
        jobs = Counter({priority: counts.pop(client, 0) for priority, counts in self.waiting.items()})
        self.waiting = {priority: counts for priority, counts in self.waiting.items() if counts}
        self.paused[client] = jobs

    def resume(self, client: str) -> None:
        for priority, count in self.paused.pop(client).items():
            if count:
                self.waiting.setdefault(priority, Counter())[client] += count

    def serve(self, line: _Line) -> None:
        self.leave(line)
        self.turns += 1
        self.served[line[1]] = (self.turns, 0)


def _walk(ahead: _Round, lines: Mapping[_Line, Iterable[Ref]]) -> Iterator[Ref]:
    places: dict[_Line, Iterator[Ref]] = {}
    while (line := ahead.next()) is not None:
        if line not in places:
            places[line] = iter(lines[line])
        yield next(places[line])
        ahead.serve(line)


class Turn:
    """`halted`: nobody is served until it is unset."""

    def __init__(self) -> None:
        self._round = _Round()
        self._lines: dict[_Line, OrderedDict[Ref, None]] = {}
        self._line_of: dict[Ref, _Line] = {}
        self._hold: set[Ref] = set()  # these are passed over, once they are there
        self._held: dict[Ref, _Line] = {}  # those of them that are
        self.halted = False

    def __len__(self) -> int:
        return len(self._line_of) + len(self._held)

    def __contains__(self, ref: Ref) -> bool:
        return ref in self._line_of or ref in self._held

    def __iter__(self) -> Iterator[Ref]:
        """In the order in which they will be served if none comes, none goes, and what is halted goes on."""
        return _walk(self._round.copy(), self._lines)

    def snapshot(self) -> Iterator[Ref]:
        """The same, as it is now, however the queue changes while it is read. A copy of some ms for 100,000 jobs."""
        return _walk(self._round.copy(), {line: tuple(jobs) for line, jobs in self._lines.items()})

    def add(self, ref: Ref, priority: int, first: bool = False) -> None:
        """Queue a job; `first` for one that comes back: it goes before its client's others of that priority."""
        if ref in self:
            return
        line = priority, ref.client
        if ref in self._hold:
            self._held[ref] = line
            return
        jobs = self._lines.setdefault(line, OrderedDict())
        jobs[ref] = None
        jobs.move_to_end(ref, last=not first)
        self._line_of[ref] = line
        self._round.join(line)

    def next(self) -> Ref | None:
        """The job whose turn it is; it stays until it is served or removed."""
        line = None if self.halted else self._round.next()
        return next(iter(self._lines[line])) if line else None

    def serve(self, ref: Ref) -> None:
        """The job is handed out: its client's turn is over."""
        self._round.serve(self._take(ref))

    def remove(self, ref: Ref) -> None:
        """The job leaves without a turn, as one that is cancelled does; nothing if it does not wait."""
        if ref in self._line_of:
            self._round.leave(self._take(ref))
        self._held.pop(ref, None)

    def _take(self, ref: Ref) -> _Line:
        line = self._line_of.pop(ref)
        del self._lines[line][ref]
        if not self._lines[line]:
            del self._lines[line]
        return line

    def pause(self, clients: set[str]) -> None:
        """From now on these clients, and no others, are passed over."""
        for client in clients - self._round.paused.keys():
            self._round.pause(client)
        for client in self._round.paused.keys() - clients:
            self._round.resume(client)

    def hold(self, jobs: set[Ref]) -> None:
        """From now on these jobs, and no others, are passed over, those too that are yet to come. One that is let go is
        the next of its client and priority."""
        self._hold = set(jobs)
        for ref in jobs & self._line_of.keys():
            line = self._line_of[ref]
            self.remove(ref)
            self._held[ref] = line
        for ref in sorted(self._held.keys() - jobs):
            priority, _ = self._held.pop(ref)
            self.add(ref, priority, first=True)

    @property
    def held(self) -> int:
        """How many of those that wait are held."""
        return len(self._held)

    def passed_over(self, count: int) -> dict[Ref, str]:
        """Some of the jobs that are held or of paused clients, and what they wait for: an operator's word."""
        jobs = dict.fromkeys(islice(self._held, count), "release")
        paused = (ref for line, jobs in self._lines.items() if line[1] in self._round.paused for ref in jobs)
        return jobs | dict.fromkeys(islice(paused, count - len(jobs)), "resume")

    def head(self, count: int) -> list[Ref]:
        """The next `count` jobs in order."""
        return list(islice(self, count))

    def firsts(self) -> list[Ref]:
        """The first job of each line, each client's and priority's: among them is the oldest, or one that came back."""
        return [next(iter(jobs)) for jobs in self._lines.values()]

    def per_client(self) -> dict[str, int]:
        found = sum(self._round.waiting.values(), Counter[str]())
        found.update({client: jobs.total() for client, jobs in self._round.paused.items() if jobs.total()})
        found.update(ref.client for ref in self._held)
        return dict(found)

    def count(self, client: str) -> int:
        """How many jobs of a client wait."""
        waiting = sum(counts[client] for counts in self._round.waiting.values())
        held = sum(ref.client == client for ref in self._held)
        return waiting + held + self._round.paused.get(client, Counter[int]()).total()
