"""When the disk says no: what must be written is owed and tried again, and nothing new begins until it is paid.

The daemon goes on: it reports `degraded`, answers, and drains when the disk is well again. Only at start, when nothing
is known yet, does a disk that refuses end it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from imagend import files
from imagend.daemon.health import Health

RETRY_S = 1.0

Work = Callable[[], Callable[[], object] | None]
"""Something to write. It may return its second half, for which the disk needs time."""


class Disk:
    """`folders` are those whose file systems need room."""

    def __init__(self, folders: tuple[Path, ...], health: Health, clock: Callable[[], float]) -> None:
        self._folders, self._health, self._clock = folders, health, clock
        self._owed: deque[Work] = deque()
        self._begun: deque[tuple[Work, Callable[[], object]]] = deque()
        self._refusing = False
        self.again_at = 0.0  # the disk is left alone until then

    @property
    def owing(self) -> bool:
        return bool(self._owed or self._begun)

    def owe(self, work: Work) -> None:
        """`work` shall be done, in the order in which it was owed. It may be called again after an OSError."""
        self._owed.append(work)

    def pay(self, at_once: bool = False) -> None:
        """Do what is owed, as far as the disk lets us. Second halves come next time, unless `at_once`."""
        if self._clock() < self.again_at:
            return
        self._refusing = False
        try:
            self._complete()
            while self._owed:
                complete = self._owed[0]()
                work = self._owed.popleft()
                if complete is not None:
                    self._begun.append((work, complete))
                self.worked("disk")
            if at_once:
                self._complete()
        except OSError as error:
            self.refused("disk", error)

    def _complete(self) -> None:
        while self._begun:
            work, complete = self._begun.popleft()
            try:
                complete()
            except OSError:  # nothing of it is trusted: all of it anew
                self._owed.appendleft(work)
                raise

    def worked(self, part: str) -> None:
        self._health.trouble(part, None)

    def refused(self, part: str, error: OSError | str) -> None:
        """Something could not be written or read: leave the disk alone for a while. `part` until it worked."""
        self._refusing, self.again_at = True, self._clock() + RETRY_S
        self._health.trouble(part, f"the disk refuses: {error}. Nothing is lost; it is tried again every second")

    @property
    def well(self) -> bool:
        """Whether a job may be handed out."""
        return not self._refusing

    def has_room(self, reserve_mb: int) -> bool:
        """Whether anything new may be written. Quotas are not seen here, only when they refuse."""
        try:
            short = [folder for folder in self._folders if files.free_bytes(folder) < reserve_mb << 20]
            why = f"less than {reserve_mb} MB (reserve_mb) are free under {short[0]}: make room" if short else None
        except OSError as error:
            why = f"free space is not known: {error}"
        self._health.trouble("space", why)
        return why is None
