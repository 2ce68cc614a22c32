"""Recovery from every state that a power cut may leave of a life.

What was answered is not lost, what ended is neither torn nor done again, what was not answered is taken in afterwards.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import Home, make_home
from crashstates import Journalled, Literal, State, Tree, crash_states, snapshot
from disk import KILLED, SYNCS, Op, watched
from scene import (
    big_scene,
    check,
    check_answered,
    check_nothing_is_half,
    complaints,
    kill,
    live,
    quick_home,
    quiet,
    start,
)
from syncs import Step, SyncKiller, TracedScene, Tracer

from imagend import config as configuration
from imagend.outputs import Outputs
from imagend.signers import NAMESPACE
from imagend.signing import Key
from imagend.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
__all__ = ["quick_home", "quiet"]  # fixtures
LIMIT = 30
"""Where more states than about so many are possible between two syncs, they are sampled."""
MOST, MOST_OF_A_LONG_LIFE = 1600, 400
"""So many states of a life are recovered from, at most; make torture takes all."""


# Lives


def first_start(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="the first")


def one(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="one")


def batch(scene: TracedScene) -> None:
    for number in range(8):
        scene.add("succeeded", prompt=f"{number} of a batch")


def cancelled(scene: TracedScene) -> None:
    scene.add("cancelled", prompt="stay", priority=9)  # while running
    scene.add("cancelled", prompt="never painted", priority=0)  # while queued


def two_pictures(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="two pictures", seed=7, count=2)


def workers_die(scene: TracedScene) -> None:
    scene.add("failed", "WORKER_DIED", prompt="die")
    scene.add("succeeded", prompt="spared")


def failure(scene: TracedScene) -> None:
    scene.add("failed", "INVALID_PARAMETERS", prompt="fail")


def chains(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="two steps", chain={"upscale": {}})
    scene.add("failed", "INVALID_PARAMETERS", prompt="upscaling fails", chain={"upscale": {}})


def stop(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="stop")
    scene.add("succeeded", prompt="waits meanwhile", priority=1)


def rejected(scene: TracedScene) -> None:
    scene.add_junk("refused.json", scene.home.sealed(widht=64), "INVALID_PARAMETERS")
    scene.add_junk("unfinished.json", b"{}", "UNAUTHORIZED")
    scene.add("succeeded", prompt="a good one")


def two_clients(scene: TracedScene) -> None:
    key = scene.others["bob"] = Key.generate()
    with (scene.home.root / "keys" / "allowed_signers").open("a") as keys:
        keys.write(f'bob namespaces="{NAMESPACE}" {key.public_line("bob")}\n')
    scene.add("succeeded", prompt="the same")
    scene.add("succeeded", prompt="the same", client="bob")


def submitted_again(scene: TracedScene) -> None:
    scene.add("succeeded", prompt="dropped twice at once and later", twins=2, late_twin=True, priority=9)
    scene.add("cancelled", prompt="stay", priority=0, late_twin=True)


def everything(scene: TracedScene) -> None:
    again = big_scene(scene.home, TracedScene)
    scene.files, scene.later, scene.expected, scene.junk = again.files, again.later, again.expected, again.junk


def cut_after_a_death(scene: TracedScene) -> None:
    """Killed in place of a sync; the power fails while the next daemon lives."""
    scene.add("succeeded", prompt="two pictures after a death", count=2)
    scene.add("failed", "INVALID_PARAMETERS", prompt="fail")


Build = Callable[[TracedScene], None]
BUILDS: tuple[Build, ...] = (first_start, one, batch, cancelled, two_pictures, workers_die, failure, stop, rejected)
BUILDS += (two_clients, submitted_again, chains, everything, cut_after_a_death)


@dataclass
class Life:
    """What a daemon did to the disk, from a state that any power cut would spare."""

    scene: TracedScene
    before: Tree
    ops: list[Op]

    def states(self, limit: int = LIMIT) -> Iterator[State]:
        """Each once for each kind of file system."""
        for kind in (Journalled, Literal):
            yield from crash_states(kind(self.before), self.ops, limit)


def record(scene: TracedScene, new: bool = False, dies_at: int | None = None) -> Life:
    """A life on an empty spool; `new` if its folders are yet to be made.

    It may be killed in place of a sync, counted from 0; then the next daemon finds what the dead one did not sync.
    """
    scene.refill()
    if not new:
        start(replace(scene)).spool.close()
    before = snapshot(scene.home.root)
    confirm = Outputs.confirm

    def telling(self: Outputs) -> None:
        published = sorted(self._published)
        confirm(self)
        scene.trace.extend(Step(Op("published", ref.id)) for ref in published)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "confirm", telling)
        if dies_at is not None:
            assert kill(scene, SyncKiller(scene, dies_at)) == KILLED
            scene.trace.extend(pickle.loads(scene.will.read_bytes()))  # noqa: S301
        with watched(Tracer(scene)):
            live(scene)
    return Life(scene, before, [step.op for step in scene.trace if step.op.name != "stop"])


# What must hold


def restore(scene: TracedScene, state: State) -> None:
    """The world and the disk as they were, but for what the disk lost."""
    scene.refill()
    root = scene.home.root
    for folder in (scene.home.config.spool, scene.home.config.outputs):
        shutil.rmtree(folder, ignore_errors=True)
    for name, data in state.tree:
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    scene.inbox.mkdir(parents=True, exist_ok=True)
    for name in state.delivered:
        (scene.world / name).unlink()
    (scene.world / "runs").write_text("".join(f"{id} in time\n" for id in state.runs))


def judge(scene: TracedScene, state: State) -> str:
    """Live on from a state; what does not hold."""
    restore(scene, state)
    ended = manifests(scene)
    return complaints(
        lambda: check_known(scene, state),
        lambda: check_nothing_is_half(scene),
        lambda: live(scene),
        lambda: check(scene, refused=check_answered),
        lambda: check_unchanged(ended, manifests(scene)),
    )


def check_known(scene: TracedScene, state: State) -> None:
    """What the world was told or did before the power cut is known after it."""
    spool, outputs = Spool(scene.home.config.spool), Outputs(scene.home.config.outputs)
    for ref in scene.expected:
        assert ref.id not in state.published or outputs.ended(ref), f"{ref} had ended"
        claims = [line["event"] for line in spool.story(ref)].count("claimed")
        assert claims >= state.runs.count(ref.id), f"{ref} ran and nobody knows"


def check_unchanged(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    assert {name: after[name] for name in before} == before, "a result was changed"


def manifests(scene: TracedScene) -> dict[str, bytes]:
    found = scene.home.config.outputs.glob("[!.]*/*/manifest.json")
    return {str(path.relative_to(scene.home.root)): path.read_bytes() for path in found}


# Each state in a home of its own, on all processors


_mine: list[TracedScene] = []


def _move_in(scene: TracedScene) -> None:
    root = Path(tempfile.mkdtemp(dir=scene.home.root.parent))
    shutil.copytree(scene.home.root / "keys", root / "keys")
    shutil.copy(scene.home.root / "config.yaml", root)
    home = Home(root, configuration.load(root / "config.yaml"), scene.home.key)
    for inbox in home.config.inboxes:
        inbox.mkdir(parents=True)
    _mine[:] = [replace(scene, home=home)]


def _judge(state: State) -> str:
    return judge(_mine[0], state)


def found_in(scene: TracedScene, states: list[State]) -> dict[str, int]:
    """What does not hold, and in how many states."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _move_in, (scene,)) as pool:
        return Counter(filter(None, pool.imap_unordered(_judge, states, chunksize=16)))


# The tests


Surveys = dict[Build, tuple[TracedScene, list[State]]]
"""Of each life, all that a power cut may leave of it."""


@pytest.fixture(scope="module")
def states(quick_home: Home, key: Key) -> Surveys:
    return {build: surveyed(build, quick_home, key) for build in BUILDS}


def surveyed(build: Build, quick_home: Home, key: Key) -> tuple[TracedScene, list[State]]:
    scene = TracedScene(make_home(quick_home.root / build.__name__ / "home", key))
    build(scene)
    lives = [record(scene, new=build is first_start)]
    if build is cut_after_a_death:
        syncs = sum(op.name in SYNCS for op in lives[0].ops)
        lives = [record(scene, dies_at=point) for point in range(0, syncs, 2)]
    return scene, list(dict.fromkeys(state for life in lives for state in life.states()))


def some(build: Build, states: list[State]) -> list[State]:
    """All, or a seeded sample."""
    most = MOST_OF_A_LONG_LIFE if build in (batch, everything) else MOST
    return states if len(states) <= most else random.Random(0).sample(states, most)


@pytest.mark.parametrize("life", BUILDS, ids=lambda build: build.__name__)
def test_every_promise_holds_whatever_a_power_cut_left(states: Surveys, life: Build) -> None:
    scene, every = states[life]
    assert found_in(scene, some(life, every)) == {}


def test_they_are_many(states: Surveys) -> None:
    assert sum(len(some(life, every)) for life, (_, every) in states.items()) > 10_000


NEEDED = {
    "commit: spool/pending/alice/ID.json": one,
    "commit: spool/pending/alice": one,
    "accept: spool/pending": one,
    "claim: spool/journal/alice/ID.jsonl": workers_die,
    "claim: spool/active/alice": one,
    "complete: outputs/.drafts/alice/ID/PICTURE": two_pictures,
    "complete: outputs/.drafts/alice/ID/manifest.json": one,
    "complete: outputs/.drafts/alice/ID": one,
    "claim: outputs/.drafts/alice/ID/manifest.json": batch,
    "confirm: outputs/alice": one,
    "announce: outputs/results.jsonl": one,
    "finish: spool/done/alice": one,
    "stop_job: spool/journal/alice/ID.jsonl": cancelled,
    "reject: spool/rejected/.refused.json.reason.json.tmp": rejected,
}
"""Syncs without which a promise breaks, and a life that shows it."""


@pytest.mark.parametrize("point", NEEDED)
def test_one_sync_less_breaks_a_promise(states: Surveys, point: str) -> None:
    scene, _ = states[NEEDED[point]]
    life = record(scene)
    less = [step.op for step in scene.trace if step.op.name != "stop" and step.point != point]
    assert len(less) < len(life.ops)
    assert any(judge(scene, state) for state in replace(life, ops=less).states())


@pytest.mark.torture
@pytest.mark.parametrize("life", BUILDS, ids=lambda build: build.__name__)
def test_every_promise_holds_in_every_state(states: Surveys, life: Build) -> None:
    scene, every = states[life]
    assert found_in(scene, every) == {}
