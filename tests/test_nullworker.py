"""The null worker, which the lab and the long tests paint with: served as `imagend serve` serves the real one."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, Home
from nullworker.generate import SIZE, picture

Image = pytest.importorskip("PIL.Image")
PATIENCE_S = 60.0


def test_a_job_is_painted_by_the_null_worker_and_its_bytes_follow_from_the_seeds(home: Home) -> None:
    ref = home.drop(seed=7, count=3)
    folder = home.config.outputs / ref.client / ref.id
    command = [sys.executable, str(REPOSITORY / "tests" / "lab" / "null_daemon.py"), "serve"]
    with (home.root / "log").open("wb") as log:
        daemon = subprocess.Popen(command, cwd=home.root, stderr=log)
    try:
        end = time.monotonic() + PATIENCE_S
        while not (folder / "manifest.json").exists():
            assert time.monotonic() < end, (home.root / "log").read_text()
            time.sleep(0.02)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    finally:
        daemon.kill()
        daemon.wait()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["outcome"] == "succeeded"
    for artifact, seed in zip(manifest["artifacts"], (7, 8, 9), strict=True):
        data = (folder / artifact["file"]).read_bytes()
        assert data == picture(seed)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (SIZE, artifact["sha256"])
        with Image.open(folder / artifact["file"]) as image:
            assert hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() == artifact["pixels_sha256"]
