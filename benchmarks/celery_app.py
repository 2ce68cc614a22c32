"""The Celery side of benchmarks.peers: one task, acknowledged late; its 1 KB result is published as durably as ours."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from benchmarks.queue import PICTURE
from imagend import files

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    task_serializer="json",
    worker_hijack_root_logger=False,
)


@app.task(name="paint")
def paint(_job: str, result: str) -> None:
    """Temporary name, fsync, rename, fsync of the folder."""
    files.write(Path(result), PICTURE)
