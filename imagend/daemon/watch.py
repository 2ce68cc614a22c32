"""Hints that an inbox changed (inotify, by watchdog). They may be lost, late or never come; the doors look anyway."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import structlog
from watchdog.events import (
    DirCreatedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

log = structlog.get_logger()

# A finished write, a rename, a new client folder. Not our own reads and removals: they would call us back for ever.
# A file moved in from an unwatched folder is "created" to watchdog.
_TELLING: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent, DirCreatedEvent]


class _Hint(FileSystemEventHandler):
    def __init__(self, hint: Event) -> None:
        self._hint = hint

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._hint.set()


def watch(inboxes: dict[Path, Event]) -> None:
    """Set each inbox's event whenever something changes in it, for as long as this process lives.

    On a thread of its own: to look at an inbox may hang (NFS) or fail, and hints are only hints.
    """
    Thread(target=_watch, args=(inboxes,), name="watch", daemon=True).start()


def _watch(inboxes: dict[Path, Event]) -> None:
    observer = Observer()
    observer.daemon = True
    observer.start()
    for inbox, hint in inboxes.items():
        try:
            observer.schedule(_Hint(hint), str(inbox), recursive=True, event_filter=_TELLING)
        except OSError as error:
            log.warning("inbox is not watched, only scanned", inbox=str(inbox), why=str(error))
