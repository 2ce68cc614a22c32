"""imagend pause: hand nothing out for a while, or nothing of one client's."""

from __future__ import annotations

import argparse
import json

from imagend.cli import order
from imagend.cli.look import daemon_alive, read
from imagend.spool import STATUS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="only this client's jobs (default: all)")
    parser.add_argument("--reason", default="", metavar="TEXT", help="shown by status and queue, to all")
    parser.add_argument("--now", action="store_true", help="running jobs go back to the queue, at their next step")
    parser.add_argument("--json", action="store_true", help="one JSON object: client, message")
    parser.epilog = f"Jobs are taken in all the while, and wait. Until: imagend resume. {order.EPILOG}"


def run(arguments: argparse.Namespace) -> int:
    config, orders = order.begin(arguments)
    orders.give(name(arguments.client), reason=arguments.reason, now=arguments.now)
    alive = daemon_alive(read(config.spool / STATUS))
    whom = f"jobs of {arguments.client}" if arguments.client else "all jobs"
    rest = "what runs goes back to the queue" if arguments.now else "what runs is finished"
    return tell(arguments, f"paused: {whom}; {rest if alive else 'the daemon is stopped, and will find them paused'}")


def name(client: str | None) -> str:
    return f"pause.{client}" if client else "pause"


def tell(arguments: argparse.Namespace, message: str) -> int:
    print(json.dumps({"client": arguments.client, "message": message}) if arguments.json else message)
    return 0
