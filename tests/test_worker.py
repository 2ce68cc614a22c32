"""The real daemon with real worker processes, and kinds that misbehave."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Home, run_until, run_until_idle

from imagend.daemon import slots
from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import LocalExecutor
from imagend.daemon.loop import Daemon
from imagend.daemon.retry import restart_delay_s
from imagend.job import Ref
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


@pytest.fixture
def _undelayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die are started again at once."""
    monkeypatch.setattr(slots, "restart_delay_s", lambda deaths: 0.0)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("raise", "INTERNAL"),
        ("refuse", "INVALID_PARAMETERS"),
        ("run out of memory", "OUT_OF_MEMORY"),
    ],
)
def test_a_job_that_cannot_be_painted_is_not_tried_again(home: Home, prompt: str, code: str) -> None:
    ref, after = home.drop("a.json", prompt=prompt), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local)
    run_until_idle(daemon)
    end(daemon)
    assert failure(home, ref) == (code, 1)
    assert home.outcome(after) == "succeeded"  # the slot lives on


@pytest.mark.parametrize(
    ("prompt", "code", "attempts"),
    [
        ("exit", "WORKER_DIED", 1),
        ("exit at once", "WORKER_DIED", 1),
        ("kill", "WORKER_DIED", 3),
        ("segfault", "WORKER_DIED", 1),
        ("close the line", "WORKER_DIED", 1),
        ("hang", "TIMEOUT", 2),
        ("hang and ignore SIGTERM", "TIMEOUT", 1),
        ("hang in C", "TIMEOUT", 1),
        ("stop", "TIMEOUT", 1),
        ("babble", "WORKER_DIED", 1),
        ("say arrived", "WORKER_DIED", 1),
        ("give orders", "WORKER_DIED", 1),
        ("speak at length", "WORKER_DIED", 1),
        ("endless line", "WORKER_DIED", 1),
        ("endless words", "WORKER_DIED", 1),
    ],
)
@pytest.mark.usefixtures("_undelayed")
def test_every_way_a_worker_breaks_costs_one_attempt(home: Home, prompt: str, code: str, attempts: int) -> None:
    ref, after = home.drop("a.json", prompt=prompt), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local, silence_limit_s=4.0 if code == "TIMEOUT" else 60.0, max_attempts=attempts)
    run_until_idle(daemon)
    end(daemon)
    assert failure(home, ref) == (code, attempts)
    assert home.outcome(after) == "succeeded"  # the slot lives on
    assert home.manifest(after)["attempts"] == 1


def failure(home: Home, ref: Ref) -> tuple[str, int]:
    """Code and attempts of a job that failed."""
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["artifacts"]) == ("failed", [])
    return manifest["error"]["code"], manifest["attempts"]


@pytest.mark.parametrize("prompt", ["leave a child", "leave a child of its own session"])
def test_a_worker_that_leaves_a_child_with_its_socket_is_noticed_and_buried(
    home: Home, tmp_path: Path, prompt: str
) -> None:
    held = tmp_path / "held"
    ref, after = home.drop("a.json", prompt=prompt, negative_prompt=str(held)), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local, max_attempts=1)
    try:
        run_until_idle(daemon)
        end(daemon)
        assert failure(home, ref) == ("WORKER_DIED", 1)
        assert "exit status 3" in home.manifest(ref)["error"]["message"]
        assert home.outcome(after) == "succeeded"
        with held.open() as lock:
            if prompt == "leave a child":  # it died with its worker
                wait_for(lambda: _lockable(lock.fileno()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(held.read_text()), signal.SIGKILL)


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


@pytest.mark.parametrize("prompt", ["hang and ignore SIGTERM", "hang in C", "stop"])
def test_a_kind_that_ignores_cancel_is_killed(home: Home, prompt: str) -> None:
    ref, after = home.drop("a.json", prompt=prompt), home.drop("b.json", prompt="paint")
    daemon = home.daemon(local, cancel_grace_s=0.2)
    run_until(daemon, lambda: daemon.slots["cpu0"].running is not None)
    home.drop("c.json", kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "cancelled"
    assert home.outcome(after) == "succeeded"


@pytest.mark.parametrize("prompt", ["hang and ignore SIGTERM", "hang in C", "stop"])
def test_a_kind_that_ignores_the_daemons_stop_is_killed_and_its_job_is_unharmed(home: Home, prompt: str) -> None:
    ref = home.drop(prompt=prompt)
    daemon = home.daemon(local, stop_grace_s=0.2)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.running is not None and slot.running.progress is not None)
    end(daemon)
    assert home.where(ref) is State.PENDING
    assert daemon.spool.attempts(ref) == 0


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


@pytest.mark.parametrize(("how", "settings"), [("stillborn", {}), ("asleep", {"boot_limit_s": 0.2})])
def test_a_worker_that_never_gets_ready_is_started_again_with_growing_delay(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str, settings: dict[str, float]
) -> None:
    delays = []

    def delay(deaths: int) -> float:
        delays.append(restart_delay_s(deaths))
        return 0.0

    monkeypatch.setattr(slots, "restart_delay_s", delay)
    monkeypatch.setenv("KINDS", how)
    ref, unwanted = home.drop("a.json", prompt="paint"), home.drop("b.json", prompt="paint", nonce="2")
    daemon = home.daemon(local, max_attempts=1, **settings)
    run_until(daemon, lambda: len(delays) == 4)
    assert delays == sorted(set(delays))
    assert delays[1] > 1.0
    run_until(daemon, lambda: daemon.state() == "degraded")
    assert "times in a row" in daemon.health.reasons["cpu0"]
    home.drop("c.json", kind="cancel", job=unwanted.id, prompt=...)
    run_until(daemon, lambda: home.where(unwanted) is State.DONE)
    assert home.outcome(unwanted) == "cancelled"
    assert home.where(ref) is State.PENDING  # no attempt was made of it
    assert daemon.spool.attempts(ref) == 0
    monkeypatch.delenv("KINDS")
    daemon.settings.policy = replace(
        daemon.settings.policy, config=daemon.settings.config.model_copy(update={"boot_limit_s": 60.0})
    )
    run_until_idle(daemon)
    end(daemon)
    assert home.outcome(ref) == "succeeded"
    assert "cpu0" not in daemon.health.reasons


SERVE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import Home, step
from imagend import config
from imagend.signing import Key
from test_worker import local
home = Home(Path({root!r}), config.load(Path({root!r}, "config.yaml")), Key.generate())
daemon = home.daemon(local, max_attempts=3)
while True:
    step(daemon)
"""


@contextlib.contextmanager
def serving(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in a process of its own."""
    script = SERVE.format(tests=str(TESTS), root=str(home.root))
    daemon = subprocess.Popen([sys.executable, "-c", script])
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def wait_for(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    end_of_patience = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_of_patience
        time.sleep(0.01)


@pytest.mark.parametrize(
    "deaths",
    [("daemon",) * 3, ("worker", "daemon", "worker"), ("daemon", "worker", "daemon")],
    ids=lambda deaths: "-".join(deaths),
)
def test_a_job_that_kills_fails_after_max_attempts_over_any_number_of_restarts(
    home: Home, tmp_path: Path, deaths: tuple[str, ...]
) -> None:
    """Each attempt takes the worker down, or the daemon with it. Those before it in the queue never notice."""
    plan = tmp_path / "plan"
    plan.write_text("\n".join(f"kill the {whom}" for whom in deaths))
    ref = home.drop("a.json", prompt="follow the plan", negative_prompt=str(plan), priority=9)
    after = home.drop("b.json", prompt="paint")
    starts = 0
    while home.where(ref) is not State.DONE or home.where(after) is not State.DONE:
        starts += 1
        assert starts <= 1 + len(deaths)
        with serving(home) as daemon:
            wait_for(lambda d=daemon: d.poll() is not None or home.where(after) is State.DONE)  # type: ignore[misc]
    assert starts == 1 + deaths.count("daemon")
    assert failure(home, ref) == ("WORKER_DIED", 3)
    assert plan.read_text() == ""
    assert home.outcome(after) == "succeeded"
    assert [line["id"] for line in home.feed()] == [ref.id, after.id]


def test_workers_leave_when_the_daemon_is_killed(home: Home) -> None:
    home.drop(prompt="hang")
    status = home.config.spool / "status.json"
    with serving(home) as daemon:
        wait_for(lambda: status.exists() and json.loads(status.read_text())["workers"]["cpu0"]["state"] == "busy")
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        assert len(children) == 1
        worker = os.pidfd_open(int(children[0]))
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
    assert _ends(worker)


def _lockable(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ends(pidfd: int) -> bool:
    """Whether a process ends within a minute: a pidfd becomes readable then (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        return bool(poll.poll(60_000))
    finally:
        os.close(pidfd)
