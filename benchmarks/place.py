"""A fresh place for imagend in a temporary folder, and a daemon in it, as people run it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend import config as configuration
from imagend.config import Config
from imagend.job import Ref
from imagend.signing import Key, job_id, seal

UNLIMITED = re.compile(r"(?P<key>\bmax_queued|\bjobs_per_minute): \d+")
REPOSITORY = Path(__file__).parents[1]


@dataclass
class Place:
    root: Path
    config: Config
    key: Key

    def sealed(self, **fields: Any) -> tuple[Ref, bytes]:
        """A signed job file and its reference."""
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        body = json.dumps({"schema": "imagend.job/v1", "kind": "generate", "issued_at": now} | fields).encode()
        return Ref(self.config.client.name, job_id(self.config.client.name, body)), seal(body, self.key.sign(body))

    def drop(self, **fields: Any) -> tuple[Ref, float]:
        """Put a job into the inbox; its reference and when the rename was done, in seconds since the epoch."""
        ref, raw = self.sealed(**fields)
        temporary = self.config.inboxes[0] / f".{ref.id}"
        temporary.write_bytes(raw)
        temporary.rename(self.config.inboxes[0] / f"{ref.id}.json")
        return ref, time.time()

    def wait(self, ref: Ref) -> dict[str, Any]:
        """The manifest, as soon as it is there."""
        path = self.config.outputs / ref.client / ref.id / "manifest.json"
        while not path.exists():
            time.sleep(0.002)
        manifest: dict[str, Any] = json.loads(path.read_text())
        assert manifest["outcome"] == "succeeded", manifest
        return manifest


@contextlib.contextmanager
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="imagend-bench-") as folder:
        root = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "imagend", "init", root, "--client", "bench"], check=True, stdout=subprocess.DEVNULL
        )
        path = root / "config.yaml"
        path.write_text(UNLIMITED.sub(r"\g<key>: 10000000", path.read_text()))
        config = configuration.load(path)
        yield Place(root, config, Key.load(config.client.key.read_bytes(), config.client.key))


@contextlib.contextmanager
def daemon(here: Place) -> Iterator[subprocess.Popen[bytes]]:
    """`imagend serve`, its worker warm."""
    with (here.root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "imagend", "serve"], cwd=here.root, stderr=log, env=os.environ
        )
    try:
        here.wait(here.drop(prompt="warm", num_inference_steps=1)[0])
        yield process
    finally:
        process.terminate()
        process.wait()
