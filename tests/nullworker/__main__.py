"""python tests/nullworker, or python -m nullworker: the real serve(), with the kinds of this folder."""

from __future__ import annotations

import argparse
import ctypes
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from imagend.worker.main import serve

_PR_SET_PDEATHSIG = 1  # prctl(2)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--device")
    parser.add_argument("--models")
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = SimpleNamespace(device=arguments.device, versions={}, memory=dict)
    serve(socket.socket(fileno=arguments.fd), engine, package="nullworker")  # type: ignore[arg-type]
