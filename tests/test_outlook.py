"""Where is my job: positions true to the order of turns, and estimates from what jobs took of late."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step

from imagend.cli import run as imagend
from imagend.daemon.durations import FILE, KEEP_S, MAX_KEYS, WINDOW, Durations, Work
from imagend.daemon.loop import Daemon
from imagend.job import Outcome, Ref
from imagend.manifest import Manifest

START = datetime(2026, 1, 1, tzinfo=UTC)
SMALL = {"model": "shapes-xl", "width": 64, "height": 64, "num_inference_steps": 2, "seeds": (1,)}


def ended(seconds: float, outcome: Outcome = Outcome.SUCCEEDED, **spec: object) -> Manifest:
    return Manifest(
        schema="imagend.manifest/v1",
        id="0" * 20,
        client=CLIENT,
        kind="generate",
        outcome=outcome,
        issued_at=START,
        accepted_at=START,
        started_at=START,
        ended_at=START + timedelta(seconds=seconds),
        attempts=1,
        spec=SMALL | spec,
    )


def queue_of(daemon: Daemon) -> list[dict[str, object]]:
    head = daemon.health.report(0.0, "ready", tuple(daemon.slots.values()), daemon.turn, ())["queue"]["head"]
    assert isinstance(head, list)
    return head


def test_the_mean_of_the_last_twenty_is_expected_by_size_and_steps_then_model_then_any(home: Home) -> None:
    durations = Durations(home.config.spool)
    assert durations.expect(Work.of(SMALL)) is None
    for _ in range(WINDOW):
        durations.learn(ended(1000.0))
    for seconds in (2.0, 4.0) * (WINDOW // 2):
        durations.learn(ended(seconds))
    durations.learn(ended(1000.0, Outcome.FAILED))
    assert durations.expect(Work.of(SMALL)) == 3.0
    assert durations.expect(Work.of(SMALL | {"seeds": (1, 2)})) == 6.0
    durations.learn(ended(83.0, width=128))
    assert durations.expect(Work.of(SMALL | {"width": 128})) == 83.0
    assert durations.expect(Work.of(SMALL)) == 3.0
    mean = (2.0 * 9 + 4.0 * 10 + 83.0) / WINDOW
    assert durations.expect(Work.of(SMALL | {"height": 128})) == pytest.approx(mean)
    assert durations.expect(Work.of(SMALL | {"model": "other"})) == pytest.approx(mean)


def test_what_was_learned_outlives_the_daemon_and_a_damaged_file_costs_only_that(home: Home) -> None:
    durations = Durations(home.config.spool)
    durations.learn(ended(7.0))
    durations.keep(0.0)
    assert not (home.config.spool / FILE).exists()  # a fast painter's jobs cost no write each
    durations.keep(KEEP_S)
    assert Durations(home.config.spool).expect(Work.of(SMALL)) == 7.0
    for damaged in (b"", b"[]", b'{"schema": "imagend.durations/v1", "seconds": {"a": 1}}', b"[" * 100_000):
        (home.config.spool / FILE).write_bytes(damaged)
        assert Durations(home.config.spool).expect(Work.of(SMALL)) is None


def test_however_many_models_the_file_stays_small(home: Home) -> None:
    durations = Durations(home.config.spool)
    for number in range(2 * MAX_KEYS):
        durations.learn(ended(1.0, model=f"model {number}"))
    durations.keep(0.0, at_once=True)
    assert len(json.loads((home.config.spool / FILE).read_text())["seconds"]) == MAX_KEYS


def test_positions_are_true_to_the_turns_and_each_wait_is_the_sum_of_what_stands_before(home: Home) -> None:
    bob = home.neighbour("bob")
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    for number in range(3):
        home.drop(f"b{number}.json", prompt=f"mine {number}", width=64, height=64, num_inference_steps=2)
    bob.drop("c.json", prompt="his", width=64, height=64, num_inference_steps=2, count=2)
    run_until(daemon, lambda: len(daemon.turn) == 4)
    assert {job["estimated_wait_seconds"] for job in queue_of(daemon)} == {None}
    assert daemon.health.outlook is not None
    for _ in range(WINDOW):
        daemon.health.outlook.durations.learn(ended(100.0))
    slot = daemon.slots["cpu0"]
    assert slot.running is not None
    slot.running.started_at = datetime.now(UTC) - timedelta(hours=1)  # overdue: it ends at any moment
    queue_of(daemon)
    head = queue_of(daemon)
    order = [Ref(str(job["client"]), str(job["id"])) for job in head]
    assert [job["queue_position"] for job in head] == [1, 2, 3, 4]
    assert order == list(daemon.turn)
    took = [200.0 if ref.client == "bob" else 100.0 for ref in order]
    assert [job["estimated_wait_seconds"] for job in head] == [sum(took[:place]) for place in range(4)]
    daemon.turn.remove(order[0])
    first = queue_of(daemon)[0]
    assert (first["id"], first["queue_position"]) == (order[1].id, 1)


def test_a_job_that_cannot_be_painted_is_estimated_as_any_other(home: Home) -> None:
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    home.drop("b.json", prompt="no such model", model="none")
    run_until(daemon, lambda: len(daemon.turn) == 1)
    assert daemon.health.outlook is not None
    daemon.health.outlook.durations.learn(ended(50.0))
    (job,) = queue_of(daemon)
    assert job["estimated_wait_seconds"] == pytest.approx(50.0, abs=49.0)


def test_a_job_that_was_painted_is_learned_of(home: Home) -> None:
    daemon = home.daemon()
    home.drop("a.json", width=64, height=64, num_inference_steps=2)
    run_until_idle(daemon)
    assert daemon.health.outlook is not None
    assert daemon.health.outlook.durations.expect(Work.of(SMALL)) is not None


def test_queue_and_watch_show_place_and_wait(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.root)
    daemon = home.daemon(heartbeat_s=5.0)
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    waiting = home.drop("b.json", prompt="later")
    run_until(daemon, lambda: len(daemon.turn) == 1)
    assert daemon.health.outlook is not None
    daemon.health.outlook.durations.learn(ended(36_000.0))
    daemon.health.write(daemon.clock(), "busy", daemon.slots.values(), daemon.turn, ())
    capsys.readouterr()  # the log
    assert imagend(["queue"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["cpu0", str(running)]
    assert second.split()[:2] == ["1", str(waiting)]
    assert second.endswith("about 10.0 h")
    assert imagend(["queue", "--json", "--client", "bob"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["running"], document["waiting"], document["pending"]) == ([], [], 1)
    assert imagend(["watch", waiting.id, "--timeout", "0"]) == 75
    assert "queued, 1 of 1, 10.0 h to wait" in capsys.readouterr().out
    assert imagend(["watch", waiting.id, "--json", "--timeout", "0"]) == 75
    assert json.loads(capsys.readouterr().out)["estimated_wait_seconds"] == pytest.approx(36_000, abs=60)
    daemon.health.write(daemon.clock(), "stopped", daemon.slots.values(), daemon.turn, ())
    assert imagend(["queue"]) == 69
    step(daemon)
