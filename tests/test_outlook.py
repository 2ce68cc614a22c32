"""Where is my job: positions true to the order of turns, and estimates from what jobs took of late."""

from __future__ import annotations

import itertools
import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step

from imagend.cli import run as imagend
from imagend.cli.look import read
from imagend.daemon.durations import FILE, KEEP_S, MAX_KEYS, WINDOW, Durations, Work
from imagend.daemon.executor import Heard
from imagend.daemon.loop import Daemon
from imagend.daemon.outlook import HEAD
from imagend.daemon.report import report
from imagend.daemon.states import FILES, States
from imagend.daemon.turn import Turn
from imagend.job import Outcome, Ref
from imagend.manifest import Manifest
from imagend.messages import Progress

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


def states(daemon: Daemon) -> States:
    assert daemon.health.states is not None
    return daemon.health.states


def queue_of(daemon: Daemon) -> list[dict[str, object]]:
    told = report(daemon.health, 0.0, "ready", tuple(daemon.slots.values()), daemon.turn, ())
    head = told.model_dump(mode="json")["queue"]["head"]
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
    for _ in range(WINDOW):
        states(daemon).outlook.durations.learn(ended(100.0))
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
    states(daemon).outlook.durations.learn(ended(50.0))
    (job,) = queue_of(daemon)
    assert job["estimated_wait_seconds"] == pytest.approx(50.0, abs=49.0)


def test_a_kind_without_model_size_and_steps_is_learned_of(home: Home) -> None:
    durations = Durations(home.config.spool)
    manifest = ended(4.0).model_copy(update={"spec": {"image": "leona/front", "scale": 2}})
    durations.learn(manifest)
    assert durations.expect(Work.of({"image": "leona/back", "scale": 2})) == 4.0


def test_a_chain_that_paints_anew_is_learned_of_beside_one_that_does_not(home: Home) -> None:
    durations = Durations(home.config.spool)
    for strength, seconds in ((None, 2.0), (0.3, 10.0)):
        spec = SMALL | {"chain": {"upscale": {"scale": 2, "strength": strength}}}
        durations.learn(ended(seconds).model_copy(update={"spec": spec}))
    for strength, seconds in ((None, 2.0), (0.3, 10.0)):
        assert durations.expect(Work.of(SMALL | {"chain": {"upscale": {"scale": 2, "strength": strength}}})) == seconds


def test_a_job_that_was_painted_is_learned_of(home: Home) -> None:
    daemon = home.daemon()
    home.drop("a.json", width=64, height=64, num_inference_steps=2)
    run_until_idle(daemon)
    assert states(daemon).outlook.durations.expect(Work.of(SMALL)) is not None


def test_queue_and_watch_show_place_and_wait(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.root)
    daemon = home.daemon(heartbeat_s=5.0)
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    waiting = home.drop("b.json", prompt="later")
    run_until(daemon, lambda: len(daemon.turn) == 1)
    states(daemon).outlook.durations.learn(ended(36_000.0))
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


# State files, for those who see outputs/ only


def told(home: Home) -> dict[str, dict[str, object]]:
    return {path.name.partition(".")[0]: read(path) for path in home.config.outputs.glob("*/[!.]*.state.json")}


def test_a_job_is_told_of_beside_its_result_from_acceptance_until_it_is_there(home: Home) -> None:
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    waiting = home.drop("b.json", prompt="secret words")
    run_until(daemon, lambda: told(home).keys() == {running.id, waiting.id})
    state = told(home)[waiting.id]
    assert datetime.fromisoformat(str(state.pop("at"))) <= datetime.now(UTC)
    assert state == {
        "schema": "imagend.state/v1",
        "id": waiting.id,
        "client": CLIENT,
        "state": "queued",
        "queue_position": 1,
        "queue_length": 1,
        "estimated_wait_seconds": None,
    }
    daemon.mailbox.put(Heard("cpu0", Progress(job=running, stage="painting", picture=0, pictures=1, step=3, steps=9)))
    run_until(daemon, lambda: told(home)[running.id].get("step") == 3)
    assert told(home)[running.id]["state"] == "running"
    path = home.config.outputs / CLIENT / f"{waiting.id}.state.json"
    assert path.stat().st_mode & 0o007 == 0  # the client's and its group's, as its results are
    home.drop("cancel.json", kind="cancel", job=running.id, prompt=...)
    run_until_idle(daemon)
    assert told(home) == {}
    assert {path.name for path in (home.config.outputs / CLIENT).iterdir()} == {running.id, waiting.id}


def test_what_a_dead_daemon_told_is_put_right(home: Home) -> None:
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: bool(told(home)))
    waiting = home.drop("b.json", prompt="later")
    run_until(daemon, lambda: len(told(home)) == 2)
    folder = home.config.outputs / CLIENT
    for name in (f"{'0' * 20}.state.json", f".{'1' * 20}.state.json.tmp", f".{waiting.id}.state.json.tmp"):
        (folder / name).write_text("of a job that is no more")
    (folder / f"{waiting.id}.state.json").write_text("torn")
    daemon.spool.close()
    again = home.daemon()
    right = {running.id: "running", waiting.id: "queued"}
    run_until(again, lambda: {id: state.get("state") for id, state in told(home).items()} == right)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_long_queue_costs_so_many_files_a_period_and_every_job_is_told_of(home: Home) -> None:
    """Head first; then the rest, whose places are those of the moment that their file names."""
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    refs = [Ref(CLIENT, f"{number:020x}") for number in range(HEAD + 3 * FILES)]
    for ref in refs:
        daemon.turn.add(ref, 5)
    before = len(told(home))
    clock = itertools.count(daemon.clock() + 1000.0, 1.0)
    for period in range(1, 3):
        states(daemon).tend(next(clock))
        assert len(told(home)) <= before + period * FILES
    assert {ref.id for ref in refs[: FILES - 2]} <= told(home).keys()
    taken = 0
    while len(told(home)) < len(refs) + 1:
        states(daemon).tend(next(clock))
        if taken == 2:
            daemon.turn.remove(refs[0])
        taken += 1
        assert taken < 100
    for place, ref in enumerate(refs[1:HEAD], 1):
        assert told(home)[ref.id]["queue_position"] in (place, place + 1)
    deep = [told(home)[ref.id]["queue_position"] for ref in refs[HEAD + 1 :]]
    assert deep == sorted(deep, key=int)  # type: ignore[arg-type]


def test_a_snapshot_of_the_order_stays_while_the_queue_changes(home: Home) -> None:
    turn = Turn()
    refs = [Ref(client, f"{number:020x}") for client in ("alice", "bob") for number in range(5)]
    for ref in refs:
        turn.add(ref, 5)
    order, seen = list(turn), turn.snapshot()
    first = next(seen)
    turn.serve(order[0])
    turn.remove(order[5])
    turn.add(Ref("carol", "9" * 20), 9)
    assert [first, *seen] == order


def test_watch_from_a_host_that_has_the_outputs_only(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.root)
    daemon = home.daemon()
    running = home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.slots["cpu0"].holds(running))
    waiting = home.drop("b.json", prompt="later")
    run_until(daemon, lambda: len(told(home)) == 2)
    shutil.rmtree(home.config.spool)
    capsys.readouterr()
    assert imagend(["watch", waiting.id, "--timeout", "0"]) == 75
    assert imagend(["watch", running.id, "--timeout", "0"]) == 75
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{waiting.id}  queued, 1 of 1", f"{running.id}  starting"]
