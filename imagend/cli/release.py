"""imagend release: let a held job have its turn."""

from __future__ import annotations

import argparse

from imagend.cli import order
from imagend.orders import name_of


def configure(parser: argparse.ArgumentParser) -> None:
    order.add_id(parser)
    parser.epilog = f"It is the next of its client's jobs of that priority then. {order.EPILOG}"


def run(arguments: argparse.Namespace) -> int:
    config, orders = order.begin(arguments)
    ref = order.find(config, arguments.id)
    was = orders.take_back(name_of("hold", ref))
    return order.say(arguments, config, ref, "may have its turn" if was else "was not held, and waits for its turn")
