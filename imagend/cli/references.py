"""imagend references: the pictures in reference/ that jobs may name, from spool/catalog.json, or by looking."""

from __future__ import annotations

import argparse
import json

from imagend import config as configuration
from imagend import references
from imagend.catalog import FILE
from imagend.cli.look import daemon_alive, read
from imagend.spool import STATUS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON: entities with their views")
    parser.epilog = "A job names one as ENTITY/VIEW: imagend submit generate --image leona/front --strength 0.6 …"


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    alive = daemon_alive(read(config.spool / STATUS))
    known = read(config.spool / FILE).get("references") if alive else None
    found = references.look(config.reference).document() if known is None else known
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        lines = [f"{entity['name']}: {', '.join(entity['views'])}" for entity in found]
        print("\n".join(lines) or f"No pictures: put some under {config.reference} as ENTITY/VIEW.png")
    return 0
