"""Whose turn it is: the pending jobs in memory. Highest priority first, and within a priority the clients take turns.

Every fourth turn is free of priority: it goes to the client that was served longest ago, so that no flood of urgent
jobs keeps another client waiting for ever: at most four turns for each client that waits. A client's own jobs go by
priority, then in order of acceptance. The spool on disk is the truth; this index is rebuilt from it at start. Nothing
here costs more when more jobs wait; it grows with the clients that wait.

Each lane (imagend.lanes) has an order and turns of its own: what waits in one keeps no job of another from its turn.

An operator may halt all, pause a client, hold a job: what is passed over waits on, and has no place meanwhile.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice

from imagend.job import Ref
from imagend.lanes import Lane, lane_at

FREE_TURN = 4
"""Every so many turns one is free of priority."""

_Line = tuple[int, str]
"""A priority and a client: the jobs of one line go in order."""
_Place = tuple[Lane, _Line]


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
    """`devices`: of the workers there are. Without one for the lane CPU its jobs go by PAINT. `halted`: nobody is
    served until it is unset."""

    def __init__(self, devices: Iterable[str] = ()) -> None:
        self._served = set(map(lane_at, devices))
        self._rounds = {lane: _Round() for lane in Lane}
        self._lines: dict[Lane, dict[_Line, OrderedDict[Ref, None]]] = {lane: {} for lane in Lane}
        self._place_of: dict[Ref, _Place] = {}
        self._lengths = Counter[Lane]()
        self._hold: set[Ref] = set()  # these are passed over, once they are there
        self._held: dict[Ref, _Place] = {}  # those of them that are
        self.halted = False

    def __len__(self) -> int:
        return len(self._place_of) + len(self._held)

    def length(self, lane: Lane) -> int:
        """How many wait in a lane."""
        return self._lengths[lane]

    def __contains__(self, ref: Ref) -> bool:
        return ref in self._place_of or ref in self._held

    def __iter__(self) -> Iterator[Ref]:
        """Lane after lane, in the order in which they will be served if none comes, none goes, and what is halted goes
        on."""
        return chain.from_iterable(map(self._in_order, Lane))

    def _in_order(self, lane: Lane) -> Iterator[Ref]:
        return _walk(self._rounds[lane].copy(), self._lines[lane])

    def snapshot(self, lane: Lane = Lane.PAINT) -> Iterator[Ref]:
        """A lane as it is now, however it changes while it is read. A copy of some ms for 100,000 jobs."""
        return _walk(self._rounds[lane].copy(), {line: tuple(jobs) for line, jobs in self._lines[lane].items()})

    def add(self, ref: Ref, priority: int, first: bool = False, lane: Lane = Lane.PAINT) -> None:
        """Queue a job; `first` for one that comes back: it goes before its client's others of that priority."""
        if ref in self:
            return
        lane = Lane.PAINT if lane is Lane.CPU and lane not in self._served else lane
        line = priority, ref.client
        self._lengths[lane] += 1
        if ref in self._hold:
            self._held[ref] = lane, line
            return
        jobs = self._lines[lane].setdefault(line, OrderedDict())
        jobs[ref] = None
        jobs.move_to_end(ref, last=not first)
        self._place_of[ref] = lane, line
        self._rounds[lane].join(line)

    def next(self, lane: Lane = Lane.PAINT) -> Ref | None:
        """The job whose turn it is; it stays until it is served or removed."""
        line = None if self.halted else self._rounds[lane].next()
        return next(iter(self._lines[lane][line])) if line else None

    def serve(self, ref: Ref) -> None:
        """The job is handed out: its client's turn is over."""
        lane, line = self._take(ref)
        self._rounds[lane].serve(line)

    def remove(self, ref: Ref) -> None:
        """The job leaves without a turn, as one that is cancelled does; nothing if it does not wait."""
        if ref in self._place_of:
            lane, line = self._take(ref)
            self._rounds[lane].leave(line)
        elif ref in self._held:
            self._lengths[self._held.pop(ref)[0]] -= 1

    def _take(self, ref: Ref) -> _Place:
        lane, line = self._place_of.pop(ref)
        lines = self._lines[lane]
        del lines[line][ref]
        if not lines[line]:
            del lines[line]
        self._lengths[lane] -= 1
        return lane, line

    def pause(self, clients: set[str]) -> None:
        """From now on these clients, and no others, are passed over."""
        for round_ in self._rounds.values():
            for client in clients - round_.paused.keys():
                round_.pause(client)
            for client in round_.paused.keys() - clients:
                round_.resume(client)

    def hold(self, jobs: set[Ref]) -> None:
        """From now on these jobs, and no others, are passed over, those too that are yet to come. One that is let go is
        the next of its client and priority."""
        self._hold = set(jobs)
        for ref in jobs & self._place_of.keys():
            lane, (priority, _) = self._place_of[ref]
            self.remove(ref)
            self.add(ref, priority, lane=lane)
        for ref in sorted(self._held.keys() - jobs):
            lane, (priority, _) = self._held[ref]
            self.remove(ref)
            self.add(ref, priority, first=True, lane=lane)

    @property
    def held(self) -> int:
        """How many of those that wait are held."""
        return len(self._held)

    def passed_over(self, count: int) -> dict[Ref, str]:
        """Some of the jobs that are held or of paused clients, and what they wait for: an operator's word."""
        jobs = dict.fromkeys(islice(self._held, count), "release")
        paused = (
            ref
            for lane, lines in self._lines.items()
            for line, jobs in lines.items()
            if line[1] in self._rounds[lane].paused
            for ref in jobs
        )
        return jobs | dict.fromkeys(islice(paused, count - len(jobs)), "resume")

    def head(self, count: int, lane: Lane = Lane.PAINT) -> list[Ref]:
        """The next `count` jobs of a lane in order."""
        return list(islice(self._in_order(lane), count))

    def firsts(self) -> list[Ref]:
        """The first job of each line, each client's and priority's: among them is the oldest, or one that came back."""
        return [next(iter(jobs)) for lines in self._lines.values() for jobs in lines.values()]

    def per_client(self) -> dict[str, int]:
        found = Counter[str]()
        for round_ in self._rounds.values():
            found = sum(round_.waiting.values(), found)
            found.update({client: jobs.total() for client, jobs in round_.paused.items() if jobs.total()})
        found.update(ref.client for ref in self._held)
        return dict(found)

    def count(self, client: str) -> int:
        """How many jobs of a client wait."""
        waiting = sum(counts[client] for round_ in self._rounds.values() for counts in round_.waiting.values())
        paused = sum(round_.paused.get(client, Counter[int]()).total() for round_ in self._rounds.values())
        return waiting + paused + sum(ref.client == client for ref in self._held)
