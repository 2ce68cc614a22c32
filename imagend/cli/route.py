"""imagend route: which way an edit would go by its words, and why."""

from __future__ import annotations

import argparse

from imagend import config as configuration
from imagend import router


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what an edit asks for, in quotes")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.epilog = (
        "A job that says path: simple or path: complex goes that way whatever its words are; others go by them "
        "(path: auto). Rules of your own: edit in config.yaml."
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    found = router.route(arguments.prompt, rules=config.edit.rules)
    text = f"{found.path}: {found.reason} (confidence {found.confidence:g})"
    print(found.model_dump_json() if arguments.json else text)
    return 0
