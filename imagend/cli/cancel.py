"""imagend cancel: a signed wish that a job stop, dropped like a job. An operator's may be another client's."""

from __future__ import annotations

import argparse
import json

from imagend import config as configuration
from imagend.cli import drop
from imagend.cli.look import look
from imagend.cli.watch import EXIT_STATUS, OVER, add_watch_options, follow, parse_ref
from imagend.errors import UsageError
from imagend.job import Ref


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job's id")
    parser.epilog = "exit status: 0 asked for, or ended; 3 (with --wait) the wish was rejected"
    parser.add_argument("--client", metavar="NAME", help="whose job it is; another's only as an operator")
    parser.add_argument("--wait", action="store_true", help="wait until it has ended, one way or the other")
    add_watch_options(parser)


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    ref = parse_ref(arguments.id, config)
    own = config.client.name
    if arguments.client:
        ref = Ref(arguments.client, ref.id)
    elif ref.client != own:
        raise UsageError(f"{ref} is another client's job; you are {own!r}. As an operator, say: --client {ref.client}")
    owner = {} if ref.client == own else {"client": ref.client}  # whether we may, the daemon says
    wish = drop.compose({"kind": "cancel", "job": ref.id} | owner)
    if look(config, ref).state in OVER:
        _say(arguments, ref, f"{ref.id} has ended already")
        return 0
    dropped = drop.drop(config, wish)
    if arguments.wait:
        status = follow(config, ref, arguments, wish=dropped)
        return status if status == EXIT_STATUS["rejected"] else 0
    _say(arguments, ref, f"asked to cancel {ref.id}")
    return 0


def _say(arguments: argparse.Namespace, ref: Ref, text: str) -> None:
    print(json.dumps({"id": ref.id, "client": ref.client, "message": text}) if arguments.json else text)
