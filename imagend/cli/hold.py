"""imagend hold: pass a job over until it is released."""

from __future__ import annotations

import argparse

from imagend.cli import order
from imagend.errors import UsageError
from imagend.orders import name_of


def configure(parser: argparse.ArgumentParser) -> None:
    order.add_id(parser)
    parser.epilog = f"One that runs goes on; should it come back to the queue, it stays there. {order.EPILOG}"


def run(arguments: argparse.Namespace) -> int:
    config, orders = order.begin(arguments)
    ref = order.find(config, arguments.id)
    if ended := order.outcome(config, ref):
        raise UsageError(f"{ref} has {ended} already: there is nothing to hold. To try it again: imagend requeue")
    orders.give(name_of("hold", ref))
    return order.say(arguments, config, ref, "is held until: imagend release")
