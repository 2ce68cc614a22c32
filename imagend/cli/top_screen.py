"""The screen of `imagend top`, by Textual: status.json and the live feed, looked at again and again. It changes nothing
itself: a key runs the command of the same name.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, Sparkline, Static

from imagend.cli.look import daemon_alive, read, shown, span
from imagend.config import Config
from imagend.job import Outcome
from imagend.lanes import Lane
from imagend.live import End, Recent, percentile
from imagend.spool import EVENTS, STATUS

_PERIOD_S = 0.5
_RESULTS = 50
_BAR = 24
_PIPE = asyncio.subprocess.PIPE
_ALIVE = ("of-workers", "of-waiting")
_TITLES = {
    "workers": "Workers",
    "throughput": "Ended in each half hour of the last day",
    "figures": "Last day",
    "waiting": "Waiting",
    "results": "Ended (UTC)",
}
_HEADS = {
    "of-workers": ("worker", "device", "state", "model", "job", "stage", "done"),
    "of-waiting": ("place", "job", "about"),
    "of-results": ("ended", "job", "outcome", "took"),
}
_COLOURS = {"succeeded": "green", "partial": "yellow", "failed": "red", "cancelled": "dim"}
Row = tuple[Text, ...]
Table = DataTable[Text]


class Sure(ModalScreen[bool]):
    """Yes or no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape", "dismiss(False)", "No"),
    ]
    DEFAULT_CSS = "Sure { align: center middle; } Sure Label { padding: 1 3; border: round $accent; }"

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Label(f"{shown(self._question)}  y / n", markup=False)


class Top(App[None]):
    TITLE = "imagend"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("c", "order('cancel')", "Cancel job"),
        Binding("h", "order('hold')", "Hold"),
        Binding("r", "order('release')", "Release"),
        Binding("p", "pause", "Pause/resume all"),
        Binding("tab", "app.focus_next", "Next table"),
    ]
    CSS = """
    #state { height: auto; padding: 0 1; }
    .box { border: round $primary; padding: 0 1; }
    #workers { height: auto; max-height: 40%; }
    #middle { height: 6; }
    Sparkline { height: 1fr; }
    #figures { width: 34; height: 100%; }
    #lower { height: 1fr; }
    DataTable { height: 1fr; }
    #workers DataTable { height: auto; }
    """

    def __init__(self, config: Config, path: Path) -> None:
        super().__init__()
        self._config, self._path = config, path
        self._recent = Recent(config.spool / EVENTS)
        self._shown: dict[str, list[tuple[str, Row]]] = {}

    def compose(self) -> ComposeResult:
        yield Static(id="state", markup=False)
        with Vertical(id="workers", classes="box"):
            yield Table(id="of-workers", cursor_type="row")
        with Horizontal(id="middle"):
            with Vertical(classes="box", id="throughput"):
                yield Sparkline([0], id="ended")
            yield Static(id="figures", classes="box")
        with Horizontal(id="lower"):
            with Vertical(classes="box", id="waiting"):
                yield Table(id="of-waiting", cursor_type="row")
            with Vertical(classes="box", id="results"):
                yield Table(id="of-results", cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        for name, title in _TITLES.items():
            self.query_one(f"#{name}").border_title = title
        for name, heads in _HEADS.items():
            self._table(name).add_columns(*heads)
        self.look()
        self.set_interval(_PERIOD_S, self.look)

    def look(self) -> None:
        """Show what is."""
        status = read(self._config.spool / STATUS)
        self._recent.look()
        alive = daemon_alive(status)
        self.query_one("#state", Static).update(_headline(status, alive, self._config.spool))
        workers = status.get("workers", {}) if alive else {}
        self._fill("of-workers", [(_job(worker) or name, _worker(name, worker)) for name, worker in workers.items()])
        head = status.get("queue", {}).get("head", ())
        passed = status.get("queue", {}).get("passed_over", ())
        waiting = [(f"{job['client']}/{job['id']}", _waiting(job)) for job in head]
        waiting += [(f"{job['client']}/{job['id']}", _passed_over(job)) for job in passed]
        self._fill("of-waiting", waiting)
        latest = list(self._recent.latest)[: -_RESULTS - 1 : -1]
        self._fill("of-results", [(f"{end.ref} {end.at}", _result(end)) for end in latest])
        counts = self._recent.by_time(datetime.now(UTC))
        self.query_one("#ended", Sparkline).data = [float(count.total()) for count in counts]
        self.query_one("#figures", Static).update(_figures(sum(counts, Counter()), self._recent))

    def _table(self, name: str) -> Table:
        return self.query_one(f"#{name}", DataTable)

    def _fill(self, name: str, rows: list[tuple[str, Row]]) -> None:
        """The cursor stays on its job, wherever that has gone."""
        if rows == self._shown.get(name):
            return
        table, chosen = self._table(name), self._chosen(name)
        table.clear()
        for _, row in rows:
            table.add_row(*row)
        self._shown[name] = rows
        keys = [key for key, _ in rows]
        if chosen in keys:
            table.move_cursor(row=keys.index(chosen))

    def _chosen(self, name: str) -> str | None:
        """The key of the row under a table's cursor."""
        rows, row = self._shown.get(name, []), self._table(name).cursor_row
        return rows[row][0] if 0 <= row < len(rows) else None

    @work
    async def action_order(self, verb: str) -> None:
        """Cancel, hold or release the job under the cursor, if that is sure."""
        name = self.focused.id if isinstance(self.focused, DataTable) else None
        client, _, job = (self._chosen(name) or "" if name in _ALIVE else "").partition("/")
        if not job:
            self.notify("Choose a job that runs or waits.", severity="warning")
        elif await self.push_screen_wait(Sure(f"{verb.capitalize()} {client}/{job}?")):
            await self._run(verb, *([job, "--client", client] if verb == "cancel" else [f"{client}/{job}"]))

    @work
    async def action_pause(self) -> None:
        """Pause all, or resume what is paused for all, if that is sure."""
        paused = read(self._config.spool / STATUS).get("queue", {}).get("paused")
        verb = "resume" if paused else "pause"
        if await self.push_screen_wait(Sure(f"{verb.capitalize()} all jobs?")):
            await self._run(verb)

    async def _run(self, *words: str) -> None:
        """As the command does it, and with its rights."""
        command = [sys.executable, "-m", "imagend", *words, "--config", str(self._path)]
        process = await asyncio.create_subprocess_exec(*command, stdout=_PIPE, stderr=_PIPE)
        out, err = await process.communicate()
        said = (err if process.returncode else out).decode().strip()
        self.notify(shown(said), severity="error" if process.returncode else "information", markup=False)


def _text(text: str, style: str = "") -> Text:
    """No markup, and nothing that controls a terminal."""
    return Text(shown(text), style)


def _headline(status: dict[str, Any], alive: bool, spool: Path) -> Text:
    if not alive:
        return _text(f"The daemon of {spool} is not running. Start it: imagend serve", "bold red")
    queue, state = status["queue"], status["state"]
    well = "bold red" if status["reasons"] else "bold green"
    state = f"{state}, paused" if queue.get("paused") else state
    counts = f"   {queue['pending']} waiting, {queue['active']} running   imagend {status['version']}"
    line = Text.assemble(_text(status["name"], "bold"), " is ", _text(state, well), _text(counts))
    gpus = [_text(_gpu(gpu)) for gpu in status.get("gpu", {}).get("devices", ())]
    return Text("\n").join([line, *gpus, *(_text(f"! {reason}", "red") for reason in status["reasons"])])


def _gpu(gpu: dict[str, Any]) -> str:
    used, total = gpu["vram_used_mb"] / 1024, gpu["vram_total_mb"] / 1024
    told = (("{} °C", gpu.get("temperature_c")), ("{} % busy", gpu.get("utilization_percent")))
    more = "".join(f", {words.format(value)}" for words, value in told if value is not None)
    return f"GPU {gpu['index']}  {gpu['name']}  {_bar(used / total)} {used:.1f} of {total:.1f} GB{more}"


def _job(worker: dict[str, Any]) -> str:
    return f"{worker['client']}/{worker['job']}" if "job" in worker else ""


def _worker(name: str, worker: dict[str, Any]) -> Row:
    stage = bar = Text()
    if "job" in worker:
        of = f" {worker['picture'] + 1}/{worker['pictures']}" if worker.get("pictures") else ""
        stage = _text(str(worker.get("stage", "starting")).replace("_", " ") + of)
    if worker.get("steps"):
        done = (worker["picture"] + worker["step"] / worker["steps"]) / max(1, worker["pictures"])
        done = worker.get("progress", done)  # of a chain
        bar = Text(f"{_bar(done)} {done:4.0%}", "green")
    if worker.get("bytes_total"):
        done = worker["bytes_done"] / worker["bytes_total"]
        bar = Text(f"{_bar(done)} {done:4.0%}", "green")
    model = (worker.get("pipeline") or {}).get("model_loaded") or ""
    cells = (name, worker["device"], worker["state"], model, _job(worker))
    return (*map(_text, cells), stage, bar)


def _bar(done: float) -> str:
    full = round(_BAR * min(1.0, max(0.0, done)))
    return "█" * full + "░" * (_BAR - full)


def _waiting(job: dict[str, Any]) -> Row:
    wait = job["estimated_wait_seconds"]
    about = "not known yet" if wait is None else span(wait)
    lane = "" if job.get("lane", Lane.PAINT) == Lane.PAINT else f"{job['lane']} "
    return (_text(f"{lane}{job['queue_position']}"), _text(f"{job['client']}/{job['id']}"), _text(about))


def _passed_over(job: dict[str, Any]) -> Row:
    why = "held" if job["waits_for"] == "release" else "its client is paused"
    return (_text("-"), _text(f"{job['client']}/{job['id']}"), _text(why))


def _result(end: End) -> Row:
    outcome = _text(f"{end.outcome} {end.code}".rstrip(), _COLOURS[end.outcome])
    return (_text(f"{end.at:%H:%M:%S}"), _text(str(end.ref)), outcome, _text(_seconds(end.seconds)))


def _figures(day: Counter[Outcome], recent: Recent) -> Text:
    judged = sum(day[outcome] for outcome in (Outcome.SUCCEEDED, Outcome.PARTIAL, Outcome.FAILED))
    ratio = f"{day[Outcome.SUCCEEDED] / judged:.1%}" if judged else "-"
    seconds = recent.seconds()
    middle, late = (_seconds(percentile(seconds, percent)) for percent in (50, 95))
    return Text(f"{day.total()} ended, {ratio} of them well\nhalf of them within {middle}\n95 % of them within {late}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
