"""python -m imagend.fetch: one process that fetches, started by the daemon for one job. It alone knows the network."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
from pathlib import Path

from imagend.config import Config
from imagend.fetch.main import serve
from imagend.messages import FetchSettings

_PR_SET_PDEATHSIG = 1  # prctl(2)
_NICE = 10
"""Hashing what comes takes a CPU's time; painting goes first."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="imagend.fetch", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="a socket to the daemon")
    parser.add_argument("--device", required=True, help="network")
    parser.add_argument("--models", type=Path, required=True, help="the models folder")
    parser.add_argument("--settings", required=True, help="FetchSettings as JSON")
    arguments = parser.parse_args()
    settle_in()
    serve(socket.socket(fileno=arguments.fd), config_of(arguments.settings, arguments.models))


def settle_in() -> None:
    """Live no longer than the daemon, and in nobody's way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    os.nice(_NICE)


def config_of(text: str, models: Path) -> Config:
    """As far as a fetch needs it."""
    settings = FetchSettings.model_validate(json.loads(text))
    extra = Path(settings.extra_model_paths) if settings.extra_model_paths else None
    return Config(models=models, extra_model_paths=extra, reserve_mb=settings.reserve_mb, fetch=settings.fetch)


if __name__ == "__main__":
    main()
