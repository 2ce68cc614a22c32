"""The daemon's decisions, with a painter that takes no time."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step
from fakes import paint

from imagend import files
from imagend.daemon.executor import Died, Heard, ReloadRequested, StopRequested
from imagend.daemon.intake import MAX_BATCH
from imagend.daemon.report import report
from imagend.errors import Bug
from imagend.job import Outcome, Ref
from imagend.messages import Ended, Failure
from imagend.signers import NAMESPACE
from imagend.signing import Key, job_id, seal
from imagend.spool import State


def test_a_job_becomes_a_manifest(home: Home) -> None:
    ref = home.drop(seed=7, count=2, label="shot 12")
    run_until_idle(home.daemon())
    manifest = home.manifest(ref)
    assert manifest["outcome"] == "succeeded"
    assert (manifest["id"], manifest["client"], manifest["label"]) == (ref.id, CLIENT, "shot 12")
    assert [(item["file"], item["seed"]) for item in manifest["artifacts"]] == [("0000.png", 7), ("0001.png", 8)]
    assert manifest["spec"]["num_inference_steps"] == 30  # defaults are written out
    assert (manifest["spec"]["width"], manifest["spec"]["model"]) == (128, "shapes-xl")
    folder = home.config.outputs / CLIENT / ref.id
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "0001.png", "manifest.json"]
    assert home.where(ref) is State.DONE
    assert [line["id"] for line in home.feed()] == [ref.id]
    assert list(home.config.inboxes[0].iterdir()) == []


def test_the_same_job_twice_is_one_job(home: Home) -> None:
    body = home.body()
    home.drop_body(body, "one.json")
    ref = home.drop_body(body, "two.json")
    daemon = home.daemon()
    run_until_idle(daemon)
    home.drop_body(body, "three.json")  # long after it has ended
    run_until_idle(daemon)
    assert len(daemon.executor.runs) == 1  # type: ignore[attr-defined]
    assert [line["id"] for line in home.feed()] == [ref.id]
    assert list(home.config.inboxes[0].iterdir()) == []


def test_a_stranger_cannot_swallow_a_job_by_signing_its_bytes_first(home: Home) -> None:
    mallory = Key.generate()
    with (home.root / "keys" / "allowed_signers").open("a") as signers:
        signers.write(f'mallory namespaces="{NAMESPACE}" {mallory.public_line("m")}\n')
    body = home.body()
    home.put(seal(body, mallory.sign(body)), "a-first.json")
    ref = home.drop_body(body, "b-second.json")
    run_until_idle(home.daemon())
    theirs = Ref("mallory", job_id("mallory", body))
    assert ref.id != theirs.id
    assert home.outcome(ref) == home.outcome(theirs) == "succeeded"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_an_inbox_may_lie_on_another_file_system_and_there_may_be_several(home: Home) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        far = Path(elsewhere, "inbox")
        (far / "alice").mkdir(parents=True)
        assert far.stat().st_dev != home.config.spool.parent.stat().st_dev
        near, home.config = (
            home.config.inboxes[0],
            home.config.model_copy(update={"inboxes": (*home.config.inboxes, far)}),
        )
        body, bad = home.body(prompt="from afar"), home.body(prompt="refused", audience="elsewhere")
        (far / "alice" / "a.json").write_bytes(home.seal(body))
        (far / "alice" / "b.json").write_bytes(home.seal(bad))
        here = home.drop()
        run_until_idle(home.daemon())
        assert home.outcome(Ref(CLIENT, job_id(CLIENT, body))) == home.outcome(here) == "succeeded"
        assert (
            json.loads((far.parent / "rejected/alice/b.json.reason.json").read_text())["error"]["code"] == "FORBIDDEN"
        )
        assert not (near.parent / "rejected").exists()


def test_higher_priority_first_then_order_of_arrival(home: Home) -> None:
    names = {"low": 1, "first": 5, "second": 5, "urgent": 9}
    for number, (name, priority) in enumerate(names.items()):
        home.drop(f"{number}.json", prompt=name, priority=priority)
    daemon = home.daemon()
    run_until_idle(daemon)
    prompts = [run.spec["prompt"] for run in daemon.executor.runs]  # type: ignore[attr-defined]
    assert prompts == ["urgent", "first", "second", "low"]


def test_a_job_that_kills_its_worker_fails_after_max_attempts_and_says_why(home: Home) -> None:
    ref, after = home.drop("a.json", prompt="die"), home.drop("b.json")
    daemon = home.daemon()
    daemon.clock = _hurried(daemon.clock)
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("failed", 3)
    assert manifest["error"]["code"] == "WORKER_DIED"
    assert "SIGSEGV" in manifest["error"]["message"]
    assert home.outcome(after) == "succeeded"


def _hurried(clock):  # type: ignore[no-untyped-def]
    """A clock that runs a thousand times faster, for restart delays."""
    return lambda: clock() * 1000


def test_a_failed_job_publishes_no_pictures_and_is_not_tried_again(home: Home) -> None:
    ref = home.drop(prompt="fail")
    daemon = home.daemon()
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"], manifest["artifacts"]) == ("failed", 1, [])
    assert manifest["error"] == {"code": "INVALID_PARAMETERS", "message": "no", "detail": None, "status": 422}
    status = home.config.spool / "status.json"
    run_until(daemon, lambda: json.loads(status.read_text())["totals"]["failed"] == 1)
    assert json.loads(status.read_text())["last_errors"][0]["code"] == "INVALID_PARAMETERS"


def test_an_unknown_model_fails_and_lists_the_known_ones(home: Home) -> None:
    ref = home.drop(model="no-such-model")
    run_until_idle(home.daemon())
    error = home.manifest(ref)["error"]
    assert (error["code"], error["status"]) == ("MODEL_NOT_FOUND", 404)
    assert "'no-such-model'" in error["message"]
    assert "shapes-xl" in error["message"]


def test_cancel_reaches_a_queued_job_and_a_running_one(home: Home) -> None:
    running = home.drop("a.json", prompt="stay", priority=9)
    queued = home.drop("b.json", prompt="never painted")
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    for ref in (queued, running):
        home.drop(kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    assert home.outcome(queued) == home.outcome(running) == "cancelled"
    assert home.manifest(queued)["attempts"] == 0
    assert len(daemon.executor.runs) == 1  # type: ignore[attr-defined]


def test_cancel_that_comes_with_its_job_finds_it(home: Home) -> None:
    ref = home.drop("z-job.json")
    home.drop("a-cancel.json", kind="cancel", job=ref.id, prompt=...)
    run_until_idle(home.daemon())
    assert home.outcome(ref) == "cancelled"


def test_cancel_of_an_ended_job_changes_nothing(home: Home) -> None:
    ref = home.drop()
    daemon = home.daemon()
    run_until_idle(daemon)
    home.drop("c.json", kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert not (home.config.inboxes[0].parent / "rejected").exists()


def test_nobody_cancels_what_is_not_his(home: Home) -> None:
    ref = home.drop("a.json", prompt="stay")
    mallory = Key.generate()
    with (home.root / "keys" / "allowed_signers").open("a") as signers:
        signers.write(f"mallory {mallory.public_line('m')}\n")
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    body = home.body(kind="cancel", job=ref.id, prompt=...)
    home.put(seal(body, mallory.sign(body)), "c.json")
    step(daemon)
    assert home.reason("c.json")["code"] == "JOB_NOT_FOUND"
    assert daemon.busy


def test_stop_gives_a_running_job_back_without_counting_the_attempt(home: Home) -> None:
    ref = home.drop(prompt="stay")
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    assert daemon.spool.attempts(ref) == 1
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()
    assert home.where(ref) is State.PENDING
    assert daemon.spool.attempts(ref) == 0
    assert json.loads((home.config.spool / "status.json").read_text())["state"] == "stopped"


def test_a_file_that_arrives_while_stopping_stays_in_the_inbox(home: Home) -> None:
    daemon = home.daemon()
    daemon.stop()
    home.drop("late.json")
    arrivals = daemon.doors[0].look(0.0)
    assert daemon.reception.take_in(arrivals) == ("later",)
    daemon.doors[0].settle(arrivals[0], "later")
    assert (home.config.inboxes[0] / "late.json").exists()


def test_new_keys_are_taken_over_and_broken_ones_are_not(home: Home) -> None:
    signers = home.root / "keys" / "allowed_signers"
    good = signers.read_text()
    daemon = home.daemon()
    signers.write_text("alice this is no key\n")
    step(daemon)
    assert daemon.state() == "degraded"
    assert "line 1" in daemon.health.reasons["keys"]
    first = home.drop("a.json")  # the table before it is still in force
    run_until_idle(daemon)
    assert home.outcome(first) == "succeeded"
    bob = Key.generate()
    signers.write_text(f"{good}bob {bob.public_line('b')}\n")
    step(daemon)
    assert daemon.state() == "ready"
    body = home.body(prompt="by bob")
    home.put(seal(body, bob.sign(body)), "b.json")
    run_until_idle(daemon)
    assert home.outcome(Ref("bob", job_id("bob", body))) == "succeeded"


def test_reload_takes_over_what_can_be_and_names_what_needs_a_restart(home: Home) -> None:
    daemon = home.daemon()
    path = home.root / "config.yaml"
    path.write_text(path.read_text() + "time_limit_s: 5\n")
    daemon.handle(ReloadRequested())
    assert daemon.settings.config.time_limit_s == 5.0
    daemon.look_around()
    assert daemon.doors[0].policy.config.time_limit_s == 5.0
    path.write_text(path.read_text() + "outputs: elsewhere\n")
    daemon.handle(ReloadRequested())
    assert "config.yaml changes outputs" in daemon.health.reasons["config"]
    assert daemon.settings.config.outputs == home.config.outputs
    path.write_text("time_limit_s: soon\n")
    daemon.handle(ReloadRequested())
    assert "time_limit_s" in daemon.health.reasons["config"]
    assert daemon.settings.config.time_limit_s == 5.0


def test_a_disk_that_refuses_leaves_jobs_in_the_inbox_and_says_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = home.drop("a.json")
    daemon = home.daemon()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        arrivals = daemon.doors[0].look(0.0)
        assert daemon.reception.take_in(arrivals) == ("later",)
    assert "No space left" in daemon.health.reasons["intake"]
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert "intake" not in daemon.health.reasons


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_status_tells_of_queue_and_head_without_growing_with_the_queue(home: Home) -> None:
    daemon = home.daemon()
    for number in range(150):
        daemon.turn.add(Ref(CLIENT, f"{number:020x}"), priority=5)
    told = report(daemon.health, 0.0, "ready", (), daemon.turn, ()).queue
    assert told.pending == 150
    assert told.per_client == {CLIENT: 150}
    assert [entry.id for entry in told.head] == [f"{number:020x}" for number in range(100)]


def test_the_next_job_does_not_go_to_a_worker_that_is_being_killed(home: Home) -> None:
    """The last job ended just in time; the kill was on its way already, and must not hit the next one."""
    first, second = home.drop("a.json", prompt="stay"), home.drop("b.json")
    daemon = home.daemon(time_limit_s=10.0)
    run_until(daemon, lambda: daemon.busy)
    slot = daemon.slots["cpu0"]
    died: list[Died] = []
    daemon.executor.kill = lambda worker: died.append(Died(worker, -9))  # type: ignore[method-assign]
    slot.tend(daemon.executor, daemon.settings.config, daemon.clock() + 11)  # its time is up
    assert died
    daemon.handle(Heard("cpu0", Ended(job=first, outcome=Outcome.CANCELLED)))
    daemon.look_around()
    assert slot.running is None
    daemon.handle(died[0])
    run_until_idle(daemon)
    assert home.outcome(second) == "succeeded"
    assert home.manifest(second)["attempts"] == 1


def test_a_worker_that_met_a_bug_is_replaced_before_the_next_job(home: Home) -> None:
    first, second = home.drop("a.json", prompt="stay"), home.drop("b.json")
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    failure = Failure.of(Bug("ValueError")).model_copy(update={"traceback": "..."})
    daemon.handle(Heard("cpu0", Ended(job=first, outcome=Outcome.FAILED, failure=failure)))
    assert daemon.slots["cpu0"].state == "booting"
    run_until_idle(daemon)
    assert (home.outcome(first), home.outcome(second)) == ("failed", "succeeded")


def test_a_worker_that_shows_fewer_pictures_than_asked_for_has_not_succeeded(home: Home) -> None:
    ref = home.drop("a.json", prompt="stay", count=3)
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    artifacts = tuple(paint(daemon.outputs.draft(ref), index, index) for index in range(2))
    daemon.handle(Heard("cpu0", Ended(job=ref, outcome=Outcome.SUCCEEDED, artifacts=artifacts)))
    run_until_idle(daemon)
    assert home.outcome(ref) == "failed"
    assert home.manifest(ref)["artifacts"] == []


def test_a_cancel_that_is_listed_long_before_its_job_finds_it(home: Home) -> None:
    for number in range(MAX_BATCH):
        home.drop(f"b{number}.json", prompt="stay", nonce=str(number))
    ref = home.drop("z.json", prompt="never painted")
    home.drop("a.json", kind="cancel", job=ref.id, prompt=...)
    daemon = home.daemon()
    run_until(daemon, lambda: home.where(ref) is State.DONE)
    assert home.outcome(ref) == "cancelled"


def test_cancels_of_unknown_jobs_by_the_batch_are_refused_and_hold_nobody_up(home: Home) -> None:
    for number in range(2 * MAX_BATCH):
        home.drop(f"a{number:03}.json", kind="cancel", job="0" * 20, prompt=..., nonce=str(number))
    ref = home.drop("z.json")
    daemon = home.daemon()
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert list(home.config.inboxes[0].iterdir()) == []
    reasons = (home.config.inboxes[0].parent / "rejected").glob("*.reason.json")
    assert len(list(reasons)) == 2 * MAX_BATCH


def test_an_image_type_that_breaks_the_prompts_syntax_is_told_so(home: Home) -> None:
    ref = home.drop(prompt='("a circle", "a star").and(1, 0.5)', image_type="character")
    run_until_idle(home.daemon())
    error = home.manifest(ref)["error"]
    assert error["code"] == "INVALID_PARAMETERS"
    assert "image_type" in error["message"]


def test_image_types_scale_to_the_models_size_and_wrap_the_prompt(home: Home) -> None:
    ref = home.drop(prompt="a red circle", image_type="character")
    run_until_idle(home.daemon())
    spec = home.manifest(ref)["spec"]
    assert (spec["width"], spec["height"]) == (104, 152)  # 832 x 1216 on a model of 128
    assert spec["prompt"] == "a red circle, full body, simple background"


def test_a_disk_too_full_for_the_status_does_not_end_the_daemon(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = home.daemon()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_hint", full)
        run_until(daemon, lambda: daemon.state() == "degraded")
    assert "status.json cannot be written: No space left" in daemon.health.reasons["status"]
    ref = home.drop()
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    run_until(daemon, lambda: daemon.state() == "ready")


def test_a_strangers_folder_in_the_place_of_a_result_is_moved_aside(home: Home) -> None:
    ref = home.drop()
    place = home.config.outputs / ref.client / ref.id
    place.mkdir(parents=True)
    (place / "theirs.txt").write_text("kept")
    run_until_idle(home.daemon())
    assert home.outcome(ref) == "succeeded"
    (aside,) = place.parent.glob(f".{ref.id}.*")
    assert (aside / "theirs.txt").read_text() == "kept"


def test_after_a_crash_a_manifest_of_another_version_is_finished_too(home: Home) -> None:
    ref = home.drop()
    daemon = home.daemon()
    run_until_idle(daemon)
    daemon.spool.close()
    manifest = home.config.outputs / ref.client / ref.id / "manifest.json"
    manifest.write_text(json.dumps(home.manifest(ref) | {"schema": "imagend.manifest/v7", "new": 1}))
    (home.config.spool / "done" / ref.client / f"{ref.id}.json").rename(
        home.config.spool / "active" / ref.client / f"{ref.id}.json"
    )
    home.daemon()
    assert home.where(ref) is State.DONE
    assert len(home.feed()) == 1


def test_after_a_crash_the_running_job_comes_back_in_its_old_place(home: Home) -> None:
    running = home.drop("a.json", prompt="stay")
    later = [home.drop(f"{name}.json", nonce=name) for name in "bc"]
    daemon = home.daemon()
    run_until(daemon, lambda: home.where(running) is State.ACTIVE)
    daemon.spool.close()
    assert list(home.daemon().turn) == [running, *later]
