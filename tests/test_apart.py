"""Clients apart: one cannot fill up, starve, cancel or replay another, and learns why it was refused."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step

from imagend.daemon.executor import ReloadRequested
from imagend.daemon.loop import Daemon
from imagend.job import Ref
from imagend.rights import Limits, Rights


@pytest.fixture
def mallory(home: Home) -> Home:
    return home.neighbour("mallory")


def busy(home: Home, **settings: Any) -> tuple[Daemon, Ref]:
    """A daemon whose worker is taken, so that all else waits; and the job that takes it."""
    ref = home.drop("0.json", prompt="stay")
    daemon = home.daemon(**{"max_queued": 100, "limits": Limits()} | settings)
    run_until(daemon, lambda: daemon.busy and not len(daemon.turn))
    return daemon, ref


def drop_many(client: Home, count: int, **fields: Any) -> dict[str, Ref]:
    """So many jobs, by the names of their files."""
    names = [f"{client.client}-{number:03}.json" for number in range(count)]
    return {name: client.drop(name, nonce=name, **fields) for name in names}


def refusals(home: Home) -> dict[str, str]:
    """The codes of what was rejected, by file."""
    paths = (home.config.inboxes[0].parent / "rejected").glob("*.reason.json")
    return {path.name.removesuffix(".reason.json"): json.loads(path.read_text())["error"]["code"] for path in paths}


def order(daemon: Daemon) -> list[Ref]:
    return [run.job for run in daemon.executor.runs]  # type: ignore[attr-defined]


# Nobody fills up the queue for others


def test_a_client_that_floods_fills_its_own_share_and_no_others(home: Home, mallory: Home) -> None:
    daemon, running = busy(home)
    theirs, ours = drop_many(mallory, 30), drop_many(home, 5)
    step(daemon)
    assert daemon.turn.per_client() == {"mallory": 10, CLIENT: 5}
    assert refusals(home) == dict.fromkeys(list(theirs)[10:], "QUEUE_FULL")
    reason = home.reason("mallory-010.json")
    assert (reason["status"], "10 jobs of mallory wait" in reason["message"]) == (503, True)
    home.drop("c.json", kind="cancel", job=running.id, prompt=...)  # taken although mallory's queue is full
    run_until_idle(daemon)
    assert {home.outcome(ref) for ref in ours.values()} == {"succeeded"}
    again = home.config.inboxes[0].parent / "rejected" / "mallory-010.json"
    again.rename(home.config.inboxes[0] / "again.json")  # as the reason says: later, the same file
    run_until_idle(daemon)
    assert home.outcome(theirs["mallory-010.json"]) == "succeeded"


def test_the_queue_of_all_has_an_end_too(home: Home, mallory: Home) -> None:
    daemon, _ = busy(home, max_queued=12)
    drop_many(home, 10)
    drop_many(mallory, 10)
    step(daemon)
    assert daemon.turn.per_client() == {CLIENT: 10, "mallory": 2}
    assert "12 jobs of all clients wait" in home.reason("mallory-002.json")["message"]


def test_a_job_that_is_known_is_not_refused_when_the_queue_is_full(home: Home) -> None:
    daemon, running = busy(home, limits=Limits(max_queued=1, jobs_per_minute=2))
    body = home.body(nonce="second")
    home.drop_body(body, "first time.json")
    step(daemon)
    for _ in range(5):
        home.drop_body(body, "again.json")
        step(daemon)
    home.drop("third.json", nonce="third")
    step(daemon)
    assert refusals(home) == {"third.json": "QUEUE_FULL"}
    assert list(home.config.inboxes[0].iterdir()) == []
    home.drop("c.json", kind="cancel", job=running.id, prompt=...)
    run_until_idle(daemon)
    home.drop_body(body, "long after it has ended.json")
    run_until_idle(daemon)
    assert set(refusals(home)) == {"third.json"}
    assert len(order(daemon)) == 2


def test_who_sends_too_fast_is_told_when_to_send_again_and_others_are_not(home: Home, mallory: Home) -> None:
    daemon = home.daemon(clients={"mallory": Rights(jobs_per_minute=5)})
    drop_many(mallory, 8)
    drop_many(home, 8)
    run_until_idle(daemon)
    assert refusals(home) == dict.fromkeys([f"mallory-{number:03}.json" for number in (5, 6, 7)], "RATE_LIMITED")
    assert "Send this one again in " in home.reason("mallory-005.json")["message"]


def test_a_disk_that_refuses_costs_a_client_neither_room_nor_rate(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon, _ = busy(home, limits=Limits(max_queued=2, jobs_per_minute=3))
    refs = drop_many(home, 2)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(daemon.spool, "commit", full)
        for _ in range(10):
            step(daemon)
            assert (len(daemon.turn), refusals(home)) == (0, {})
    run_until(daemon, lambda: set(daemon.turn) == set(refs.values()))


def test_what_was_accepted_stays_accepted_over_a_restart(home: Home) -> None:
    daemon, _ = busy(home)
    refs = drop_many(home, 10)
    step(daemon)
    daemon.spool.close()
    second = home.daemon(max_queued=1, limits=Limits(max_queued=1, jobs_per_minute=1))
    assert set(refs.values()) <= set(second.turn)


def test_limits_change_when_the_configuration_is_read_again(home: Home) -> None:
    daemon, _ = busy(home, max_queued=1)
    drop_many(home, 2)
    step(daemon)
    assert refusals(home) == {"alice-001.json": "QUEUE_FULL"}  # from now on, unlimited as conftest.py has it
    daemon.handle(ReloadRequested())
    drop_many(home, 20, seed=1)
    step(daemon)
    assert len(daemon.turn) == 1 + 20
    assert len(refusals(home)) == 1


# Nobody starves


def test_a_flood_of_urgent_jobs_does_not_starve_another(home: Home, mallory: Home) -> None:
    daemon, running = busy(home, clients={"mallory": Rights(max_queued=100)})
    drop_many(mallory, 60, priority=9)
    mine = home.drop("mine.json", nonce="mine", priority=0)
    home.drop("c.json", kind="cancel", job=running.id, prompt=...)
    run_until_idle(daemon)
    assert len(order(daemon)) == 62
    assert order(daemon).index(mine) <= 4


def test_clients_of_one_priority_take_turns(home: Home, mallory: Home) -> None:
    daemon, running = busy(home)
    drop_many(mallory, 9)
    drop_many(home, 3)
    home.drop("c.json", kind="cancel", job=running.id, prompt=...)
    run_until_idle(daemon)
    assert [ref.client[0] for ref in order(daemon)[1:9]] == list("mamamamm")


# What may be asked for


@pytest.mark.parametrize(
    ("rights", "fields", "field"),
    [
        (Rights(kinds=()), {}, "kind"),
        (Rights(models=("other",)), {}, "model"),
        (Rights(max_priority=4), {"priority": 5}, "priority"),
        (Rights(max_work=100), {"count": 4}, "count"),
    ],
)
def test_what_a_client_may_not_ask_for_is_refused_at_the_door(
    home: Home, mallory: Home, rights: Rights, fields: dict[str, Any], field: str
) -> None:
    mallory.drop("a.json", **fields)
    ref = home.drop("b.json", **fields)
    run_until_idle(home.daemon(clients={"mallory": rights}))
    reason = home.reason("a.json")
    assert (reason["code"], reason["status"], reason["detail"][0]["field"]) == ("FORBIDDEN", 403, field)
    assert home.outcome(ref) == "succeeded"


# Nobody cancels or replays another's jobs


def test_only_an_operator_cancels_anothers_job(home: Home, mallory: Home) -> None:
    operator = home.neighbour("ops")
    daemon, running = busy(home, clients={"ops": Rights(operator=True)})
    queued = home.drop("queued.json", nonce="queued")
    for number, ref in enumerate((running, queued)):
        mallory.drop(f"a{number}.json", kind="cancel", job=ref.id, client=CLIENT, prompt=...)
        mallory.drop(f"b{number}.json", kind="cancel", job=ref.id, prompt=...)
    step(daemon)
    assert refusals(home) == {
        "a0.json": "FORBIDDEN",
        "a1.json": "FORBIDDEN",
        "b0.json": "JOB_NOT_FOUND",
        "b1.json": "JOB_NOT_FOUND",
    }
    assert daemon.busy
    assert queued in daemon.turn
    for number, ref in enumerate((running, queued)):
        operator.drop(f"c{number}.json", kind="cancel", job=ref.id, client=CLIENT, prompt=...)
    run_until_idle(daemon)
    assert home.outcome(running) == home.outcome(queued) == "cancelled"
    operator.drop("d.json", kind="cancel", job="0" * 20, client=CLIENT, prompt=...)
    run_until_idle(daemon)
    note = json.loads((home.config.inboxes[0].parent / "rejected" / "d.json.reason.json").read_text())
    assert (note["client"], note["error"]["code"]) == ("ops", "JOB_NOT_FOUND")  # who signed, not whose job it is


def test_cancels_have_a_rate_of_their_own(home: Home) -> None:
    daemon, running = busy(home, limits=Limits(jobs_per_minute=2, max_queued=2))
    queued = drop_many(home, 2)
    step(daemon)
    assert refusals(home) == {"alice-001.json": "RATE_LIMITED"}
    for number, job in enumerate([queued["alice-000.json"].id, running.id, running.id]):
        home.drop(f"c{number}.json", kind="cancel", job=job, nonce=str(number), prompt=...)
    step(daemon)
    run_until_idle(daemon)
    assert refusals(home) == {"alice-001.json": "RATE_LIMITED", "c2.json": "RATE_LIMITED"}
    assert home.outcome(running) == home.outcome(queued["alice-000.json"]) == "cancelled"


def test_anothers_job_dropped_again_is_still_that_ones_job_and_runs_once(home: Home, mallory: Home) -> None:
    body = home.body(nonce="once")
    raw = home.seal(body)
    ref = home.drop_body(body)
    daemon = home.daemon(clients={"mallory": Rights(max_queued=0)})
    for number in range(3):  # mallory could read it in a shared inbox
        mallory.put(raw, f"stolen{number}.json")
        run_until_idle(daemon)
    mallory.put(raw.replace(b'"once"', b'"more"'), "changed.json")
    run_until_idle(daemon)
    assert order(daemon) == [ref]
    assert refusals(home) == {"changed.json": "UNAUTHORIZED"}
    assert not (home.config.outputs / "mallory").exists()


# Folders


def test_a_group_that_cannot_be_had_is_said_in_status(home: Home) -> None:
    daemon = home.daemon(clients={CLIENT: Rights(group="no-such-group")})
    assert any("no-such-group" in reason for reason in daemon.health.reasons.values())
    ref = home.drop()
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    daemon.handle(ReloadRequested())  # conftest.py's configuration names none
    assert "groups" not in daemon.health.reasons
