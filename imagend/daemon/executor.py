"""Where workers come from, and what the loop hears. The daemon knows only this; local.py implements it."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from imagend.daemon.intake import Arrival, Verdict
from imagend.messages import Message


@dataclass(frozen=True)
class Heard:
    worker: str
    message: Message


@dataclass(frozen=True)
class Died:
    """A worker process is gone; `exit_status` is negative for a signal, as subprocess has it."""

    worker: str
    exit_status: int


@dataclass(frozen=True)
class Arrived:
    """Verified jobs wait at a door; it wants one verdict for each, in order."""

    arrivals: tuple[Arrival, ...]
    reply: queue.SimpleQueue[tuple[Verdict, ...]]


@dataclass(frozen=True)
class Surveyed:
    """The librarian knows the base models: nothing to do but to look around."""


@dataclass(frozen=True)
class StopRequested:
    pass


@dataclass(frozen=True)
class ReloadRequested:
    pass


Event = Heard | Died | Arrived | Surveyed | StopRequested | ReloadRequested
Mailbox = queue.SimpleQueue[Event]
"""Safe to put to from threads and signal handlers."""


class Executor(Protocol):
    def slots(self) -> Mapping[str, str]:
        """Slot name → device; which lane a slot is of, its device says (imagend.lanes)."""

    def start(self, worker: str) -> None: ...

    def send(self, worker: str, message: Message) -> None: ...

    def kill(self, worker: str) -> None:
        """The worker's Died will follow, also if it was dead already."""

    def memory_mb(self, worker: str) -> float | None:
        """Memory (MiB) that the worker holds; None if that cannot be told."""
