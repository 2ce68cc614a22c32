"""dashboard.html: status.json and what ended of late as one page, which needs no server and runs no script.

A thread of its own that reads what the daemon has written for all to read: it can delay no job, and knows no prompt.
What is in it is escaped, whoever wrote it. Pictures are links: a reader sees those whose files he may read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import structlog

from imagend import __version__, files
from imagend.config import Config
from imagend.daemon.plots import bars, dots, progress
from imagend.job import Outcome, Ref
from imagend.lanes import Lane
from imagend.live import BUCKET_S, BUCKETS, End, Recent, percentile
from imagend.outputs import MANIFEST
from imagend.spool import EVENTS, STALE_INTERVALS, STATUS

log = structlog.get_logger()

FILE = "dashboard.html"
PERIOD_S = 5.0
_RELOAD_S = 10
_POLICY = "img-src 'self' file:; base-uri 'none'; form-action 'none'"
_ROWS = 15
_PICTURES = 10
_LOOKED_FOR = 50


class Dashboard:
    def __init__(self, config: Config) -> None:
        self._path = config.dashboard or config.spool / FILE
        self._status = config.spool / STATUS
        self._links = Links(config.outputs, self._path.parent)
        self._recent = Recent(config.spool / EVENTS)
        self._told: str | None = None
        self._stopping = threading.Event()

    def serve(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            self.write()

    def stop(self, thread: threading.Thread) -> None:
        """The last page says that the daemon has stopped."""
        self._stopping.set()
        thread.join(PERIOD_S)
        if not thread.is_alive():
            self.write()

    def write(self) -> None:
        """Replace the page. Never fails: what a full disk refuses grows old, which its time tells."""
        try:
            status = json.loads(self._status.read_bytes())
            if status.get("version") != __version__:  # an older daemon's; ours is about to write its own
                return
            self._recent.look()
            page = render(status, self._recent, self._links, datetime.now(UTC))
            files.replace_hint(self._path, page.encode())
            self._told = None
        except FileNotFoundError as error:
            self._trouble(f"{error.filename}: there is no such file or folder")
        except OSError as error:
            self._trouble(str(error.strerror))

    def _trouble(self, why: str) -> None:
        if why != self._told:
            log.warning("the dashboard cannot be written", path=str(self._path), why=why)
        self._told = why


class Links:
    """From a page in `folder` to files of results."""

    def __init__(self, outputs: Path, folder: Path) -> None:
        self._outputs, self._way = outputs, quote(os.path.relpath(outputs, folder))

    def to(self, ref: Ref, file: str) -> str | None:
        """As an attribute has it; None if the file has gone: results are not kept for ever."""
        if not files.exists(f"{self._outputs}/{ref.client}/{ref.id}/{file}"):
            return None
        return escape("/".join((self._way, *(quote(part) for part in (*ref, file)))))


def render(status: dict[str, Any], recent: Recent, links: Links, now: datetime) -> str:
    """The page."""
    style = resources.files(__package__).joinpath("dashboard.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; {_POLICY}"
    name, state = escape(str(status["name"])), escape(str(status["state"]))
    limit = STALE_INTERVALS * float(status["interval_s"]) + PERIOD_S + _RELOAD_S
    counts = recent.by_time(now)
    body = "\n".join(
        [
            *_notices(status),
            *_tiles(status, recent, counts),
            _section("Workers", _workers(status["workers"])),
            *_gpus(status["gpu"].get("devices", ())),
            _section("Ended in each half hour of the last day", _throughput(counts, now), "half"),
            _section("Time that the last jobs took", _durations(recent), "half"),
            _section("Pictures", _pictures(recent.latest, links)),
            _section("Ended", _ended(recent.latest, links)),
            _section("Waiting", _queue(status["queue"])),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta http-equiv="refresh" content="{_RELOAD_S}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name}: {state}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><span class="state {state}">{state}</span>
<span class="soft">{_moment(status["heartbeat"])} UTC · imagend {escape(str(status["version"]))}
· when this time is more than {limit:.0f} s ago, the daemon is dead</span></header>
<main>
{body}
</main>
</body>
</html>
"""


def _section(title: str, content: str, css: str = "") -> str:
    return f'<section class="{css}"><h2>{title}</h2>{content}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], none: str) -> str:
    """Cells are HTML."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>" if lines else f'<p class="soft">{none}</p>'


def _notices(status: dict[str, Any]) -> Iterator[str]:
    def listed(title: str, lines: Sequence[str]) -> Iterator[str]:
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            yield _section(title, f"<ul>{items}</ul>", "notice")

    queue = status["queue"]
    paused = {"all jobs": queue["paused"]} if queue.get("paused") else {}
    paused |= {f"jobs of {client}": pause for client, pause in queue["paused_clients"].items()}
    yield from listed("Needs the operator", status["reasons"])
    yield from listed("Paused", [f"{whose}: {pause['reason']}".removesuffix(": ") for whose, pause in paused.items()])


def _tiles(status: dict[str, Any], recent: Recent, counts: Sequence[Counter[Outcome]]) -> Iterator[str]:
    day: Counter[Outcome] = sum(counts, Counter())
    judged = sum(day[outcome] for outcome in (Outcome.SUCCEEDED, Outcome.PARTIAL, Outcome.FAILED))
    ratio = f"{day[Outcome.SUCCEEDED] / judged:.1%}" if judged else "-"
    seconds = recent.seconds()
    middle, late = percentile(seconds, 50), percentile(seconds, 95)
    queue = status["queue"]
    for title, value, note in (
        ("Waiting", str(queue["pending"]), f"clients: {len(queue['per_client'])}, held: {queue['held']}"),
        ("Running", str(queue["active"]), f"workers: {len(status['workers'])}"),
        ("Ended", str(day.total()), "in the last day"),
        ("Success", ratio, f"{day[Outcome.FAILED]} failed"),
        ("Median", "-" if middle is None else f"{middle:.1f} s", f"of the last {len(seconds)}"),
        ("95 %", "-" if late is None else f"{late:.1f} s", "took no longer"),
    ):
        yield _section(title, f"<b>{value}</b><small>{note}</small>", "tile")


def _workers(workers: dict[str, Any]) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name, worker in workers.items():
            job, steps = "", ""
            if "job" in worker:
                job = _job(Ref(worker["client"], worker["job"]))
                of = f" {worker['picture'] + 1}/{worker['pictures']}" if worker.get("pictures") else ""
                steps = escape(f"{worker.get('stage', 'starting')}{of}").replace("_", " ")
            model = (worker.get("pipeline") or {}).get("model_loaded") or ""
            bar = progress(_done(worker)) if worker.get("steps") or worker.get("bytes_total") else ""
            yield escape(name), escape(worker["device"]), escape(worker["state"]), escape(model), job, steps, bar

    return _table(("worker", "device", "state", "model", "job", "stage", ""), rows(), "there is none")


def _done(worker: dict[str, Any]) -> float:
    """The part of its job that a worker has done."""
    if worker.get("bytes_total"):
        return float(worker["bytes_done"] / worker["bytes_total"])
    if "progress" in worker:  # of a chain
        return float(worker["progress"])
    return float((worker["picture"] + worker["step"] / worker["steps"]) / max(1, worker["pictures"]))


def _gpus(devices: Sequence[dict[str, Any]]) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for gpu in devices:
            used, total = gpu["vram_used_mb"], gpu["vram_total_mb"]
            memory = f"{used / 1024:.1f} of {total / 1024:.1f} GB"
            told = [gpu.get("temperature_c"), gpu.get("utilization_percent")]
            heat, load = ("" if value is None else f"{value}" for value in told)
            yield str(gpu["index"]), escape(gpu["name"]), progress(used / total), memory, heat, load

    if devices:
        yield _section("GPUs", _table(("GPU", "", "memory", "", "°C", "% busy"), rows(), ""))


def _throughput(counts: Sequence[Counter[Outcome]], now: datetime) -> str:
    last = int(now.timestamp() // BUCKET_S)
    begins = [datetime.fromtimestamp((last - BUCKETS + 1 + index) * BUCKET_S, UTC) for index in range(len(counts))]
    words = [
        f"{begin:%H:%M}: " + ", ".join(f"{count[outcome]} {outcome}" for outcome in Outcome)
        for begin, count in zip(begins, counts, strict=True)
    ]
    return bars(counts, words, f"{begins[0]:%H:%M} UTC", f"{begins[-1] + timedelta(seconds=BUCKET_S):%H:%M}")


def _durations(recent: Recent) -> str:
    seconds, latest = recent.seconds(), recent.latest
    middle = percentile(seconds, 50)
    if middle is None:
        return '<p class="soft">no job has succeeded yet</p>'
    return dots(seconds, middle, f"{latest[0].at:%H:%M} UTC", f"{latest[-1].at:%H:%M}")


def _queue(queue: dict[str, Any]) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for entry in queue["head"]:
            wait = entry["estimated_wait_seconds"]
            about = "not known yet" if wait is None else f"{wait:.0f} s" if wait < 600 else f"{wait / 60:.0f} min"
            lane = "" if entry.get("lane", Lane.PAINT) == Lane.PAINT else f"{entry['lane']} "
            yield f"{lane}{entry['queue_position']}", _job(Ref(entry["client"], entry["id"])), about
        for entry in queue["passed_over"]:
            why = "held" if entry["waits_for"] == "release" else "its client is paused"
            yield "-", _job(Ref(entry["client"], entry["id"])), why

    shown = list(islice(rows(), _ROWS))
    if queue["pending"] > len(shown):
        shown.append(("", f"and {queue['pending'] - len(shown)} more", ""))
    return _table(("place", "job", "about"), shown, "nothing waits")


def _ended(latest: Sequence[End], links: Links) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for end in list(latest)[: -_ROWS - 1 : -1]:
            outcome = f'<span class="{end.outcome}">{end.outcome} {escape(end.code)}</span>'
            took = "" if end.seconds is None else f"{end.seconds:.1f} s"
            job = _link(links.to(end.ref, MANIFEST), _job(end.ref))
            shown = (_link(links.to(end.ref, file), f"{number}") for number, file in enumerate(end.pictures, 1))
            yield f"{end.at:%H:%M:%S}", job, outcome, escape(end.kind), escape(end.model), took, " ".join(shown)

    return _table(("ended (UTC)", "job", "", "kind", "model", "took", "pictures"), rows(), "nothing yet")


def _pictures(latest: Sequence[End], links: Links) -> str:
    """The pictures themselves, small: the browser scales them, and loads those that are looked at."""
    made = ((end.ref, file) for end in reversed(latest) for file in end.pictures if file.endswith(".png"))
    shown: list[str] = []
    for ref, file in islice(made, _LOOKED_FOR):
        if len(shown) < _PICTURES and (url := links.to(ref, file)):
            what = escape(f"{ref} {file}")
            shown.append(f'<a href="{url}" title="{what}"><img src="{url}" alt="{what}" loading="lazy"></a>')
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else '<p class="soft">there are none</p>'


def _link(url: str | None, html: str) -> str:
    return html if url is None else f'<a href="{url}">{html}</a>'


def _job(ref: Ref) -> str:
    return f"<code>{escape(str(ref))}</code>"


def _moment(text: str) -> str:
    return escape(f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S}")
