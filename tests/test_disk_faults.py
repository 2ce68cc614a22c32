"""The disk says no, at every operation, once and from then on: no job is lost, and all drains when it is well again.

The daemon lives on in the same process. Only at start may it give up (exit 74); then it is started again, by systemd.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, step
from disk import Op, Recorder, Watcher, watched
from scene import Painter, Scene, big_scene, check, check_nothing_is_half, live, quick_home, quiet, start

from imagend.daemon import durations
from imagend.daemon.loop import Daemon
from imagend.messages import Message
from imagend.spool import STATUS

__all__ = ["quick_home", "quiet"]

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
STEPS_IN_FAULT = 8
"""So long the world watches a disk that refuses for good, before it is mended."""


class Refuser(Watcher):
    """From its n-th operation on, the disk refuses `count` of them."""

    def __init__(self, point: int, error: int, count: int) -> None:
        self.point, self.error, self.count = point, error, count
        self.refused: Op | None = None
        self.armed = False

    def before(self, op: Op) -> None:
        if not self.armed or _is_of_no_matter(op):
            return
        self.point -= 1
        if self.point < 0 < self.count:
            self.count -= 1
            self.refused = self.refused or op
            raise OSError(self.error, os.strerror(self.error), op.path)


def _is_of_no_matter(op: Op) -> bool:
    """status.json cannot tell of itself, to make a folder that is there does nothing, durations may be forgotten."""
    known = op.name == "mkdir" and Path(op.path).is_dir()
    return known or Path(op.path).name in (f".{STATUS}.tmp", f".{durations.FILE}.tmp", ".ballast", "..ballast.tmp")


@contextlib.contextmanager
def only_the_daemons(refuser: Refuser) -> Iterator[None]:
    """What a worker writes while it paints is another process's."""
    send = Painter.send

    def aside(painter: Painter, worker: str, message: Message) -> None:
        armed, refuser.armed = refuser.armed, False
        send(painter, worker, message)
        refuser.armed = armed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Painter, "send", aside)
        yield


def begin(scene: Scene, refuser: Refuser, in_recovery: bool) -> Daemon:
    """Start, and again when the disk refuses: it is mended by then."""
    refuser.armed = in_recovery
    try:
        return start(scene)
    except OSError:
        refuser.count = 0
    finally:
        refuser.armed = True
    gc.collect()  # the dead one's lock goes with it
    return start(scene)


def live_through(scene: Scene, refuser: Refuser, in_recovery: bool = False) -> set[str]:
    """A life in which the disk refuses; the parts that were degraded from then on."""
    told: set[str] = set()
    daemon = begin(scene, refuser, in_recovery)
    steps_in_fault = 0
    for _ in range(400):
        more = step(daemon)
        check_nothing_is_half(scene)
        if refuser.refused is not None:
            steps_in_fault += 1
            told |= daemon.health.reasons.keys()
            if steps_in_fault >= STEPS_IN_FAULT:
                refuser.count = 0
        done = not daemon.stopping and not more and not any(scene.inbox.iterdir())
        if daemon.stopped or done:
            daemon.spool.close()
        if done:
            return told
        if daemon.stopped:
            daemon = begin(scene, refuser, in_recovery)
    raise AssertionError(f"never done; inbox: {os.listdir(scene.inbox)}, {daemon.health.reasons}")  # noqa: PTH208


class NoDescriptors:
    """From its n-th opening on, for reading too, this process has no descriptor left for `count` of them."""

    def __init__(self, point: int, count: int) -> None:
        self.point, self.count = point, count
        self.refused: Path | None = None

    def __call__(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if Path(str(path)).name not in (f".{STATUS}.tmp", ".ballast", "..ballast.tmp", "runs"):
                self.point -= 1
                if self.point < 0 < self.count:
                    self.count -= 1
                    self.refused = self.refused or Path(str(path))
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
            return real(path, *args, **kwargs)

        return call


def survey(scene: Scene, count: int, in_recovery: bool = False) -> Iterator[str]:
    """What is wrong after a refusal at each point of a life."""
    for point in itertools.count():
        scene.refill()
        refuser = Refuser(point, ERRORS[point % len(ERRORS)], count)
        with only_the_daemons(refuser), watched(refuser):
            try:
                told = live_through(scene, refuser, in_recovery)
                check(scene, deaths=0)
                found = "" if told or in_recovery else "nobody was told"
            except Exception:
                found = traceback.format_exc(limit=-2)
        if refuser.refused is None:
            break
        if found:
            yield f"{os.strerror(refuser.error)} at {point}: {refuser.refused[:3]}: {found}"
    assert point > (10 if in_recovery else 200)


@pytest.fixture(scope="module")
def scene(quick_home: Home) -> Scene:
    return big_scene(quick_home, Scene)


def test_the_scene_goes_well_when_the_disk_does(scene: Scene) -> None:
    scene.refill()
    with watched(Recorder()):
        live(scene)
    check(scene, deaths=0)


@pytest.mark.parametrize("count", [1, 1_000_000], ids=["once", "from then on"])
def test_a_disk_that_refuses_delays_and_loses_nothing(scene: Scene, count: int) -> None:
    wrong = list(survey(scene, count))
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_disk_that_refuses_at_the_start_ends_the_daemon_and_loses_nothing(scene: Scene) -> None:
    wrong = list(survey(scene, 1, in_recovery=True))
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("count", [1, 40])
def test_without_a_descriptor_left_nothing_is_lost(scene: Scene, count: int) -> None:
    """At every third opening of a life."""
    wrong = []
    for point in itertools.count(count % 3, 3):
        scene.refill()
        daemon = start(scene)
        no = NoDescriptors(point, count)
        with pytest.MonkeyPatch.context() as patch, only_the_daemons(Refuser(0, 0, 0)):
            for module, name in ((os, "open"), (io, "open"), (os, "scandir")):
                patch.setattr(module, name, no(getattr(module, name)))
            for _ in range(100):
                step(daemon)
                if daemon.stopped:
                    break
        daemon.spool.close()
        try:
            live(scene)
            check(scene, deaths=0)
        except Exception:
            wrong.append(f"at {point}: {no.refused}: {traceback.format_exc(limit=-2)}")
        if no.refused is None:
            break
    assert not wrong, "\n" + "\n".join(wrong)
    assert point > 100
