"""spool/history.db: every job that ended, also when its outputs have gone. SQLite, derived from manifests. No
part of a job's way: whoever asks brings it up to date first, by what the feed has told since, and so does retention
before a result goes.

It holds no prompt and no label: it outlives the outputs, and so what their clients wanted kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from imagend import feed, files
from imagend.errors import HistoryUnusable, SpoolUnusable
from imagend.job import CLIENT_NAME, JOB_ID, Kind, Ref
from imagend.model_names import wanted
from imagend.outputs import MANIFEST, RESULTS
from imagend.set_field import CONTACT_SHEET

FILE = "history.db"
_VERSION = 1
_BATCH = 1000
_LOCK_LIMIT_S = 60.0
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
CREATE TABLE jobs (
    client TEXT NOT NULL, id TEXT NOT NULL, kind TEXT, model TEXT, outcome TEXT NOT NULL, code TEXT,
    accepted_at REAL, started_at REAL, ended_at REAL NOT NULL, attempts INTEGER, pictures INTEGER NOT NULL,
    from_manifest INTEGER NOT NULL,
    PRIMARY KEY (client, id)
) WITHOUT ROWID;
CREATE INDEX jobs_by_end ON jobs (ended_at);
CREATE TABLE place (feed_offset INTEGER NOT NULL, tail BLOB NOT NULL);
"""
_Row = dict[str, Any]


def look(path: Path, outputs: Path, rebuild: bool = False) -> sqlite3.Connection:
    """The history, up to date. Who may not write it gets a copy in memory. Raises as trouble() does."""
    with trouble(path):
        writable = _made(path)
        if rebuild and not writable:
            raise SpoolUnusable(path, "only who may write it can rebuild it")
        database = _open(path) if writable else _copy(path)
        history = History(database, outputs, writable)
        if _version(database, path) == 0:
            history.make()
        if rebuild:
            history.forget()
        history.update()
    return database


@contextlib.contextmanager
def trouble(path: Path) -> Iterator[None]:
    """What SQLite says becomes HistoryUnusable, where another database would do, or SpoolUnusable."""
    try:
        yield
    except sqlite3.Error as error:
        damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
        raise (HistoryUnusable if damaged else SpoolUnusable)(path, error) from None


def set_aside(path: Path) -> Path | None:
    """Before a rebuild: where a history now lies that cannot be used; None if it can."""
    with contextlib.suppress(HistoryUnusable), trouble(path), contextlib.closing(_copy(path)) as database:
        _version(database, path)
        if database.execute("PRAGMA quick_check").fetchone()[0] == "ok":
            return None
    aside = path.with_name(f"{path.name}.damaged")
    for ending in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            files.rename(Path(f"{path}{ending}"), Path(f"{aside}{ending}"))
    return aside


def _version(database: sqlite3.Connection, path: Path) -> int:
    """0 of one that is new and empty. Raises HistoryUnusable for what is not ours."""
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version > _VERSION:
        raise HistoryUnusable(path, "a newer imagend wrote it")
    if version:
        database.execute("SELECT 1 FROM jobs, place LIMIT 0")
    return version


def _made(path: Path) -> bool:
    """Whether we may write it; from now on it is there, and who owns its folder may write it, too."""
    if not os.access(path.parent, os.W_OK, effective_ids=True):
        return False
    try:
        files.touch(path, 0o640)  # what SQLite puts beside it gets the same mode and owner
    except PermissionError:
        return False
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.chown(path, folder.st_uid, folder.st_gid, follow_symlinks=False)
    return True


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_LOCK_LIMIT_S, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    return database


def _copy(path: Path) -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", isolation_level=None)
    while path.exists():
        if not os.access(path, os.R_OK, effective_ids=True):
            raise SpoolUnusable(path, "it is for imagend's own user and group to read")
        before = _at_rest(path)
        # Without a log beside it nobody writes; and where we may make no log, SQLite reads only what never changes.
        how = "immutable=1" if before else "mode=ro"
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?{how}", uri=True)) as disk:
            disk.backup(memory)
        if before == _at_rest(path):
            break
    return memory


def _at_rest(path: Path) -> tuple[int, ...]:
    """What changes whenever it was written; nothing while somebody has it open to write."""
    if Path(f"{path}-wal").exists():
        return ()
    status = path.stat()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


class History:
    """Takes in what has ended. Two at once do no harm: each batch begins where the last one of any ended."""

    def __init__(self, database: sqlite3.Connection, outputs: Path, strict: bool) -> None:
        self._database, self._outputs, self._strict = database, outputs, strict

    def make(self) -> None:
        with self._change() as database:
            if database.execute("PRAGMA user_version").fetchone()[0] == 0:  # else another was quicker
                for statement in filter(str.strip, _TABLES.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")

    def forget(self) -> None:
        """Every manifest is to be read again. What no manifest tells any more stays as it is."""
        with self._change() as database:
            database.execute("UPDATE jobs SET from_manifest = 0")
            database.execute("DELETE FROM place")

    def update(self) -> None:
        if self._place() is None:
            self._look_through()
        try:
            while self._read_on():
                pass
        except feed.Lost:
            with self._change() as database:
                database.execute("DELETE FROM place")
            self.update()

    def _read_on(self) -> bool:
        """Take in a batch of the feed; whether there may be more."""
        with self._change() as database:
            place, count = self._place(), 0
            for line, after in islice(feed.lines(self._outputs / RESULTS, place), _BATCH):
                place, count = after, count + 1
                self._take(line)
            if count and place:
                database.execute("DELETE FROM place")
                database.execute("INSERT INTO place VALUES (?, ?)", place)
        return count == _BATCH

    def _look_through(self) -> None:
        """All manifests that there are: the feed may have been cut since its jobs ended."""
        refs = self._published()
        while batch := list(islice(refs, _BATCH)):
            with self._change():
                for ref in batch:
                    if not self._known(ref) and (row := self._manifest(ref)):
                        self._enter(row)

    def _published(self) -> Iterator[Ref]:
        for client in self._names(self._outputs, CLIENT_NAME):
            for job in self._names(self._outputs / client, JOB_ID):
                yield Ref(client, job)

    def _names(self, folder: Path, pattern: str) -> Iterable[str]:
        try:
            return sorted(path.name for path in folder.iterdir() if re.match(pattern, path.name))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except PermissionError:
            if self._strict:
                raise
            return ()

    def _take(self, line: bytes) -> None:
        """A line of the feed. What a crash cut is passed over: the line was written again."""
        try:
            told = json.loads(line)
            ref, ended_at = Ref(told["client"], told["id"]), _seconds(told["ended_at"])
            if not (re.match(CLIENT_NAME, ref.client) and re.match(JOB_ID, ref.id)):
                return
            row = _told_by_feed(ref, told)
        except (ValueError, KeyError, TypeError):
            return
        if not self._known(ref, ended_at):
            self._enter(self._manifest(ref) or row)

    def _known(self, ref: Ref, ended_at: float | None = None) -> bool:
        """Whether its manifest was read, the one of that end."""
        sql = "SELECT ended_at FROM jobs WHERE client = ? AND id = ? AND from_manifest"
        row = self._database.execute(sql, ref).fetchone()
        return row is not None and ended_at in (None, row[0])

    def _manifest(self, ref: Ref) -> _Row | None:
        """None if it has gone, or may not be read by one who only reads."""
        try:
            return _told_by_manifest(ref, json.loads((self._outputs / ref.client / ref.id / MANIFEST).read_bytes()))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None
        except PermissionError:
            if self._strict:
                raise
            return None

    def _enter(self, row: _Row) -> None:
        """What a manifest told before is not replaced by the little that the feed tells of the same end."""
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        kept = "" if row["from_manifest"] else "WHERE jobs.ended_at <> excluded.ended_at"
        changes = ", ".join(f"{name} = excluded.{name}" for name in row)
        sql = f"INSERT INTO jobs ({names}) VALUES ({marks}) ON CONFLICT DO UPDATE SET {changes} {kept}"
        self._database.execute(sql, tuple(row.values()))

    def _place(self) -> feed.Place | None:
        row = self._database.execute("SELECT feed_offset, tail FROM place").fetchone()
        return feed.Place(*row) if row else None

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One at a time, and whole or not at all."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database


def _told_by_feed(ref: Ref, line: dict[str, Any]) -> _Row:
    row = {"client": ref.client, "id": ref.id, "kind": line.get("kind"), "model": None}
    files = () if line.get("kind") == Kind.TRAIN else line.get("files") or ()
    pictures = sum(name != CONTACT_SHEET for name in files)
    row |= {"outcome": line["outcome"], "code": line.get("code"), "accepted_at": None, "started_at": None}
    ended = {"ended_at": _seconds(line["ended_at"]), "attempts": None, "pictures": pictures}
    return row | ended | {"from_manifest": 0}


def _told_by_manifest(ref: Ref, manifest: dict[str, Any]) -> _Row:
    model = (manifest.get("spec") or {}).get("model")
    times = {key: manifest.get(key) for key in ("accepted_at", "started_at", "ended_at")}
    row = {"client": ref.client, "id": ref.id, "kind": manifest.get("kind")}
    row |= {"model": wanted(model).name if model else None, "outcome": manifest["outcome"]}
    row |= {"code": (manifest.get("error") or {}).get("code")}
    row |= {key: _seconds(text) if text else None for key, text in times.items()}
    pictures = sum("role" not in one for one in manifest.get("artifacts") or ())
    return row | {"attempts": manifest.get("attempts"), "pictures": pictures, "from_manifest": 1}


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
