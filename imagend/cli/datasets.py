"""imagend datasets: the folders that LoRAs are trained on; with a name, whether that one is fit for it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from imagend import config as configuration
from imagend import datasets
from imagend.dataset_report import Report
from imagend.errors import BadDataset, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="look at this one: every picture is opened")
    parser.add_argument("--resolution", type=int, default=1024, help="for its buckets (1024)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.epilog = "A dataset is a folder reference/datasets/NAME/ of pictures with captions: docs/train.md"


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    if arguments.name is None:
        found = datasets.names(config.reference)
        folder = config.reference / datasets.FOLDER
        listed = "\n".join(found) or f"No datasets: put pictures with captions into {folder}/NAME/"
        print(json.dumps(found) if arguments.json else listed)
        return 0
    if not 64 <= arguments.resolution <= 2048:
        raise UsageError("--resolution: from 64 to 2048 are possible")
    report = _look(config.reference, arguments.name, arguments.resolution)
    if arguments.json:
        print(json.dumps(report.model_dump(mode="json") | {"is_fit": report.is_fit}, indent=1))
    else:
        print("\n".join((*report.lines(), report.verdict())))
    return 0 if report.is_fit else 1


def _look(reference: Path, name: str, resolution: int) -> Report:
    """By a process of its own: these are strangers' pictures. Raises UsageError, UnknownDataset, BadDataset."""
    if importlib.util.find_spec("PIL") is None:
        raise UsageError("Looking at pictures needs the engine: pip install 'imagend[engine]'")
    datasets.look(reference, name)
    command = [sys.executable, "-m", "imagend.worker.dataset", str(reference), name, str(resolution)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        return Report.model_validate_json(done.stdout)
    except ValueError:
        sys.stderr.write(done.stderr.decode(errors="replace"))
        raise BadDataset(name, f"looking at it failed (exit status {done.returncode})", name) from None
