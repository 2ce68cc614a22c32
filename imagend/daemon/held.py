"""Files that stay in the inbox for now: why, and when each is looked at again. The more they are, the less often."""

from __future__ import annotations

import enum
from collections.abc import Container
from dataclasses import dataclass

from imagend.inbox import Identity

LOOKS_PER_S = 4000
RETRIES_PER_S = 500
MAX_PAUSE_S = 15.0
"""A file that met an error is tried again at least this often, if there are not many."""


class Why(enum.Enum):
    UNFINISHED = "it does not look whole"
    UNREADABLE = "reading it met an error of ours"
    STUCK = "it could not be taken away"


@dataclass
class HeldFile:
    why: Why
    identity: Identity
    look_at: float
    """from then on we look whether it has changed"""
    until: float
    """from then on it is tried again even if it has not"""
    tries: int


class Held:
    def __init__(self) -> None:
        self._files: dict[str, HeldFile] = {}
        self.counts = dict.fromkeys(Why, 0)

    def get(self, name: str) -> HeldFile | None:
        return self._files.get(name)

    def keep(self, name: str, why: Why, identity: Identity, now: float, pause_s: float | None = None) -> bool:
        """Leave the file alone for `pause_s`, or with growing pauses; False if it was held for this already."""
        before = self.release(name)
        again = before is not None and (before.why, before.identity) == (why, identity)
        tries = before.tries + 1 if before and again else 1
        if pause_s is None:
            pause_s = max(min(2.0 ** (tries - 1) - 1, MAX_PAUSE_S), len(self._files) / RETRIES_PER_S)
        self._files[name] = HeldFile(why, identity, self._next_look(now), now + pause_s, tries)
        self.counts[why] += 1
        return not again

    def rests(self, file: HeldFile, identity: Identity, now: float) -> bool:
        """Whether a file that was looked at is to be left alone: it has not changed, and its time is not over."""
        file.look_at = self._next_look(now)
        return file.identity == identity and now < file.until

    def release(self, name: str) -> HeldFile | None:
        file = self._files.pop(name, None)
        if file is not None:
            self.counts[file.why] -= 1
        return file

    def release_all_but(self, names: Container[str]) -> None:
        for name in [name for name in self._files if name not in names]:
            self.release(name)

    def _next_look(self, now: float) -> float:
        return now + len(self._files) / LOOKS_PER_S
