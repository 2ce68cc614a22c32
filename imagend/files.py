"""How bytes reach the disk so that a crash leaves the old state or the new, never half: the only fsync and rename.

After a failed fsync the file is not trusted again: the error goes up, and whoever tries anew writes a new file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def settle(root: Path, depth: int) -> None:
    """Make durable what an earlier process may have renamed or created in `root` and died before it could sync."""
    sync(root)
    if depth:
        for path in root.iterdir():
            if path.is_dir() and not path.is_symlink():
                settle(path, depth - 1)


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably; quick where it stands."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """Create or replace path in one step; durable once the caller has called sync(path.parent)."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        if mtime_ns is not None:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.fsync(fd)
    temporary.rename(path)


def write(path: Path, data: bytes) -> None:
    """Create or replace path in one step, durably."""
    write_unsynced(path, data)
    sync(path.parent)


def create(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Write a new file in one step, durably; False if there is one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a crash's, of whatever mode
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync(path.parent)
    return True


def replace_hint(path: Path, data: bytes) -> None:
    """Replace path in one step, not durably: for what is stale after a crash anyway."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def move(source: Path, target: Path) -> None:
    """Rename, and return only once the rename would survive a power cut."""
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync(path.parent)


def append(path: Path, line: bytes, durable: bool = True) -> None:
    """Add one line with one write(), mending a line that a crash has cut: readers may follow with `tail -F`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line + b"\n"
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    if durable and size == 0:
        sync(path.parent)


class NotOrdinary(OSError):
    """Not a regular file: a link, a folder, a pipe, a socket or a device."""


def read_untrusted(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """Read a stranger's file: no symlink followed, no pipe to hang on, at most limit + 1 bytes.

    Returns its bytes and the fstat of what was read. Raises NotOrdinary, or the OSError of open() and read().
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
            raise NotOrdinary(error.errno, "not a regular file", str(path)) from None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):  # before fdopen(), which refuses folders and leaves fd open
            raise NotOrdinary(errno.EINVAL, "not a regular file", str(path))
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(limit + 1), status
    finally:
        os.close(fd)
