"""Workers as child processes of this machine, one per slot, each at the other end of a socket pair.

A worker's stdout and stderr are the daemon's stderr: libraries print, and last words belong in the log.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from imagend import messages
from imagend.daemon.executor import Died, Heard, Mailbox

log = structlog.get_logger()

_CANNOT_START = 71  # EX_OSERR


class LocalExecutor:
    def __init__(self, devices: Mapping[str, str], models: Path, mailbox: Mailbox, command: Sequence[str] = ()) -> None:
        self._devices, self._models, self._mailbox = devices, models, mailbox
        self._command = tuple(command) or (sys.executable, "-m", "imagend.worker")
        self._children: dict[str, tuple[subprocess.Popen[bytes], socket.socket]] = {}

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
        arguments = ("--fd", str(theirs.fileno()), "--device", self._devices[worker], "--models", str(self._models))
        child = subprocess.Popen(
            (*self._command, *arguments),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
        theirs.close()
        self._children[worker] = child, ours
        threading.Thread(target=self._listen, args=(worker, child, ours), name=f"listen-{worker}", daemon=True).start()

    def send(self, worker: str, message: messages.Message) -> None:
        with contextlib.suppress(OSError):  # it just died; Died is on its way
            self._children[worker][1].sendall(messages.encode(message))

    def kill(self, worker: str) -> None:
        if worker in self._children:
            self._children[worker][0].kill()

    def _listen(self, worker: str, child: subprocess.Popen[bytes], ours: socket.socket) -> None:
        try:
            with ours, ours.makefile("rb") as lines:
                while line := lines.readline(messages.MAX_LINE_BYTES):
                    self._mailbox.put(Heard(worker, messages.decode(line)))
        except (OSError, ValueError):  # it is gone, or talks nonsense
            log.info("a worker said its last word", worker=worker)
        finally:
            child.kill()
            self._mailbox.put(Died(worker, child.wait()))
