"""Disks that are full, fail, or turn read-only, for real: somebody else fills them, and makes room again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import REPOSITORY, Home
from lab import images, uml
from lab.drill import load_plan
from lab.powercut import make_root, write_jobs
from lab.trouble import Endurance

from imagend.daemon.health import Health
from imagend.daemon.turn import Turn
from imagend.signing import Key

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(images.missing() is not None, reason=f"no file systems of our own: {images.missing()}"),
]
SMALL = 24 * images.MIB
FILL = "for size in 1M 4k 1; do dd if=/dev/zero bs=$size of={0}/anothers.$size; done; sync -f {0}"
ROOM = "rm {0}/anothers.*"


QUOTA = """
set -e
modprobe -d /run/kernel xfs
mkdir /run/home
cp -r {root}/. /run/home
cd /run/home
mkdir -p {folder}
mount -t xfs -o gquota /dev/ubda {folder}
chgrp 1000 {folder}
chmod g+s {folder}
xfs_quota -x -D /dev/null -P /dev/null -c 'limit -g bhard=4m 1000' {folder}
PYTHONPATH={repository} {python} {repository}/tests/lab/trouble.py . '{spoil}' '{mend}' '{words}'
"""
"""A group's quota, because the daemon runs as root there, whose own files XFS does not count."""


@pytest.fixture
def home(tmp_path: Path, key: Key) -> Iterator[Home]:
    home = make_root(tmp_path / "home", key)
    write_jobs(home)
    yield home
    subprocess.run(["umount", "--recursive", "--lazy", str(home.root / "disk")], capture_output=True, check=False)


def endure(home: Home, spoil: str, mend: str, error: int) -> None:
    Endurance(home.root, load_plan(home.root)).endure(spoil, mend, os.strerror(error))


@contextlib.contextmanager
def small_ext4(home: Home, folder: str) -> Iterator[Path]:
    image = images.make(home.root / "image", "ext4", SMALL)
    with images.mounted(image, home.root / folder, "ext4"):
        yield image


@pytest.mark.parametrize("folder", ["disk", "disk/spool", "disk/outputs"])
def test_a_full_ext4(home: Home, folder: str) -> None:
    with small_ext4(home, folder):
        endure(home, FILL.format(folder), ROOM.format(folder), errno.ENOSPC)


@pytest.mark.parametrize("folder", ["disk", "disk/spool", "disk/outputs"])
def test_a_full_tmpfs(home: Home, folder: str) -> None:
    """Folders can still be made there: without a reserve, jobs would be handed out and fail."""
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace("reserve_mb: 0", "reserve_mb: 1"))
    with images.memory(home.root / folder, 4 * images.MIB):
        endure(home, FILL.format(folder), ROOM.format(folder), errno.ENOSPC)


def test_status_is_written_in_whatever_room_there_is(tmp_path: Path) -> None:
    """What is kept free for it need not be whole."""
    with images.memory(tmp_path / "spool", 5 * os.sysconf("SC_PAGESIZE")) as spool:
        health = Health(spool, "imagend", 5.0, datetime.now(UTC))
        for state in ("ready", "busy", "draining"):
            health.write(0.0, state, (), Turn(), ())
            assert json.loads((spool / "status.json").read_bytes())["state"] == state
    assert health.reasons == {}


def test_outputs_turn_read_only(home: Home) -> None:
    """Spool cannot while the daemon holds its lock, but by an error: see below."""
    with small_ext4(home, "disk/outputs"):
        again = "until mount -o remount,{} disk/outputs; do sleep 0.01; done"
        endure(home, again.format("ro"), again.format("rw"), errno.EROFS)


@pytest.mark.parametrize("folder", ["disk", "disk/spool", "disk/outputs"])
def test_a_disk_that_cannot_keep_what_it_takes(home: Home, folder: str) -> None:
    """Its free blocks have yet to be found on a host's disk, which is full: a write succeeds and its fsync fails."""
    with images.memory(home.root / "host", 2 * SMALL + 2 * images.MIB):
        sparse, image = images.make(home.root / "host" / "sparse", "ext4", SMALL), home.root / "host" / "image"
        subprocess.run(["cp", "--sparse=never", str(sparse), str(image)], check=True)
        sparse.unlink()
        with images.mounted(image, home.root / folder, "ext4"):
            subprocess.run(["fstrim", str(home.root / folder)], check=True)  # all but what is in use goes back
            endure(home, FILL.format("host"), ROOM.format("host"), errno.ENOSPC)


@pytest.mark.parametrize("folder", ["disk", "disk/spool", "disk/outputs"])
def test_a_disk_that_dies_and_is_mounted_again(home: Home, folder: str) -> None:
    """As ext4 does when its journal cannot be written: it is read-only until it is mounted anew."""
    with small_ext4(home, folder) as image:
        daemon = Endurance(home.root, load_plan(home.root))
        daemon.fall(f"mount -o remount,abort {folder}", os.strerror(errno.EROFS))
    with images.mounted(image, home.root / folder, "ext4"):
        daemon.rise()


@pytest.mark.skipif(uml.missing() is not None, reason=f"no guests: {uml.missing()}")
@pytest.mark.parametrize("folder", ["disk/spool", "disk/outputs"])
def test_a_quota(home: Home, folder: str) -> None:
    """In a guest: a host's kernel may have none."""
    disk, network = images.make(home.root / "image", "xfs"), uml.Network()
    guest = uml.Guest("quota", 1, network, [disk])
    command = QUOTA.format(
        root=home.root,
        folder=folder,
        repository=REPOSITORY,
        python=sys.executable,
        spoil=FILL.format(folder),
        mend=ROOM.format(folder),
        words=os.strerror(errno.EDQUOT),
    )
    try:
        guest.boot()
        guest.run(command, limit_s=300)
    finally:
        guest.powercut()
        network.close()
