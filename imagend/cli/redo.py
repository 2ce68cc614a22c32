"""imagend redo: paint what is missing of a set that ended without it, as a job of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from imagend import config as configuration
from imagend.cli.replay import manifest_of, send_again
from imagend.cli.submit import change, item_value
from imagend.cli.watch import add_watch_options, follow, parse_ref
from imagend.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the set's id, or CLIENT/ID; you paint it as yourself")
    parser.add_argument(
        "--item",
        dest="item_values",
        metavar="NAME:KEY=VALUE",
        action="append",
        default=[],
        type=item_value,
        help="change a value of an item that failed, as for `imagend submit`; give it again for more",
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="a picture that had been sent along with it; give it again for more of them",
    )
    parser.add_argument("--wait", action="store_true", help="follow the job to its end, as `imagend watch` does")
    add_watch_options(parser)
    parser.epilog = "What is painted has the seeds that it would have had in the set."


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    ref = parse_ref(arguments.id, config)
    manifest = manifest_of(config, ref)
    made = {one["name"] for one in manifest.get("items", ()) if one["outcome"] == "succeeded"}
    missing = {one["name"]: one for one in manifest["spec"].get("items", ()) if one["name"] not in made}
    if not missing:
        raise UsageError(f"Nothing is missing: {ref} is no set, or all its items have pictures.")
    if other := [name for name, _, _ in arguments.item_values if name not in missing]:
        raise UsageError(f"{other[0]} is none of what is missing of {ref}: {', '.join(missing)}. Leave it out.")
    change(missing, arguments.item_values)
    items = [{key: value for key, value in one.items() if value is not None} for one in missing.values()]
    again = send_again(config, ref, manifest, arguments.image, {"items": items, "label": f"redo of {ref}"})
    if arguments.wait:
        return follow(config, again, arguments)
    print(json.dumps({"id": again.id, "client": again.client}) if arguments.json else again.id)
    return 0
