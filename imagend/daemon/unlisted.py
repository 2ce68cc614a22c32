"""Jobs that brought a model which the catalogue does not know yet: their end is told when others may name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from imagend.daemon.installer import Installer
from imagend.daemon.librarian import Librarian
from imagend.daemon.slots import Running
from imagend.messages import Ended

LIMIT_S = 60.0
"""A models folder that does not answer keeps no job for longer."""
LOOK_S = 0.05
"""It is asked for so often meanwhile."""


@dataclass(frozen=True)
class _Fetched:
    running: Running
    ended: Ended
    look: int
    until: float


class Unlisted:
    """A crash loses none: the job is tried again, and finds its model in place."""

    def __init__(self, librarian: Librarian, clock: Callable[[], float], installer: Installer) -> None:
        self._librarian, self._clock, self._installer = librarian, clock, installer
        self._waiting: list[_Fetched] = []
        self._installing: list[tuple[Running, Future[Ended]]] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._installing)

    def install(self, running: Running, ended: Ended) -> None:
        """What the job trained is yet to be put into models/."""
        self._installing.append((running, self._installer.install(running, ended)))

    def add(self, running: Running, ended: Ended) -> None:
        self._waiting.append(_Fetched(running, ended, self._librarian.next_look(), self._clock() + LIMIT_S))

    def listed(self, all_of_them: bool) -> Iterator[tuple[Running, Ended]]:
        """Those that wait no longer."""
        for running, installing in [one for one in self._installing if one[1].done()]:
            self._installing.remove((running, installing))
            self.add(running, installing.result())
        looks, now = self._librarian.looks, self._clock()
        due = [one for one in self._waiting if all_of_them or one.look <= looks or now > one.until]
        self._waiting = [one for one in self._waiting if one not in due]
        return ((one.running, one.ended) for one in due)
