"""Guests with kernels of their own, as ordinary processes: User-Mode Linux, its root the host's / over hostfs.

So the same Python, the same packages and this repository run in each guest. Power is cut by SIGKILL of the guest's
process group, a pause is SIGSTOP of its kernel. What shall survive a power cut lies on a disk image: hostfs is no file
system for that. See https://docs.kernel.org/virt/uml/user_mode_linux_howto_v2.html.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEEDED = ("linux.uml", "uml_switch", "mkfs.ext4", "modprobe", "mount.nfs4", "rpc.nfsd")
BOOT_LIMIT_S = 120.0


def missing() -> str | None:
    """Why there can be no guests here, or None."""
    if os.geteuid() != 0:
        return "needs root: nfsd in a guest reads the host's files as their owner"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    return f"{', '.join(absent)} not installed: tests/lab/packages" if absent else None


class PowerLost(Exception):
    """The guest went down while a command ran."""


class CommandFailed(AssertionError):
    """A command in a guest ended with another exit status than 0."""


@dataclass(frozen=True)
class Done:
    """How a command in a guest ended."""

    status: int
    out: str
    err: str


class Network:
    """A switch that guests are plugged into. It ends with this process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="uml-"))  # short: a socket's path may have 107 bytes
        self.socket = self.folder / "switch"
        command = ["uml_switch", "-unix", str(self.socket)]
        self._switch = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_for(self.socket.exists, "the switch")

    def close(self) -> None:
        self._switch.kill()
        self._switch.wait()
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Guest:
    """A machine. boot() switches it on; its disks outlive powercut()."""

    def __init__(
        self, name: str, number: int, network: Network, disks: Sequence[Path] = (), memory: str = "320M"
    ) -> None:
        self.name, self.address, self.mac = name, f"10.9.0.{number}", f"02:00:00:00:00:{number:02x}"
        self._arguments = [
            "linux.uml",
            f"mem={memory}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={HERE / 'guest_init.sh'}",
            "con=null",
            "con0=null,fd:2",
            "con1=fd:0,fd:1",
            f"uml_dir={network.folder}",
            f"umid={name}",
            "quiet",
            "random.trust_cpu=on",
            f"eth0=daemon,{self.mac},unix,{network.socket}",
            *(f"ubd{chr(ord('a') + index)}={disk}" for index, disk in enumerate(disks)),
            *(f"{key}={value}" for key, value in self._environment().items()),
        ]
        self._console = network.folder / f"{name}.console"
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, Future[Done]] = {}
        self._lock = threading.Lock()

    def _environment(self) -> dict[str, str]:
        return {
            "NAME": self.name,
            "ADDRESS": self.address,
            "PYTHON": sys.executable,
            "AGENT": str(HERE / "agent.py"),
        }

    def boot(self) -> None:
        """Switch on; returns when commands can be run."""
        self._numbers = itertools.count(1)
        self._waiting = {0: (up := Future())}
        with self._console.open("ab") as console:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=console,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self._process, self._waiting), daemon=True).start()
        try:
            up.result(BOOT_LIMIT_S)
        except PowerLost:
            raise PowerLost(self._console.read_text(errors="replace")[-2000:]) from None

    def _listen(self, process: subprocess.Popen[bytes], waiting: dict[int, Future[Done]]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # the kernel's own words
                message: dict[str, Any] = json.loads(line)
                waiting.pop(message.pop("id")).set_result(Done(**message) if message else Done(0, "", ""))
        with self._lock:
            for future in waiting.values():
                future.set_exception(PowerLost(self.name))
            waiting.clear()

    def start(self, command: str) -> Future[Done]:
        """Begin a shell command; its end comes as the future's result, or PowerLost."""
        assert self._process is not None
        assert self._process.stdin is not None
        future: Future[Done] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            self._process.stdin.write(json.dumps({"id": number, "command": command}).encode() + b"\n")
            self._process.stdin.flush()
        return future

    def run(self, command: str, limit_s: float = 120.0) -> str:
        """Run a shell command; what it printed. Raises CommandFailed, TimeoutError, PowerLost."""
        done = self.start(command).result(limit_s)
        if done.status:
            raise CommandFailed(
                f"{self.name}: {command}\nexit status {done.status}\n{done.out[-2000:]}{done.err[-4000:]}"
            )
        return done.out

    def pause(self) -> None:
        """Stop the kernel. Its programs are its traced children and stop at their next system call; were they sent the
        signal too, the kernel would meet it when it goes on, and panic.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def powercut(self) -> None:
        """Power off at once; what the guest had not synced to its disks may be gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self._process = None


def make_disk(path: Path, megabytes: int = 256) -> Path:
    """A disk image with ext4 on it, journalled."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
    return path


def _wait_for(condition: Any, what: str, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not there after {limit_s} s"
        time.sleep(0.02)
