"""What systemd is told of us (sd_notify(3)): ready, alive, reloading, stopping, and the line in `systemctl status`.

Told at the end of the loop's look around and by nobody else: a watchdog that another thread fed would guard nothing.
Where nobody asks (no $NOTIFY_SOCKET), none of this is made.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from imagend.daemon.health import DOOR_LIMIT_S
from imagend.daemon.loop import Daemon
from imagend.daemon.slots import Slot
from imagend.lanes import Lane

STATUS_S = 1.0
"""The status line is told at most this often, and only if it is another one."""
EXTEND_S = 60.0
"""While we start, systemd is asked for so much more time, again and again: no start is too long for it, a hang is."""
_MARGIN_S = 30.0
_MAX_WORKS, _MAX_STATUS = 4, 500


class Notifier:
    """One datagram per call, never waited for."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address  # abstract: unix(7)

    def tell(self, **words: str | int) -> bool:
        """Whether it was sent; if not, it may be told again. A full or missing socket is no trouble of ours."""
        lines = (f"{name}={' '.join(str(value).split())}" for name, value in words.items())  # one line each, surely
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as ours:
                ours.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError:
            return False
        return True


class Systemd:
    """Looks at the daemon and tells systemd of it. `watchdog_s` is how long we may be silent; 0: for ever."""

    def __init__(self, notifier: Notifier, watchdog_s: float, daemon: Daemon) -> None:
        self._notifier, self._daemon = notifier, daemon
        self._feed_every_s = watchdog_s / 2
        self._ready = self._stopping = self._reloading = False
        self._fed = self._extended = self._told_at = float("-inf")
        self._told = ""

    def tend(self, now: float) -> None:
        """After each look around: a word of life, and what is new."""
        if self._feed_every_s and now - self._fed >= self._feed_every_s and self._notifier.tell(WATCHDOG=1):
            self._fed = now
        if self._daemon.stopping:
            self._stop()
        elif not self._ready:
            self._start(now)
        elif self._reloading:
            self._reloading = not self._notifier.tell(READY=1)
        self._show(now)

    def reloading(self) -> None:
        """The configuration is about to be read again; the next tend() says that it has been."""
        if self._ready:
            self._reloading = self._notifier.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def _start(self, now: float) -> None:
        if self._complete(now):
            self._ready = self._notifier.tell(READY=1)
        elif now - self._extended >= EXTEND_S / 6 and self._notifier.tell(EXTEND_TIMEOUT_USEC=_usec(EXTEND_S)):
            self._extended = now

    def _stop(self) -> None:
        if not self._stopping:
            usec = _usec(self._daemon.settings.config.stop_grace_s + _MARGIN_S)
            self._stopping = self._notifier.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=usec)

    def _complete(self, now: float) -> bool:
        """All that can be is in place: every inbox and the models have been looked at, and a worker can take a job.

        What does not come, a hung mount or workers that die, must not keep us from serving the rest: the state is
        `degraded` then, and the status line says why.
        """
        doors = all(door.looked or now - door.looked_at > DOOR_LIMIT_S for door in self._daemon.doors)
        models = self._daemon.librarian.ready or self._daemon.librarian.trouble(now) is not None
        slots = [slot for slot in self._daemon.slots.values() if slot.lane is Lane.PAINT]
        up = any(slot.state in ("idle", "busy") for slot in slots) or all(slot.deaths > 1 for slot in slots)
        return doors and models and up

    def _show(self, now: float) -> None:
        if now - self._told_at < STATUS_S:
            return
        daemon = self._daemon
        queue = f"{len(daemon.turn)} queued" + ", paused" * (daemon.health.wishes.pause is not None)
        line = status(daemon.state(), daemon.health.reasons.values(), daemon.slots.values(), queue)
        if line != self._told and self._notifier.tell(STATUS=line):
            self._told, self._told_at = line, now


def status(state: str, reasons: Iterable[str], slots: Iterable[Slot], queue: str) -> str:
    """Such as `busy alice 4f2c… step 17/30, 12 queued`; of prompts and files it tells nothing."""
    works = [_work(slot) for slot in slots if slot.running]
    more = [f"{len(works) - _MAX_WORKS} more"] if len(works) > _MAX_WORKS else []
    head = " ".join([state, *filter(None, ["; ".join(works[:_MAX_WORKS] + more)])])
    line = ". ".join([f"{head}, {queue}", *sorted(reasons)])
    return line if len(line) <= _MAX_STATUS else f"{line[: _MAX_STATUS - 1]}…"


def _work(slot: Slot) -> str:
    assert slot.running is not None
    ref, progress = slot.running.job.ref, slot.running.progress
    if progress is None:
        doing = "starting"
    elif progress.steps:
        picture = f"{progress.picture + 1}/{progress.pictures} " if progress.pictures > 1 else ""
        doing = f"{picture}step {progress.step}/{progress.steps}"
    elif progress.bytes_done is not None:
        doing = f"{progress.stage} {progress.bytes_done / 1e6:.0f} MB"
    else:
        doing = progress.stage
    return f"{ref.client} {ref.id[:4]}… {doing}"


def _usec(seconds: float) -> int:
    return round(seconds * 1e6)
