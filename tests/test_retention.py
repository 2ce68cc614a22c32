"""What has ended goes in time, and not before: seen by a clock that the test sets, and files whose times it sets."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until_idle, step
from test_cli import imagend

from imagend import config as configuration
from imagend import results, retention
from imagend.daemon.loop import Daemon
from imagend.daemon.report import report
from imagend.daemon.retention import AT_ONCE, DISBELIEF_S, Retention
from imagend.job import Ref
from imagend.spool import Spool, State
from imagend.status import Gpus

HOUR_S, DAY_S = 3600.0, 86400.0


@dataclass
class Place:
    """A daemon, its retention without its thread, and a clock for the two."""

    home: Home
    daemon: Daemon
    now: float = 0.0
    offset: float = field(default=0.0)
    """how far the wall clock is ahead of the other one"""

    def __post_init__(self) -> None:
        self.now = datetime.now(UTC).timestamp()
        self.retention = Retention(
            self.daemon.spool,
            self.daemon.outputs,
            self.daemon.ending.is_tidied,
            lambda: self.daemon.settings.config,
            wall=lambda: self.now + self.offset,
            clock=lambda: self.now,
        )
        self.daemon.health.retain(self.retention)

    def later(self, seconds: float) -> None:
        """So much later, all that is due has gone."""
        self.now += seconds
        self.turn()

    def turn(self) -> None:
        self.retention.look()
        while self.retention._results or self.retention._jobs:
            step(self.daemon)
        self.retention.clear()

    def paint(self, home: Home | None = None, **fields: Any) -> Ref:
        ref = (home or self.home).drop(**fields)
        run_until_idle(self.daemon)
        return ref

    def folder(self, ref: Ref) -> Path:
        return self.home.config.outputs / ref.client / ref.id

    def has(self, ref: Ref) -> bool:
        return self.folder(ref).exists()


def settled(home: Home, text: str, client: str = "") -> None:
    """These keys of `retention`, and of a client."""
    path = home.root / "config.yaml"
    clients = f"clients: {{{client}}}\n" if client else ""
    path.write_text(f"{path.read_text()}retention: {{{text}}}\n{clients}")
    home.config = configuration.load(path)


@pytest.fixture
def place(home: Home) -> Place:
    return Place(home, home.daemon())


# When


def test_a_result_goes_a_day_after_its_job_ended(place: Place) -> None:
    ref = place.paint(seed=1)
    place.later(24 * HOUR_S - 60)
    assert place.has(ref)
    place.later(120)
    assert not place.has(ref)
    assert list((place.home.config.outputs / ".trash").iterdir()) == []


def test_one_that_was_retrieved_goes_an_hour_after(place: Place) -> None:
    kept, gone = place.paint(seed=1), place.paint(seed=2)
    results.mark(place.folder(gone))
    place.later(HOUR_S - 60)
    assert place.has(gone)
    place.later(120)
    assert (place.has(kept), place.has(gone)) == (True, False)


def test_a_marker_as_old_as_the_manifest_says_nothing(place: Place) -> None:
    ref = place.paint(seed=1)
    results.mark(place.folder(ref))
    at = (place.folder(ref) / "manifest.json").stat().st_mtime_ns
    os.utime(place.folder(ref) / "retrieved", ns=(at, at))
    place.later(2 * HOUR_S)
    assert place.has(ref)


def test_a_client_may_have_times_of_its_own(home: Home) -> None:
    settled(home, "unretrieved_h: 24", f"{CLIENT}: {{unretrieved_h: 2}}, bob: {{unretrieved_h: null}}")
    bob, carol = home.neighbour("bob"), home.neighbour("carol")
    place = Place(home, home.daemon())
    refs = [place.paint(seed=1), place.paint(bob), place.paint(carol)]
    place.later(3 * HOUR_S)
    assert [place.has(ref) for ref in refs] == [False, True, True]
    place.later(400 * DAY_S)
    assert [place.has(ref) for ref in refs] == [False, True, False]


def test_too_many_bytes_take_the_retrieved_first_and_then_the_oldest_of_who_has_most(home: Home) -> None:
    settled(home, "retrieved_h: 20, outputs_gb: 0.0004")
    bob = home.neighbour("bob")
    place = Place(home, home.daemon())
    small = place.paint(bob, seed=1)
    refs = [place.paint(seed=number) for number in range(6)]
    results.mark(place.folder(refs[4]))
    for ref in (small, *refs):
        picture = place.folder(ref) / "0000.png"
        picture.write_bytes(bytes(50_000 if ref == small else 100_000))
    sizes = {result.ref: result.size for result in results.found(home.config.outputs)}
    most, kept = 400_000, [small, *refs]
    for ref in (refs[4], *refs):  # bob's is the oldest, and he has less than his share
        if sum(sizes[one] for one in kept) > most and ref in kept:
            kept.remove(ref)
    place.retention.look()  # who has most, it learns at the first look
    place.turn()
    place.turn()
    assert [ref for ref in (small, *refs) if place.has(ref)] == kept
    assert small in kept
    assert refs[4] not in kept
    assert len(kept) == 4


def test_a_full_disk_takes_what_was_retrieved_and_nothing_else(home: Home) -> None:
    place = Place(home, home.daemon())
    kept, gone = place.paint(seed=1), place.paint(seed=2)
    results.mark(place.folder(gone))
    for free, leave in ((home.config.reserve_mb << 20, []), ((home.config.reserve_mb << 20) - 1, [gone])):
        stock = retention.look_at_results(home.config, place.daemon.spool, place.now, (), free)
        assert [one.ref for one in stock.leaving if one.at <= place.now] == leave
        assert {one.ref for one in stock.leaving} == {kept, gone}


# Never before


def test_a_job_file_that_comes_again_after_its_result_went_is_not_painted_again(place: Place) -> None:
    raw = place.home.sealed(seed=1)
    ref = place.home.drop_body(raw.rpartition(b',"signature"')[0] + b"}")
    run_until_idle(place.daemon)
    place.later(25 * HOUR_S)
    assert not place.has(ref)
    place.home.put(raw, "again.json")
    run_until_idle(place.daemon)
    assert list(place.home.config.inboxes[0].iterdir()) == []
    assert not place.has(ref)
    assert [run.job for run in place.daemon.executor.runs] == [ref]  # type: ignore[attr-defined]


def test_what_done_does_not_know_stays_until_its_job_file_has_expired(place: Place) -> None:
    ref = place.paint(seed=1)
    Spool(place.home.config.spool).forget(ref)
    place.later(7 * DAY_S + 12 * HOUR_S)
    assert place.has(ref)
    place.later(DAY_S)
    assert not place.has(ref)


@pytest.mark.parametrize("state", [State.PENDING, State.ACTIVE])
def test_a_job_that_is_queued_again_keeps_its_result(place: Place, state: State) -> None:
    ref = place.paint(seed=1)
    place.now += 25 * HOUR_S
    place.retention.look()
    spool = place.home.config.spool
    os.rename(spool / "done" / CLIENT / f"{ref.id}.json", spool / state / CLIENT / f"{ref.id}.json")  # noqa: PTH104
    place.retention.tend()
    place.retention.clear()
    assert place.has(ref)


def test_a_result_whose_end_is_yet_to_be_written_down_stays(place: Place) -> None:
    ref = place.paint(seed=1)
    place.now += 25 * HOUR_S
    place.retention.look()
    place.daemon.ending._untidied[ref] = "succeeded"
    place.retention.tend()
    assert place.has(ref)


def test_a_clock_that_jumps_ahead_is_not_believed_at_once(place: Place) -> None:
    ref = place.paint(seed=1)
    place.retention.look()
    place.offset = 48 * HOUR_S
    place.later(60)
    assert place.has(ref)
    place.offset = 0.0  # it was set right
    place.later(DISBELIEF_S)
    assert place.has(ref)
    place.offset = 48 * HOUR_S  # it stays so
    place.later(60)
    place.later(DISBELIEF_S)
    assert not place.has(ref)


def test_drafts_and_strangers_files_stay(place: Place) -> None:
    outputs = place.home.config.outputs
    place.paint(seed=1)
    others = [outputs / ".drafts" / CLIENT / ("0" * 20) / "manifest.json", outputs / CLIENT / "mine" / "manifest.json"]
    others.append(outputs / CLIENT / ("1" * 20) / "no manifest")
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    elsewhere = place.home.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("{}")
    (outputs / CLIENT / ("2" * 20)).symlink_to(elsewhere)
    place.later(400 * DAY_S)
    assert all(path.exists() for path in (*others, elsewhere / "manifest.json"))


# Jobs


def test_an_ended_jobs_file_and_story_go_after_a_month(place: Place) -> None:
    ref = place.paint(seed=1)
    spool = place.home.config.spool
    place.later(29 * DAY_S)
    assert place.home.where(ref) is State.DONE
    place.later(2 * DAY_S)
    assert place.home.where(ref) is None
    assert list((spool / "journal" / CLIENT).iterdir()) == []


def test_beyond_their_number_the_oldest_go_but_none_before_its_file_expires(home: Home) -> None:
    settled(home, "max_done: 1")
    place = Place(home, home.daemon())
    long = place.paint(seed=1, expires_at=datetime.fromtimestamp(place.now + 6 * DAY_S, UTC).isoformat())
    refs = [place.paint(seed=number) for number in (2, 3)]
    place.turn()
    assert [home.where(ref) for ref in (long, *refs)] == [State.DONE] * 3
    place.later(26 * HOUR_S)  # a job that names no expires_at is valid for a day
    assert [home.where(ref) for ref in (long, *refs)] == [State.DONE, None, State.DONE]
    place.later(6 * DAY_S)
    assert [home.where(ref) for ref in (long, *refs)] == [None, None, State.DONE]


def test_done_days_below_the_life_of_a_job_file_are_refused(home: Home) -> None:
    with pytest.raises(configuration.BadConfig, match=r"retention\.done_days"):
        settled(home, "done_days: 7")


# In small steps


def test_the_loop_takes_a_few_at_a_time(place: Place) -> None:
    refs = [place.home.drop(f"{number}.json", seed=number) for number in range(AT_ONCE + 3)]
    run_until_idle(place.daemon)
    place.now += 25 * HOUR_S
    place.retention.look()
    place.retention.tend()
    assert sum(place.has(ref) for ref in refs) == 3
    place.retention.tend()
    assert sum(place.has(ref) for ref in refs) == 0


def test_what_a_dead_process_left_in_the_trash_goes_at_the_next_start(place: Place) -> None:
    ref = place.paint(seed=1)
    place.now += 25 * HOUR_S
    place.retention.look()
    place.retention.tend()
    (left,) = (place.home.config.outputs / ".trash").iterdir()
    assert {path.name for path in left.iterdir()} == {"0000.png", "manifest.json"}
    place.daemon.spool.close()
    again = Place(place.home, place.home.daemon())
    again.daemon.outputs.discard_the_rest()
    assert list((place.home.config.outputs / ".trash").iterdir()) == []
    assert not again.has(ref)


def test_a_disk_that_refuses_is_told_and_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = place.paint(seed=1)
    place.now += 25 * HOUR_S
    place.retention.look()
    with monkeypatch.context() as patch:
        patch.setattr(place.daemon.outputs, "retire", _refuse)
        step(place.daemon)
    assert "cannot be removed" in place.daemon.health.reasons["retention"]
    place.turn()
    assert not place.has(ref)


def _refuse(ref: Ref) -> None:
    raise OSError(5, "Input/output error", str(ref))


# Who asks is told


def test_who_looks_for_a_result_that_went_is_told_when_and_why(place: Place, tmp_path: Path) -> None:
    ref = place.paint(seed=1)
    place.later(25 * HOUR_S)
    (line,) = (json.loads(line) for line in (place.home.config.outputs / "removed.jsonl").read_text().splitlines())
    assert (line["client"], line["id"], line["outcome"]) == (ref.client, ref.id, "succeeded")
    told = f"succeeded; its result was removed at {line['removed_at']}, 24 h after its job ended"
    (tmp_path / "config.yaml").write_text(f"outputs: {place.home.config.outputs}\nclient: {{name: {CLIENT}}}\n")
    for cwd in (place.home.root, tmp_path):  # the second sees the outputs only
        watched = imagend("watch", ref.id, cwd=cwd)
        assert (watched.returncode, watched.stdout.strip()) == (6, f"{ref.id} {told}")
        fetched = imagend("retrieve", ref.id, "to", cwd=cwd)
        assert (fetched.returncode, told in fetched.stderr) == (64, True)
        again = imagend("replay", ref.id, cwd=cwd)
        assert (again.returncode, told in again.stderr) == (64, True)


def test_the_command_shows_what_goes_and_removes_nothing(place: Place) -> None:
    soon, late = place.paint(seed=1), place.paint(seed=2)
    at = place.now - 30 * HOUR_S
    os.utime(place.folder(soon) / "manifest.json", (at, at))
    before = sorted(place.home.root.rglob("*"))
    shown = imagend("retention", cwd=place.home.root)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("2 results, ")
    assert [line.split()[:2] for line in lines[1:2]] == [["now", str(soon)]]
    assert lines[2].split()[:4] == ["in", "24.0", "h", str(late)]
    told = json.loads(imagend("retention", "--json", cwd=place.home.root).stdout)
    assert [one["id"] for one in told["results"]] == [soon.id, late.id]
    assert {one["id"] for one in told["jobs"]} == {soon.id, late.id}
    assert sorted(place.home.root.rglob("*")) == before


def test_status_and_metrics_tell_of_the_storage(home: Home) -> None:
    place = Place(home, home.daemon(metrics=home.root / "imagend.prom"))
    refs = [place.paint(seed=number) for number in range(3)]
    place.later(60)
    told = report(place.daemon.health, 0.0, "ready", (), place.daemon.turn, ())
    storage = told.model_dump(mode="json")["storage"]
    assert (storage["outputs_count"], storage["done_count"], storage["removed"]["results"]) == (3, 3, 0)
    assert storage["next_removal"]["id"] in {ref.id for ref in refs}
    assert storage["free_mb"] > 0
    place.later(25 * HOUR_S)
    place.turn()
    storage = place.retention.storage()
    assert (storage["outputs_count"], storage["removed"]["results"], storage["next_removal"]) == (0, 3, None)
    assert place.daemon.health.metrics
    place.daemon.health.metrics.write(False, None, Gpus(available=False))
    assert 'imagend_removed_total{what="results"} 3.0' in (home.root / "imagend.prom").read_text()


def test_history_knows_what_went(place: Place) -> None:
    ref = place.paint(seed=1, model="shapes-xl")
    place.later(25 * HOUR_S)
    told = imagend("history", "--json", cwd=place.home.root)
    assert told.returncode == 0, told.stderr
    assert ref.id in told.stdout
    assert "shapes-xl" in told.stdout
