"""What people type. One module per command, imported only when it is asked for: `imagend status` must be quick."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from imagend import __version__
from imagend.errors import ImagendError, SpoolUnusable

COMMANDS = {
    "init": "make a place for imagend: folders, config.yaml, a client key, allowed_signers",
    "install": "set this host up: user, folders, a folder per client in the inbox, config.yaml, the systemd unit",
    "serve": "run the daemon in the foreground",
    "submit": "sign a job and drop it into the inbox",
    "watch": "follow a job to its end; the exit status tells the outcome",
    "retrieve": "copy a result, check it against its manifest, and mark it as retrieved",
    "replay": "paint a job again from its manifest and say whether it is the same, bit for bit, or what differs",
    "redo": "paint what is missing of a set of which some items failed",
    "cancel": "cancel a job of yours, queued or running",
    "queue": "the jobs that run and the next that wait, in order, with how long each will wait",
    "pause": "operators: hand out no more jobs, or none of one client's, until `imagend resume`",
    "resume": "operators: hand out again what was paused",
    "hold": "operators: pass a job over until `imagend release`",
    "release": "operators: let a held job have its turn",
    "requeue": "operators: try a job again that failed or was cancelled",
    "purge": "operators: leave nothing of a job that has ended",
    "status": "what the daemon is doing",
    "top": "a live view for a terminal: workers, queue, throughput, what ended of late",
    "tail": "what happens to jobs, as it happens: queued, started, each stage, how far it is, pictures, ends",
    "history": "the jobs that ended, and how many of whom and by which model succeeded, and how long they took",
    "models": "the models there are, and which cannot be used and why",
    "references": "the pictures in reference/ that jobs may begin with",
    "route": "which way an edit would go by its words, simple or complex, and why",
    "datasets": "the datasets in reference/datasets/ that LoRAs are trained on, and whether one is fit for it",
    "fetch": "get a model from Civitai, Hugging Face or another allowed host, checked before it is installed",
    "check": "look for mistakes in config, keys, folders and models, and say how to mend them",
    "doctor": "all of check, and how the place fares: disks, stuck jobs, leftovers, GPUs, versions; each with a remedy",
    "retention": "what has ended and will be removed, when and why; the daemon does it",
    "schema": "print the JSON Schema of job files, or of status.json",
    "completion": "print a script that completes imagend's commands and options in your shell",
}
EPILOG = """\
exit status: 0 well, 1 the job failed, 3 it was rejected, 4 it was cancelled, 5 not the same bits, 6 its
result was removed, 64 wrong use, 69 the daemon is not running, 74 disk trouble, 75 --timeout passed, 78 a mistake
in the configuration
Start: imagend init; imagend serve; and elsewhere: imagend submit generate --prompt "a red circle" --wait"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(64, f"imagend: {message}. See: {self.prog} --help\n")


def parser_of(chosen: Collection[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the `chosen` commands. Only they know their options: the others are not imported."""
    parser = Parser(
        prog="imagend",
        description="Turns signed JSON job files into SDXL pictures. The file system is the interface.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"imagend {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=f"{summary}.".capitalize(), allow_abbrev=False)
        if name in chosen:
            command.add_argument(
                "--config", type=Path, metavar="FILE", help="config.yaml to use ($IMAGEND_CONFIG, ./, /etc/imagend/)"
            )
            importlib.import_module(f"imagend.cli.{name}").configure(command)
            commands[name] = command
    return parser, commands


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    chosen = next((word for word in argv if word in COMMANDS), "")
    parser, commands = parser_of((chosen,))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[arguments.command]  # its error names its own --help
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(importlib.import_module(f"imagend.cli.{arguments.command}").run(arguments))
    except ImagendError as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"error": error.envelope()}))
        print(f"imagend: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `imagend … | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        print(f"imagend: {error.filename}: {error.strerror}. Run: imagend check", file=sys.stderr)
        return SpoolUnusable.exit_status
    except KeyboardInterrupt:
        return 130
