"""Parts of the operators' commands (pause, resume, hold, release, requeue, purge): whose job, and was it heard?"""

from __future__ import annotations

import argparse
import json
import re

from imagend import config as configuration
from imagend.cli.look import daemon_alive, read
from imagend.config import Config
from imagend.errors import UsageError
from imagend.job import Ref
from imagend.orders import Orders
from imagend.outputs import MANIFEST
from imagend.spool import STATUS, State

_SHOWN = 5
EPILOG = "For whoever may write to the spool. It works while the daemon is stopped, too, and outlives restarts."


def begin(arguments: argparse.Namespace) -> tuple[Config, Orders]:
    config = configuration.load(configuration.find(arguments.config))
    return config, Orders(config.spool)


def add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job's id, or the first four digits of it or more, or CLIENT/ID")
    parser.add_argument("--json", action="store_true", help="one JSON object: id, client, message")


def find(config: Config, text: str) -> Ref:
    """The one job that is meant, whosever it is. Raises UsageError."""
    client, _, digits = text.rpartition("/")
    if not re.fullmatch(r"[0-9a-f]{4,20}", digits):
        raise UsageError(f"{text!r} is no job id: that is 20 of 0-9 and a-f, of which the first four may do.")
    found = {
        Ref(path.parent.name, path.name.removesuffix(".json"))
        for state in State
        for path in (config.spool / state).glob(f"{client or '*'}/{digits}*.json")
    }
    if not found:  # the file of an ended job may have gone before its result
        found = {
            Ref(path.parent.parent.name, path.parent.name)
            for path in config.outputs.glob(f"{client or '[!.]*'}/{digits}*/{MANIFEST}")
        }
    if not found:
        raise UsageError(f"No job {text} is known here, neither queued nor ended. What waits: imagend queue")
    if len(found) > 1:
        some = ", ".join(str(ref) for ref in sorted(found)[:_SHOWN])
        raise UsageError(f"{text} may be {len(found)} jobs: {some}{', …' * (len(found) > _SHOWN)}. Write more digits.")
    return found.pop()


def outcome(config: Config, ref: Ref) -> str | None:
    """How a job ended; None if it has not."""
    manifest = read(config.outputs / ref.client / ref.id / MANIFEST)
    return str(manifest.get("outcome")) if manifest else None


def say(arguments: argparse.Namespace, config: Config, ref: Ref, text: str) -> int:
    """Tell what was asked for, and when it will be so."""
    alive = daemon_alive(read(config.spool / STATUS))
    message = f"{ref} {text}" + ("" if alive else ", when the daemon runs again: it is stopped")
    print(json.dumps({"id": ref.id, "client": ref.client, "message": message}) if arguments.json else message)
    return 0
