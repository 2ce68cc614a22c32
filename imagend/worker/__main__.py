"""python -m imagend.worker: one worker process, started by the daemon and living no longer than it."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="imagend.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="a socket to the daemon")
    parser.add_argument("--device", required=True, help="cpu or cuda:N")
    parser.add_argument("--models", type=Path, required=True, help="the models folder")
    parser.add_argument("--settings", default="{}", help="WorkerSettings as JSON")
    arguments = parser.parse_args()
    # The daemon's death closes the socket, which ends us; this is for a library call that never lets us notice.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    os.environ.update(quiet | {"HF_HUB_OFFLINE": "1"})  # before any library reads them
    from imagend.messages import WorkerSettings
    from imagend.models import Models
    from imagend.worker.main import serve
    from imagend.worker.pipelines import Pipelines

    settings = WorkerSettings.model_validate_json(arguments.settings)
    models = Models(arguments.models, Path(settings.extra_model_paths) if settings.extra_model_paths else None)
    serve(socket.socket(fileno=arguments.fd), Pipelines(arguments.device, models, settings))


if __name__ == "__main__":
    main()
