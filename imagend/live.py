"""spool/events.jsonl as its readers see it: what is new since they last looked, and what ended of late."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from imagend import feed
from imagend.job import Outcome, Ref

Event = dict[str, Any]
BUCKET_S = 1800
BUCKETS = 48
"""A day of half hours."""
LATEST = 200
_WORDS = {"completed": Outcome.SUCCEEDED} | {one.value: one for one in Outcome if one is not Outcome.SUCCEEDED}
_OF_ENDS = re.compile(rb'"type": "imagend\.(artifact\.written|completed|partial|failed|cancelled)"')
_MAX_UNFINISHED = 1000


class Follower:
    """Reads on from call to call, over rotations and restarts of the daemon."""

    def __init__(self, path: Path, wanted: re.Pattern[bytes] | None = None) -> None:
        """`wanted` spares the parsing of lines in which it is not found."""
        self._path, self._wanted = path, wanted
        self._place: feed.Place | None = None
        self._last = ""
        """when the last event was told that was read"""
        self.missed = 0
        """how often events were lost to this reader: the files were removed, or it did not look for too long"""

    def news(self) -> Iterator[Event]:
        """What has been told since the last call; all that there is at the first. What is no event is passed over."""
        try:
            yield from self._read_on("")
        except feed.Lost:
            self.missed += 1
            self._place = None
            yield from self._read_on(self._last)

    def _read_on(self, after: str) -> Iterator[Event]:
        for line, place in feed.lines(self._path, self._place):
            self._place = place
            if self._wanted and not self._wanted.search(line):
                continue
            event = _parsed(line)
            if event and event["time"] > after:
                self._last = event["time"]
                yield event


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        is_event = isinstance(event["time"], str) and isinstance(event["type"], str) and isinstance(event["data"], dict)
        return event if is_event else None
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class End:
    """How a job ended, as the feed tells it."""

    ref: Ref
    outcome: Outcome
    at: datetime
    kind: str = ""
    model: str = ""
    code: str = ""
    seconds: float | None = None
    pictures: tuple[str, ...] = ()


class Recent:
    """What ended in the last day. Bounded, however much happens."""

    def __init__(self, path: Path) -> None:
        self._follower = Follower(path, _OF_ENDS)
        self._written: dict[Ref, tuple[str, ...]] = {}  # pictures of jobs whose end is about to be told
        self._counts: Counter[tuple[int, Outcome]] = Counter()
        self.latest: deque[End] = deque(maxlen=LATEST)

    def look(self) -> bool:
        """Take in what is new; whether there was anything."""
        return any([self._take(event) for event in self._follower.news()])

    def _take(self, event: Event) -> bool:
        data, word = event["data"], event["type"].removeprefix("imagend.")
        ref = Ref(str(data.get("client")), str(data.get("id")))
        if word not in _WORDS:
            if data.get("file"):  # of a set, the names are the client's
                self._written[ref] = (*self._written.get(ref, ()), str(data["file"]))
            while len(self._written) > _MAX_UNFINISHED:
                del self._written[next(iter(self._written))]
            return False
        at = datetime.fromisoformat(event["time"])
        told = {name: str(data.get(name) or "") for name in ("kind", "model", "code")}
        end = End(ref, _WORDS[word], at, **told, seconds=data.get("seconds"), pictures=self._written.pop(ref, ()))
        self.latest.append(end)
        self._counts[_bucket(at), end.outcome] += 1
        return True

    def seconds(self) -> list[float]:
        """How long the latest took that succeeded, in the order in which they ended."""
        return [end.seconds for end in self.latest if end.outcome is Outcome.SUCCEEDED and end.seconds is not None]

    def by_time(self, now: datetime) -> list[Counter[Outcome]]:
        """How many ended, by outcome, in each half hour of the last day, this one last; what is older is forgotten."""
        last = _bucket(now)
        for old in [key for key in self._counts if key[0] <= last - BUCKETS]:
            del self._counts[old]
        numbers = range(last - BUCKETS + 1, last + 1)
        return [Counter({outcome: self._counts[number, outcome] for outcome in Outcome}) for number in numbers]


def _bucket(at: datetime) -> int:
    return int(at.timestamp() // BUCKET_S)


def percentile(values: list[float], percent: int) -> float | None:
    """The smallest value that so many of all do not exceed; None of none."""
    return sorted(values)[(len(values) * percent + 99) // 100 - 1] if values else None
