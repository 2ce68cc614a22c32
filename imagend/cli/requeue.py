"""imagend requeue: try a job again that failed or was cancelled."""

from __future__ import annotations

import argparse

from imagend.cli import order
from imagend.errors import UsageError
from imagend.orders import name_of


def configure(parser: argparse.ArgumentParser) -> None:
    order.add_id(parser)
    parser.epilog = (
        "Its manifest is withdrawn, and what it said stands in the job's journal; attempts count anew. Pictures that "
        f"were sent along are gone: such a job must be sent again. {order.EPILOG}"
    )


def run(arguments: argparse.Namespace) -> int:
    config, orders = order.begin(arguments)
    ref = order.find(config, arguments.id)
    ended = order.outcome(config, ref)
    if ended is None:
        raise UsageError(f"{ref} has not ended, or its result has been removed: it cannot be tried again.")
    if ended == "succeeded":
        raise UsageError(f"{ref} has succeeded. To paint the same again: imagend replay {ref}")
    if ended == "partial":
        raise UsageError(f"{ref} has pictures. To paint what is missing of its set: imagend redo {ref}")
    orders.give(name_of("requeue", ref))
    return order.say(arguments, config, ref, "is queued again")
