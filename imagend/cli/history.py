"""imagend history: the jobs that ended, how many of whom and by which model succeeded, and how long they took."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from imagend import config as configuration
from imagend import history
from imagend.cli.look import moment, span
from imagend.errors import UsageError
from imagend.job import Kind

_JOBS = """
SELECT client, id, kind, model, outcome, code, accepted_at, started_at, ended_at, attempts, pictures,
       ended_at - started_at AS seconds, started_at - accepted_at AS waited_seconds
FROM jobs WHERE {chosen} ORDER BY ended_at DESC, client, id LIMIT :limit
"""
# A percentile is the smallest value that so many of all do not exceed. Only what was painted tells how long it takes.
_FIGURES = """
WITH chosen AS (SELECT {by} AS name, outcome, ended_at - started_at AS seconds, started_at - accepted_at AS waited,
                       outcome = 'succeeded' AND started_at IS NOT NULL AS timed FROM jobs WHERE {chosen}),
ranked AS (SELECT *, count(*) OVER (PARTITION BY name, timed) AS n,
                  row_number() OVER (PARTITION BY name, timed ORDER BY seconds) AS place,
                  row_number() OVER (PARTITION BY name, timed ORDER BY waited) AS waiting_place FROM chosen)
SELECT name, count(*) AS jobs, sum(outcome = 'succeeded') AS succeeded, sum(outcome = 'failed') AS failed,
       sum(outcome = 'partial') AS partial, sum(outcome = 'cancelled') AS cancelled,
       1.0 * sum(outcome = 'succeeded') / nullif(sum(outcome IN ('succeeded', 'partial', 'failed')), 0)
           AS success_ratio,
       max(CASE WHEN timed AND place = (n * 50 + 99) / 100 THEN seconds END) AS seconds_p50,
       max(CASE WHEN timed AND place = (n * 95 + 99) / 100 THEN seconds END) AS seconds_p95,
       max(CASE WHEN timed AND waiting_place = (n * 50 + 99) / 100 THEN waited END) AS waited_seconds_p50,
       max(CASE WHEN timed AND waiting_place = (n * 95 + 99) / 100 THEN waited END) AS waited_seconds_p95
FROM ranked GROUP BY name ORDER BY jobs DESC, name
"""
_TIMES = ("accepted_at", "started_at", "ended_at")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="this client's jobs only")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], help="jobs of this kind only")
    parser.add_argument("--model", metavar="NAME", help="jobs by this model only")
    parser.add_argument(
        "--since", metavar="TIME", type=moment, help="ended since: 30m, 24h, 7d, 2w, or 2026-11-26T15:00 (UTC)"
    )
    parser.add_argument(
        "--failed",
        action="store_true",
        help="list only what failed, if only in part; the figures are those of all",
    )
    parser.add_argument("--limit", metavar="N", type=int, default=20, help="list so many jobs (20); 0: all")
    parser.add_argument("--rebuild", action="store_true", help="read all manifests again; jobs whose outputs went stay")
    parser.add_argument("--json", action="store_true", help="one JSON object: jobs, total, clients, models")
    parser.epilog = (
        "The success ratio is that of jobs that succeeded or failed, if only in part. Times are those of jobs that "
        "succeeded, from the start of the last attempt to the end; waiting is from acceptance to that start. Run it as "
        "imagend's user: it keeps what it read in history.db in the spool. exit status: 0 well, 74 disk trouble"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    if arguments.limit < 0:
        raise UsageError("--limit takes 0 (all) or more.")
    path = config.history or config.spool / history.FILE
    if arguments.rebuild and (aside := history.set_aside(path)):
        lost = f"the old history could not be used and lies at {aside}; jobs whose outputs went are in it only"
        print(f"imagend: {lost}", file=sys.stderr)
    database = history.look(path, config.outputs, arguments.rebuild)
    database.row_factory = sqlite3.Row
    with history.trouble(path):
        document = _document(database, arguments)
    print(json.dumps(document, indent=1) if arguments.json else "\n".join(_lines(document)))
    return 0


def _document(database: sqlite3.Connection, arguments: argparse.Namespace) -> dict[str, Any]:
    since = arguments.since.timestamp() if arguments.since else None
    values = {"client": arguments.client, "model": arguments.model, "since": since, "limit": arguments.limit or -1}
    values["kind"] = arguments.kind
    wanted = {"client": "client = :client", "model": "model = :model", "since": "ended_at >= :since"}
    wanted["kind"] = "kind = :kind"
    chosen = " AND ".join(["TRUE", *(sql for name, sql in wanted.items() if values[name] is not None)])
    listed = f"{chosen} AND outcome IN ('failed', 'partial')" if arguments.failed else chosen

    def figures(by: str) -> list[dict[str, Any]]:
        return [_rounded(row) for row in database.execute(_FIGURES.format(by=by, chosen=chosen), values)]

    jobs = [_rounded(row) for row in database.execute(_JOBS.format(chosen=listed), values)]
    total = [{key: value for key, value in row.items() if key != "name"} for row in figures("''")]
    return {
        "since": arguments.since.isoformat(timespec="seconds") if arguments.since else None,
        "jobs": jobs,
        "total": total[0] if total else None,
        "clients": figures("client"),
        "models": figures("model"),
    }


def _rounded(row: sqlite3.Row) -> dict[str, Any]:
    told = dict(row)
    moments = {key: _moment(told[key]) for key in _TIMES if key in told}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()} | moments


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _lines(document: dict[str, Any]) -> list[str]:
    if document["total"] is None:
        return ["no job has ended"]
    lines = [f"{'ended (UTC)':19}  {'job':37}  {'kind':10}  {'outcome':9}  {'took':>7}  {'waited':>7}  model"]
    for job in reversed(document["jobs"]):
        what = f"{job['kind'] or '-':10}  {job['outcome']:9}  {_span(job['seconds'])}  {_span(job['waited_seconds'])}"
        code = f"  {job['code']}" if job["code"] else ""
        name = f"{job['client']}/{job['id']}"
        lines.append(f"{job['ended_at'][:19].replace('T', ' ')}  {name:37}  {what}  {job['model'] or '-'}{code}")
    lines += _table("client", document["clients"])
    lines += _table("model", document["models"])
    return lines + _table("", [{"name": "all"} | document["total"]])


def _table(title: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(title), *(len(row["name"] or "-") for row in rows))
    heads = ("jobs", "succeeded", "partial", "failed", "cancelled", "success", "p50", "p95", "waited", "p95")
    lines = ["", f"{title:{width}}" + "".join(f"  {head:>9}" for head in heads)] if title else [""]
    for row in rows:
        ratio = "-" if row["success_ratio"] is None else f"{row['success_ratio']:.1%}"
        counts = [row["jobs"], row["succeeded"], row["partial"], row["failed"], row["cancelled"], ratio]
        times = [_span(row[f"{key}_{p}"]) for key in ("seconds", "waited_seconds") for p in ("p50", "p95")]
        lines.append(f"{row['name'] or '-':{width}}" + "".join(f"  {value:>9}" for value in counts + times))
    return lines


def _span(seconds: float | None) -> str:
    if seconds is None:
        return f"{'-':>7}"
    return f"{f'{seconds:.1f} s' if seconds < 9.95 else span(seconds):>7}"
