"""Every write of a life is recorded by dm-log-writes in a guest; the power is cut at every FLUSH and FUA of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY
from lab import images, uml
from lab.drill import Ledger
from lab.logwrites import END, Replay, entries
from lab.powercut import Judge, make_root, write_letters
from lab.victim import NEVER_SYNC

from imagend.signing import Key

_MISSING = images.missing() or uml.missing() or (None if shutil.which("dmsetup") else "dmsetup: tests/lab/packages")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(_MISSING is not None, reason=f"no guests: {_MISSING}")]

RECORD = """
set -e
modprobe -d /run/kernel -a dm-mod dm-log-writes
table="0 $(blockdev --getsz /dev/ubda) log-writes /dev/ubda /dev/ubdb"
dmsetup --noudevrules --noudevsync create recorded --table "$table"
dmsetup mknodes
mkdir /run/life
cp -r {life}/. /run/life
mount -t ext4 /dev/mapper/recorded /run/life/disk
PYTHONPATH={repository} {python} {repository}/tests/lab/drill.py /run/life {moments} {seed} \
    'dmsetup message recorded 0 mark {{}}' {arguments}
umount /run/life/disk
dmsetup --noudevsync remove recorded
sync
"""


class Recording:
    """One life in a guest: what the disk was before it, the log of all writes, and the ledger at each mark."""

    def __init__(self, life: Path, workshop: Path, key: Key, jobs: int) -> None:
        self.life, self.workshop = life, workshop
        write_letters(make_root(life, key), jobs)
        self.judge = Judge.of(life, workshop / "judge", key)
        self.before = images.make(workshop / "before", "ext4")
        self.log = workshop / "log"
        self.ledgers: list[Ledger] = []

    def record(self, moments: int, seed: int, arguments: Sequence[str] = ()) -> None:
        disk = images.clone(self.before, self.workshop / "disk")
        with self.log.open("wb") as log:
            log.truncate(512 * images.MIB)
        command = RECORD.format(
            life=self.life,
            repository=REPOSITORY,
            python=sys.executable,
            moments=moments,
            seed=seed,
            arguments=" ".join(arguments),
        )
        network = uml.Network()
        guest = uml.Guest("recorder", 1, network, [disk, self.log])
        try:
            guest.boot()
            told = guest.run(command, limit_s=300)
        finally:
            guest.powercut()
            network.close()
        self.ledgers = [Ledger(**json.loads(line)) for line in told.splitlines() if line.startswith("{")]

    def verdicts(self, verdict: Callable[[Judge, Ledger], Iterable[str]] = Judge.judge) -> Iterator[list[str]]:
        """What the disk lacks at each point after which the disk may not forget."""
        disk = images.clone(self.before, self.workshop / "replay")
        ledger = Ledger()
        with Replay(self.log, disk) as replay:
            for entry in entries(self.log):
                replay.apply(entry)
                if entry.mark not in ("", END):
                    ledger = self.ledgers[int(entry.mark)]
                elif entry.makes_safe:
                    image = images.clone(disk, self.workshop / "cut")
                    with images.mounted(image, self.judge.home.root / "disk", "ext4"):
                        yield list(verdict(self.judge, ledger))


@pytest.fixture
def recording(tmp_path: Path, key: Key) -> Iterator[Recording]:
    with images.workshop() as workshop:
        yield Recording(tmp_path / "life", workshop, key, jobs=12)


def test_power_is_cut_at_every_flush(recording: Recording) -> None:
    recording.record(moments=40, seed=1)
    verdicts = list(recording.verdicts())
    assert [verdict for verdict in verdicts if verdict] == []
    assert len(verdicts) > 100
    assert recording.judge.seen.keys() == {"pending", "active", "done"}


def test_a_daemon_that_never_syncs_is_found_out(recording: Recording) -> None:
    recording.record(moments=15, seed=1, arguments=[NEVER_SYNC])
    verdicts = list(recording.verdicts(Judge.at_rest))
    assert any("lost" in complaint for verdict in verdicts for complaint in verdict)
