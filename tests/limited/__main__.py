"""python tests/limited: the real worker, whose address space is limited (RLIMIT_AS) during large pictures.

How far, says the job: its seed is what the process may still grow by (MiB) once the picture has been planned. Pictures
of less than 512 pixels have no limit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it

import torch

from imagend.generate_spec import Generate
from imagend.messages import WorkerSettings
from imagend.models import Models
from imagend.worker.main import serve
from imagend.worker.pipelines import Pipelines
from imagend.worker.shortage import clean_up

_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # malloc.h


def steady() -> None:
    """What a picture may use must not hang on the scheduler: else threads that meet in malloc() reserve 64 MiB of
    addresses each, and large blocks that were freed stay in the heap beneath what another thread took since."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def limit(room_mb: int | None) -> None:
    clean_up(torch.device("cpu"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard if room_mb is None else size + room_mb * 2**20, hard))


class Limited(Pipelines):
    room_mb: int | None = None

    def prepare(self, spec: Generate, context: Any) -> Any:
        assert spec.seeds is not None
        limit(None)
        self.room_mb = spec.seeds[0] if (spec.width or 0) >= 512 else None
        return super().prepare(spec, context)

    def describe(self) -> dict[str, Any]:
        """Called when the picture has been planned."""
        limit(self.room_mb)
        return super().describe()


if __name__ == "__main__":
    steady()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--device")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    settings = WorkerSettings.model_validate_json(arguments.settings)
    pipelines = Limited(arguments.device, Models(arguments.models), settings)
    serve(socket.socket(fileno=arguments.fd), pipelines)
    sys.exit(0)
