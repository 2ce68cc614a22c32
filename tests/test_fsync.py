"""What a power cut may take: at each step, all that the step relies on has been synced before.

Nothing is cut here. A life is recorded, and syncs.py reads the record; test_crashstates cuts.
"""

from __future__ import annotations

import pickle
import re

import pytest
from conftest import Home
from disk import KILLED, SYNCS, watched
from mutants import (
    Breaks,
    answer_before_the_commit,
    claim_after_the_move,
    commit_the_bytes_only,
    commit_the_names_only,
    empty_the_inbox_first,
    forget_cancels,
    leave_before_the_sync,
    manifest_after_the_move,
    move_by_rename,
    never_commit,
    note_in_passing,
    publish_unsynced,
    publish_with_a_claim_unsynced,
    put_away_before_announcing,
    put_away_before_publishing,
    reject_before_the_reason,
    requeue_before_the_journal,
    run_before_the_claim,
    run_before_the_sync,
    set_the_time_after_the_sync,
    tell_before_the_commit,
    tell_before_the_sync,
    write_in_place,
)
from scene import big_scene, check, kill, live, quick_home, quiet
from syncs import Step, SyncKiller, TracedScene, Tracer, anonymous, violations

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
__all__ = ["quick_home", "quiet"]  # fixtures


# A good life


def record(scene: TracedScene) -> list[Step]:
    scene.refill()
    with watched(Tracer(scene)):
        live(scene)
    return list(scene.trace)


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> TracedScene:
    return big_scene(quick_home, TracedScene)


@pytest.fixture(scope="module")
def trace(scene: TracedScene) -> list[Step]:
    return record(scene)


def test_nothing_relies_on_what_a_power_cut_may_take(scene: TracedScene, trace: list[Step]) -> None:
    check(scene, deaths=0)
    assert {anonymous(violation) for violation in violations(trace)} == set()
    assert len(trace) > 300


def test_nor_after_a_death(scene: TracedScene, trace: list[Step]) -> None:
    """The next life must not rely on what the dead one wrote and did not live to sync."""
    found: dict[str, str] = {}
    for point in range(sum(step.op.name in SYNCS for step in trace)):
        scene.refill()
        assert kill(scene, SyncKiller(scene, point)) == KILLED
        before = pickle.loads(scene.will.read_bytes())  # noqa: S301
        with watched(Tracer(scene)):
            live(scene)
        last = before[-1].op
        for violation in violations(before + scene.trace):
            if not re.match("never synced: stop spool/(inbox|rejected)/", violation):  # it would be refused again
                found.setdefault(anonymous(violation), anonymous(f"{last.name} {last.path} {last.target}"))
    assert not found, "".join(f"\n{violation}, after a death upon {last}" for violation, last in found.items())


# One sync less


SYNC_POINTS = (
    "_check_version: spool/..version.tmp",
    "_open_or_make: spool",
    "reject: spool/rejected/.refused.json.reason.json.tmp",
    "reject: spool/rejected/.unfinished.json.reason.json.tmp",
    "reject: spool/rejected",
    "reject: spool/inbox",
    "accept: spool/pending",
    "commit: spool/pending/alice/ID.json",
    "commit: spool/pending/alice",
    "accept: spool/journal",
    "commit: spool/journal/alice",
    "claim: spool/journal/alice/ID.jsonl",
    "claim: spool/active",
    "claim: spool/active/alice",
    "requeue: spool/journal/alice/ID.jsonl",
    "requeue: spool/pending/alice",
    "release: spool/journal/alice/ID.jsonl",
    "release: spool/pending/alice",
    "stop_job: spool/journal/alice/ID.jsonl",
    "complete: outputs/.drafts/alice/ID/PICTURE",
    "complete: outputs/.drafts/alice/ID/manifest.json",
    "claim: outputs/.drafts/alice/ID/PICTURE",
    "claim: outputs/.drafts/alice/ID/manifest.json",
    "claim: outputs/.drafts/alice/ID",
    "complete: outputs/.drafts/alice/ID",
    "claim: outputs/.drafts/alice/ID/generate/PICTURE",
    "claim: outputs/.drafts/alice/ID/generate",
    "claim: outputs/.drafts/alice/ID/upscale/PICTURE",
    "claim: outputs/.drafts/alice/ID/upscale",
    "complete: outputs/.drafts/alice/ID/generate/PICTURE",
    "complete: outputs/.drafts/alice/ID/generate",
    "show: outputs",
    "confirm: outputs/alice",
    "announce: outputs",
    "announce: outputs/results.jsonl",
    "finish: spool/done",
    "finish: spool/done/alice",
)
SPARE = {
    "open: .": "recovery syncs it again, before anything lies in outputs/",
    "open: spool": "the folders made later sync it again, before anything relies on it",
    "_check_version: spool": "the same; and without .version the file is written anew",
    "open: outputs": "publish syncs it again; before that, nothing of worth is in it",
    "draft: outputs/.drafts": "what was painted there is painted again",
    "commit: spool/active/alice": "dropped again while it is painted: only one that a dead daemon accepted needs it",
    "commit: spool/active/alice/ID.json": "the same",
}
AT_START = re.compile(r"(open|sweep|settle|recover): .*")
"""For what a dead daemon left behind: test_nor_after_a_death needs them, a good life does not."""


@pytest.mark.parametrize("point", SYNC_POINTS)
def test_one_sync_less_is_seen(trace: list[Step], point: str) -> None:
    less = [step for step in trace if step.point != point]
    assert less != trace
    assert len(violations(less)) > len(violations(trace))


def test_every_sync_is_known(trace: list[Step]) -> None:
    """A sync that nobody would miss is a cost, or a promise that no test keeps."""
    known = {*SYNC_POINTS, *SPARE}
    assert {step.point for step in trace if step.point not in known and not AT_START.fullmatch(step.point)} == {""}


# Two steps swapped, or one left out


MUTANTS: dict[Breaks, str] = {
    write_in_place: "written in place",
    set_the_time_after_the_sync: "left the inbox before it was safe in the queue",
    never_commit: "left the inbox before it was safe in the queue",
    answer_before_the_commit: "left the inbox before it was safe in the queue",
    commit_the_names_only: "left the inbox before it was safe in the queue",
    commit_the_bytes_only: "left the inbox before it was safe in the queue",
    empty_the_inbox_first: "left the inbox before it was safe in the queue",
    reject_before_the_reason: "rejected before the reason was safe",
    claim_after_the_move: "moved before the journal told of it",
    run_before_the_claim: "run without a claim",
    run_before_the_sync: "run before the claim was safe",
    requeue_before_the_journal: "moved before the journal told of it",
    move_by_rename: "moved by a rename",
    leave_before_the_sync: "left its state before it was safe in the next",
    forget_cancels: "left the inbox before the wish was safe",
    note_in_passing: "moved before the journal was safe",
    publish_unsynced: "published before all of the draft was safe",
    publish_with_a_claim_unsynced: "published before all of the draft was safe",
    manifest_after_the_move: "published without its manifest",
    put_away_before_publishing: "put away before the result was safe",
    put_away_before_announcing: "put away before the feed told of it",
    tell_before_the_commit: "told before it was safe in the queue",
    tell_before_the_sync: "told before the result was safe",
}


@pytest.mark.parametrize("breaks", MUTANTS, ids=lambda breaks: breaks.__name__)
def test_a_wrong_order_is_seen(scene: TracedScene, breaks: Breaks) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        found = violations(record(scene))
    assert {violation.partition(":")[0] for violation in found} >= {MUTANTS[breaks]}
