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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from imagend import config as configuration
from imagend.config import Config
from imagend.job import Ref
from imagend.signing import Key, job_id, seal

UNLIMITED = re.compile(r"(?P<key>\bmax_queued|\bjobs_per_minute): \d+")
REPOSITORY = Path(__file__).parents[1]
LIMIT_S = 600.0


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

    def sealed_to(self, size: int, count: int) -> list[tuple[Ref, bytes]]:
        """So many job files of `size` bytes each; their prompts fill them up."""
        _, shortest = self.sealed(prompt="", seed=10**6)
        prompt = ("a lighthouse at dusk, volumetric light, " * size)[: size - len(shortest)]
        return [self.sealed(prompt=prompt, seed=10**6 + number) for number in range(count)]

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
        wait_until(path.exists)
        manifest: dict[str, Any] = json.loads(path.read_text())
        assert manifest["outcome"] == "succeeded", manifest
        return manifest

    def files(self, state: str) -> int:
        """How many jobs lie in inbox, pending, active or done."""
        with contextlib.suppress(FileNotFoundError):
            folder = self.config.spool / state
            with os.scandir(folder if state == "inbox" else folder / self.config.client.name) as found:
                return sum(entry.name.endswith(".json") and not entry.name.startswith(".") for entry in found)
        return 0


@contextlib.contextmanager
def place(parent: Path | None = None, **keys: Any) -> Iterator[Place]:
    """What `imagend init` makes, without limits to what a client may ask for; `keys` of config.yaml as given."""
    with tempfile.TemporaryDirectory(prefix="imagend-bench-", dir=parent) as folder:
        root = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "imagend", "init", root, "--client", "bench"], check=True, stdout=subprocess.DEVNULL
        )
        path = root / "config.yaml"
        settings = yaml.safe_load(UNLIMITED.sub(r"\g<key>: 10000000", path.read_text()))
        path.write_text(yaml.safe_dump(settings | keys))
        config = configuration.load(path)
        yield Place(root, config, Key.load(config.client.key.read_bytes(), config.client.key))


@contextlib.contextmanager
def process(here: Place, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that stands in the place and writes its log there; asked to stop at the end."""
    command = [sys.executable, *(str(argument) for argument in arguments)]
    python_path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (here.root / "log").open("wb") as log:
        running = subprocess.Popen(command, cwd=here.root, stderr=log, env={**os.environ, "PYTHONPATH": python_path})
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


@contextlib.contextmanager
def daemon(here: Place) -> Iterator[subprocess.Popen[bytes]]:
    """`imagend serve`, its worker warm."""
    with process(here, "-m", "imagend", "serve") as running:
        here.wait(here.drop(prompt="warm", num_inference_steps=1, width=64, height=64)[0])
        yield running


def wait_until(condition: Callable[[], bool], every_s: float = 0.002) -> None:
    """Look until it is so."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"a benchmark waited {LIMIT_S:.0f} s in vain")
        time.sleep(every_s)
