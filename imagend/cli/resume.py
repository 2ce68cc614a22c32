"""imagend resume: hand out again what was paused."""

from __future__ import annotations

import argparse

from imagend.cli import order
from imagend.cli.pause import name, tell


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="this client's jobs (default: what was paused for all)")
    parser.add_argument("--json", action="store_true", help="one JSON object: client, message")
    parser.epilog = order.EPILOG


def run(arguments: argparse.Namespace) -> int:
    _, orders = order.begin(arguments)
    whom = f"jobs of {arguments.client}" if arguments.client else "jobs"
    was = orders.take_back(name(arguments.client))
    others = sorted(orders.read().paused)
    still = f"; still paused: {', '.join(others)}" if others and not arguments.client else ""
    return tell(arguments, (f"resumed: {whom} are handed out again" if was else f"{whom} were not paused") + still)
