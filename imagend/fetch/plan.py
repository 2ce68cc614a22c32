"""What is to be fetched: files with their digests, and what the source says of the model. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from imagend.architecture import ModelKind
from imagend.model_names import MAX_NAME, stem

_STRANGE = re.compile(r"[^A-Za-z0-9 ._()\[\]+-]+")


@dataclass(frozen=True)
class Item:
    """One file. Its digest is the source's or the user's; there is none without."""

    url: str
    path: str
    """in the model's folder; of a single file, its name"""
    sha256: str | None = None
    git_sha1: str | None = None
    """of a small file in a git repository: that of its blob"""
    size: int | None = None

    @property
    def is_weights(self) -> bool:
        return self.path.endswith(".safetensors")


@dataclass(frozen=True)
class Plan:
    host: str
    name: str
    items: tuple[Item, ...]
    is_file: bool = True
    kind: ModelKind | None = None
    """as the source has it; the tensors have the last word"""
    said: dict[str, object] = field(default_factory=dict)
    """for the record: source, version, base, license, trigger_words"""

    @property
    def size(self) -> int | None:
        sizes = [item.size for item in self.items]
        return sum(size for size in sizes if size is not None) if None not in sizes else None


def tame(name: str) -> str:
    """A stranger's file name as a model may be called here."""
    bare = _STRANGE.sub("_", stem(name.rpartition("/")[2])).strip(" .")[: MAX_NAME - 40]
    return bare or "model"


def short(value: object, limit: int = 2000) -> str | None:
    """A stranger's text, on one line; None where there is none."""
    text = " ".join(str(value).split()) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return "".join(letter for letter in text if letter.isprintable())[:limit] or None
