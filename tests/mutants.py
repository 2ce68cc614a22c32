"""The daemon broken on purpose: two steps swapped, or one left out. Each is a change that a tired hand might make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scene import Painter

from imagend import files
from imagend.daemon.ending import Ending
from imagend.daemon.intake import Arrival, Door
from imagend.job import Manifest, Ref
from imagend.messages import Message
from imagend.outputs import MANIFEST, Outputs
from imagend.spool import Spool, State

Breaks = Callable[[pytest.MonkeyPatch], None]


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    def write_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
        path.write_bytes(data)
        files.sync(path)

    patch.setattr(files, "write_unsynced", write_unsynced)


def set_the_time_after_the_sync(patch: pytest.MonkeyPatch) -> None:
    real = files.write_unsynced

    def write_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        real(temporary, data)
        os.utime(temporary, ns=(mtime_ns or 0, mtime_ns or 0))
        temporary.rename(path)

    patch.setattr(files, "write_unsynced", write_unsynced)


def never_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spool, "commit", lambda self: None)


def empty_the_inbox_first(patch: pytest.MonkeyPatch) -> None:
    real = Door._read

    def read(self: Door, path: Path) -> Arrival:
        arrival = real(self, path)
        path.unlink()
        return arrival

    patch.setattr(Door, "_read", read)


def reject_before_the_reason(patch: pytest.MonkeyPatch) -> None:
    real = files.write
    late: list[tuple[Path, bytes]] = []

    def move(source: Path, target: Path) -> None:
        _move(source, target)
        while late:
            real(*late.pop())

    def write(path: Path, data: bytes) -> None:
        if path.name.endswith(".reason.json"):
            late.append((path, data))
        else:
            real(path, data)

    _move = files.move
    patch.setattr(files, "write", write)
    patch.setattr(files, "move", move)


def claim_after_the_move(patch: pytest.MonkeyPatch) -> None:
    def claim(self: Spool, ref: Ref) -> int:
        self._move(ref, State.PENDING, State.ACTIVE)
        self.note(ref, "claimed", durable=True)
        return self.attempts(ref)

    patch.setattr(Spool, "claim", claim)


def run_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    real, send = Spool.claim, Painter.send
    late: list[Callable[[], object]] = []

    def claim(self: Spool, ref: Ref) -> int:
        late.append(lambda: real(self, ref))
        return self.attempts(ref) + 1

    def claim_late(self: Painter, worker: str, message: Message) -> None:
        send(self, worker, message)
        while late:
            late.pop()()

    patch.setattr(Spool, "claim", claim)
    patch.setattr(Painter, "send", claim_late)


def requeue_before_the_journal(patch: pytest.MonkeyPatch) -> None:
    def requeue(self: Spool, ref: Ref, why: str) -> None:
        self._move(ref, State.ACTIVE, State.PENDING)
        self.note(ref, "requeued", durable=True, why=why)

    patch.setattr(Spool, "requeue", requeue)


def forget_cancels(patch: pytest.MonkeyPatch) -> None:
    _note_otherwise(patch, lambda event, durable: None if event == "cancel" else durable)


def note_in_passing(patch: pytest.MonkeyPatch) -> None:
    _note_otherwise(patch, lambda event, durable: False)


def _note_otherwise(patch: pytest.MonkeyPatch, how: Callable[[str, bool], bool | None]) -> None:
    real = Spool.note

    def note(self: Spool, ref: Ref, event: str, durable: bool = False, **details: Any) -> None:
        if (durably := how(event, durable)) is not None:
            real(self, ref, event, durably, **details)

    patch.setattr(Spool, "note", note)


def never_seal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outputs, "seal", lambda *arguments: None)


def manifest_after_the_move(patch: pytest.MonkeyPatch) -> None:
    def publish(self: Outputs, ref: Ref, manifest: Manifest) -> None:
        target = self.root / ref.client / ref.id
        files.make_folder(target.parent)
        files.sync(self.draft(ref))
        files.move(self.draft(ref), target)
        files.write(target / MANIFEST, manifest.model_dump_json().encode())

    patch.setattr(Outputs, "publish", publish)


def put_away_before_publishing(patch: pytest.MonkeyPatch) -> None:
    publish = Outputs.publish
    late: list[Callable[[], None]] = []

    def finish(self: Ending, ref: Ref, manifest: Manifest) -> None:
        self.spool.finish(ref, manifest.outcome)
        while late:
            late.pop()()
        self.outputs.announce(ref)

    patch.setattr(Outputs, "publish", lambda *arguments: late.append(lambda: publish(*arguments)))
    patch.setattr(Ending, "finish", finish)


def put_away_before_announcing(patch: pytest.MonkeyPatch) -> None:
    finish, announce = Spool.finish, Outputs.announce
    late: list[Callable[[], None]] = []

    def finish_first(self: Spool, ref: Ref, outcome: str) -> None:
        finish(self, ref, outcome)
        while late:
            late.pop()()

    patch.setattr(Outputs, "announce", lambda *arguments: late.append(lambda: announce(*arguments)))
    patch.setattr(Spool, "finish", finish_first)
