"""Every command that the documents show is run as it stands there, but for ids, beside a daemon that paints."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import imagend
from test_docs import commands_shown
from test_service import serving, status, wait_for

pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
import detectors
import loras
from engine_conftest import EMBEDDED, load_plain
from PIL import Image

from imagend import config as configuration

AN_ID, A_PREFIX = "4f2c9d0b6a1e83c57d24", "4f2c"
NOT_HERE = {
    ("serve",): "all the others are run beside it",
    ("init",): "it would make /srv/imagend; this test begins with one elsewhere",
    ("fetch",): "it asks Civitai and Hugging Face; test_fetch.py asks servers that behave like these",
    ("submit", "fetch"): "the same",
    ("submit", "train"): "it takes minutes; test_train_jobs.py trains for seconds",
}
QUICK = ("submit", "generate", "--prompt", "x", "--num-inference-steps", "1")


class Farm:
    """A place as the reader has it by then: pictures, models and jobs of the names that are shown."""

    def __init__(self, folder: Path) -> None:
        assert imagend("init", "farm", "--client", "alice", cwd=folder).returncode == 0
        self.root = folder / "farm"
        self.config = configuration.load(self.root / "config.yaml")
        Image.new("RGB", (64, 64), "red").save(self.root / "photo.png")
        Image.new("L", (64, 64), "white").save(self.root / "mask.png")
        dataset = self.config.reference / "datasets" / "hats"
        dataset.mkdir(parents=True)
        Image.new("RGB", (64, 64), "blue").save(dataset / "hat.png")
        (dataset / "hat.txt").write_text("a blue hat")
        (self.root / "hats.csv").write_text("name,colour\nfirst,red\nsecond,blue\n")
        (self.root / "set.csv").write_text("name,colour,shape,ground\nfirst,red,circle,blue\n")
        (self.root / "payload.json").write_text(json.dumps({"kind": "generate", "prompt": "a hat", "seed": 1}))
        (self.config.models / "diffusers" / "pony").mkdir()
        (self.config.models / "diffusers" / "pony" / "v6").symlink_to(EMBEDDED)
        for seed, name in enumerate(("hats", "ink")):
            path = self.config.models / "loras" / f"{name}.safetensors"
            loras.save(loras.random(load_plain(), seed, scale=0.01), path)
        detectors.save(self.config.models)
        self.painted = ""

    def run(self, *words: str) -> str:
        done = imagend(*words, cwd=self.root)
        assert done.returncode == 0, f"imagend {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return str(done.stdout).strip()

    def manifest(self, ref: str) -> Any:
        path = self.config.outputs / "alice" / ref / "manifest.json"
        wait_for(path.exists, self)  # type: ignore[arg-type]
        return json.loads(path.read_text())

    @contextlib.contextmanager
    def meant(self, command: str) -> Iterator[str]:
        """The id of a job for which the command is for."""
        match command:
            case "cancel" | "hold":
                self.run("pause")
                yield self.run(*QUICK)
                self.run("resume")
            case "redo":
                values = {"colour": "red " * 990, "shape": "very " * 790, "ground": "big " * 990}
                items = [{"name": "one", "values": dict.fromkeys(values, "red")}, {"name": "two", "values": values}]
                job = {"kind": "generate", "prompt": "{colour} {shape} {ground}", "items": items}
                (self.root / "set.json").write_text(json.dumps(job | {"num_inference_steps": 1}))
                ref = self.run("submit", "--file", "set.json")
                assert self.manifest(ref)["outcome"] == "partial"
                yield ref
            case "requeue":
                ref = self.run(*QUICK, "--model", "nobody")
                assert self.manifest(ref)["outcome"] == "failed"
                yield ref
            case _:
                yield self.painted

    def show(self, *words: str) -> None:
        """One command as it is shown."""
        match words:
            case ["top"]:
                assert b"alice" in self.at_a_terminal(*words)
            case ["tail"]:
                assert self.first_line(*words)
            case [command, *_]:
                with self.meant(command) as ref:
                    self.run(*(ref if word in (AN_ID, A_PREFIX) else word for word in words))

    def first_line(self, *words: str) -> str:
        """Of a command that goes on for ever."""
        command = [sys.executable, "-m", "imagend", *words]
        with subprocess.Popen(command, cwd=self.root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            line = process.stdout.readline()
            process.send_signal(signal.SIGINT)
        return line

    def at_a_terminal(self, *words: str) -> bytes:
        """What it shows, until it is told `q`."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (40, 120))
        command, environment = [sys.executable, "-m", "imagend", *words], os.environ | {"TERM": "xterm"}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}  # Textual draws on the last
        with subprocess.Popen(command, cwd=self.root, env=environment, **streams) as process:
            os.close(theirs)
            shown = b""
            while b"alice" not in shown:
                shown += os.read(ours, 1 << 16)
            os.write(ours, b"q")
            with contextlib.suppress(OSError):  # the terminal is gone
                while os.read(ours, 1 << 16):
                    pass
        os.close(ours)
        assert process.returncode == 0
        return shown


def test_every_command_in_the_documents_does_what_it_says(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    with serving(SimpleNamespace(root=farm.root, config=farm.config)):  # type: ignore[arg-type]
        wait_for(lambda: status(farm).get("workers"), farm)  # type: ignore[arg-type]
        farm.painted = json.loads(farm.run(*QUICK, "--wait", "--json").splitlines()[-1])["id"]
        shown = list(commands_shown().values())
        here = [words for words in shown if not any(tuple(words[: len(one)]) == one for one in NOT_HERE)]
        for words in here:
            farm.show(*words)
    assert len(here) > 20
