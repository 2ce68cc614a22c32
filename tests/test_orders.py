"""What operators ask for: pause, resume, hold, release, requeue, purge; killed at every operation."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle, step
from crashstates import Journalled, Literal, Tree, crash_states, snapshot
from crashstates import State as CrashState
from disk import KILLED, Recorder, points, watched
from fakes import FakeExecutor
from scene import Scene, complaints, dies_at, feed, quick_home, quiet
from syncs import Step, TracedScene, Tracer

from imagend.cli import run
from imagend.cli.order import find
from imagend.daemon.executor import Mailbox
from imagend.daemon.loop import Daemon
from imagend.errors import UsageError
from imagend.job import Ref
from imagend.messages import Message, Run, Stop
from imagend.orders import Orders, Wishes, name_of
from imagend.spool import State

__all__ = ["quick_home", "quiet"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12, where there are threads


def imagend(home: Home, *words: str) -> int:
    return run([*words, "--config", str(home.root / "config.yaml")])


def look_around(daemon: Daemon, times: int = 3) -> None:
    for _ in range(times):
        daemon.look_around()
        while not daemon.mailbox.empty():
            daemon.handle(daemon.mailbox.get())


def ended(home: Home, ref: Ref) -> str | None:
    return home.outcome(ref) if (home.config.outputs / ref.client / ref.id).exists() else None


def status(home: Home, daemon: Daemon) -> dict[str, object]:
    daemon.health._written = float("-inf")
    daemon.look_around()
    queue: dict[str, object] = json.loads((home.config.spool / "status.json").read_text())["queue"]
    return queue


def test_paused_jobs_are_taken_in_and_wait_until_they_are_resumed(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = home.daemon()
    assert imagend(home, "pause", "--reason", "new cards come") == 0
    ref = home.drop()
    run_until(daemon, lambda: len(daemon.turn) == 1)
    look_around(daemon)
    assert daemon.executor.runs == []  # type: ignore[attr-defined]
    queue = status(home, daemon)
    assert queue["paused"]["reason"] == "new cards come"  # type: ignore[index]
    assert [job["estimated_wait_seconds"] for job in queue["head"]] == [None]  # type: ignore[attr-defined]
    assert imagend(home, "resume") == 0
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert "resumed: jobs are handed out again" in capsys.readouterr().out
    assert imagend(home, "resume") == 0
    assert capsys.readouterr().out == "jobs were not paused\n"


def test_a_pause_of_one_client_outlives_a_restart_and_leaves_the_others_alone(home: Home) -> None:
    bob = home.neighbour("bob")
    imagend(home, "pause", "--client", "bob")
    mine, bobs = home.drop(), bob.drop()
    daemon = home.daemon()
    run_until(daemon, lambda: ended(home, mine) == "succeeded")
    look_around(daemon)
    daemon.spool.close()
    daemon = home.daemon()
    look_around(daemon)
    assert (home.where(bobs), daemon.executor.runs) == (State.PENDING, [])  # type: ignore[attr-defined]
    queue = status(home, daemon)
    assert (list(queue["paused_clients"]), queue["head"], queue["pending"]) == (["bob"], [], 1)  # type: ignore[call-overload]
    told = json.loads((home.config.outputs / "bob" / f"{bobs.id}.state.json").read_text())
    assert (told["state"], told["waits_for"]) == ("queued", "resume")
    imagend(home, "resume", "--client", "bob")
    run_until_idle(daemon)
    assert home.outcome(bobs) == "succeeded"


class Leaver(FakeExecutor):
    """Leaves when it is asked to, with the job it holds."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(mailbox)
        self.stops = 0

    def send(self, worker: str, message: Message) -> None:
        self.stops += isinstance(message, Stop)
        super().send(worker, message)


def test_a_pause_now_puts_the_running_job_back_unharmed(home: Home) -> None:
    daemon = home.daemon(Leaver)
    ref = home.drop(prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    imagend(home, "pause")
    look_around(daemon)
    assert daemon.busy  # what runs is finished
    imagend(home, "pause", "--now")
    run_until(daemon, lambda: home.where(ref) is State.PENDING)
    assert daemon.spool.attempts(ref) == 0
    assert daemon.slots["cpu0"].deaths == 0
    look_around(daemon, 5)
    assert daemon.executor.stops == 1  # type: ignore[attr-defined]
    imagend(home, "resume")
    run_until(daemon, lambda: home.where(ref) is State.ACTIVE)
    assert daemon.spool.attempts(ref) == 1


def test_a_held_job_is_passed_over_and_can_be_cancelled(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    held, other = home.drop(nonce="a"), home.drop(nonce="b")
    daemon = home.daemon()
    run_until(daemon, lambda: len(daemon.turn) == 2 or daemon.busy)
    imagend(home, "pause")
    look_around(daemon)
    waiting = [ref for ref in (held, other) if home.where(ref) is State.PENDING]
    for ref in waiting:
        imagend(home, "hold", ref.id[:6])
    imagend(home, "resume")
    look_around(daemon, 5)
    assert [ref for ref in (held, other) if home.where(ref) is State.PENDING] == waiting
    home.drop("c.json", kind="cancel", job=waiting[0].id, prompt=...)
    run_until(daemon, lambda: ended(home, waiting[0]) == "cancelled")
    status(home, daemon)
    assert imagend(home, "watch", waiting[-1].id, "--timeout", "0") == 75
    assert "queued, held by an operator" in capsys.readouterr().out
    for ref in waiting[1:]:
        imagend(home, "release", ref.id)
    run_until_idle(daemon)
    look_around(daemon)
    assert list(Orders(home.config.spool).folder.iterdir()) == []  # the hold of the cancelled one, too


def test_hold_of_what_has_ended_and_of_what_nobody_knows_is_refused(home: Home) -> None:
    ref, other = home.drop(nonce="a"), home.drop(nonce="b")
    run_until_idle(home.daemon())
    with pytest.raises(UsageError, match="No job 0000 is known here"):
        find(home.config, "0000")
    with pytest.raises(UsageError, match="is no job id"):
        find(home.config, "xyz")
    assert find(home.config, f"{CLIENT}/{ref.id[:8]}") == ref
    assert imagend(home, "hold", ref.id) == 64
    assert imagend(home, "requeue", other.id) == 64


def test_an_ambiguous_id_lists_what_it_may_mean(home: Home) -> None:
    folder = home.config.spool / "pending" / CLIENT
    folder.mkdir(parents=True)
    for digit in "ab":
        (folder / f"0123{digit * 16}.json").touch()
    with pytest.raises(UsageError, match=f"may be 2 jobs: {CLIENT}/0123a+, {CLIENT}/0123b+. Write more digits"):
        find(home.config, "0123")


def test_a_failed_job_is_tried_again_with_attempts_counted_anew(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(prompt="die")
    run_until_idle(daemon)
    assert (home.outcome(ref), home.manifest(ref)["attempts"]) == ("failed", 3)
    imagend(home, "requeue", ref.id)
    run_until(daemon, lambda: ref in daemon.turn or daemon.busy)
    run_until_idle(daemon)
    assert (home.outcome(ref), home.manifest(ref)["attempts"]) == ("failed", 3)
    assert [line["id"] for line in home.feed()] == [ref.id] * 2
    story = daemon.spool.story(ref)
    (again,) = [line for line in story if line["event"] == "reopened"]
    assert (again["outcome"], again["code"]) == ("failed", "WORKER_DIED")


def test_a_cancelled_job_that_is_queued_again_is_not_cancelled_by_the_old_wish(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    home.drop("c.json", kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    assert home.outcome(ref) == "cancelled"
    imagend(home, "requeue", ref.id)
    run_until(daemon, lambda: home.where(ref) is State.ACTIVE)
    daemon.spool.close()  # it dies
    daemon = home.daemon()
    run_until(daemon, lambda: daemon.busy)
    assert daemon.spool.attempts(ref) == 2


def test_of_a_purged_job_only_its_id_stays_and_its_file_is_not_painted_again(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    body = home.body(prompt="a secret garden")
    ref = home.drop_body(body, "a.json")
    daemon = home.daemon()
    run_until_idle(daemon)
    imagend(home, "purge", ref.id)
    run_until(daemon, lambda: not (home.config.outputs / CLIENT / ref.id).exists())
    run_until_idle(daemon)
    for folder in (home.config.spool, home.config.outputs):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert home.where(ref) is State.DONE
    assert imagend(home, "watch", ref.id) == 6
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{ref.id} ended; its result was removed at \S+, purged", last)
    home.drop_body(body, "again.json")
    run_until_idle(daemon)
    assert len(daemon.executor.runs) == 1  # type: ignore[attr-defined]
    assert list(home.config.inboxes[0].iterdir()) == []


def test_a_waiting_job_is_not_purged(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    assert imagend(home, "purge", ref.id) == 64
    Orders(home.config.spool).give(name_of("purge", ref))  # by hand
    look_around(daemon, 5)
    assert home.where(ref) is State.ACTIVE
    assert not (Orders(home.config.spool).folder / name_of("purge", ref)).exists()


def test_what_is_no_order_is_passed_over(home: Home) -> None:
    orders = Orders(home.config.spool)
    assert orders.read() == Wishes()
    for name in ("hold", "hold.xyz.alice", f"hold.{'0' * 20}..._x", "pause.", "pause.-x", "rm", ".pause"):
        orders.give(name)
    orders.give("pause.bob", reason="r" * 999, now="yes")
    (orders.folder / "pause").write_bytes(b"\xff not json")
    wishes = orders.read()
    assert wishes.pause is not None
    assert list(wishes.paused) == ["bob"]
    assert (wishes.paused["bob"].now, len(wishes.paused["bob"].reason)) == (False, 200)
    assert wishes.held == set()


@pytest.mark.parametrize("command", ["pause", "resume", "hold", "release", "requeue", "purge"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run([command, "--help"])
    assert "while the daemon is stopped" in " ".join(capsys.readouterr().out.split())


# Killed at every operation


class Once(FakeExecutor):
    """Fails a job whose prompt says so at its first attempt only."""

    def attempt(self, worker: str, run: Run) -> None:
        marker = Path(run.folder).parents[3] / f"tried {run.job.id}"
        if run.spec["prompt"] == "fail" and marker.exists():
            run = run.model_copy(update={"spec": {**run.spec, "prompt": "works now"}})
        marker.touch()
        super().attempt(worker, run)


def fill(home: Home) -> tuple[Ref, Ref, Ref]:
    """A job that failed and shall be tried again, one that shall be purged, one that is held; orders given."""
    for path in (home.config.spool, home.config.outputs):
        shutil.rmtree(path, ignore_errors=True)
    for path in home.root.glob("tried *"):
        path.unlink()
    again, gone = home.drop(prompt="fail"), home.drop(prompt="a secret")
    live(home)
    held = home.drop(prompt="held")
    orders = Orders(home.config.spool)
    orders.give(name_of("requeue", again))
    orders.give(name_of("purge", gone))
    orders.give(name_of("hold", held))
    return again, gone, held


def live(home: Home) -> None:
    daemon = home.daemon(Once, heartbeat_s=1e-9)
    seconds = itertools.count()
    daemon.clock = lambda: float(next(seconds))
    daemon._patience_s = lambda: 0.0  # type: ignore[method-assign]
    daemon.outputs.discard_the_rest()  # as retention's thread does first
    quiet_steps = 0
    while quiet_steps < 3:
        busy = step(daemon) or list(home.config.inboxes[0].glob("*.json")) or daemon.unwritten
        quiet_steps = 0 if busy and daemon.turn.held != len(daemon.turn) else quiet_steps + 1
    daemon.spool.close()


def wrong(home: Home, again: Ref, gone: Ref, held: Ref) -> str:
    """Live on, twice; what does not hold then."""
    orders = Orders(home.config.spool)
    rest = [home.config.outputs / ".drafts", home.config.outputs / ".trash"]
    return complaints(
        lambda: live(home),
        lambda: ensure(home.outcome(again) == "succeeded", "the failed job was not tried again"),
        lambda: ensure(home.where(again) is State.DONE, "it is not put away"),
        lambda: ensure([line["id"] for line in lines(home)].count(again.id) >= 2, "its second end is not told"),
        lambda: ensure(home.where(gone) is State.DONE, "the purged job's id is forgotten"),
        lambda: ensure(not (home.config.outputs / CLIENT / gone.id).exists(), "its result is still there"),
        lambda: ensure(
            not (home.config.spool / "journal" / CLIENT / f"{gone.id}.jsonl").exists(), "its story is there"
        ),
        lambda: ensure(home.where(held) is State.PENDING, "the held job is not held"),
        lambda: ensure([path.name for path in orders.folder.iterdir()] == [name_of("hold", held)], "orders lie there"),
        lambda: live(home),
        lambda: ensure(
            not [path for folder in rest for path in folder.rglob("*") if path.is_file()], "not all is gone"
        ),
        lambda: ensure(not secrets(home), "the purged job's words are still there"),
    )


def ensure(holds: bool, what: str) -> None:
    assert holds, what


def secrets(home: Home) -> list[Path]:
    return [path for path in home.config.spool.rglob("*") if path.is_file() and b"a secret" in path.read_bytes()]


def lines(home: Home) -> list[dict[str, Any]]:
    return list(feed(Scene(home)))


def test_a_death_anywhere_leaves_no_order_half_done(quick_home: Home, quiet: None) -> None:
    fill(quick_home)
    recorder = Recorder()
    with watched(recorder):
        live(quick_home)
    strikes = points(recorder.ops)
    assert sum("orders/" in strike for strike in strikes) == 2
    survived = set()
    for point, strike in enumerate(strikes):
        refs = fill(quick_home)
        survived |= {dies_at(point, lambda: live(quick_home))}
        assert wrong(quick_home, *refs) == "", strike
    assert survived <= {KILLED, 0}
    assert KILLED in survived


@dataclass
class Life:
    """What the daemon did to the disk for the orders."""

    home: Home
    refs: tuple[Ref, Ref, Ref]
    before: Tree
    steps: list[Step]

    def broken(self, without: str = "") -> list[str]:
        """What does not hold after a power cut at any moment, if the disk did all but the syncs `without`."""
        ops = [step.op for step in self.steps if not without or step.point != without]
        assert not without or len(ops) < len(self.steps)
        found = []
        for kind in (Journalled, Literal):
            for state in crash_states(kind(self.before), ops, 8):
                self.restore(state)
                if says := wrong(self.home, *self.refs):
                    found.append(says)
                    if without:
                        return found
        return found

    def restore(self, state: CrashState) -> None:
        for folder in (self.home.config.spool, self.home.config.outputs):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.home.root.glob("tried *"):
            path.unlink()
        (self.home.root / f"tried {self.refs[0].id}").touch()
        for name, data in state.tree:
            if data is None:
                (self.home.root / name).mkdir()
            else:
                (self.home.root / name).write_bytes(data)
        self.home.config.inboxes[0].mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="module")
def life(quick_home: Home) -> Life:
    refs = fill(quick_home)
    before = snapshot(quick_home.root)
    scene = TracedScene(quick_home)
    with watched(Tracer(scene)):
        live(quick_home)
    steps = [step for step in scene.trace if step.op.path.startswith(("spool", "outputs"))]
    return Life(quick_home, refs, before, steps)


def test_a_power_cut_at_any_moment_leaves_no_order_half_done(life: Life, quiet: None) -> None:
    assert life.broken() == []


@pytest.mark.parametrize(
    "point",
    [
        "reopen: spool/journal/alice/ID.jsonl",
        "discard: outputs/alice",
        "requeue_ended: spool/pending/alice/.ID.json.tmp",
        "requeue_ended: spool/pending/alice",
        "bury: spool/done/alice",
        "bury: spool/journal/alice",
    ],
)
def test_one_sync_less_leaves_one_half_done(life: Life, quiet: None, point: str) -> None:
    assert {step.point for step in life.steps} >= {point}, sorted({step.point for step in life.steps})
    assert life.broken(without=point)
