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
    claim_after_the_move,
    empty_the_inbox_first,
    forget_cancels,
    manifest_after_the_move,
    never_commit,
    never_seal,
    note_in_passing,
    put_away_before_announcing,
    put_away_before_publishing,
    reject_before_the_reason,
    requeue_before_the_journal,
    run_before_the_claim,
    set_the_time_after_the_sync,
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
    "_reject: spool",
    "_reject: spool/rejected/.refused.json.reason.json.tmp",
    "_reject: spool/rejected/.unfinished.json.reason.json.tmp",
    "_reject: spool/rejected",
    "_reject: spool/inbox",
    "accept: spool/pending",
    "accept: spool/pending/alice/.ID.json.tmp",
    "commit: spool/pending/alice",
    "claim: spool/journal",
    "claim: spool/journal/alice",
    "claim: spool/journal/alice/ID.jsonl",
    "claim: spool/active",
    "claim: spool/active/alice",
    "claim: spool/pending/alice",
    "requeue: spool/journal/alice/ID.jsonl",
    "requeue: spool/pending/alice",
    "requeue: spool/active/alice",
    "release: spool/journal/alice/ID.jsonl",
    "release: spool/pending/alice",
    "release: spool/active/alice",
    "cancel: spool/journal/alice/ID.jsonl",
    "seal: outputs/.drafts/alice/ID/0000.png",
    "seal: outputs/.drafts/alice/ID/0001.png",
    "publish: outputs/.drafts/alice/ID/.manifest.json.tmp",
    "publish: outputs/.drafts/alice/ID",
    "publish: outputs",
    "publish: outputs/alice",
    "announce: outputs",
    "announce: outputs/results.jsonl",
    "finish: spool/done",
    "finish: spool/done/alice",
    "finish: spool/active/alice",
    "finish: spool/pending/alice",
)
SPARE = {
    "open: .": "recovery syncs it again, before anything lies in outputs/",
    "open: spool": "the folders made later sync it again, before anything relies on it",
    "_check_version: spool": "the same; and without .version the file is written anew",
    "open: outputs": "publish syncs it again; before that, nothing of worth is in it",
    "publish: outputs/.drafts/alice": "a draft that comes back is swept",
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
    set_the_time_after_the_sync: "published before its bytes were safe",
    never_commit: "left the inbox before it was safe in the queue",
    empty_the_inbox_first: "left the inbox before it was safe in the queue",
    reject_before_the_reason: "rejected before the reason was safe",
    claim_after_the_move: "moved before the journal told of it",
    run_before_the_claim: "run without a claim",
    requeue_before_the_journal: "moved before the journal told of it",
    forget_cancels: "left the inbox before the wish was safe",
    note_in_passing: "run before the claim was safe",
    never_seal: "published before all of the draft was safe",
    manifest_after_the_move: "published without its manifest",
    put_away_before_publishing: "put away before the result was safe",
    put_away_before_announcing: "put away before the feed told of it",
}


@pytest.mark.parametrize("breaks", MUTANTS, ids=lambda breaks: breaks.__name__)
def test_a_wrong_order_is_seen(scene: TracedScene, breaks: Breaks) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        found = violations(record(scene))
    assert {violation.partition(":")[0] for violation in found} >= {MUTANTS[breaks]}
