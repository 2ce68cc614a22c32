"""imagend top: what it shows, and that its keys do what the commands do. Driven by Textual's own pilot."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step
from test_cli import imagend

pytest.importorskip("textual", reason="needs Textual: pip install 'imagend[top]'")
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

from imagend.cli.top_screen import Sure, Top
from imagend.daemon.loop import Daemon
from imagend.spool import EVENTS, STATUS

MARKUP = "[red]x[/red]\x1b[2J"


class Screen:
    """The app under the pilot."""

    def __init__(self, app: Top, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    def rows(self, name: str) -> list[list[str]]:
        table = self.app.screen_stack[0].query_one(f"#of-{name}", DataTable)
        return [[str(cell) for cell in table.get_row_at(number)] for number in range(table.row_count)]

    def text(self, name: str) -> str:
        return str(self.app.screen_stack[0].query_one(f"#{name}", Static).content)

    def cursor(self, name: str) -> str:
        table = self.app.query_one(f"#of-{name}", DataTable)
        return str(table.get_row_at(table.cursor_row)[1])

    def said(self) -> list[str]:
        return [notification.message for notification in self.app._notifications]

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()


def drive(home: Home, use: Callable[[Screen], Awaitable[None]]) -> None:
    async def main() -> None:
        app = Top(home.config, home.root / "config.yaml")
        async with app.run_test(size=(140, 40)) as pilot:
            await pilot.pause()
            await use(Screen(app, pilot))

    asyncio.run(main())


def status(home: Home, **changes: Any) -> None:
    """A status as a daemon that lives leaves it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    document: dict[str, Any] = {
        "name": "studio",
        "version": "0.1.0",
        "state": "busy",
        "reasons": [],
        "interval_s": 60.0,
    }
    document |= {"heartbeat": now, "workers": {}, "queue": {"pending": 0, "active": 0, "head": []}}
    home.config.spool.mkdir(exist_ok=True)
    (home.config.spool / STATUS).write_text(json.dumps(document | changes))


def waiting(*ids: str) -> dict[str, Any]:
    head = [
        {"client": CLIENT, "id": id, "queue_position": place, "estimated_wait_seconds": 700.0}
        for place, id in enumerate(ids, 1)
    ]
    return {"pending": len(ids), "active": 1, "head": head}


# What it shows


def test_workers_and_queue(home: Home) -> None:
    worker = {"state": "busy", "device": "cuda:0", "job": "f" * 20, "client": "carol"}
    at = {"stage": "painting", "picture": 1, "pictures": 4, "step": 10, "steps": 20}
    workers = {
        "gpu0": worker | at | {"pipeline": {"model_loaded": "pony/v6"}},
        "gpu1": worker | {"stage": "model_loading"},
        "gpu2": {"state": "idle", "device": "cpu"},
    }
    gpu = {"index": 0, "name": "NVIDIA H100", "vram_total_mb": 81920, "vram_used_mb": 20480}
    gpu |= {"vram_free_mb": 61440, "temperature_c": 54, "utilization_percent": None}
    queue = waiting("a" * 20, "b" * 20)
    status(home, workers=workers, queue=queue, reasons=["no room"], gpu={"available": True, "devices": [gpu]})

    async def use(screen: Screen) -> None:
        first, second, third = screen.rows("workers")
        assert first[:6] == ["gpu0", "cuda:0", "busy", "pony/v6", f"carol/{'f' * 20}", "painting 2/4"]
        assert first[6].split() == ["█" * 9 + "░" * 15, "38%"]
        assert second[3:] == ["", f"carol/{'f' * 20}", "model loading", ""]
        assert third == ["gpu2", "cpu", "idle", "", "", "", ""]
        assert screen.rows("waiting") == [["1", f"alice/{'a' * 20}", "12 min"], ["2", f"alice/{'b' * 20}", "12 min"]]
        line, gpu, reason = screen.text("state").splitlines()
        assert line == "studio is busy   2 waiting, 1 running   imagend 0.1.0"
        assert gpu.split("  ")[1:] == ["NVIDIA H100", f"{'█' * 6}{'░' * 18} 20.0 of 80.0 GB, 54 °C"]
        assert reason == "! no room"

    drive(home, use)


def test_the_jobs_of_a_daemon(home: Home) -> None:
    well, failed = home.drop(prompt="a secret", count=2), home.drop(prompt="fail")
    daemon = home.daemon()
    run_until_idle(daemon)
    step(daemon)

    async def use(screen: Screen) -> None:
        results = {row[1]: row[2:] for row in screen.rows("results")}
        assert results.keys() == {str(well), str(failed)}
        assert results[str(well)][0] == "succeeded"
        assert results[str(failed)][0] == "failed INVALID_PARAMETERS"
        assert screen.text("figures").startswith("2 ended, 50.0% of them well")
        assert sum(screen.app.query_one("#ended", Sparkline).data or ()) == 2
        another = home.drop(nonce="another")
        run_until_idle(daemon)
        step(daemon)
        screen.app.look()
        assert screen.rows("results")[0][1] == str(another)
        assert "secret" not in str([screen.rows(name) for name in ("workers", "waiting", "results")])

    drive(home, use)


def test_without_a_daemon_it_names_the_next_step(home: Home) -> None:
    async def use(screen: Screen) -> None:
        assert "is not running. Start it: imagend serve" in screen.text("state")
        status(home)
        screen.app.look()
        assert screen.text("state").startswith("studio is busy")
        status(home, heartbeat="2020-01-01T00:00:00+00:00", workers={"gpu0": {"state": "idle", "device": "cpu"}})
        screen.app.look()
        assert "is not running" in screen.text("state")
        assert screen.rows("workers") == []

    drive(home, use)


def test_no_text_becomes_markup(home: Home) -> None:
    worker = {"state": MARKUP, "device": MARKUP, "job": MARKUP, "client": MARKUP, "stage": MARKUP}
    head = [{"client": MARKUP, "id": MARKUP, "queue_position": 1, "estimated_wait_seconds": None}]
    queue = {"pending": 1, "active": 1, "head": head}
    status(home, name=MARKUP, reasons=[MARKUP], workers={MARKUP: worker}, queue=queue)
    data = {"client": MARKUP, "id": MARKUP, "code": MARKUP}
    event = {"type": "imagend.failed", "time": datetime.now(UTC).isoformat(), "data": data}
    (home.config.spool / EVENTS).write_text(json.dumps(event) + "\n")

    async def use(screen: Screen) -> None:
        assert screen.rows("workers")[0][0] == "[red]x[/red]?[2J"
        assert "[/red]" in screen.rows("waiting")[0][1]
        assert "[/red]" in screen.rows("results")[0][2]
        assert "\x1b" not in screen.app.export_screenshot()
        assert "[red]x" in screen.app.export_screenshot().replace("&#160;", " ")

    drive(home, use)


def test_the_cursor_stays_on_its_job(home: Home) -> None:
    ids = [letter * 20 for letter in "abcdef"]
    status(home, queue=waiting(*ids))

    async def use(screen: Screen) -> None:
        screen.app.query_one("#of-waiting").focus()
        await screen.press("down", "down")
        assert screen.cursor("waiting") == f"alice/{ids[2]}"
        status(home, queue=waiting(*ids[1:]))
        screen.app.look()
        assert screen.cursor("waiting") == f"alice/{ids[2]}"
        status(home, queue=waiting(ids[5]))
        screen.app.look()
        assert screen.cursor("waiting") == f"alice/{ids[5]}"

    drive(home, use)


# Its keys


def busy(home: Home) -> Daemon:
    """A job that runs until it is cancelled, and one that waits behind it."""
    home.drop(prompt="stay", priority=9)
    home.drop(prompt="another")
    daemon = home.daemon(heartbeat_s=60.0)
    run_until(daemon, lambda: daemon.slots["cpu0"].running is not None and len(daemon.turn) == 1)
    daemon.health.write(daemon.clock(), daemon.state(), daemon.slots.values(), daemon.turn, daemon.doors)
    return daemon


@pytest.mark.parametrize("table", ["workers", "waiting"])
def test_cancel_asks_and_then_does_what_the_command_does(home: Home, table: str) -> None:
    daemon = busy(home)
    inbox = home.config.inboxes[0]

    async def use(screen: Screen) -> None:
        screen.app.query_one(f"#of-{table}").focus()
        row = screen.rows(table)[0]
        chosen = next(cell for cell in row if cell.startswith(f"{CLIENT}/"))
        for no in ("n", "escape"):
            await screen.press("c")
            assert isinstance(screen.app.screen, Sure)
            await screen.press(no)
            await screen.app.workers.wait_for_complete()
            assert not isinstance(screen.app.screen, Sure)
            assert list(inbox.iterdir()) == []
        await screen.press("c", "y")
        await screen.app.workers.wait_for_complete()
        assert screen.said() == [f"asked to cancel {chosen.partition('/')[2]}"]
        run_until(daemon, lambda: daemon.health.totals["cancelled"] == 1)
        assert (home.config.outputs / chosen / "manifest.json").exists()

    drive(home, use)


def test_an_operator_holds_releases_and_pauses(home: Home) -> None:
    daemon = busy(home)
    held = daemon.turn.head(1)[0]

    async def use(screen: Screen) -> None:
        screen.app.query_one("#of-waiting").focus()
        await screen.press("h", "y")
        await screen.app.workers.wait_for_complete()
        await screen.press("p", "y")
        await screen.app.workers.wait_for_complete()
        show(daemon)
        screen.app.look()
        assert ["-", str(held), "held"] in screen.rows("waiting")
        assert "paused" in screen.text("state")
        screen.app.query_one("#of-waiting", DataTable).move_cursor(row=len(screen.rows("waiting")) - 1)
        await screen.press("r", "y")
        await screen.app.workers.wait_for_complete()
        await screen.press("p", "y")
        await screen.app.workers.wait_for_complete()
        show(daemon)
        screen.app.look()
        assert ["-", str(held), "held"] not in screen.rows("waiting")
        assert "paused" not in screen.text("state")

    drive(home, use)
    assert held in daemon.turn.head(9)


def show(daemon: Daemon) -> None:
    daemon.health._written = float("-inf")
    daemon.look_around()


def test_an_operator_cancels_anothers_job(home: Home) -> None:
    """Whether she is one, the daemon says."""
    queue = waiting("a" * 20)
    queue["head"][0]["client"] = "bob"
    status(home, queue=queue)

    async def use(screen: Screen) -> None:
        screen.app.query_one("#of-waiting").focus()
        await screen.press("c", "y")
        await screen.app.workers.wait_for_complete()
        (wish,) = home.config.inboxes[0].iterdir()
        fields = json.loads(wish.read_bytes())
        assert (fields["kind"], fields["job"], fields["client"]) == ("cancel", "a" * 20, "bob")

    drive(home, use)


def test_cancel_without_a_job_or_a_key_says_why(home: Home) -> None:
    status(home, workers={"gpu0": {"state": "idle", "device": "cpu"}}, queue=waiting("a" * 20))
    home.config.client.key.unlink()

    async def use(screen: Screen) -> None:
        for name in ("results", "workers"):
            screen.app.query_one(f"#of-{name}").focus()
            await screen.press("c")
            await screen.app.workers.wait_for_complete()
        assert screen.said() == ["Choose a job that runs or waits."] * 2
        screen.app.query_one("#of-waiting").focus()
        await screen.press("c", "y")
        await screen.app.workers.wait_for_complete()
        assert "Make a key with `imagend init`" in screen.said()[-1]

    drive(home, use)


def test_q_ends_it(home: Home) -> None:
    async def use(screen: Screen) -> None:
        await screen.press("q")
        assert not screen.app.is_running

    drive(home, use)


# The command


def test_without_a_terminal_or_without_textual_it_says_what_to_do(home: Home) -> None:
    done = imagend("top", cwd=home.root)
    assert (done.returncode, done.stdout) == (64, "")
    assert "imagend status --json" in done.stderr
    program = "import sys; sys.modules['textual'] = None; from imagend.cli import run; sys.exit(run(['top']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=home.root, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "pip install 'imagend[top]'" in done.stderr
