"""Workers as child processes of this machine, one per slot, each at the other end of a socket pair.

A worker's stdout and stderr are the daemon's stderr: libraries print, and last words belong in the log.
A worker leads a process group: what it has started dies with it, and cannot keep its slot or its device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from imagend import messages
from imagend.daemon.executor import Died, Heard, Mailbox
from imagend.lanes import HOST, NETWORK, Lane, lane_at

log = structlog.get_logger()

MAX_WORDS_PER_S = 5_000
"""A worker that says more is broken: one that paints says ten, and the loop must have time for the others."""

_CANNOT_START = 71  # EX_OSERR
_MB = 1 << 20


class Babble(ValueError):
    """More words than anyone can hear."""


@dataclass(frozen=True)
class Fetching:
    """How processes that fetch are started; `settings` are asked for each of them."""

    at_once: int
    settings: Callable[[], messages.FetchSettings]
    command: Sequence[str] = (sys.executable, "-m", "imagend.fetch")


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    ours: socket.socket

    def kill(self) -> None:
        if self.process.returncode is None:  # until wait() has reaped it, its number stays its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def hang_up(self) -> None:
        """Wait until it has exited, then end the line: somebody it has started may still hold the other end.

        What was said before is still heard: shutdown() on a Unix socket drops nothing that was sent (unix(7)).
        """
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(OSError):
            self.ours.shutdown(socket.SHUT_RD)

    def words(self) -> Iterator[messages.Word]:
        """What it says, until it is gone. Raises ValueError if it talks nonsense, or too much."""
        second, said = 0, 0
        with self.ours.makefile("rb") as lines:
            while line := lines.readline(messages.MAX_LINE_BYTES):
                now = int(time.monotonic())
                second, said = now, said + 1 if now == second else 1
                if said > MAX_WORDS_PER_S:
                    raise Babble
                yield messages.decode_word(line)


class LocalExecutor:
    def __init__(
        self,
        devices: Mapping[str, str],
        models: Path,
        mailbox: Mailbox,
        settings: messages.WorkerSettings | None = None,
        command: Sequence[str] = (),
        fetching: Fetching | None = None,
    ) -> None:
        fetchers = {f"fetch{number}": NETWORK for number in range(fetching.at_once)} if fetching else {}
        self._devices, self._models, self._mailbox = {**devices, **fetchers}, models, mailbox
        self._fetching = fetching
        self._settings = (settings or messages.WorkerSettings()).model_dump_json()
        self._command = tuple(command) or (sys.executable, "-m", "imagend.worker")
        self._children: dict[str, _Child] = {}

    def slots(self) -> Mapping[str, str]:
        return self._devices

    def start(self, worker: str) -> None:
        try:
            self._start(worker)
        except OSError as error:  # no memory or no descriptors for it now: as if it had died at once
            log.error("a worker cannot be started", worker=worker, why=str(error))
            self._mailbox.put(Died(worker, _CANNOT_START))

    def _start(self, worker: str) -> None:
        ours, theirs = socket.socketpair()
        command, settings, device = self._command, self._settings, self._devices[worker]
        if self._fetching and lane_at(device) is Lane.FETCH:
            command, settings = tuple(self._fetching.command), self._fetching.settings().model_dump_json()
        arguments = ["--fd", str(theirs.fileno()), "--device", "cpu" if device == HOST else device]
        arguments += ["--models", str(self._models), "--settings", settings]
        with theirs:
            process = subprocess.Popen(
                (*command, *arguments),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                process_group=0,
            )
        self._children[worker] = child = _Child(process, ours)
        threading.Thread(target=self._listen, args=(worker, child), name=f"listen-{worker}", daemon=True).start()

    def send(self, worker: str, message: messages.Message) -> None:
        with contextlib.suppress(OSError):  # it just died; Died is on its way
            self._children[worker].ours.sendall(messages.encode(message))

    def kill(self, worker: str) -> None:
        if worker in self._children:
            self._children[worker].kill()

    def memory_mb(self, worker: str) -> float | None:
        """Resident memory of the worker's process (proc(5), statm); what it has started is not counted."""
        try:
            pages = int(Path(f"/proc/{self._children[worker].process.pid}/statm").read_text().split()[1])
        except (KeyError, OSError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE") / _MB

    def _listen(self, worker: str, child: _Child) -> None:
        waiter = threading.Thread(target=child.hang_up, name=f"wait-{worker}", daemon=True)
        waiter.start()
        try:
            for word in child.words():
                self._mailbox.put(Heard(worker, word))
        except OSError:
            log.info("a worker's line broke", worker=worker)
        except Babble:
            log.error("a worker is killed: it talks without end", worker=worker)
        except ValueError:  # not which: a prompt may stand in it
            log.error("a worker is killed: it talks nonsense", worker=worker)
        finally:
            child.kill()
            waiter.join()  # it must see the exit before wait() takes it away
            child.ours.close()
            self._mailbox.put(Died(worker, child.process.wait()))
