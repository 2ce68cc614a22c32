"""Hints that a folder changed (inotify, by watchdog). They may be lost, late or never come; we look anyway."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

log = structlog.get_logger()

# A finished write, a rename, a new client folder. Not our own reads and removals: they would call us back for ever.
# A file moved in from an unwatched folder is "created" to watchdog.
_TELLING: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent, DirCreatedEvent]
_LOSSES: list[type[FileSystemEvent]] = [FileDeletedEvent, DirDeletedEvent, DirMovedEvent]


class _Hint(FileSystemEventHandler):
    def __init__(self, hint: Event) -> None:
        self._hint = hint

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._hint.set()


def watch(folders: Mapping[Path, Event], losses: bool = False) -> None:
    """Set each folder's event whenever something comes into it (with `losses`: or leaves it), for as long as this
    process lives.

    On a thread of its own: to look at a folder may hang (NFS) or fail, and hints are only hints.
    """
    telling = _TELLING + _LOSSES if losses else _TELLING
    Thread(target=_watch, args=(folders, telling), name="watch", daemon=True).start()


def _watch(folders: Mapping[Path, Event], telling: list[type[FileSystemEvent]]) -> None:
    observer = Observer()
    observer.daemon = True
    observer.start()
    for folder, hint in folders.items():
        try:
            observer.schedule(_Hint(hint), str(folder), recursive=True, event_filter=telling)
        except OSError as error:
            log.warning("a folder is not watched, only scanned", folder=str(folder), why=str(error))
