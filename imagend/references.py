"""reference/: the pictures that jobs may name, an entity per folder and a view per file. It reads none of them.

`datasets` is no entity: datasets.py knows it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagend.errors import UnknownDataset, UnknownReference
from imagend.fields import NAME, PICTURE
from imagend.model_names import MAX_NAME
from imagend.train_spec import DATASET

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
"""Where two files have one name, the first of these is meant."""
MAX_PICTURES = 20_000
_DATASETS = "datasets"
_SHOWN = 20


@dataclass(frozen=True)
class Library:
    """What there was at one look. It never changes, so that any thread may read it."""

    pictures: Mapping[str, Path] = field(default_factory=dict)
    """by name, ENTITY/VIEW"""
    datasets: Mapping[str, Path] = field(default_factory=dict)
    """the folders to train on, as a job of that kind names them"""
    full: bool = False
    """whether there were more than are listed"""

    def find(self, name: str) -> Path:
        """Raises UnknownReference, which lists what comes near, or UnknownDataset."""
        if name.startswith(DATASET):
            if name in self.datasets:
                return self.datasets[name]
            known = [one.removeprefix(DATASET) for one in self.datasets]
            raise UnknownDataset(name.removeprefix(DATASET), ", ".join(known[:_SHOWN]) or "none")
        if name in self.pictures:
            return self.pictures[name]
        entity = name.partition("/")[0]
        if views := self.views().get(entity):
            raise UnknownReference(name, f"Of {entity} there are: {_listed(views)}.")
        entities = sorted(self.views())
        near = difflib.get_close_matches(entity, entities[:500], n=5)
        raise UnknownReference(name, f"There are views of: {_listed(list(dict.fromkeys((*near, *entities))))}.")

    def views(self) -> dict[str, list[str]]:
        """The views of each entity, all in order."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.pictures):
            entity, _, view = name.partition("/")
            found.setdefault(entity, []).append(view)
        return found

    def document(self) -> list[dict[str, Any]]:
        """As it stands in catalog.json: no paths, which are the operator's."""
        return [{"name": entity, "views": views} for entity, views in self.views().items()]


def look(root: Path, each: Callable[[], None] = lambda: None) -> Library:
    """Look through the folder; `each` is called for each entity. One that cannot be read has no views.

    Hidden files, links and what no job can name are passed over.
    """
    found: dict[str, Path] = {}
    folders = _names(root / _DATASETS, os.DirEntry.is_dir)
    datasets = {f"{DATASET}{name}": root / _DATASETS / name for name in folders if re.fullmatch(NAME, name)}
    for entity in _names(root, os.DirEntry.is_dir):
        if entity == _DATASETS:
            continue
        each()
        files = _names(root / entity, os.DirEntry.is_file)
        for file in sorted(files, key=_rank, reverse=True):  # so that the first comes last, and stays
            name = f"{entity}/{os.path.splitext(file)[0]}"  # noqa: PTH122
            if _rank(file) < len(EXTENSIONS) and _can_be_named(name):
                found[name] = root / entity / file
        if len(found) > MAX_PICTURES:
            return Library(dict(sorted(found.items())[:MAX_PICTURES]), datasets, full=True)
    return Library(found, datasets)


def _names(folder: Path, is_one: Callable[..., bool]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if is_one(entry, follow_symlinks=False))
    except OSError:
        return []


def _rank(file: str) -> int:
    extension = os.path.splitext(file)[1].lower()  # noqa: PTH122
    return EXTENSIONS.index(extension) if extension in EXTENSIONS else len(EXTENSIONS)


def _can_be_named(name: str) -> bool:
    return len(name) <= MAX_NAME and name.isprintable() and re.fullmatch(PICTURE, name) is not None


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    more = f" and {rest} more (imagend references lists them)" if rest > 0 else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
