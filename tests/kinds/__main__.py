"""python tests/kinds: the real serve(), with the kinds of this folder.

KINDS=stillborn dies before it is ready, KINDS=asleep never gets ready.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from imagend.worker.main import serve

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--device")
    parser.add_argument("--models")
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    if os.environ.get("KINDS") == "stillborn":
        os._exit(7)
    if os.environ.get("KINDS") == "asleep":
        signal.pause()
    connection = socket.socket(fileno=arguments.fd)
    engine = SimpleNamespace(device=arguments.device, versions={}, memory=dict, connection=connection)
    serve(connection, engine, package="kinds")  # type: ignore[arg-type]
