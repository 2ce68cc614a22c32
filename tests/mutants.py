"""The daemon broken on purpose: two steps swapped, or one left out. Each is a change that a tired hand might make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scene import Painter

from imagend import files
from imagend.daemon.ending import Ending
from imagend.daemon.events import Events
from imagend.daemon.intake import Arrival, Door
from imagend.job import Ref
from imagend.manifest import Manifest
from imagend.messages import Message
from imagend.outputs import MANIFEST, Outputs
from imagend.spool import Spool, State

Breaks = Callable[[pytest.MonkeyPatch], None]


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        path.write_bytes(data)
        files.sync(path)
        files.sync(path.parent)

    patch.setattr(files, "write", write)


def set_the_time_after_the_sync(patch: pytest.MonkeyPatch) -> None:
    real = Spool.commit

    def commit(self: Spool) -> None:
        new = list(self._new)
        real(self)
        for path in new:
            os.utime(path)

    patch.setattr(Spool, "commit", commit)


def never_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spool, "commit", lambda self: None)


def answer_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    real = Spool.commit
    late: list[Callable[[], object]] = []

    def commit(self: Spool) -> None:
        while late:
            late.pop()()
        late.append(lambda: real(self))

    patch.setattr(Spool, "commit", commit)


def commit_the_names_only(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Spool, "commit", lambda path: path.suffix == ".json")


def commit_the_bytes_only(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Spool, "commit", lambda path: path.suffix != ".json")


def empty_the_inbox_first(patch: pytest.MonkeyPatch) -> None:
    real = Door._examine

    def examine(self: Door, name: str, now: float) -> Arrival | None:
        arrival = real(self, name, now)
        if arrival is not None:
            (self.inbox / name).unlink()
        return arrival

    patch.setattr(Door, "_examine", examine)


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
    def claim(self: Spool, ref: Ref, sync_too: Iterable[Path] = ()) -> int:
        files.sync_all(list(sync_too))
        self._move([ref], State.PENDING, State.ACTIVE)
        self.note(ref, "claimed", durable=True)
        return self.attempts(ref)

    patch.setattr(Spool, "claim", claim)


def run_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    real, send = Spool.claim, Painter.send
    late: list[Callable[[], object]] = []

    def claim(self: Spool, ref: Ref, sync_too: Iterable[Path] = ()) -> int:
        files.sync_all(list(sync_too))
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
        self._move([ref], State.ACTIVE, State.PENDING)
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


def run_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Spool, "claim", lambda path: True)


def move_by_rename(patch: pytest.MonkeyPatch) -> None:
    def move(self: Spool, refs: Iterable[Ref], source: State, target: State, sync_first: Iterable[Path] = ()) -> None:
        for ref in refs:
            state = source if self._path(source, ref).exists() else State.PENDING
            files.make_folder(self._path(target, ref).parent)
            self._path(state, ref).rename(self._path(target, ref))
            files.sync_all([*sync_first, self._path(target, ref).parent])

    patch.setattr(Spool, "_move", move)


def leave_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Spool, "_move", lambda path: True)


def publish_unsynced(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Outputs, "complete", lambda path: True)


def publish_with_a_claim_unsynced(patch: pytest.MonkeyPatch) -> None:
    _sync_less(patch, Spool, "claim", lambda path: ".drafts" in path.parts)


def _sync_less(patch: pytest.MonkeyPatch, owner: type, verb: str, lost: Callable[[Path], bool]) -> None:
    """In one verb, some of what it syncs together is not."""
    real, sync_all = getattr(owner, verb), files.sync_all

    def call(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(files, "sync_all", lambda paths: sync_all([path for path in paths if not lost(path)]))
            return real(*args, **kwargs)

    patch.setattr(owner, verb, call)


def tell_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    def ended(self: Events, manifest: Manifest) -> None:
        self._ended.append(manifest)
        self.confirmed()

    patch.setattr(Events, "ended", ended)


def tell_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    """And at once, not with what the whole look-around tells."""
    real = Spool.commit
    told: list[Events] = []
    begin = Events.__init__

    def start(self: Events, spool: Path, name: str) -> None:
        begin(self, spool, name)
        told.append(self)

    def commit(self: Spool) -> None:
        for path in self._new:
            told[-1].tell("queued", Ref(path.parent.name, path.stem))
        told[-1].write(0.0, at_once=True)
        real(self)

    patch.setattr(Events, "__init__", start)
    patch.setattr(Spool, "commit", commit)


def manifest_after_the_move(patch: pytest.MonkeyPatch) -> None:
    late: dict[Ref, Manifest] = {}

    def complete(self: Outputs, ref: Ref) -> None:
        target = self.root / ref.client / ref.id
        files.make_folder(target.parent)
        files.sync(self.draft(ref))
        files.move(self.draft(ref), target)
        files.write(target / MANIFEST, late.pop(ref).model_dump_json().encode())

    patch.setattr(Outputs, "begin", lambda self, ref, manifest: late.update({ref: manifest}))
    patch.setattr(Outputs, "complete", complete)


def put_away_before_publishing(patch: pytest.MonkeyPatch) -> None:
    complete, confirm = Outputs.complete, Outputs.confirm
    late: list[Callable[[], None]] = []

    def tidy(self: Ending) -> None:
        self.spool.finish(self._untidied)
        while late:
            late.pop()()
        confirm(self.outputs)
        self.outputs.announce(self._untidied)
        self._untidied.clear()

    patch.setattr(Outputs, "complete", lambda *arguments: late.append(lambda: complete(*arguments)))
    patch.setattr(Outputs, "confirm", lambda self: None)
    patch.setattr(Ending, "tidy", tidy)


def put_away_before_announcing(patch: pytest.MonkeyPatch) -> None:
    finish, announce = Spool.finish, Outputs.announce
    late: list[Callable[[], None]] = []

    def finish_first(self: Spool, outcomes: Mapping[Ref, str]) -> None:
        finish(self, dict(outcomes))
        while late:
            late.pop()()

    patch.setattr(Outputs, "announce", lambda self, refs: late.append(partial(announce, self, list(refs))))
    patch.setattr(Spool, "finish", finish_first)
