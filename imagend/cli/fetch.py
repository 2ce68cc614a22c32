"""imagend fetch: a model from Civitai, Hugging Face or another allowed host into models/, checked first."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import UTC, datetime

from imagend import config as configuration
from imagend.architecture import ModelKind
from imagend.cli.init import login_name
from imagend.errors import UsageError
from imagend.fetch import tokens
from imagend.fetch.fetcher import Fetcher, Wish
from imagend.fetch.web import Web
from imagend.record import MAX_TEXT

_EVERY_S = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a page or a download URL of Civitai, the number of a version, an AIR; the URL of a file or a repository "
        "of Hugging Face; another https URL of a .safetensors file",
    )
    parser.add_argument(
        "--sha256", metavar="HEX", help="what the file must be; needed where the source does not tell it"
    )
    parser.add_argument(
        "--kind", choices=[kind.value for kind in ModelKind], help="if its tensors shall tell nothing else"
    )
    parser.add_argument("--name", help="what to call it here; folders/may/precede")
    parser.add_argument("--variant", metavar="fp16", help="of a repository: the weights of that name")
    parser.add_argument("--notes", metavar="TEXT", help="for its record")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    parser.epilog = (
        "Ctrl-C keeps what has come for seven days: the same command goes on. An error deletes it. What may come from "
        "where is set under `fetch` in config.yaml."
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    sha256 = arguments.sha256.lower() if arguments.sha256 else None
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError("--sha256 takes 64 hexadecimal digits, as sha256sum prints them.")
    if len(arguments.notes or "") > MAX_TEXT:
        raise UsageError(f"--notes may have {MAX_TEXT} characters.")
    web = Web(config.fetch, tokens.load(config.fetch.tokens, configuration.credentials()))
    fetcher = Fetcher(config, web, login_name(), lambda: datetime.now(UTC), _Teller())
    kind = ModelKind(arguments.kind) if arguments.kind else None
    wish = Wish(arguments.source, sha256, kind, arguments.name, arguments.variant, arguments.notes)
    try:
        fetched = fetcher.fetch(wish)
    except KeyboardInterrupt:
        print("\nInterrupted. What has come is kept: the same command goes on.", file=sys.stderr)
        return 130
    if arguments.json:
        told = {"kind": fetched.kind.value, "name": fetched.name, "path": str(fetched.path), "sha256": fetched.sha256}
        print(json.dumps(told))
    else:
        print(f"{fetched.kind.noun} {fetched.name}: {fetched.path}\npin it as {fetched.name}@{fetched.sha256[:10]}")
    return 0


class _Teller:
    """Progress on standard error, once a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, path: str, size: int, total: int | None) -> None:
        now = time.monotonic()
        if now < self._next and size != total:
            return
        self._next = now + _EVERY_S
        of = f" of {total / 1e6:.1f} MB, {100 * size // total} %" if total else " MB"
        print(f"{path}: {size / 1e6:.1f}{of}", file=sys.stderr, flush=True)
