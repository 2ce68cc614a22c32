"""Kill the daemon in place of every disk operation around pictures that were sent along: no job of them is lost or
lacks its picture, and nothing is left of them when it has ended."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path

import pytest
from conftest import Home, step
from disk import KILLED, Recorder, points, watched
from fakes import FakeExecutor
from scene import dies_at, quick_home, quiet

from imagend.job import Ref
from imagend.messages import Run

__all__ = ["quick_home", "quiet"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12, where there are threads

PHOTO = b"no picture at all: the daemon does not look"
SHA256 = hashlib.sha256(PHOTO).hexdigest()


class Looker(FakeExecutor):
    """Opens the pictures it is told of."""

    def attempt(self, worker: str, run: Run) -> None:
        assert [Path(place).read_bytes() for place in run.pictures.values()] == [PHOTO]
        super().attempt(worker, run)


def fill(home: Home) -> list[Ref]:
    """Two jobs with one picture: it has three names."""
    for folder in (home.config.spool, home.config.outputs):
        shutil.rmtree(folder, ignore_errors=True)
    home.put(PHOTO, f"files/{SHA256}")
    return [home.drop(image=f"sha256:{SHA256}", nonce=nonce) for nonce in "ab"]


def live(home: Home) -> None:
    daemon = home.daemon(Looker, heartbeat_s=1e-9)
    seconds = itertools.count()
    daemon.clock = lambda: float(next(seconds))
    daemon._patience_s = lambda: 0.0  # type: ignore[method-assign]
    while step(daemon) or list(home.config.inboxes[0].glob("*.json")):
        pass
    daemon.spool.close()


def left(home: Home) -> list[str]:
    return [path.name for path in (home.config.spool / "attachments").rglob("*") if path.is_file()]


def test_a_death_anywhere_loses_no_picture_and_leaves_none(quick_home: Home, quiet: None) -> None:
    fill(quick_home)
    recorder = Recorder()
    with watched(recorder):
        live(quick_home)
    strikes = points(recorder.ops)
    assert sum("/attachments/" in strike for strike in strikes) > 8
    survived = set()
    for point, strike in enumerate(strikes):
        refs = fill(quick_home)
        survived |= {dies_at(point, lambda: live(quick_home))}
        live(quick_home)
        assert [quick_home.outcome(ref) for ref in refs] == ["succeeded"] * 2, strike
        assert [name for name in left(quick_home) if not name.startswith(".")] == [], strike
        live(quick_home)
        assert left(quick_home) == [], strike
    assert survived <= {KILLED, 0}
    assert KILLED in survived
