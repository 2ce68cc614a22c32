"""Knows models and reference pictures: a thread beside the loop that looks through their folders, hashes files of
models and keeps the catalogue.

The loop reads only the snapshot that lies in memory: a models folder that hangs (NFS) stops neither it nor painting.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from imagend import files, reference_field, references
from imagend.architecture import ModelKind
from imagend.catalog import FILE, Catalog, Entry, Key
from imagend.control import ControlType, choose, chosen
from imagend.daemon.watch import watch
from imagend.errors import JobFailed, RetiredModel
from imagend.fields import digest_of
from imagend.hashes import Hashes, HashFile, hash_file, stamp
from imagend.model_names import named
from imagend.models import Model, digest
from imagend.references import Library
from imagend.survey import Survey

log = structlog.get_logger()

INTERVAL_S = 10.0
"""The folders are looked through this often even when nothing tells of a change (NFS tells nothing)."""
SOON_S = 1.0
"""The same while something is being copied."""
LIMIT_S = 60.0
"""Folders that have not answered for so long are reported."""
SAVE_S = 5.0
"""Hashes, and the catalogue with them, are written at most this often while there is more to hash."""
_YIELD_S = 0.1
_NICE = 10


class Librarian:
    """`catalog`, `library` and `ready` may be read from any thread; the others are the librarian's own."""

    def __init__(
        self, survey: Survey, reference: Path, spool: Path, tell: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self.catalog, self.library = Catalog(), Library()
        self.ready = False
        """whether the reference pictures and the base models have been looked through since the start"""
        self.hint = threading.Event()
        self.yielding = False
        """set by the loop while a worker reads a model: hashing leaves the disk to it"""
        self.looks = 0
        """how many looks have ended"""
        self._begun = 0
        self._survey, self._reference = survey, reference
        self._path, self._tell, self._clock = spool / FILE, tell, clock
        self._hashes = HashFile(spool)
        self._alive_at = self._looked_at = clock()
        self._saved_at = -SAVE_S
        self._unsaved = False
        self._written: dict[str, Any] = {}
        self._folders: dict[tuple[str, ...], str] = {}
        self._refused: str | None = None
        self._failed: dict[Key, Model] = {}  # could not be hashed: not again until it has changed

    # For the loop

    def find(self, name: str, kind: ModelKind = ModelKind.BASE) -> Model:
        """Raises JobFailed, as Catalog.find()."""
        return self.catalog.find(name, kind)

    def pictures(self, names: tuple[str, ...]) -> dict[str, str]:
        """Where those of these pictures are that lie in reference/. Raises UnknownReference."""
        return {name: str(self.library.find(name)) for name in names if digest_of(name) is None}

    def known(self, spec: Mapping[str, Any]) -> dict[str, str]:
        """SHA-256 by stamp of the files of the models that a spec names, as far as they are known."""
        found: dict[str, str] = {}
        for kind, name in named(spec):
            with contextlib.suppress(JobFailed):  # the worker will say so
                found |= self._hashes.of(self.find(name, kind).version)
        return found

    def check_active(self, spec: Mapping[str, Any], accepted: datetime) -> None:
        """That none of the models that a spec names was retired before its job was taken in. Raises RetiredModel."""
        wanted = named(spec)
        if spec.get("control"):
            there = [name for kind, name in self.catalog.entries if kind is ModelKind.CONTROLNET]
            wanted += [(ModelKind.CONTROLNET, name) for name in chosen(spec, there)]
        if spec.get("references"):
            there = [name for kind, name in self.catalog.entries if kind is ModelKind.IP_ADAPTER]
            wanted += [(ModelKind.IP_ADAPTER, name) for name in reference_field.chosen(spec, there)]
        for kind, name in wanted:
            try:
                entry = self.catalog.entry(name, kind)
            except JobFailed:  # the worker will say so
                continue
            retired = entry.record.retired if entry.record else None
            if retired and retired.at <= accepted:
                raise RetiredModel(kind.noun, entry.model.name, retired.reason)

    def guides(self, base: Model) -> dict[ControlType, str]:
        """By which ControlNets an edit in a base model can be guided: of what a preprocessor makes pictures of."""
        models = [entry.model for entry in self.catalog.entries.values()]
        made = {model.architecture.format for model in models if model.kind is ModelKind.PREPROCESSOR}
        widths = (0, base.architecture.cross_attention_dim)
        nets = [
            model.name
            for model in models
            if model.kind is ModelKind.CONTROLNET and model.architecture.cross_attention_dim in widths
        ]
        found = {}
        for type_ in (ControlType.POSE, ControlType.DEPTH):
            with contextlib.suppress(JobFailed):  # none, or several
                if type_ in made:
                    found[type_] = choose(type_, nets)
        return found

    def has(self, kind: ModelKind) -> bool:
        """Whether there is any model of a kind."""
        return any(one is kind for one, _ in self.catalog.entries)

    def next_look(self) -> int:
        """Ask for a look, and say its number: once `looks` has come to it, what lies in the folders now is known."""
        self.hint.set()
        return self._begun + 1

    def trouble(self, now: float) -> str | None:
        """What the operator should know."""
        folders = self._survey.models.folders
        if now - self._alive_at > LIMIT_S:
            return f"{folders.root}, {self._reference} or another models folder does not answer: is it mounted?"
        if self.library.full:
            return f"too many pictures under {self._reference}: some are not listed"
        if self._survey.full:
            return f"too many files for models of the kinds {', '.join(self._survey.full)}: some are not listed"
        return folders.trouble or self._refused

    # On its thread

    def serve(self) -> None:
        """Look, hash, wait, for ever."""
        watch(dict.fromkeys((*self._survey.models.folders.all(), self._reference), self.hint), losses=True)
        self._try(self.look)  # at full speed: painting waits for it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        while True:
            self._try(self.hash_all)
            self._wait()
            self._try(self.look)

    def look(self) -> None:
        """Look through all folders, and write the catalogue if it has changed. Raises OSError."""
        self.hint.clear()
        self._begun += 1
        self._live()
        self.library = references.look(self._reference, self._live)
        for catalog in self._survey.look(self._live):
            if not self.ready:  # ModelKind.BASE comes first: painting need not wait for the others
                self.catalog, self.ready = self._with_hashes(catalog), True
                self._tell()
        self.catalog = self._with_hashes(catalog)
        self._looked_at, self.looks = self._clock(), self._begun
        self._write()

    def hash_all(self) -> None:
        """Hash what has not been hashed, the small files first; looks through the folders in between."""
        while (found := self._next_unhashed()) is not None:
            key, entry = found
            if not (self._hash(entry.model) and self._sums(entry)):
                self._failed[key] = entry.model
            self.catalog = self._with_hashes(self.catalog)
            if self._clock() - self._saved_at >= SAVE_S:
                self._save()
        self._save()

    def _wait(self) -> None:
        """Until there is a hint, or it is time; a file that is still being copied is looked at again soon."""
        if self.hint.wait(SOON_S if self._survey.is_waiting else INTERVAL_S):
            time.sleep(_YIELD_S)  # they come in swarms
        self._live()

    def _live(self) -> None:
        self._alive_at = self._clock()

    def _next_unhashed(self) -> tuple[Key, Entry] | None:
        waiting = (
            (key, entry)
            for key, entry in self.catalog.entries.items()
            if entry.sha256 is None and self._failed.get(key) != entry.model
        )
        return min(waiting, key=lambda pair: pair[1].model.size, default=None)

    def _hash(self, model: Model) -> bool:
        """Whether all its files are hashed now."""
        try:
            for path in self._survey.models.weight_files(model):
                if self._hashes.get(stamp(path.stat())) is None:
                    if (hashed := hash_file(path, self._pause)) is None:
                        self.hint.set()  # it has changed meanwhile: look again
                        return False
                    self._hashes.add(*hashed)
                    self._unsaved = True
        except OSError as error:
            log.warning("a model cannot be hashed", model=model.name, why=error.strerror)
            return False
        return True

    def _pause(self) -> None:
        """Between two chunks of a file."""
        self._live()
        while self.yielding:
            time.sleep(_YIELD_S)
            self._live()
        if self._clock() - self._looked_at >= (SOON_S if self.hint.is_set() else INTERVAL_S):
            self._try(self.look)

    def _with_hashes(self, catalog: Catalog) -> Catalog:
        entries = {}
        for key, entry in catalog.entries.items():
            sums = self._sums(entry)
            entries[key] = replace(entry, sha256=sums.sha256, weights_sha256=sums.weights_sha256) if sums else entry
        return replace(catalog, entries=entries)

    def _sums(self, entry: Entry) -> Hashes | None:
        """A model's hashes, if all its files are hashed; of a folder the one that stands for all."""
        model = entry.model
        if model.is_file:
            return self._hashes.get(model.version[0])
        if model.version not in self._folders:
            known = [self._hashes.get(one) for one in model.version]
            paths = self._survey.models.weight_files(model)
            if None in known or len(paths) != len(known):
                return None
            names = (path.relative_to(model.path).as_posix() for path in paths)
            self._folders[model.version] = digest(dict(zip(names, (one.sha256 for one in known if one), strict=True)))
        return Hashes(self._folders[model.version], "")

    # What it writes

    def _save(self) -> None:
        self._saved_at = self._clock()
        if self._unsaved:
            self._hashes.save()
            self._unsaved = False
        self._write()

    def _write(self) -> None:
        """catalog.json, if something has changed."""
        document = self.catalog.document(updated="") | {"references": self.library.document()}
        if document != self._written:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            files.replace_hint(self._path, json.dumps(document | {"updated": now}, indent=1).encode() + b"\n")
            self._written = document

    def _try(self, step: Callable[[], None]) -> None:
        """What the disk refuses is tried again at the next look."""
        try:
            step()
        except OSError as error:
            self._refused = f"the catalogue of models cannot be kept in {self._path.parent}: {error.strerror}"
        else:
            self._refused = None
