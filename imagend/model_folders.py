"""Where models lie: the folders of models/ and of a ComfyUI user's extra_model_paths.yaml, and what is in them.

It lists names and looks into no file. Links are followed: the folders are the operator's, who keeps models on other
disks, and the Hugging Face cache is made of links. A listing is bounded in depth and number, whatever lies there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from imagend import config
from imagend.architecture import ModelKind
from imagend.model_names import EXTENSIONS, MAX_NAME

MAX_ENTRIES = 50_000
"""Of all the folders of one kind; what is beyond is not listed, and `Listing.full` says so."""
_MAX_DEPTH = 8
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_MARKS = {  # what makes a folder a model
    ModelKind.BASE: "model_index.json",
    **dict.fromkeys((ModelKind.VAE, ModelKind.CONTROLNET, ModelKind.CLIP_VISION), "config.json"),
    **dict.fromkeys((ModelKind.PREPROCESSOR, ModelKind.DETECTOR, ModelKind.SAFETY, ModelKind.CLIP), "config.json"),
}
_MAX_YAML_BYTES = 2**20


@dataclass(frozen=True)
class Found:
    """Something that may be a model: a weight file, or a folder in diffusers' format."""

    name: str
    path: Path
    is_file: bool


@dataclass
class Listing:
    """What lies in the folders of one kind."""

    found: dict[str, Found] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """what cannot be a model for its name's sake, and why"""
    full: bool = False

    def add(self, one: Found) -> None:
        """By its name without extension; with it where that name is taken, as by a folder of the same name."""
        name = one.name + one.path.suffix if one.is_file and one.name in self.found else one.name
        if one.path.name.endswith(_PICKLES):
            self._refuse(one.name + one.path.suffix, "a pickle, which may run any program: get it as .safetensors")
        elif not name.isprintable() or len(name) > MAX_NAME:
            self._refuse(name, f"of a name that is not printable or longer than {MAX_NAME} characters: rename it")
        elif name in self.found:
            self._refuse(f"{name} in {one.path.parent.name}", "of a name that another one has: rename one of them")
        else:
            self.found[name] = replace(one, name=name)

    def _refuse(self, name: str, why: str) -> None:
        self.refused[name if name.isprintable() else ascii(name)] = why


class ModelFolders:
    """`root` is models/; `extra` a ComfyUI extra_model_paths.yaml, read again whenever it has changed."""

    def __init__(self, root: Path, extra: Path | None = None) -> None:
        self.root, self._extra = root, extra
        self.trouble: str | None = None
        self._read: tuple[object, Mapping[str, tuple[Path, ...]]] = (None, {})

    def all(self) -> tuple[Path, ...]:
        """Every folder that may hold models, for those who watch."""
        extra = self._extra_paths()
        names = [name for kind in ModelKind for name in kind.folders]
        return (self.root, *dict.fromkeys(path for name in names for path in extra.get(name, ())))

    def list(self, kind: ModelKind) -> Listing:
        """Everything in the folders of a kind, our own first, that may be a model of it."""
        listing, walk, extra = Listing(), _Walk(kind), self._extra_paths()
        for name in kind.folders:
            for folder in dict.fromkeys((self.root / name, *extra.get(name, ()))):
                for found in walk.through(folder, whole_only=name == "diffusers"):
                    listing.add(found)
        listing.full = walk.left <= 0
        return listing

    def _extra_paths(self) -> Mapping[str, tuple[Path, ...]]:
        """Those that were read last where the file cannot be read now: `trouble` says why."""
        if self._extra is None:
            return {}
        try:
            status = self._extra.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._read[0] != version:
                self._read = (version, self._read[1])
                self._read = (version, extra_paths(self._text(status.st_size), self._extra.absolute().parent))
                self.trouble = None
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            if isinstance(error, OSError):  # it may be well again at once, and the same
                self._read = (None, self._read[1])
            self.trouble = f"extra_model_paths: {self._extra}: {' '.join(str(error).split())}"
        return self._read[1]

    def _text(self, size: int) -> str:
        assert self._extra is not None
        if size > _MAX_YAML_BYTES or not self._extra.is_file():
            raise ValueError(f"it is no file of at most {_MAX_YAML_BYTES} bytes")
        return self._extra.read_text(encoding="utf-8")


def extra_paths(text: str, base: Path) -> dict[str, tuple[Path, ...]]:
    """ComfyUI's name of a kind → folders, from the text of an extra_model_paths.yaml that lies in the folder `base`.

    After load_extra_path_config() in ComfyUI's utils/extra_config.py. Raises ValueError, yaml.YAMLError.
    """
    found: dict[str, list[Path]] = {}
    sections: Any = yaml.safe_load(text) or {}
    if not isinstance(sections, dict):
        raise ValueError("it must hold sections of keys and paths, as ComfyUI's extra_model_paths.yaml.example does")
    for section, entries in sections.items():
        if entries is None:
            continue
        if not isinstance(entries, dict):
            raise ValueError(f"{section}: must hold keys and paths, such as `loras: models/loras`")
        root = base / config.expand(str(entries["base_path"])) if entries.get("base_path") else base
        for key, lines in entries.items():
            if key in ("base_path", "is_default"):
                continue
            if not isinstance(lines, str):
                raise ValueError(f"{section}: {key}: must be a path, or several on lines of their own after a `|`")
            paths = [Path(os.path.normpath(root / line.strip())) for line in lines.split("\n") if line.strip()]
            if any(b"\0" in os.fsencode(path) for path in paths):
                raise ValueError(f"{section}: {key}: a path cannot hold NUL")
            found.setdefault(str(key), []).extend(paths)
    return {key: tuple(paths) for key, paths in found.items()}


class _Walk:
    """One look through folders for models of a kind; `left` entries more, then it stops."""

    def __init__(self, kind: ModelKind) -> None:
        self._mark = _MARKS.get(kind)
        self.left = MAX_ENTRIES

    def through(
        self, folder: Path, whole_only: bool, prefix: str = "", above: tuple[tuple[int, int], ...] = ()
    ) -> Iterator[Found]:
        """A folder that cannot be read holds nothing: others may be well."""
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            with os.scandir(folder) as listing:
                entries = sorted(islice(listing, self.left), key=lambda entry: entry.name)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # ours is the shortage, not the folder's
                raise
            return
        self.left -= len(entries)
        if here in above or len(above) > _MAX_DEPTH:  # links that lead back up
            return
        for entry in entries:
            name, path = prefix + entry.name, folder / entry.name
            if entry.name.startswith("."):
                continue
            if self._is_folder(entry):
                if self._is_model(path):
                    yield Found(name, path, is_file=False)
                else:
                    yield from self.through(path, whole_only, f"{name}/", (*above, here))
            elif not whole_only and entry.name.endswith(EXTENSIONS + _PICKLES):
                yield Found(name.removesuffix(path.suffix), path, is_file=True)

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:
            return False

    def _is_model(self, folder: Path) -> bool:
        try:
            return self._mark is not None and (folder / self._mark).exists()
        except OSError:
            return False
