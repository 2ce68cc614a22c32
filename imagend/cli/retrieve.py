"""imagend retrieve: copy a result, check it against its manifest, and say to the daemon that it may go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from imagend import config as configuration
from imagend import results
from imagend.cli.look import look, removed
from imagend.cli.watch import EXIT_STATUS, parse_ref
from imagend.config import Config
from imagend.errors import SpoolUnusable, UsageError
from imagend.job import Ref


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job's id, or CLIENT/ID")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to; its files come to DIR/ID/")
    parser.add_argument("--json", action="store_true", help="one JSON object: folder, files, marked")
    parser.epilog = (
        "Each file is durable and has the digest that its manifest tells before the result is marked as retrieved. "
        "exit status: as the job ended, 0 succeeded, 1 failed, 4 cancelled, 7 a set of which some items failed; "
        "64 there is no result, 74 it is damaged"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    ref = parse_ref(arguments.id, config)
    source, target = config.outputs / ref.client / ref.id, arguments.folder / ref.id
    manifest = _manifest(config, ref)
    try:
        copied = results.copy(source, target, manifest)
    except FileNotFoundError as error:
        raise SpoolUnusable(error.filename, "it went while it was copied") from None
    refusal = _mark(source)
    if arguments.json:
        told = {"id": ref.id, "client": ref.client, "outcome": manifest["outcome"], "folder": str(target)}
        print(json.dumps(told | {"files": [path.name for path in copied], "marked": refusal is None}))
    else:
        print("\n".join(str(path) for path in copied))
    if refusal:
        print(f"imagend: {refusal}", file=sys.stderr)
    return EXIT_STATUS[manifest["outcome"]]


def _manifest(config: Config, ref: Ref) -> dict[str, Any]:
    sight = look(config, ref)
    if sight.state == "ended":
        return sight.document
    if sight.state == "rejected":
        raise UsageError(f"{ref} was rejected: {sight.document.get('error', {}).get('message', 'see rejected/')}")
    if sight.state == "removed":
        raise UsageError(f"{removed(ref, sight.document)}.")
    if sight.state == "unknown":
        raise UsageError(f"No result of {ref} is under {config.outputs}. Whose job is it? Write CLIENT/ID.")
    raise UsageError(f"{ref} has not ended yet. Wait for it: imagend watch {ref}")


def _mark(folder: Path) -> str | None:
    """Why it could not be marked; None if it is."""
    try:
        results.mark(folder)
    except OSError as error:
        todo = "to mark it, be in the client's Unix group (clients.NAME.group in config.yaml) and mount it writable"
        return f"copied, but not marked as retrieved: {folder}: {error.strerror}; {todo}"
    return None
