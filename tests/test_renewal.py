"""Workers are replaced between two jobs: when they have painted enough, or hold too much memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import structlog
from conftest import Home, run_until, run_until_idle
from test_worker import end, local

from imagend.daemon.loop import Daemon
from imagend.messages import Stop
from imagend.spool import State


@pytest.fixture(autouse=True)
def _loud(capfd: pytest.CaptureFixture[str]) -> None:
    """Give the workers a real stderr to inherit."""


def said(log: list[Any], event: str) -> list[str]:
    return [line.get("why", "") for line in log if line["event"] == event]


def test_a_worker_is_replaced_after_so_many_jobs_and_that_is_no_death(home: Home) -> None:
    refs = [home.drop(f"{number}.json", prompt="paint", nonce=str(number)) for number in range(4)]
    with structlog.testing.capture_logs() as log:
        daemon = home.daemon(local, max_jobs_per_worker=2)
        slot = daemon.slots["cpu0"]
        run_until(daemon, lambda: len(said(log, "worker ready")) == 3)
        assert slot.deaths == 0
        assert "cpu0" not in daemon.health.reasons
        end(daemon)
    assert [home.manifest(ref)["attempts"] for ref in refs] == [1] * 4
    assert [line["outcome"] for line in home.feed()] == ["succeeded"] * 4
    assert said(log, "a worker is replaced") == ["it has painted 2 jobs (max_jobs_per_worker)"] * 2
    assert said(log, "worker died") == []


def test_a_worker_that_leaks_is_replaced_between_two_jobs(home: Home) -> None:
    """Each of its jobs leaves 64 MB behind."""
    refs = [home.drop(f"{number}.json", prompt="leak", nonce=str(number)) for number in range(6)]
    with structlog.testing.capture_logs() as log:
        daemon = home.daemon(local)
        slot = daemon.slots["cpu0"]
        run_until(daemon, lambda: slot.ready)
        fresh = daemon.executor.memory_mb("cpu0")
        assert fresh
        limit = int(fresh + 100)
        config = daemon.settings.config.model_copy(update={"worker_memory_mb": limit})
        daemon.settings.policy = replace(daemon.settings.policy, config=config)
        run_until_idle(daemon)
        end(daemon)
    assert [home.manifest(ref)["attempts"] for ref in refs] == [1] * 6
    assert [line["outcome"] for line in home.feed()] == ["succeeded"] * 6
    reasons = said(log, "a worker is replaced")
    assert len(reasons) >= 2
    assert all(reason.endswith("MB of memory (worker_memory_mb)") for reason in reasons)
    assert all(int(reason.split()[2]) > limit for reason in reasons)
    assert said(log, "worker died") == []


def test_a_worker_that_is_too_large_from_the_start_still_paints(home: Home) -> None:
    """A limit below what the model takes: each job has a worker of its own, and none waits for ever."""
    home.drop("a.json", nonce="1")
    home.drop("b.json", nonce="2")
    daemon = home.daemon(worker_memory_mb=1)
    daemon.executor.held_mb = 5000.0  # type: ignore[attr-defined]
    run_until_idle(daemon)
    assert [line["outcome"] for line in home.feed()] == ["succeeded"] * 2


@pytest.mark.parametrize("limit", ["max_jobs_per_worker", "worker_memory_mb"])
def test_a_worker_over_its_limit_finishes_its_job_first(home: Home, limit: str) -> None:
    first = home.drop("a.json")
    daemon = home.daemon(**{limit: 1})
    orders = listen(daemon)
    run_until(daemon, lambda: home.where(first) is State.DONE)
    daemon.executor.held_mb = 5000.0  # type: ignore[attr-defined]
    run_until(daemon, lambda: orders.count("stop") == 1)
    orders.clear()
    ref = home.drop("b.json", prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    for _ in range(5):
        daemon.look_around()
        daemon.wait()
    assert orders == ["run"]
    home.drop("c.json", kind="cancel", job=ref.id, prompt=...)
    run_until(daemon, lambda: home.where(ref) is State.DONE and "stop" in orders)
    assert orders == ["run", "cancel", "stop"]


def test_a_worker_that_does_not_leave_is_killed_and_gets_no_job_meanwhile(home: Home) -> None:
    first, second = home.drop("a.json", nonce="1"), home.drop("b.json", nonce="2")
    daemon = home.daemon(max_jobs_per_worker=1, stop_grace_s=30.0)
    orders = listen(daemon, deaf_to_stop=True)
    slot = daemon.slots["cpu0"]
    run_until(daemon, lambda: slot.leaving)
    for _ in range(5):
        daemon.look_around()
        daemon.wait()
    assert home.where(second) is State.PENDING
    late = daemon.clock() + 31.0
    slot.tend(daemon.executor, daemon.settings.config, late)
    run_until_idle(daemon)
    assert home.outcome(first) == home.outcome(second) == "succeeded"
    assert slot.deaths == 0
    assert orders[:3] == ["run", "stop", "run"]


def test_a_worker_that_says_it_is_worn_is_replaced_before_its_next_job(home: Home) -> None:
    home.drop("a.json", prompt="worn")
    home.drop("b.json", nonce="2")
    with structlog.testing.capture_logs() as log:
        daemon = home.daemon()
        orders = listen(daemon)
        run_until_idle(daemon)
    assert orders == ["run", "stop", "run"]
    assert said(log, "a worker is replaced") == ["it is tired"]
    assert said(log, "worker died") == []
    assert daemon.slots["cpu0"].deaths == 0
    assert [line["outcome"] for line in home.feed()] == ["succeeded"] * 2


def listen(daemon: Daemon, deaf_to_stop: bool = False) -> list[str]:
    """What the daemon tells its workers from now on."""
    orders: list[str] = []
    send = daemon.executor.send

    def heard(worker: str, message: Any) -> None:
        orders.append(message.type)
        if not (deaf_to_stop and isinstance(message, Stop)):
            send(worker, message)

    daemon.executor.send = heard  # type: ignore[method-assign]
    return orders


def test_status_tells_of_no_trouble_while_a_worker_is_replaced(home: Home) -> None:
    for number in range(6):
        home.drop(f"{number}.json", nonce=str(number))
    daemon = home.daemon(max_jobs_per_worker=1)
    states = set()

    def look() -> bool:
        states.add(daemon.state())
        return len(daemon.turn) == 0 and not daemon.busy and (home.config.outputs / "results.jsonl").exists()

    run_until(daemon, look)
    assert "degraded" not in states
    assert json.loads((home.config.spool / "status.json").read_text())["reasons"] == []
