"""Runs in a guest: shell commands come in as JSON lines on the second console, their ends go back the same way."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import tty

CONSOLE = "/dev/tty1"
_one_at_a_time = threading.Lock()


def say(console: int, message: dict[str, object]) -> None:
    data = json.dumps(message).encode() + b"\n"
    with _one_at_a_time:
        while data:
            data = data[os.write(console, data) :]


def run(console: int, number: int, command: str) -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", command], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    say(console, {"id": number, "status": done.returncode, "out": done.stdout, "err": done.stderr})


if __name__ == "__main__":
    console = os.open(CONSOLE, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(console)
    say(console, {"id": 0})
    with open(console, "rb", buffering=0, closefd=False) as lines:
        waiting = b""
        while piece := lines.read(65536):
            *whole, waiting = (waiting + piece).split(b"\n")
            for line in filter(bytes.strip, whole):
                order = json.loads(line)
                threading.Thread(target=run, args=(console, order["id"], order["command"]), daemon=True).start()
