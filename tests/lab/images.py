"""File systems in files: made, mounted by loop devices, copied in an instant, and put away whatever happens.

A copy of a mounted file system's image, taken without a sync, is what a power cut leaves of it: what the kernel had
not yet written to the device is not in it. For that the copy must be of one instant, so that images lie on an XFS with
reflinks (ioctl_ficlonerange(2)), itself an image in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

TOOLS = ("mkfs.ext4", "mkfs.xfs", "mount", "umount")
MEMORY = Path("/dev/shm")
MIB = 1 << 20
_MAKE = {
    "ext4": (48 * MIB, ("mkfs.ext4", "-q", "-F", "-m0")),
    "xfs": (320 * MIB, ("mkfs.xfs", "-q", "-f", "-m", "reflink=1")),
}
_UNSURE = {"xfs": "nouuid"}
"""Options for mounting a copy beside its original."""
_FICLONE = 0x40049409


class Unmountable(Exception):
    """mount(8) refused an image."""


def make(path: Path, kind: str, size: int = 0) -> Path:
    """A new file system of `size` bytes (or a small one) in a sparse file."""
    smallest, command = _MAKE[kind]
    with path.open("wb") as file:
        file.truncate(size or smallest)
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return path


def clone(source: Path, target: Path) -> Path:
    """A copy of one instant; both must lie on one file system with reflinks."""
    with source.open("rb") as reading, target.open("wb") as writing:
        fcntl.ioctl(writing, _FICLONE, reading.fileno())
    return target


@contextlib.contextmanager
def mounted(image: Path, folder: Path, kind: str, options: str = "") -> Iterator[Path]:
    """The file system in `image` at `folder`. Raises Unmountable.

    The loop device goes with the mount. A mount that somebody still uses is taken out of the tree, so that it goes
    with its last user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = ",".join(filter(None, ("loop", _UNSURE.get(kind), options)))
    done = subprocess.run(
        ["mount", "-t", kind, "-o", wanted, str(image), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unmountable(done.stderr.strip())
    try:
        yield folder
    finally:
        unmount(folder)


@contextlib.contextmanager
def memory(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder where clone() works: an XFS in memory, or on the disk where there is no /dev/shm."""
    with tempfile.TemporaryDirectory(prefix="imagend-lab-", dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        image = make(Path(temporary, "workshop.xfs"), "xfs", 8192 * MIB)
        with mounted(image, Path(temporary, "workshop"), "xfs") as folder:
            yield folder


@functools.cache
def missing() -> str | None:
    """Why file systems cannot be mounted here, or None."""
    if os.geteuid() != 0:
        return "only root may mount file systems"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(absent)} not installed: run tests/lab/packages"
    try:
        with workshop() as folder:
            original = make(folder / "original", "ext4")
            with mounted(clone(original, folder / "copy"), folder / "at", "ext4"):
                return None
    except (OSError, Unmountable, subprocess.CalledProcessError) as error:
        return f"no loop devices, or no ext4 and XFS, in this place: {error}"
