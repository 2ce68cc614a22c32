"""spool/orders/: what an operator wants of the queue. A file is a wish: it holds as long as it lies there, or once.

    pause  pause.<client>      nothing is handed out, or none of this client's jobs, while the file is there
    hold.<id>.<client>         this job is passed over while the file is there
    requeue.<id>.<client>      this failed or cancelled job shall be tried again     (done: the daemon removes the file)
    purge.<id>.<client>        nothing of this ended job shall stay                  (likewise)

Who may write here is an operator. Files, so that a wish outlives whoever wrote it and whoever reads it, in any order.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend import files
from imagend.job import CLIENT_NAME, Ref

FOLDER = "orders"
MAX_BYTES = 4096
_ID = re.compile(r"(hold|requeue|purge)\.([0-9a-f]{20})\.(.+)")
_CLIENT = re.compile(CLIENT_NAME)


@dataclass(frozen=True)
class Pause:
    at: str = ""
    reason: str = ""
    now: bool = False
    """whether what runs shall go back to the queue"""


@dataclass
class Wishes:
    """All that is wished, as the folder says it."""

    pause: Pause | None = None
    paused: dict[str, Pause] = field(default_factory=dict)
    held: set[Ref] = field(default_factory=set)
    requeue: list[Ref] = field(default_factory=list)
    purge: list[Ref] = field(default_factory=list)

    def stop(self, client: str) -> bool:
        """Whether a running job of this client shall go back to the queue."""
        return any(pause is not None and pause.now for pause in (self.pause, self.paused.get(client)))


class Orders:
    def __init__(self, spool: Path) -> None:
        self.folder = spool / FOLDER

    def give(self, name: str, **words: Any) -> None:
        """Write a wish, durably. Given by root, it belongs to whom the spool belongs, who must be able to remove it."""
        files.make_folder(self.folder, 0o750)
        path = self.folder / name
        words = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **words}
        files.write(path, json.dumps(words).encode() + b"\n", 0o640)
        if os.geteuid() == 0:
            owner = self.folder.parent.stat()
            for one in (self.folder, path):
                os.chown(one, owner.st_uid, owner.st_gid)

    def take_back(self, name: str) -> bool:
        """Remove a wish, durably; False if there was none."""
        there = (self.folder / name).exists()
        if there:
            files.remove(self.folder / name)
        return there

    def version(self) -> int:
        """Another number when wishes come or go."""
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def read(self) -> Wishes:
        """What is wished now. What is no wish, or of a stranger's making, is passed over."""
        wishes = Wishes()
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except FileNotFoundError:
            return wishes
        for name in names:
            verb, _, client = name.partition(".")
            if match := _ID.fullmatch(name):
                self._of_job(match[1], Ref(match[3], match[2]), wishes)
            elif name == "pause":
                wishes.pause = self._pause(name)
            elif verb == "pause" and _CLIENT.fullmatch(client):
                wishes.paused[client] = self._pause(name)
        return wishes

    def _of_job(self, verb: str, ref: Ref, wishes: Wishes) -> None:
        if not _CLIENT.fullmatch(ref.client):
            return
        if verb == "hold":
            wishes.held.add(ref)
        else:
            (wishes.requeue if verb == "requeue" else wishes.purge).append(ref)

    def _pause(self, name: str) -> Pause:
        """A pause counts, whatever its words are."""
        try:
            told = json.loads(files.read_untrusted(self.folder / name, MAX_BYTES)[0])
            return Pause(str(told.get("at", ""))[:40], str(told.get("reason", ""))[:200], told.get("now") is True)
        except (OSError, ValueError, AttributeError, RecursionError):
            return Pause()


def name_of(verb: str, ref: Ref) -> str:
    return f"{verb}.{ref.id}.{ref.client}"
