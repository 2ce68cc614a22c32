"""The daemon that benchmarks measure is the one that people run, with a painter that takes no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from conftest import REPOSITORY, Home
from test_service import PATIENCE_S, wait_for


def test_the_service_of_benchmarks_starts_paints_and_stops(home: Home) -> None:
    ref = home.drop()
    command = [sys.executable, "-m", "benchmarks.service", str(home.root / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with (home.root / "log").open("wb") as log:
        daemon = subprocess.Popen(command, cwd=home.root, stderr=log, env=environment)
    try:
        wait_for(lambda: home.where(ref) == "done" or daemon.poll() is not None, home)
        assert daemon.poll() is None, (home.root / "log").read_text()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    finally:
        daemon.kill()
        daemon.wait()
    assert home.outcome(ref) == "succeeded"
