"""An inbox on disk: its listing, its files and rejected/ beside it, each folder opened without following a link.

It decides nothing. A folder is opened anew for each step: what was listed as a client's folder may have become a link
to our own queue, and one that is held open shows an old listing (NFS) or none (it was removed and made again).
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from imagend import files
from imagend.job import MAX_JOB_BYTES

ATTACHMENTS = "files"  # a folder of this name in an inbox holds no job files
REJECTED = "rejected"
_REASON = ".reason.json"
PROBE = ".imagend-clock"
Identity = tuple[int, int, int, int]
UNKNOWN: Identity = (0, 0, 0, 0)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Listing(NamedTuple):
    names: list[str]
    """in order; those in a client's folder as `folder/name`"""
    closed: tuple[tuple[str, OSError], ...]
    """entries that could not be looked at: they must not close the inbox to the others"""


class Inbox:
    """Files are called by their names in a Listing. GONE is what is raised for one that is there no more."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self) -> Listing:
        """Every entry that is no dotfile, here and one level down; 0.1 s for 100,000. Raises OSError."""
        names: list[str] = []
        folders: list[str] = []
        closed: list[tuple[str, OSError]] = []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if _is_job_name(entry.name):
                    try:
                        (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
                    except OSError as error:
                        closed.append((entry.name, error))
        for folder in folders:
            try:
                with self._folder(folder) as fd, os.scandir(fd) as entries:
                    names += [f"{folder}/{entry.name}" for entry in entries if _is_job_name(entry.name)]
            except GONE:
                continue
            except OSError as error:
                closed.append((folder, error))
        return Listing(sorted(names), tuple(closed))

    def identity(self, name: str) -> Identity:
        """Changes when the file does. Cheap, and on NFS perhaps a minute old."""
        with self._place(name) as place:
            return identity(os.lstat(place))

    def read(self, name: str) -> tuple[bytes, os.stat_result]:
        """See files.read_untrusted()."""
        with self._place(name) as place:
            return files.read_untrusted(Path(place), MAX_JOB_BYTES)

    def attachment(self, name: str, leaf: str, limit: int) -> bytes:
        """A file in files/ beside the job file `name`, or else in the inbox's own; see files.read_untrusted()."""
        for folder in dict.fromkeys((name.rpartition("/")[0], "")):
            with suppress(*GONE), self._attachments(folder) as fd:
                return files.read_untrusted(Path(f"/proc/self/fd/{fd}/{leaf}"), limit)[0]
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), leaf)

    def sweep_attachments(self, before: float) -> None:
        """Remove what lies in files/, here and one level down, from before a moment of the inbox's clock."""
        with os.scandir(self.root) as entries:
            folders = [entry.name for entry in entries if _is_job_name(entry.name) and _is_folder(entry)]
        for folder in ("", *folders):
            with suppress(OSError), self._attachments(folder) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    if not _is_folder(entry) and entry.stat(follow_symlinks=False).st_ctime < before:
                        os.unlink(entry.name, dir_fd=fd)

    def sweep_rejected(self, before: float, most: int) -> None:
        """Remove what was refused before a moment of the inbox's clock, and in each folder of rejected/ what is older
        than the `most` newest reasons. Raises OSError."""
        with suppress(*GONE), self._standing(self.root.parent, REJECTED) as fd:
            with os.scandir(fd) as entries:
                folders = [entry.name for entry in entries if _is_folder(entry)]
            _sweep(fd, before, most)
            for folder in folders:
                with suppress(*GONE), self._standing(f"/proc/self/fd/{fd}", folder) as client:
                    _sweep(client, before, most)

    def remove(self, name: str, known: Identity) -> None:
        """Unlink the file that was read; if its sender has put another one in its place, that one stays."""
        with self._place(name) as place:
            if _current(place) == known:
                try:
                    Path(place).unlink()
                except OSError:
                    if _exists(place):
                        raise  # else it was done, and only the answer was lost (NFS)

    def reject(self, name: str, known: Identity, note: dict[str, Any]) -> None:
        """Move the file beside the inbox. `note`, with the file's new name added, is there first.

        It stays there even if the move met an error, for that does not tell that it was not done (NFS).
        """
        folder, _, leaf = name.rpartition("/")
        with self._place(name) as place, self._rejected(folder) as rejected:
            target = _free(rejected, leaf, known)
            reason = _reason(target)
            files.write(Path(reason), json.dumps({"file": _leaf(target), **note}, indent=2).encode() + b"\n")
            if _current(place) == known:
                files.move(Path(place), Path(target))

    def skew_s(self) -> float:
        """How far the clock that stamps this inbox's files (on NFS the server's) is ahead of ours. Raises OSError."""
        with self._place(PROBE) as place:
            with suppress(FileNotFoundError):
                Path(place).unlink()  # a crash's
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                before = time.time()
                os.utime(fd)  # "now" by the server's clock
                stamped = os.fstat(fd).st_mtime
                return stamped - (before + time.time()) / 2
            finally:
                os.close(fd)
                with suppress(OSError):
                    Path(place).unlink()

    @contextmanager
    def _place(self, name: str) -> Iterator[str]:
        folder, _, leaf = name.rpartition("/")
        with self._folder(folder) as fd:
            yield f"/proc/self/fd/{fd}/{leaf}"

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """The inbox ('') or a client's folder in it."""
        with ExitStack() as stack:
            fd = os.open(self.root, _FOLDER)
            stack.callback(os.close, fd)
            if name:
                fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            yield fd

    @contextmanager
    def _attachments(self, folder: str) -> Iterator[int]:
        with self._folder(folder) as parent:
            fd = os.open(ATTACHMENTS, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
            try:
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _standing(self, parent: Path | str, name: str) -> Iterator[int]:
        """A folder that is there, in one that we trust."""
        fd = os.open(parent, _FOLDER)
        try:
            folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        try:
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _rejected(self, folder: str) -> Iterator[str]:
        """rejected/ or a client's folder in it, made if it is not there."""
        with ExitStack() as stack:
            path = self.root.parent
            fd = os.open(path, _FOLDER)
            stack.callback(os.close, fd)
            for name in filter(None, (REJECTED, folder)):
                path /= name
                try:
                    fd = _open_or_make(name, fd)
                except NotADirectoryError:  # raised as it is, it would mean that the file is gone
                    why = f"{path} is a link or a file: put a folder in its place"
                    raise FileExistsError(errno.EEXIST, why) from None
                stack.callback(os.close, fd)
            yield f"/proc/self/fd/{fd}"


GONE = (FileNotFoundError, NotADirectoryError)


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _sweep(folder: int, before: float, most: int) -> None:
    """A file is refused right after its reason: whose reason is among the newest stays, and so does the reason."""
    with os.scandir(folder) as entries:
        reasons = (entry.stat(follow_symlinks=False).st_ctime for entry in entries if entry.name.endswith(_REASON))
        newest = heapq.nlargest(most, reasons)
    if len(newest) == most:
        before = max(before, newest[-1])
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_folder(entry) and entry.stat(follow_symlinks=False).st_ctime < before:
                with suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=folder)


def _is_job_name(name: str) -> bool:
    return not name.startswith(".") and name != ATTACHMENTS


def _open_or_make(name: str, parent: int) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        files.make_folder(Path(f"/proc/self/fd/{parent}/{name}"))
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)


def _current(place: str) -> Identity:
    """By opening the file, because that asks an NFS server, where lstat() may answer from a cache."""
    try:
        fd = os.open(place, _FILE)
    except FileNotFoundError:
        raise
    except OSError:  # a link, a socket, a file we may not read
        return identity(os.lstat(place))
    try:
        return identity(os.fstat(fd))
    finally:
        os.close(fd)


def _exists(place: str) -> bool:
    try:
        os.lstat(place)
    except FileNotFoundError:
        return False
    return True


def _free(folder: str, name: str, known: Identity) -> str:
    """A place that is not taken, nor its reason's: x.json, or x.HASH.json, which is the same whenever this very file is
    rejected again after a crash. A name too long for `.reason.json` is cut."""
    stem, suffix = (name[: -len(".json")], ".json") if name.endswith(".json") else (name, "")
    stem = os.fsdecode(os.fsencode(stem)[:200])
    candidate, number = f"{folder}/{stem}{suffix}", 0
    while _exists(candidate) or (_exists(_reason(candidate)) and not _left_over(candidate)):
        digest = hashlib.sha256(repr((known, number)).encode()).hexdigest()
        candidate, number = f"{folder}/{stem}.{digest[:12]}{suffix}", number + 1
    return candidate


def _left_over(place: str) -> bool:
    """Whether a crash came between the reason and the move of this very file."""
    try:
        raw, _ = files.read_untrusted(Path(_reason(place)), MAX_JOB_BYTES)  # perhaps a stranger's file of that name
        return bool(json.loads(raw)["file"] == _leaf(place))
    except (files.NotOrdinary, FileNotFoundError, PermissionError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _reason(place: str) -> str:
    return place + _REASON


def _leaf(place: str) -> str:
    return place.rpartition("/")[2]
