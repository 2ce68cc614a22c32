"""imagend retention: what will be removed, when and why. It looks and removes nothing: that the daemon does."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from typing import Any

from imagend import config as configuration
from imagend import files, retention
from imagend.cli.look import daemon_alive, read, span
from imagend.config import Config
from imagend.retention import Leaving, Stock
from imagend.spool import STATUS, Spool

_SHOWN = 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="this client's only")
    parser.add_argument("--all", action="store_true", help=f"the next {retention.LIMIT}, not the next {_SHOWN}")
    parser.add_argument("--json", action="store_true", help="one JSON object: results, jobs, sizes, times and reasons")
    parser.epilog = (
        "It removes nothing: a running daemon does, in time. Times change when a result is retrieved, when `retention` "
        "in config.yaml does, or when results get too large together. Who may not read the spool sees less"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    now, spool = time.time(), Spool(config.spool)
    free = files.free_bytes(config.outputs)
    stock = retention.look_at_results(config, spool, now, free=free)
    stock = retention.look_at_results(config, spool, now, stock.heavy(config), free)
    known, jobs = retention.look_at_jobs(config, spool, now)
    most = retention.LIMIT if arguments.all or arguments.json else _SHOWN
    results, jobs = (
        [one for one in found if arguments.client in (None, one.ref.client)][:most] for found in (stock.leaving, jobs)
    )
    alive = daemon_alive(read(config.spool / STATUS))
    if arguments.json:
        print(json.dumps(_document(stock, known, free, results, jobs, now, alive), indent=1))
        return 0
    print("\n".join(_lines(config, stock, known, results, jobs, now, alive)))
    return 0


def _document(
    stock: Stock, known: int, free: int, results: list[Leaving], jobs: list[Leaving], now: float, alive: bool
) -> dict[str, Any]:
    return {
        "at": _moment(now),
        "alive": alive,
        "outputs_count": stock.count,
        "outputs_bytes": stock.size,
        "retrieved_count": stock.retrieved,
        "free_bytes": free,
        "done_count": known,
        "results": [_as_json(one) | {"bytes": one.size} for one in results],
        "jobs": [_as_json(one) for one in jobs],
    }


def _as_json(leaving: Leaving) -> dict[str, Any]:
    return {"client": leaving.ref.client, "id": leaving.ref.id, "at": _moment(leaving.at), "why": leaving.why}


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _lines(
    config: Config, stock: Stock, known: int, results: list[Leaving], jobs: list[Leaving], now: float, alive: bool
) -> list[str]:
    lines = [f"{stock.count} results, {_size(stock.size)}, {stock.retrieved} of them retrieved, under {config.outputs}"]
    lines += [_line(one, now) + f" ({_size(one.size)})" for one in results]
    lines += [f"{known} ended jobs are known, in {config.spool}/done and journal"]
    lines += [_line(one, now) for one in jobs]
    return lines if alive else [*lines, "The daemon is not running: nothing is removed. Start it: imagend serve"]


def _line(leaving: Leaving, now: float) -> str:
    when = "now" if leaving.at <= now else f"in {span(leaving.at - now)}"
    return f"  {when:>9}  {leaving.ref}  {leaving.why}"


def _size(size: int) -> str:
    return f"{size / 10**9:.1f} GB" if size >= 10**9 else f"{size / 10**6:.1f} MB"
