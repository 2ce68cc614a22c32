"""dashboard.html: what it shows, that it shows it to a browser, and that nobody's text becomes markup."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import structlog
from conftest import CLIENT, Home, run_until_idle, step

from imagend import __version__, files, live
from imagend import config as configuration
from imagend.config import Config
from imagend.daemon import dashboard
from imagend.daemon.dashboard import FILE, Dashboard
from imagend.daemon.executor import StopRequested
from imagend.job import Outcome
from imagend.live import Follower, Recent
from imagend.outputs import MANIFEST
from imagend.spool import EVENTS, STATUS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "link"}
MARKUP = "\"><img src=x onerror=alert(1)><script>alert(1)</script>&amp;'"


class Tag(NamedTuple):
    name: str
    attributes: dict[str, str | None]
    within: tuple[str, ...]


class Page(HTMLParser):
    """A page whose tags are balanced: its tags and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.text, self.open = "", list[str]()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, dict(attrs), tuple(self.open)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += f"{data} "

    def all(self, name: str, css: str | None = None) -> list[Tag]:
        return [tag for tag in self.tags if tag.name == name and css in (None, tag.attributes.get("class"))]

    def targets(self) -> list[str]:
        return [
            unquote(str(tag.attributes[key])) for tag in self.tags for key in ("href", "src") if key in tag.attributes
        ]


def page(home: Home) -> Page:
    Dashboard(home.config).write()
    return Page(home.config.spool / FILE)


class Told:
    """A feed and a status as a daemon leaves them, with whatever words."""

    def __init__(self, config: Config) -> None:
        self.config, self.now = config, datetime.now(UTC)
        config.spool.mkdir(parents=True, exist_ok=True)
        self.status: dict[str, Any] = {"name": "studio", "version": __version__, "state": "busy", "reasons": []}
        self.status |= {"heartbeat": self.now.isoformat(timespec="milliseconds"), "interval_s": 5.0}
        self.status |= {"gpu": {"available": False, "devices": []}}
        self.status |= {"queue": self.queue(), "workers": {}}

    def queue(self, **changes: Any) -> dict[str, Any]:
        nobody: dict[str, Any] = {"head": [], "passed_over": []}
        return {"pending": 0, "active": 0, "per_client": {}, "paused_clients": {}, "held": 0} | nobody | changes

    def happens(self, word: str, ago_s: float = 0.0, **data: Any) -> None:
        at = (self.now - timedelta(seconds=ago_s)).isoformat(timespec="milliseconds")
        event = {"type": f"imagend.{word}", "time": at, "data": {"client": CLIENT, "id": "0" * 20} | data}
        with (self.config.spool / EVENTS).open("a") as file:
            file.write(json.dumps(event) + "\n")

    def paint(self, client: str = CLIENT, id: str = "0" * 20, file: str = "0000.png", data: bytes = b"") -> None:
        """A picture of a job that then ends."""
        folder = self.config.outputs / client / id
        for path in (folder / file, folder / MANIFEST):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.happens("artifact.written", client=client, id=id, file=file)
        self.happens("completed", client=client, id=id, kind="generate", seconds=3.0)

    def page(self) -> Page:
        (self.config.spool / STATUS).write_text(json.dumps(self.status))
        Dashboard(self.config).write()
        return Page(self.config.spool / FILE)


@pytest.fixture
def told(home: Home) -> Told:
    return Told(home.config)


# What it shows


def test_the_life_of_a_daemon(home: Home) -> None:
    well, failed = home.drop(prompt="a secret", label="a secret", count=2), home.drop(prompt="fail")
    home.drop(prompt="stay", priority=1)
    waiting = home.drop(prompt="stay", priority=0)
    daemon = home.daemon()
    while sum(daemon.health.totals.values()) < 2 or daemon.ending.untidied or daemon.slots["cpu0"].running is None:
        step(daemon)
    daemon.health.write(daemon.clock(), daemon.state(), daemon.slots.values(), daemon.turn, daemon.doors)
    daemon.health.events.write(daemon.clock(), at_once=True)
    shown = page(home)
    assert str(waiting) in shown.text
    assert "50.0%" in shown.text
    assert home.manifest(failed)["error"]["code"] in shown.text
    folder = f"../outputs/{well.client}/{well.id}"
    assert {f"{folder}/{name}" for name in ("manifest.json", "0000.png", "0001.png")} <= set(shown.targets())
    assert all((home.config.spool / target).is_file() for target in shown.targets())
    assert [tag.attributes["class"] for tag in shown.all("rect")] == ["succeeded", "failed"]
    assert len(shown.all("circle", "done")) == 1
    assert len(shown.all("img")) == 2
    assert "secret" not in (home.config.spool / FILE).read_text()
    daemon.mailbox.put(StopRequested())
    daemon.run()
    assert page(home).all("span", "state stopped")


def test_a_queue_a_worker_and_what_needs_the_operator(told: Told) -> None:
    ids = [f"{number:020x}" for number in range(40)]
    head = [
        {"client": "bob", "id": id, "queue_position": place, "estimated_wait_seconds": None if place == 1 else 700.0}
        for place, id in enumerate(ids, 1)
    ]
    told.status["queue"] = told.queue(pending=1234, active=1, per_client={"bob": 1234}, held=3, head=head)
    told.status["queue"] |= {"paused": {"at": "", "reason": "a new disk"}, "paused_clients": {"eve": {"reason": ""}}}
    told.status["reasons"] = ["less than 500 MB are free"]
    worker = {"state": "busy", "device": "cuda:0", "job": "f" * 20, "client": "carol", "stage": "model_loading"}
    at = {"picture": 1, "pictures": 4, "step": 10, "steps": 20}
    pipeline = {"pipeline": {"model_loaded": "pony/v6"}}
    told.status["workers"] = {"gpu0": worker | {"stage": "painting"} | at | pipeline, "gpu1": worker}
    gpu = {"index": 0, "name": "NVIDIA H100", "vram_total_mb": 81920, "vram_used_mb": 20480, "vram_free_mb": 61440}
    told.status["gpu"]["devices"] = [gpu | {"temperature_c": 54, "utilization_percent": None}]
    shown = told.page()
    words = re.sub(r"\s+", " ", shown.text)
    for text in (f"1 bob/{ids[0]} not known yet", f"2 bob/{ids[1]} 12 min", f"15 bob/{ids[14]}", "and 1219 more"):
        assert text in words
    assert ids[15] not in words
    assert f"gpu0 cuda:0 busy pony/v6 carol/{'f' * 20} painting 2/4" in words
    assert "0 NVIDIA H100 20.0 of 80.0 GB 54" in words
    assert f"gpu1 cuda:0 busy carol/{'f' * 20} model loading" in words
    widths = [tag.attributes["width"] for tag in shown.all("rect", "done")]
    assert widths == ["60", "40"]  # of 160: one and a half of four pictures, a quarter of the memory
    assert "less than 500 MB are free" in words
    assert len(shown.all("section", "notice")) == 2
    assert "Paused all jobs: a new disk jobs of eve Waiting 1234 clients: 1, held: 3" in words


def test_jobs_that_an_operator_passes_over(told: Told) -> None:
    passed = [
        {"client": "bob", "id": "a" * 20, "waits_for": "release"},
        {"client": "eve", "id": "b" * 20, "waits_for": "resume"},
    ]
    told.status["queue"] = told.queue(pending=3, passed_over=passed)
    words = re.sub(r"\s+", " ", told.page().text)
    assert f"- bob/{'a' * 20} held - eve/{'b' * 20} its client is paused and 1 more" in words


def test_ends_are_counted_by_half_hours_of_the_last_day(told: Told) -> None:
    for ago_h, word in [(30, "completed"), (25, "failed"), (20, "completed"), (20, "failed"), (0, "completed")]:
        told.happens(word, ago_s=ago_h * 3600, seconds=2.0 * ago_h)
    shown = told.page()
    assert [tag.attributes["class"] for tag in shown.all("rect")] == ["succeeded", "failed", "succeeded"]
    assert "66.7%" in shown.text
    heights = [float(tag.attributes["height"] or 0) for tag in shown.all("rect")]
    assert heights == [65.0, 65.0, 65.0]  # half of the room each: two in one half hour are the most
    assert len(shown.all("circle")) == 3  # of those that succeeded


def test_before_the_first_job(told: Told) -> None:
    shown = told.page()
    assert shown.all("circle") == shown.all("rect") == shown.all("img") == []
    for text in ("nothing waits", "there are none", "no job has succeeded yet"):
        assert text in shown.text


def test_what_has_been_removed_is_not_linked(told: Told) -> None:
    for number in range(3):
        told.paint(id=f"{number:020x}")
    shutil.rmtree(told.config.outputs / CLIENT / f"{1:020x}")
    shown = told.page()
    left = {f"../outputs/{CLIENT}/{number:020x}/{name}" for number in (0, 2) for name in (MANIFEST, "0000.png")}
    assert {*shown.targets()} == left
    assert len(shown.all("img")) == 2
    assert f"{1:020x}" in shown.text


def test_it_is_bounded_however_much_happens(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MAX_UNFINISHED", 10)
    for number in range(1000):
        told.happens("artifact.written", id=f"{number:020x}", file="0000.png")
        if number % 2:
            told.paint(id=f"{number:020x}")
    shown = told.page()
    assert len(shown.all("circle")) == live.LATEST
    assert len(shown.all("img")) == 10
    assert (told.config.spool / FILE).stat().st_size < 100_000


# Who may read it


def test_no_text_becomes_markup(told: Told) -> None:
    job = {"client": MARKUP, "id": MARKUP}
    told.paint(**job, file=f"{MARKUP}.png")
    told.happens("completed", **job, kind=MARKUP, model=MARKUP, seconds=1.0)
    told.happens("failed", **job, code=MARKUP)
    told.status |= {"name": MARKUP, "state": MARKUP, "reasons": [MARKUP]}
    head = [job | {"queue_position": 1, "estimated_wait_seconds": 1.0}]
    paused = {"paused": {"reason": MARKUP}, "paused_clients": {MARKUP: {"reason": MARKUP}}}
    told.status["queue"] = told.queue(pending=1, active=1, per_client={MARKUP: 1}, head=head, **paused)
    worker = {"state": MARKUP, "device": MARKUP, "job": MARKUP, "client": MARKUP, "stage": MARKUP}
    worker |= {"pipeline": {"model_loaded": MARKUP}}
    gpu = {"index": 0, "name": MARKUP, "vram_total_mb": 2, "vram_used_mb": 1}
    told.status["gpu"]["devices"] = [gpu]
    told.status["workers"] = {MARKUP: worker}
    shown = told.page()
    assert shown.text.count(MARKUP) > 10
    assert not shown.all("script")
    assert all(not name.startswith("on") and name != "style" for tag in shown.tags for name in tag.attributes)
    assert {*shown.targets()} == {f"../outputs/{MARKUP}/{MARKUP}/{name}" for name in (MANIFEST, f"{MARKUP}.png")}
    assert len(shown.all("img")) == 1


def test_it_may_run_nothing_and_load_nothing_but_pictures(told: Told) -> None:
    told.paint()
    shown = told.page()
    policies = {tag.attributes.get("http-equiv"): tag.attributes.get("content") for tag in shown.all("meta")}
    style = re.findall(r"<style>(.*?)</style>", (told.config.spool / FILE).read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert policies["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self' file:; base-uri 'none'; form-action 'none'"
    )
    assert len(style) == 1
    assert len(shown.targets()) == 4
    assert all(target.startswith("../outputs/") for target in shown.targets())
    assert not {tag.name for tag in shown.tags} & {"script", "link", "iframe", "object", "form", "base"}


# Where it lies, and disks that refuse


def test_it_lies_where_config_yaml_says(home: Home) -> None:
    with (home.root / "config.yaml").open("a") as file:
        file.write("dashboard: outputs/index.html\n")
    config = configuration.load(home.root / "config.yaml")
    config.outputs.mkdir()
    told = Told(config)
    told.paint(id="1" * 20)
    (config.spool / STATUS).write_text(json.dumps(told.status))
    Dashboard(config).write()
    folder = f"./{CLIENT}/{'1' * 20}"
    assert {*Page(config.outputs / "index.html").targets()} == {f"{folder}/0000.png", f"{folder}/manifest.json"}


def test_a_disk_that_refuses_is_told_once_and_costs_the_page_only(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Dashboard(told.config)
    with structlog.testing.capture_logs() as log:
        painter.write()  # no status yet
        (told.config.spool / STATUS).write_text(json.dumps(told.status))

        def full(path: Path, data: bytes, mode: int = 0o644) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace_hint", full)
            painter.write()
            painter.write()
        painter.write()
    assert [line["why"].rpartition("/")[2] for line in log] == [
        "status.json: there is no such file or folder",
        "No space left on device",
    ]
    assert Page(told.config.spool / FILE)


def test_the_daemon_runs_on_while_it_is_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that writes as fast as it can, beside a daemon that has jobs."""
    monkeypatch.setattr(dashboard, "PERIOD_S", 0.001)
    daemon = home.daemon()
    painter = Dashboard(home.config)
    thread = threading.Thread(target=painter.serve, daemon=True)
    thread.start()
    refs = [home.drop(nonce=str(number)) for number in range(30)]
    run_until_idle(daemon)
    monkeypatch.setattr(dashboard, "PERIOD_S", 60.0)
    daemon.mailbox.put(StopRequested())
    daemon.run()
    painter.stop(thread)
    shown = Page(home.config.spool / FILE)
    assert shown.all("span", "state stopped")
    assert len(shown.all("circle")) == len(refs)


# Readers of the feed


def test_a_follower_takes_up_after_loss(told: Told) -> None:
    follower, path = Follower(told.config.spool / EVENTS), told.config.spool / EVENTS
    told.happens("queued", ago_s=2)
    assert len(list(follower.news())) == 1
    path.unlink()
    told.happens("queued", ago_s=3)  # it was read before
    told.happens("started", ago_s=1)
    assert [event["type"] for event in follower.news()] == ["imagend.started"]
    assert follower.missed == 1


def test_what_is_recent_forgets_what_is_not(told: Told) -> None:
    recent = Recent(told.config.spool / EVENTS)
    told.happens("completed")
    assert recent.look()
    assert not recent.look()
    assert recent.by_time(told.now)[-1][Outcome.SUCCEEDED] == 1
    assert not any(count.total() for count in recent.by_time(told.now + timedelta(days=2)))
    assert not any(count.total() for count in recent.by_time(told.now))


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3.0], 95, 3.0), ([3.0, 1.0, 2.0], 50, 2.0), ([float(n) for n in range(1, 101)], 95, 95.0)],
)
def test_percentiles(values: list[float], percent: int, expected: float | None) -> None:
    assert live.percentile(values, percent) == expected


# In a browser

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
GROUND = {"light": (0xF4, 0xF5, 0xF7), "dark": (0x14, 0x17, 0x1C)}
GOOD = {"light": (0x2F, 0x8F, 0x5B), "dark": (0x4F, 0xB7, 0x83)}
BAD = {"light": (0xC9, 0x3A, 0x4E), "dark": (0xF0, 0x69, 0x7B)}
PAINTED = (255, 0, 255)


def screenshot(path: Path, scheme: str) -> Any:
    """The pixels that a reader sees, rows of (red, green, blue); a console without complaints."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    shot = path.with_name(f"{scheme}.png")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1250,1600"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"]
    command += [f"--user-data-dir={path.parent / 'chromium'}", "--enable-logging=stderr", "--log-level=0"]
    command += [
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--screenshot={shot}",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    assert "CONSOLE" not in done.stderr
    return np.asarray(image.open(shot).convert("RGB"))


def pixels(shot: Any, colour: tuple[int, int, int]) -> int:
    return int((shot == colour).all(axis=2).sum())


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(told: Told, scheme: str) -> None:
    image = pytest.importorskip("PIL.Image")
    png = io.BytesIO()
    image.new("RGB", (64, 64), PAINTED).save(png, "PNG")
    told.paint(data=png.getvalue())
    told.page()
    shot = screenshot(told.config.spool / FILE, scheme)
    assert tuple(shot[-1, 0]) == tuple(shot[0, -1]) == GROUND[scheme]
    assert pixels(shot, GOOD[scheme]) > 500  # the bar of a job that succeeded
    assert pixels(shot, BAD[scheme]) == 0
    assert pixels(shot, PAINTED) > 5000  # the picture itself, small
    told.happens("failed", code="TIMEOUT")
    told.status["reasons"] = ["no room"]
    told.page()
    shot = screenshot(told.config.spool / FILE, scheme)
    assert pixels(shot, BAD[scheme]) > 500


@browser
def test_a_browser_runs_nothing_that_a_stranger_wrote(told: Told) -> None:
    """Were it markup, it would paint the page; were it run, it would say so."""
    evil = f"{MARKUP}<style>body{{background:#f0f}}</style><svg><rect fill='#f0f' width='999' height='999'/></svg>"
    told.happens("completed", client=evil, kind=evil, model=evil, seconds=1.0)
    told.status |= {"name": evil, "reasons": [evil]}
    told.page()
    shot = screenshot(told.config.spool / FILE, "light")
    assert pixels(shot, PAINTED) == 0
    assert tuple(shot[-1, 0]) == GROUND["light"]
