"""How bytes reach the disk so that a crash leaves the old state or the new, never half: the only fsync and rename.

After a failed fsync a file is not trusted again (the kernel may have dropped its bytes and call it clean): the error
goes up, and whoever tries again writes anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_THREADS = 8
_AHEAD = 128
_PIECE = 1 << 20
_WRITE, _WAIT_AFTER = 2, 4  # SYNC_FILE_RANGE_…


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(paths: Collection[Path]) -> None:
    """sync() each. A journalled file system then needs one commit for all instead of one for each."""
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths if path.is_file()]
    try:
        for flags in (_WRITE, _WRITE | _WAIT_AFTER) if len(fds) > 1 else ():
            for fd in fds:  # all bytes on their way first: they get their places in one commit
                _write_back(fd, flags)
    finally:
        for fd in fds:
            os.close(fd)
    if len(paths) < _THREADS:
        for path in paths:
            sync(path)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(sync, paths))


def _write_back(fd: int, flags: int) -> None:
    """sync_file_range(2). It may be told of an error that fsync() is then not told of again."""
    if _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), flags) != 0:
        error = ctypes.get_errno()
        if error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # others: a folder, or a file system without this
            raise OSError(error, os.strerror(error), str(Path(f"/proc/self/fd/{fd}").readlink()))


def settle(root: Path) -> None:
    """Make durable whatever an earlier process wrote on the file system of `root` and died before it could sync it."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(root))
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def exists(place: str) -> bool:
    """Path.exists(), for those who ask often: making a Path costs more than asking."""
    return os.path.exists(place)  # noqa: PTH110


def read(place: str) -> bytes:
    """Path.read_bytes(), for those who read often: making a Path costs more than reading."""
    with open(place, "rb", buffering=0) as file:  # noqa: PTH123
        return file.read()


def read_many(places: Sequence[str]) -> Iterator[bytes]:
    """read() of each, for a disk that has to fetch them: it is told of the next 128, and fetches them side by side."""
    for first in range(0, len(places), _AHEAD):
        fds: list[int] = []
        try:
            for place in places[first : first + _AHEAD]:
                fds.append(os.open(place, os.O_RDONLY | os.O_CLOEXEC))
                os.posix_fadvise(fds[-1], 0, 0, os.POSIX_FADV_WILLNEED)
            for fd in fds:
                with open(fd, "rb", buffering=0, closefd=False) as file:
                    yield file.read()
        finally:
            for fd in fds:
                os.close(fd)


def touch(path: Path, mode: int, now: bool = False) -> None:
    """An empty file, if there is none; `now`: one that is there becomes new, by the clock of its disk. Not durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        if now:
            os.utime(fd)
    finally:
        os.close(fd)


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Create a folder and its parents durably; quick where it stands."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode, exist_ok=True)
    try:
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()  # else it would be taken for durable next time
        raise


def rename(source: Path, target: Path) -> None:
    """Not durable. Over NFS a rename may be done and yet report an error, because the answer was lost: look again.

    After Postfix, sane_rename(3).
    """
    was = source.lstat()
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(source) or not _is(target, was):
            raise


def link(source: Path, target: Path) -> None:
    """A second name, in place of any that was there; not durable. What a failed attempt left is made anew."""
    target.unlink(missing_ok=True)
    target.hardlink_to(source)


def _is(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), file)
    except OSError:
        return False


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write(path: Path, data: bytes, mode: int, durable: bool, mtime_ns: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        if mtime_ns is not None:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        if durable:
            os.fsync(fd)


def write_unsynced(path: Path, data: bytes, mode: int = 0o644, mtime_ns: int | None = None) -> None:
    """Create path in one step; durable once the caller has synced path and its folder. Before that, a power cut may
    leave the name without the bytes."""
    temporary = _temporary(path)
    _write(temporary, data, mode, durable=False, mtime_ns=mtime_ns)
    rename(temporary, path)


def write(path: Path, data: bytes, mode: int = 0o644, mtime_ns: int | None = None) -> None:
    """Create or replace path in one step, durably. What fails leaves what was there, and no other file."""
    temporary = _temporary(path)
    try:
        _write(temporary, data, mode, durable=True, mtime_ns=mtime_ns)
        rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def create(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Write a new file in one step, durably; False if there is one."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)  # a crash's, of whatever mode
    _write(temporary, data, mode, durable=True)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        if not _is(path, temporary.lstat()):  # over NFS it may be ours: done, and the answer was lost
            return False
    finally:
        temporary.unlink()
    sync(path.parent)
    return True


def replace_hint(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace path in one step, not durably: for what is stale after a crash anyway."""
    temporary = _temporary(path)
    _write(temporary, data, mode, durable=False)
    rename(temporary, path)


def copy(source: Path, target: Path) -> str:
    """A stranger's file, durably, in place of what is there; its SHA-256. No link is followed. Not in one step: the
    target is a temporary name. Raises NotOrdinary, OSError."""
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with os.fdopen(reading, "rb") as file:
        if not stat.S_ISREG(os.fstat(reading).st_mode):
            raise NotOrdinary(errno.EINVAL, "not a regular file", str(source))
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        digest = hashlib.sha256()
        with os.fdopen(writing, "wb") as copied:
            while piece := file.read(_PIECE):
                digest.update(piece)
                copied.write(piece)
            copied.flush()
            os.fsync(writing)
    return digest.hexdigest()


def move(source: Path, target: Path) -> None:
    """Rename, and return only once the rename would survive a power cut."""
    rename(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync(path.parent)


def append(path: Path, data: bytes, mode: int = 0o644, durable: bool = True) -> None:
    """Add whole lines with one write(), mending a line that a crash has cut: readers may follow with `tail -F`.

    What fails is taken back, so that another try writes it anew: bytes whose fsync failed may never reach the disk.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        lines = b"\n" * torn + data
        try:
            if os.write(fd, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if durable:
                os.fsync(fd)
                if size == 0:
                    sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def end_line(path: Path) -> None:
    """Mend a line that a crash has cut, durably, although nothing is to be added: a reader waits for its end."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END) > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            append(path, b"")


def rotate(path: Path, max_bytes: int, kept: int) -> None:
    """A file that is so large gives its name to a new one, as `tail -F` expects it; `kept` older ones stay, the
    youngest as NAME.1. Not durable. A crash in between leaves a number out, which harms nobody."""
    try:
        if path.stat().st_size < max_bytes:
            return
    except FileNotFoundError:
        return
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, kept + 1))]
    for older, younger in pairwise(reversed(names)):
        with contextlib.suppress(FileNotFoundError):
            rename(younger, older)


def no_waiting(path: str, flags: int) -> int:
    """An opener, for open(), that waits for no pipe's other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


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
