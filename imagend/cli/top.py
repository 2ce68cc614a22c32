"""imagend top: a live view for a terminal. Its screen needs Textual, an extra, and is imported only here."""

from __future__ import annotations

import argparse
import sys

from imagend import config as configuration
from imagend.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Shows workers, queue, throughput and what ended of late, and no prompt. c, h and r cancel, hold and release "
        "the job under the cursor, p pauses all: as the commands do, and with their rights. Needs Textual: "
        "pip install 'imagend[top]'"
    )


def run(arguments: argparse.Namespace) -> int:
    path = configuration.find(arguments.config)
    config = configuration.load(path)
    try:
        from imagend.cli.top_screen import Top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise UsageError("imagend top needs Textual. Install it: pip install 'imagend[top]'") from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("imagend top needs a terminal. For scripts: imagend status --json, imagend tail --json")
    Top(config, path).run()
    return 0
