"""Retention, killed or refused at every operation on the disk: no result is half gone, and the next start goes on."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
from conftest import Home, make_home, run_until_idle
from disk import KILLED, Killer, Op, Recorder, Watcher, watched
from scene import complaints, in_child, quick_home, quiet
from test_retention import HOUR_S, Place

from imagend import results
from imagend.signing import Key
from imagend.spool import State

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12, where there are threads
__all__ = ["quick_home", "quiet"]  # fixtures


class Story:
    """Three results; two are due. Told anew from the same jobs, so that their ids stay."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.bodies = [home.body(seed=number) for number in range(3)]

    def begin(self) -> Place:
        for folder in (self.home.config.spool, self.home.config.outputs):
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self.home.config.inboxes[0].mkdir(parents=True)
        daemon = self.home.daemon()
        self.refs = [self.home.drop_body(body) for body in self.bodies]
        run_until_idle(daemon)
        daemon.spool.close()
        for ref in self.refs[:2]:
            results.mark(self.home.config.outputs / ref.client / ref.id)
        return self.go_on()

    def go_on(self) -> Place:
        """A start, an hour and more after the two were retrieved."""
        place = Place(self.home, self.home.daemon())
        place.now += 2 * HOUR_S
        place.retention._offset, place.retention._believe_at = 0.0, place.now
        place.retention._alive_at = place.now
        return place

    def check_nothing_is_half(self) -> None:
        outputs = self.home.config.outputs
        for ref in self.refs:
            folder = outputs / ref.client / ref.id
            if folder.exists():
                (artifact,) = json.loads((folder / "manifest.json").read_text())["artifacts"]
                data = (folder / artifact["file"]).read_bytes()
                assert hashlib.sha256(data).hexdigest() == artifact["sha256"]
            assert self.home.where(ref) is State.DONE

    def check(self) -> None:
        outputs = self.home.config.outputs
        assert [(outputs / ref.client / ref.id).exists() for ref in self.refs] == [False, False, True]
        assert list((outputs / ".trash").iterdir()) == []
        told = [json.loads(line)["id"] for line in (outputs / "removed.jsonl").read_text().splitlines()]
        assert set(told) == {ref.id for ref in self.refs[:2]}


@pytest.fixture
def story(tmp_path: Path, key: Key) -> Story:
    return Story(make_home(tmp_path / "home", key))


def finish(story: Story) -> None:
    """What the thread does when it starts, and a turn."""
    place = story.go_on()
    place.daemon.outputs.discard_the_rest()
    place.turn()
    place.daemon.spool.close()


def test_killed_at_every_operation(story: Story) -> None:
    def work(killer: Killer) -> None:
        place = story.go_on()
        with watched(killer):
            place.turn()

    wrong = []
    for point in itertools.count():
        story.begin().daemon.spool.close()
        status, _ = in_child(lambda: work(Killer(point)))  # noqa: B023
        found = complaints(story.check_nothing_is_half, lambda: finish(story), story.check)
        if found:
            wrong.append(f"at {point}: {found}")
        if status != KILLED:
            break
    assert not wrong, "\n".join(wrong)
    assert point > 10


class Refuser(Watcher):
    """The disk refuses the n-th operation, and `count` in all."""

    def __init__(self, point: int, count: int) -> None:
        self.point, self.count = point, count
        self.refused: Op | None = None

    def before(self, op: Op) -> None:
        self.point -= 1
        if self.point < 0 < self.count:
            self.count -= 1
            self.refused = op
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), op.path)


@pytest.mark.parametrize("count", [1, 1_000_000])
def test_refused_at_every_operation(story: Story, count: int) -> None:
    wrong = []
    for point in itertools.count():
        place = story.begin()
        refuser = Refuser(point, count)
        with watched(refuser):
            for step in (place.retention.look, place.retention.tend, place.retention.clear):
                place.retention._try(step)
        found = complaints(story.check_nothing_is_half)
        for step in (place.retention.look, place.retention.tend, place.retention.clear):
            place.retention._try(step)
        place.daemon.spool.close()
        found = found or complaints(story.check_nothing_is_half, lambda: only_results_are_gone(story))
        if found:
            wrong.append(f"at {point}, {refuser.refused}: {found}")
        if refuser.refused is None:
            break
    assert not wrong, "\n".join(wrong)
    assert point > 10


def only_results_are_gone(story: Story) -> None:
    outputs = story.home.config.outputs
    assert [(outputs / ref.client / ref.id).exists() for ref in story.refs] == [False, False, True]
    assert list((outputs / ".trash").iterdir()) == []


def test_nothing_of_a_result_goes_before_its_absence_is_durable(story: Story) -> None:
    place, recorder = story.begin(), Recorder()
    with watched(recorder):
        place.turn()
    outputs = story.home.config.outputs
    ops = [(op.name, Path(op.path)) for op in recorder.ops]
    renames = [n for n, op in enumerate(recorder.ops) if op.name == "rename" and "/.trash/" in op.target]
    unlinks = [n for n, (name, path) in enumerate(ops) if name in ("unlink", "rmdir") and ".trash" in path.parts]
    assert (len(renames), len(unlinks) > 0) == (2, True)
    for folder in (outputs / ".trash", outputs / story.refs[0].client):
        assert any(max(renames) < n < min(unlinks) for n, op in enumerate(ops) if op == ("fsync", folder))


def test_only_who_owns_the_trash_looks_into_it(story: Story) -> None:
    story.begin()
    assert (story.home.config.outputs / ".trash").stat().st_mode & 0o777 == 0o700
