"""imagend purge: leave nothing of a job that has ended."""

from __future__ import annotations

import argparse

from imagend.cli import order
from imagend.errors import UsageError
from imagend.orders import name_of
from imagend.spool import State


def configure(parser: argparse.ArgumentParser) -> None:
    order.add_id(parser)
    parser.epilog = (
        "Pictures, manifest, job file and journal go. What stays: its id, so that the same file is not painted again, "
        f"and lines in results.jsonl and events.jsonl, which hold nothing that a client wrote. {order.EPILOG}"
    )


def run(arguments: argparse.Namespace) -> int:
    config, orders = order.begin(arguments)
    ref = order.find(config, arguments.id)
    waits = any(
        (config.spool / state / ref.client / f"{ref.id}.json").exists() for state in (State.PENDING, State.ACTIVE)
    )
    if waits and order.outcome(config, ref) is None:
        raise UsageError(f"{ref} has not ended. First: imagend cancel {ref.id} --client {ref.client}")
    orders.give(name_of("purge", ref))
    return order.say(arguments, config, ref, "is purged")
