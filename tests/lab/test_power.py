"""Power is cut while the daemon works: genuine images of its disk, at many moments, each mounted and lived on from.

In the short form everywhere where file systems can be mounted; with more moments, and XFS, in `make lab`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from lab import images
from lab.drill import Drill, Ledger
from lab.powercut import Judge, make_root, write_letters
from lab.victim import NEVER_SYNC

from imagend.signing import Key

pytestmark = pytest.mark.skipif(images.missing() is not None, reason=f"no power cuts: {images.missing()}")


class Cuts:
    """Lives on one disk, and the images of it."""

    def __init__(self, workshop: Path, key: Key, kind: str, jobs: int) -> None:
        self.workshop, self.kind = workshop, kind
        self.home = make_root(workshop / "life", key)
        self.plan = write_letters(self.home, jobs)
        self.disk = images.make(workshop / "disk", kind)
        self.images: list[tuple[Path, Ledger]] = []
        self.judge = Judge.of(self.home.root, workshop / "judge", key)

    def live(self, moments: int, seed: int, arguments: Sequence[str] = ()) -> None:
        """A life on the disk as it is, with an image at each moment."""
        self._live(Ledger(), moments, seed, arguments)

    def live_on(self, moments: int, seed: int) -> None:
        """A power cut, now in earnest: the next life begins with an image of the last one."""
        image, ledger = self.images[-moments // 2]
        for path in (self.home.root / "mail" / "inbox").iterdir():
            path.unlink()
        images.clone(image, self.disk)
        self._live(ledger, moments, seed)

    def _live(self, before: Ledger, moments: int, seed: int, arguments: Sequence[str] = ()) -> None:
        def strike(moment: int, ledger: Ledger) -> None:
            self.images.append((images.clone(self.disk, self.workshop / f"{len(self.images)}"), ledger))

        with images.mounted(self.disk, self.home.root / "disk", self.kind):
            Drill(self.home.root, self.plan, before).live(moments, seed, strike, arguments)

    def verdicts(self, verdict: Callable[[Judge, Ledger], Iterable[str]] = Judge.judge) -> Iterator[list[str]]:
        """What each image lacks."""
        for image, ledger in self.images:
            with images.mounted(image, self.judge.home.root / "disk", self.kind):
                yield list(verdict(self.judge, ledger))
            image.unlink()


@pytest.fixture
def workshop() -> Iterator[Path]:
    with images.workshop() as folder:
        yield folder


def test_a_power_cut_at_any_of_ten_moments(workshop: Path, key: Key) -> None:
    cuts = Cuts(workshop, key, "ext4", jobs=60)
    cuts.live(moments=9, seed=1)
    assert list(cuts.verdicts()) == [[]] * 10
    assert cuts.judge.seen.total() > 60 + 10


def test_a_daemon_that_never_syncs_is_found_out(workshop: Path, key: Key) -> None:
    cuts = Cuts(workshop, key, "ext4", jobs=12)
    cuts.live(moments=3, seed=1, arguments=[NEVER_SYNC])
    assert any("lost" in complaint for verdict in cuts.verdicts(Judge.at_rest) for complaint in verdict)


@pytest.mark.lab
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_power_cuts_upon_power_cuts(workshop: Path, key: Key, kind: str, seed: int) -> None:
    """Three lives, of which each but the first begins with the ruins of the one before."""
    cuts = Cuts(workshop, key, kind, jobs=120)
    cuts.live(20, seed)
    cuts.live_on(20, seed + 100)
    cuts.live_on(20, seed + 200)
    assert list(cuts.verdicts()) == [[]] * 63
    assert min(cuts.judge.seen[state] for state in ("pending", "active", "done")) > 10
