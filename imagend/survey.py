"""One look through all models: what can be used, what is refused and why, what is still being copied.

A file is taken up when its header describes it to the byte and it has not changed for some seconds: a download that
has reserved its room is of full size from the beginning. One that we fetched is whole when it comes. Each is judged
once for as long as it is unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from imagend.architecture import ModelKind
from imagend.catalog import Catalog, Entry, Key, told
from imagend.errors import BrokenModel, JobFailed, UnusableModel
from imagend.model_folders import Found
from imagend.models import Models, check_whole
from imagend.records import Records

SETTLE_S = 3.0
_Version = tuple[int, ...]


class Survey:
    def __init__(
        self,
        models: Models,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.models, self._settle_s, self._clock, self._wall = models, settle_s, clock, wall
        self._judged: dict[Key, tuple[_Version, Entry | JobFailed]] = {}
        self._seen: dict[Key, tuple[_Version, float]] = {}
        self._records = Records()
        self.full: tuple[ModelKind, ...] = ()

    def look(self, each: Callable[[], None] = lambda: None) -> Iterator[Catalog]:
        """The catalogue after each kind, what comes later in it as it was before; `each` is called for each model."""
        catalog = Catalog({key: one for key, (_, one) in self._judged.items() if isinstance(one, Entry)})
        full = []
        for kind in ModelKind:
            entries: dict[Key, Entry] = {}
            refused: dict[Key, JobFailed] = {}
            arriving: set[Key] = set()
            listing = self.models.folders.list(kind)
            full += [kind] if listing.full else []
            for name, why in listing.refused.items():
                refused[kind, name] = UnusableModel(kind.noun, name, why)
            for found in listing.found.values():
                each()
                key = (kind, found.name)
                match self._judge(key, found):
                    case Entry() as entry:
                        try:
                            entries[key] = replace(entry, record=self._records.of(found.path))
                        except ValueError as wrong:
                            refused[key] = UnusableModel(kind.noun, found.name, f"one whose record {wrong}")
                    case JobFailed() as error:
                        refused[key] = error
                    case _:
                        arriving.add(key)
            gone = {key for key in self._judged if key[0] is kind} - entries.keys() - refused.keys()
            for key in gone:
                del self._judged[key]
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] is not kind or key in arriving}
            catalog = _with(catalog, kind, entries, refused, arriving)
            yield catalog
        self.full = tuple(full)

    def _judge(self, key: Key, found: Found) -> Entry | JobFailed | None:
        """None while it is being copied."""
        try:
            version = _version(found)
        except OSError as error:
            return BrokenModel(found.name, error.strerror or "it cannot be read")
        known = self._judged.get(key)
        if known is not None and known[0] == version:
            return known[1]
        if not (self._was_whole(found, version) or self._is_settled(key, version)):
            return None
        judged, passing = self._examine(key[0], found)
        if not passing:
            self._judged[key] = (version, judged)
        return judged

    def _was_whole(self, found: Found, version: _Version) -> bool:
        """Whether its record, which comes before it, says that it was fetched, and it has not changed since."""
        try:
            record = self._records.of(found.path)
        except ValueError:
            return False
        fetched = record.fetched_at if record else None
        return fetched is not None and _changed_at(version) <= fetched.timestamp()

    def _is_settled(self, key: Key, version: _Version) -> bool:
        """By the file's own time, or, where that is of a clock that goes wrong, by ours."""
        if self._wall() - _changed_at(version) >= self._settle_s:
            return True
        seen, since = self._seen.get(key, (None, 0.0))
        if seen != version:
            self._seen[key] = (version, self._clock())
            return self._settle_s <= 0
        return self._clock() - since >= self._settle_s

    def _examine(self, kind: ModelKind, found: Found) -> tuple[Entry | JobFailed, bool]:
        """What it is; and whether that may be otherwise the next time though its files are the same (EIO, EACCES)."""
        try:
            model = self.models.judge(found, kind)
            check_whole(model)
            self.models.check(model)
            words, base = told(self.models.header(model).metadata) if model.is_file else ((), None)
            return Entry(model, words, base), False
        except JobFailed as error:
            return error, isinstance(error.__context__, OSError)

    @property
    def is_waiting(self) -> bool:
        """Whether something is still being copied: look again soon."""
        return bool(self._seen)


def _with(
    catalog: Catalog, kind: ModelKind, entries: dict[Key, Entry], refused: dict[Key, JobFailed], arriving: set[Key]
) -> Catalog:
    """`catalog` with all that is known of one kind replaced."""
    return replace(
        catalog,
        entries={key: one for key, one in catalog.entries.items() if key[0] is not kind} | entries,
        refused={key: one for key, one in catalog.refused.items() if key[0] is not kind} | refused,
        arriving=frozenset({key for key in catalog.arriving if key[0] is not kind} | arriving),
    )


def _version(found: Found) -> _Version:
    """Device, inode, size and both times of change of the file; of a folder, of all that a library may read in it."""
    paths = [found.path] if found.is_file else [found.path, *_files_in(found.path)]
    states = [path.stat() for path in paths]
    return tuple(
        number
        for status in states
        for number in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


def _changed_at(version: _Version) -> float:
    """When its bytes were last written, in seconds of its file system's clock."""
    return max(version[3::5], default=0) / 1e9


def _files_in(folder: Path) -> list[Path]:
    wanted = (".safetensors", ".json", ".txt")
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.name.endswith(wanted))
