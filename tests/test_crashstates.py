"""Recovery from every state that a power cut may leave of a life.

What was answered is not lost, what ended is neither torn nor done again, what was not answered is taken in afterwards.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import CLIENT, Home, make_home
from crashstates import Disk, Journalled, Literal, State, Tree, crash_states, snapshot
from disk import KILLED, Op, watched
from scene import big_scene, check, check_answered, check_nothing_is_half, complaints, kill, live, quick_home, quiet, start
from syncs import Step, SyncKiller, TracedScene, Tracer

from imagend import config as configuration
from imagend.job import Manifest, Ref
from imagend.outputs import Outputs
from imagend.signers import NAMESPACE
from imagend.signing import Key
from imagend.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
__all__ = ["quick_home", "quiet"]  # fixtures
LIMIT = 30
"""Where more states than about so many are possible between two syncs, they are sampled."""


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


LIVES = (first_start, one, batch, cancelled, two_pictures, workers_die, failure, stop, rejected, two_clients)
LIVES += (submitted_again, everything)


@dataclass
class Life:
    """What a daemon did to the disk, from a state that any power cut would spare."""

    scene: TracedScene
    before: Tree
    ops: list[Op]

    def states(self, limit: int) -> Iterator[State]:
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
    publish = Outputs.publish

    def telling(self: Outputs, ref: Ref, manifest: Manifest) -> None:
        publish(self, ref, manifest)
        scene.trace.append(Step(Op("published", ref.id)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outputs, "publish", telling)
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


_mine: list[TracedScene] = []


def _move_in(scene: TracedScene, memory: Path) -> None:
    """In a process of its own: a home of its own."""
    root = Path(tempfile.mkdtemp(dir=memory))
    shutil.copytree(scene.home.root / "keys", root / "keys")
    shutil.copy(scene.home.root / "config.yaml", root)
    home = Home(root, configuration.load(root / "config.yaml"), scene.home.key)
    for inbox in home.config.inboxes:
        inbox.mkdir(parents=True)
    _mine[:] = [replace(scene, home=home)]


def _judge_mine(state: State) -> str:
    return judge(_mine[0], state)


def complaints_of(life: Life, states: list[State], memory: Path) -> list[str]:
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), _move_in, (life.scene, memory)) as pool:
        return pool.map(_judge_mine, states, chunksize=16)
