"""The real daemon with real worker processes, and kinds that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle

from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import LocalExecutor
from imagend.daemon.loop import Daemon
from imagend.spool import State

TESTS = Path(__file__).parent


def local(mailbox: Mailbox) -> LocalExecutor:
    return LocalExecutor({"cpu0": "cpu"}, Path("models"), mailbox, command=(sys.executable, str(TESTS / "kinds")))


def end(daemon: Daemon) -> None:
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()


@pytest.fixture(autouse=True)
def _loud(capfd: pytest.CaptureFixture[str]) -> None:
    """Give the workers a real stderr to inherit."""


@pytest.mark.parametrize(
    ("prompt", "outcome", "code", "attempts"),
    [
        ("paint", "succeeded", None, 1),
        ("raise", "failed", "INTERNAL", 1),
        ("refuse", "failed", "INVALID_PARAMETERS", 1),
        ("exit", "failed", "WORKER_DIED", 2),
        ("exit at once", "failed", "WORKER_DIED", 2),
        ("kill", "failed", "WORKER_DIED", 2),
        ("babble", "failed", "WORKER_DIED", 2),
        ("endless line", "failed", "WORKER_DIED", 2),
        ("hang", "failed", "TIMEOUT", 2),
        ("lie about a path", "failed", "INTERNAL", 1),
        ("lie about a file", "failed", "INTERNAL", 1),
        ("lie about bytes", "failed", "INTERNAL", 1),
        ("link", "failed", "INTERNAL", 1),
    ],
)
def test_every_way_an_attempt_can_end(home: Home, prompt: str, outcome: str, code: str | None, attempts: int) -> None:
    ref, after = home.drop("a.json", prompt=prompt), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local, silence_limit_s=2.0 if prompt == "hang" else 60.0, max_attempts=2)
    run_until_idle(daemon)
    end(daemon)
    manifest = home.manifest(ref)
    error: dict[str, Any] = manifest.get("error") or {}
    assert (manifest["outcome"], error.get("code"), manifest["attempts"]) == (outcome, code, attempts)
    assert home.outcome(after) == "succeeded"  # the slot lives on


def test_an_attempt_beyond_the_time_limit_fails_the_job_and_names_the_setting(home: Home) -> None:
    ref = home.drop(prompt="take time", num_inference_steps=150)
    daemon = home.daemon(local, time_limit_s=0.3)
    run_until_idle(daemon)
    end(daemon)
    error = home.manifest(ref)["error"]
    assert error["code"] == "TIMEOUT"
    assert "time_limit_s" in error["message"]


def test_cancel_stops_one_job_and_spares_the_next(home: Home) -> None:
    first = home.drop("a.json", prompt="take time", num_inference_steps=150)
    second = home.drop("b.json", prompt="take time", num_inference_steps=5)
    daemon = home.daemon(local)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.running is not None and slot.running.progress is not None)
    for number in range(20):  # a whole bunch, late ones among them
        home.drop(f"c{number}.json", kind="cancel", job=first.id, prompt=..., nonce=str(number))
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(first) == "cancelled"
    assert home.outcome(second) == "succeeded"
    assert home.manifest(second)["attempts"] == 1


def test_a_kind_that_ignores_cancel_is_killed(home: Home) -> None:
    ref = home.drop(prompt="hang")
    daemon = home.daemon(local, cancel_grace_s=0.2)
    run_until(daemon, lambda: daemon.busy)
    home.drop("c.json", kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "cancelled"


def test_a_clean_stop_releases_and_the_next_start_paints(home: Home) -> None:
    ref = home.drop(prompt="take time", num_inference_steps=150)
    daemon = home.daemon(local)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.running is not None and slot.running.progress is not None)
    end(daemon)
    assert home.where(ref) is State.PENDING
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "succeeded"
    assert home.manifest(ref)["attempts"] == 1


def test_asked_twice_to_stop_the_daemon_does_not_wait_for_the_worker(home: Home) -> None:
    ref = home.drop(prompt="hang")
    daemon = home.daemon(local, stop_grace_s=600.0)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.running is not None and slot.running.progress is not None)
    daemon.mailbox.put(StopRequested())
    end(daemon)  # the second one
    assert home.where(ref) is State.PENDING
    assert daemon.spool.attempts(ref) == 0


def test_a_worker_that_never_gets_ready_is_started_again_with_growing_delay(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINDS", "stillborn")
    ref = home.drop(prompt="paint")
    daemon = home.daemon(local)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.deaths == 2)
    assert slot.deadline - daemon.clock() > 1.0
    run_until(daemon, lambda: daemon.state() == "degraded")
    assert "died 2 times" in daemon.health.reasons["cpu0"]
    assert home.where(ref) is State.PENDING  # no attempt was made of it
    assert daemon.spool.attempts(ref) == 0
    monkeypatch.delenv("KINDS")
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "succeeded"


SERVE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import make_home, step
from imagend.signing import Key
from test_worker import local
home = make_home(Path({root!r}), Key.generate())
home.drop(prompt="hang")
daemon = home.daemon(local)
while True:
    step(daemon)
"""


def test_workers_leave_when_the_daemon_is_killed(tmp_path: Path) -> None:
    script = SERVE.format(tests=str(TESTS), root=str(tmp_path / "home"))
    daemon = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    status = tmp_path / "home" / "spool" / "status.json"
    end_of_patience = time.monotonic() + 60

    def worker_is_busy() -> bool:
        assert daemon.poll() is None
        assert time.monotonic() < end_of_patience
        return status.exists() and json.loads(status.read_text())["workers"]["cpu0"]["state"] == "busy"

    while not worker_is_busy():
        time.sleep(0.01)
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    assert len(children) == 1
    worker = os.pidfd_open(int(children[0]))
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    assert _ends(worker)


def _ends(pidfd: int) -> bool:
    """Whether a process ends within a minute: a pidfd becomes readable then (pidfd_open(2))."""
    import select

    try:
        return bool(select.select([pidfd], [], [], 60.0)[0])
    finally:
        os.close(pidfd)
