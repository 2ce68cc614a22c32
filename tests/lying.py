"""A file system that lies as NFS may, between one folder and all that touch it, on a clock of its own.

It takes the place of os.open() and its like for paths under a root. Whoever acts inside `abroad()` is another host: it
sees what is so, and our host may hear of its doings late. Our own doings we see at once. Whatever is asked may be
refused; what is done may be told as refused. Every lie is drawn from one seed, and all of them end at `honest_at`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MEMORY_S = 30.0
"""how long our host may believe what is no longer so: acdirmax and acregmax of a usual mount"""
_REFUSALS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT)
_WRITE_REFUSALS = (*_REFUSALS, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class Entries:
    """What os.scandir() returns."""

    def __init__(self, entries: list[Any]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Entries:
        return self

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None: ...


class Entry:
    def __init__(self, name: str, path: str, folder: bool) -> None:
        self.name, self.path, self.folder = name, path, folder

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.folder


class Lies:
    def __init__(self, root: Path, seed: int, honest_at: float) -> None:
        self.root, self.random, self.honest_at = str(root), random.Random(seed), honest_at
        self.now = 0.0
        self.told: Counter[str] = Counter()
        self._abroad = self._truth = False
        self._hidden: dict[str, float] = {}  # it is there, and we do not know
        self._gone: dict[str, tuple[float, os.stat_result]] = {}  # it is gone, and we do not know
        self._old: dict[str, tuple[float, os.stat_result]] = {}  # it was replaced, and we do not know
        self._real: dict[str, Any] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "stat", "lstat", "scandir", "unlink", "rename", "mkdir", "fsync"):
            self._real[name] = getattr(os, name)
            patch.setattr(os, name, getattr(self, f"_{name}"))

    @contextlib.contextmanager
    def abroad(self) -> Iterator[None]:
        self._abroad = True
        try:
            yield
        finally:
            self._abroad = False

    @contextlib.contextmanager
    def truth(self) -> Iterator[None]:
        self._truth = True
        try:
            yield
        finally:
            self._truth = False

    # What is so, and what is told

    def _place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Where a path leads, whatever descriptors it goes through; None if that is no business of ours."""
        if self._truth:
            return None
        place = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path)
        if dir_fd is not None:
            place = f"/proc/self/fd/{dir_fd}/{place}"
        if place.startswith("/proc/self/fd/"):
            number, _, rest = place.removeprefix("/proc/self/fd/").partition("/")
            place = f"{os.readlink(f'/proc/self/fd/{number}')}/{rest}".rstrip("/")  # noqa: PTH115
        return place if place.startswith(self.root) else None

    def _status(self, place: str) -> os.stat_result | None:
        try:
            return self._real["lstat"](place)  # type: ignore[no-any-return]
        except OSError:
            return None

    def _chance(self, share: float) -> bool:
        return self.now < self.honest_at and self.random.random() < share

    def _refuse(self, place: str, share: float, numbers: tuple[int, ...], what: str = "refused") -> None:
        if self._chance(share):
            self.told[what] += 1
            number = self.random.choice(numbers)
            raise OSError(number, os.strerror(number), place)

    def _forget(self, place: str) -> None:
        for memory in (self._hidden, self._gone, self._old):
            memory.pop(place, None)  # type: ignore[attr-defined]

    def _changed(self, place: str, before: os.stat_result | None) -> None:
        """Another host, or we, made, replaced or removed an entry; what will our host believe?"""
        self._forget(place)
        until = self.now + self.random.uniform(0.0, MEMORY_S)
        after = self._status(place)
        if before is not None and after is None and self._chance(0.5):
            self._gone[place] = (until, before)
        elif self._abroad and before is None and self._chance(0.5):
            self._hidden[place] = until
        elif self._abroad and before is not None and self._chance(0.5):
            self._old[place] = (until, before)

    def _is_hidden(self, place: str) -> bool:
        hidden = not self._abroad and self.now < min(self._hidden.get(place, 0.0), self.honest_at)
        self.told["not there yet"] += hidden
        return hidden

    def _remembered(self, place: str, memory: dict[str, tuple[float, os.stat_result]]) -> os.stat_result | None:
        until, status = memory.get(place, (0.0, None))
        if status is None or self._abroad or self.now >= min(until, self.honest_at):
            return None
        self.told["still there" if memory is self._gone else "still the old one"] += 1
        return status

    # The calls

    def _scandir(self, path: Any = ".") -> Any:
        place = self._place(path)
        if place is None:
            return self._real["scandir"](path)
        self._refuse(place, 0.05, _REFUSALS)
        with self._real["scandir"](path) as real:
            entries = [Entry(e.name, e.path, e.is_dir(follow_symlinks=False)) for e in real]
        entries = [entry for entry in entries if not self._is_hidden(f"{place}/{entry.name}")]
        for gone in self._gone:
            folder, _, name = gone.rpartition("/")
            if folder == place and (status := self._remembered(gone, self._gone)) and self._status(gone) is None:
                entries.append(Entry(name, gone, stat.S_ISDIR(status.st_mode)))
        self.random.shuffle(entries)
        return Entries(entries)

    def _lstat(self, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        return self._stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def _stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        place = None if isinstance(path, int) else self._place(path, dir_fd)
        if place is not None:
            self._refuse(place, 0.03, _REFUSALS)
            if self._is_hidden(place):
                raise FileNotFoundError(errno.ENOENT, "no such file, says a memory", place)
            if self._status(place) is None and (status := self._remembered(place, self._gone)):
                return status
            if status := self._remembered(place, self._old):
                return status
        return self._real["stat"](path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)  # type: ignore[no-any-return]

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if place is None:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)  # type: ignore[no-any-return]
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        self._refuse(place, 0.04, _WRITE_REFUSALS if writes else _REFUSALS)
        if not writes and self._is_hidden(place):
            raise FileNotFoundError(errno.ENOENT, "no such file, says a memory", place)
        if not writes and self._status(place) is None and self._remembered(place, self._gone):
            raise OSError(errno.ESTALE, "its handle is stale", place)
        before = self._status(place)
        fd: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        if writes and (before is None or flags & os.O_TRUNC):
            self._changed(place, before)
        elif not writes:
            self._old.pop(place, None)  # to open a file asks the server
        return fd

    def _fsync(self, fd: int) -> None:
        if (place := self._place(fd)) is not None:
            self._refuse(place, 0.04, _WRITE_REFUSALS)
        self._real["fsync"](fd)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        if place is None:
            return self._real["unlink"](path, dir_fd=dir_fd)  # type: ignore[no-any-return]
        self._refuse(place, 0.05, _WRITE_REFUSALS)
        before = self._status(place)
        self._real["unlink"](path, dir_fd=dir_fd)
        self._changed(place, before)
        self._refuse(place, 0.05, (errno.EIO, errno.ENOENT), "done, and the answer lost")
        return None

    def _rename(self, source: Any, target: Any) -> None:
        places = [self._place(source), self._place(target)]
        if places[0] is None or places[1] is None:
            return self._real["rename"](source, target)  # type: ignore[no-any-return]
        self._refuse(places[1], 0.05, _WRITE_REFUSALS)
        before = [self._status(places[0]), self._status(places[1])]
        self._real["rename"](source, target)
        for place, status in zip(places, before, strict=True):
            assert place is not None
            self._changed(place, status)
        self._refuse(places[1], 0.08, (errno.EIO, errno.ENOENT, errno.EEXIST), "done, and the answer lost")
        return None

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        if place is None:
            return self._real["mkdir"](path, mode, dir_fd=dir_fd)  # type: ignore[no-any-return]
        self._refuse(place, 0.05, _WRITE_REFUSALS)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._changed(place, None)
        self._refuse(place, 0.1, (errno.EIO, errno.EEXIST), "done, and the answer lost")
        return None
