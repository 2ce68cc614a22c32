"""The disk, watched: every change that this process makes, told before and after it; and deaths in its place."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from imagend import files

KILLED = 9
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SYNCS = ("fsync", "syncfs")
_BY_PATH = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate", "utime", "chmod")


class Op(NamedTuple):
    """A change of the disk, made by os, pathlib, shutil or open()."""

    name: str
    path: str
    target: str = ""
    data: bytes = b""
    truncates: bool = False


class Watcher:
    """Is told of every change before it is made and after it was made.

    Of a sync, too; it is not done then: whom we kill does not need it, and it takes most of the time.
    """

    def before(self, op: Op) -> None: ...

    def before_write(self, op: Op, tear: Callable[[int], object]) -> None:
        """tear(n) writes the first n bytes only."""
        self.before(op)

    def after(self, op: Op) -> None: ...


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While it lasts, `watcher` sees each change that this process makes.

    pathlib and shutil look their functions up in `os` (pathlib opens by io.open) at each call, so they are seen too;
    test_nothing_escapes_the_watcher holds that against Python's own audit events.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in _BY_PATH:
            patch.setattr(os, name, _by_path(name, getattr(os, name), watcher))
        patch.setattr(os, "fsync", _sync("fsync", watcher))
        calls = SimpleNamespace(syncfs=_sync("syncfs", watcher), sync_file_range=files._libc.sync_file_range)
        patch.setattr(files, "_libc", calls)
        patch.setattr(os, "open", _os_open(os.open, watcher))
        patch.setattr(os, "write", _os_write(os.write, watcher))
        opened = _io_open(io.open, watcher)
        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        yield


def _where(path: Any, folder: int | None = None) -> str:
    """The absolute path of a path, a file descriptor, or a name in an open folder."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    if folder is not None:
        return f"{_where(folder)}/{os.fspath(path)}"
    above, _, name = os.path.abspath(path).rpartition("/")  # noqa: PTH100
    return f"{os.path.realpath(above) if above.startswith('/proc/') else above}/{name}"


def _by_path(name: str, real: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        two = name in ("rename", "replace", "link")
        op = Op(name, _where(path, kwargs.get("dir_fd")), _where(args[0]) if two else "")
        watcher.before(op)
        result = real(path, *args, **kwargs)
        watcher.after(op)
        return result

    return call


def _sync(name: str, watcher: Watcher) -> Callable[[int], int]:
    def call(fd: int) -> int:
        op = Op(name, _where(fd))
        watcher.before(op)
        watcher.after(op)
        return 0

    return call


def _os_open(real: Callable[..., int], watcher: Watcher) -> Callable[..., int]:
    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & CHANGING:
            return real(path, flags, *args, **kwargs)
        op = Op("open", _where(path, kwargs.get("dir_fd")), truncates=bool(flags & os.O_TRUNC))
        watcher.before(op)
        fd = real(path, flags, *args, **kwargs)
        watcher.after(op)
        return fd

    return call


def _os_write(real: Callable[[int, Any], int], watcher: Watcher) -> Callable[[int, Any], int]:
    def call(fd: int, data: Any) -> int:
        op = Op("write", _where(fd), data=bytes(data))
        if not op.path.startswith("/"):  # a pipe, not the disk
            return real(fd, data)
        watcher.before_write(op, lambda length: real(fd, op.data[:length]))
        written = real(fd, data)
        watcher.after(op._replace(data=op.data[:written]))
        return written

    return call


def _io_open(real: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    class Raw(io.FileIO):
        """The lowest layer of a file object: its write() is the write(2) that a flush or a close makes."""

        def write(self, data: Any) -> int:
            op = Op("write", _where(self.fileno()), data=bytes(data))
            plain = super().write
            watcher.before_write(op, lambda length: plain(op.data[:length]))
            written = plain(op.data)
            watcher.after(op._replace(data=op.data[:written]))
            return written

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        op = Op("open", _where(file), truncates="w" in mode)
        if not isinstance(file, int):
            watcher.before(op)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if not isinstance(file, int):
            watcher.after(op)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return call


class Recorder(Watcher):
    """Keeps what was done. `armed` is False while something is going on that does not matter."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.armed = True

    def before(self, op: Op) -> None:
        if self.armed:
            self.ops.append(op)


class Killer(Recorder):
    """Ends this process at the n-th point, counted from 0. Each operation is a point: the death comes in its place.

    A write is three: nothing of it is written, half of it, or all but its last byte. A sync is none: it changes nothing
    that the dead leave behind, so a death in its place is the death in place of what follows.
    """

    def __init__(self, point: int) -> None:
        super().__init__()
        self.left = point

    def die(self) -> None:
        os._exit(KILLED)

    def before(self, op: Op) -> None:
        super().before(op)
        if op.name not in SYNCS and self._due():
            self.die()

    def before_write(self, op: Op, tear: Callable[[int], object]) -> None:
        self.before(op)
        for length in (len(op.data) // 2, len(op.data) - 1):
            if self._due():
                tear(length)
                self.die()

    def _due(self) -> bool:
        if not self.armed:
            return False
        self.left -= 1
        return self.left < 0


class ClaimKiller(Killer):
    """Ends this process when it would move a job to active/."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize)

    def before(self, op: Op) -> None:
        if op.name in ("rename", "link") and "/active/" in op.target:
            self.die()


def points(ops: Iterable[Op]) -> list[str]:
    """Where a Killer may strike, in words."""
    parts = {**dict.fromkeys(SYNCS, ()), "write": ("", " (half)", " (but for its last byte)")}
    return [f"{op.name} {op.path} {op.target}{part}" for op in ops for part in parts.get(op.name, ("",))]
