"""A journalled ext4 of its own for durable figures: an image file behind a loop device with direct I/O. Needs root.

A build machine's own file system may have no journal, which makes fsync cheap and a crash ugly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEANING = "on a journalled ext4 of its own (an image of 2 GiB with room for many files, a loop device with direct I/O)"
SIZE = 2 << 30
"""bytes"""
FILES = 1 << 19
"""mke2fs' default for that size is 131,072; 100,000 jobs have two each, and there are two such queues"""

TOOLS = ("fallocate", "mkfs.ext4", "losetup", "mount", "umount")


@dataclass
class Disk:
    device: str
    root: Path

    def mount(self) -> None:
        _run("mount", self.device, self.root)

    def forget(self) -> None:
        """Unmount and mount again: nothing of it is left in the page cache, as after a restart of the machine."""
        _run("umount", self.root)
        self.mount()

    def settle(self) -> None:
        """Nothing dirty: each timed part begins in the same state."""
        _run("sync", "--file-system", self.root)

    def work(self) -> tuple[int, int]:
        """(commits of the journal, flushes of the cache) so far: what durability costs, on a busy machine too."""
        name = Path(self.device).name
        told = Path(f"/proc/fs/jbd2/{name}-8/info").read_text()
        statistics = Path(f"/sys/block/{name}/stat").read_text().split()
        return int(told.split()[0]), int(statistics[15])


def missing() -> str | None:
    """What is lacking here for such a disk, None if nothing is."""
    if os.geteuid() != 0:
        return "root (for a loop device)"
    return next((tool for tool in TOOLS if shutil.which(tool) is None), None)


@contextlib.contextmanager
def disk() -> Iterator[Disk]:
    """The mounted disk; nothing is left of it afterwards. In /var/tmp, which is no tmpfs."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagend-disk-", dir="/var/tmp")))
        image, root = folder / "image", folder / "root"
        root.mkdir()
        _run("fallocate", "--length", SIZE, image)
        # Defaults, but for what a kernel thread would else write while we measure.
        _run("mkfs.ext4", "-q", "-F", "-N", FILES, "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        device = _run("losetup", "--direct-io=on", "--show", "--find", image)
        stack.callback(_run, "losetup", "--detach", device)
        made = Disk(device, root)
        made.mount()
        stack.callback(_run, "umount", root)
        yield made


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
