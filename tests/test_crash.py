"""Kill the daemon in place of every single disk operation; the next start must lose nothing and repeat nothing.

A death here is the process's alone: what it wrote stays, in whatever order. What a power cut takes is test_crashstates'
business, and test_fsync's.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import CLIENT, Home
from disk import CHANGING, KILLED, SYNCS, ClaimKiller, Killer, Op, Recorder, points, watched
from scene import (
    MAX_ATTEMPTS,
    Scene,
    big_scene,
    check,
    check_nothing_is_half,
    complaints,
    in_child,
    kill,
    live,
    quick_home,
    quiet,
    survive,
)

from imagend import outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12, where there are threads
__all__ = ["quick_home", "quiet"]  # fixtures


@pytest.fixture(scope="module", autouse=True)
def short_feed() -> Iterator[None]:
    """It is rotated some times in a life."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "_MAX_RESULTS_BYTES", 500)
        yield


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> Scene:
    scene = big_scene(quick_home, Scene)
    scene.litter = {
        f"outputs/.drafts/{CLIENT}/{'0' * 20}/0000.png": b"of a job that is no more",
        f"spool/pending/{CLIENT}/.{'0' * 20}.json.tmp": b"of a job that never was",
    }
    return scene


@dataclass
class Survey:
    """What came of a death at every point of a life."""

    ops: list[Op]
    complaints: list[str] = field(default_factory=list)
    recoveries: dict[tuple[str, ...], int] = field(default_factory=dict)
    """A way in which a recovery went, by its operations: a point of death that leads to it."""


@pytest.fixture(scope="module")
def survey(scene: Scene) -> Survey:
    recorder = Recorder()
    scene.refill()
    with watched(recorder):
        live(scene)
    result = Survey(recorder.ops)
    for point, place in enumerate(points(result.ops)):
        scene.refill()
        status = kill(scene, Killer(point))
        recovery: list[Op] = []
        found = complaints(
            lambda: check_nothing_is_half(scene),
            lambda: recovery.extend(survive(scene)),  # noqa: B023
            lambda: check(scene),
        )
        if status != KILLED or found:
            result.complaints.append(f"in place of {place}: {found or status}")
        else:
            result.recoveries.setdefault(signature(scene, recovery), point)
    return result


def signature(scene: Scene, ops: Iterable[Op]) -> tuple[str, ...]:
    """What happened and to what end, without what tells one job from another."""
    ids = re.compile("|".join(ref.id for ref in scene.expected))
    ends = re.compile(rb'"outcome": ?"\w+"|"code": ?"\w+"')
    return tuple(
        ids.sub("ID", f"{op.name} {op.path} {op.target} {ends.findall(op.data)}") for op in ops if op.name not in SYNCS
    )


def test_a_life_without_a_death(scene: Scene) -> None:
    scene.refill()
    survive(scene)
    check(scene, deaths=0)
    manifests = [scene.home.manifest(ref) for ref in scene.expected]
    assert {manifest["spec"]["prompt"]: manifest["attempts"] for manifest in manifests} == {
        "stay": 1,
        "never painted": 0,
        "two pictures": 1,
        "dropped twice": 1,
        "fail": 1,
        "die": MAX_ATTEMPTS,
        "two steps": 1,
        "upscaling fails": 1,
        "stop": 1,
    }
    assert len(scene.runs()) == 7 + MAX_ATTEMPTS + 1  # "stop" ran twice, "never painted" never
    assert list(scene.home.config.outputs.glob("results.jsonl.*"))


def test_nothing_escapes_the_watcher(scene: Scene) -> None:
    """Python tells its audit hooks of every change but writes and syncs; each must have passed the watcher."""
    names = {"os.rename": "rename", "os.remove": "unlink", "open": "open"} | {
        f"os.{name}": name for name in ("mkdir", "rmdir", "utime", "chmod", "truncate", "link", "symlink")
    }

    def work() -> tuple[Counter[str], Counter[str]]:  # in a child: an audit hook stays for ever
        heard: Counter[str] = Counter()
        watcher = Recorder()

        def hook(event: str, args: tuple[Any, ...]) -> None:
            reads = event == "open" and (isinstance(args[0], int) or not args[2] & CHANGING)  # an int is open already
            if event in names and not reads:
                heard[names[event]] += 1

        with watched(watcher):
            sys.addaudithook(hook)
            live(scene)
            told = heard.copy()
        told.subtract(open=len(scene.runs()), rename=len(scene.later) + 2)  # by the world, behind the watcher's back
        same = {"replace": "rename", "remove": "unlink"}
        seen = Counter(same.get(op.name, op.name) for op in watcher.ops if op.name not in ("write", *SYNCS))
        return told, seen

    scene.refill()
    status, (heard, seen) = in_child(work)
    assert status == 0
    assert heard == seen
    assert seen["rename"] > 20


def test_every_point_of_death(survey: Survey) -> None:
    assert not survey.complaints, "\n" + "\n".join(survey.complaints)
    assert len(points(survey.ops)) > 300


def test_every_point_of_death_in_a_recovery(scene: Scene, survey: Survey) -> None:
    """Of all deaths that lead to the same recovery one stands for the rest; its recovery is killed at each point."""
    places, wrong, count = points(survey.ops), [], 0
    for first in survey.recoveries.values():
        for second in itertools.count():
            scene.refill()
            kill(scene, Killer(first))
            if kill(scene, Killer(second), only_recovery=True) == 0:
                break
            count += 1
            found = complaints(lambda: check_nothing_is_half(scene), lambda: survive(scene), lambda: check(scene))
            if found:
                wrong.append(f"in place of {places[first]}, then at point {second} of the recovery: {found}")
    assert not wrong, "\n" + "\n".join(wrong)
    assert count > 100


@pytest.mark.parametrize("seed", [*range(200), *(pytest.param(n, marks=pytest.mark.torture) for n in range(200, 2200))])
def test_death_upon_death(scene: Scene, survey: Survey, seed: int) -> None:
    dice = random.Random(seed)
    scene.refill()
    for _ in range(dice.randint(2, 4)):
        assert kill(scene, Killer(dice.randrange(len(points(survey.ops))))) in (0, KILLED)
        check_nothing_is_half(scene)
    survive(scene)
    check(scene, deaths=4)


def test_deaths_during_a_claim_do_not_make_attempts_beyond_the_limit(scene: Scene) -> None:
    """Again and again between the journal's "claimed" and the rename."""
    scene.refill()
    for _ in range(MAX_ATTEMPTS + 1):
        kill(scene, ClaimKiller())
    survive(scene)
    check(scene, deaths=MAX_ATTEMPTS + 1)
