"""How a worker ends, or does not."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any


def exit(spec: dict[str, Any], context: Any) -> None:
    sys.exit(3)


def exit_at_once(spec: dict[str, Any], context: Any) -> None:
    os._exit(3)


def kill(spec: dict[str, Any], context: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(spec: dict[str, Any], context: Any) -> None:
    ctypes.string_at(8)


def kill_the_daemon(spec: dict[str, Any], context: Any) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    hang(spec, context)


def kill_the_worker(spec: dict[str, Any], context: Any) -> None:
    kill(spec, context)


def follow_the_plan(spec: dict[str, Any], context: Any) -> None:
    """The file that `negative_prompt` names says, line by line, what each attempt does."""
    plan = Path(spec["negative_prompt"])
    first, *rest = plan.read_text().splitlines()
    plan.write_text("\n".join(rest))
    globals()[first.replace(" ", "_")](spec, context)


def hang(spec: dict[str, Any], context: Any) -> None:
    threading.Event().wait()


def hang_and_ignore_SIGTERM(spec: dict[str, Any], context: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hang(spec, context)


def hang_in_C(spec: dict[str, Any], context: Any) -> None:
    """With the interpreter's lock held: no thread of this process can listen, nor leave."""
    ctypes.PyDLL(None).pause()


def stop(spec: dict[str, Any], context: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def close_the_line(spec: dict[str, Any], context: Any) -> None:
    context.pipelines.connection.shutdown(socket.SHUT_WR)
    hang(spec, context)


def leave_a_child(spec: dict[str, Any], context: Any, session: bool = False) -> None:
    """It keeps the socket, and a lock on the file that `negative_prompt` names for as long as it lives."""
    told, tell = os.pipe()
    if os.fork() == 0:
        if session:
            os.setsid()
        lock = Path(spec["negative_prompt"]).open("w")  # noqa: SIM115
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(tell, b"!")
        hang(spec, context)
    os.read(told, 1)
    os._exit(3)


def leave_a_child_of_its_own_session(spec: dict[str, Any], context: Any) -> None:
    leave_a_child(spec, context, session=True)
