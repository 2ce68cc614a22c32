"""The catalogue: what is known of the models at one moment, as a value. It reads nothing; survey.py draws it up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagend import presets
from imagend.architecture import ModelKind
from imagend.errors import JobFailed, ModelArriving, UnknownModel
from imagend.model_names import match, stem, wanted
from imagend.models import Model
from imagend.record import Record

SCHEMA = "imagend.catalog/v1"
FILE = "catalog.json"
MAX_TRIGGER_WORDS = 12
_MAX_TEXT = 200
Key = tuple[ModelKind, str]


@dataclass(frozen=True)
class Entry:
    """A model that can be used, and what its metadata tells users."""

    model: Model
    trigger_words: tuple[str, ...] = ()
    trained_on: str | None = None
    """the base it was trained on, as its trainer wrote it down"""
    sha256: str | None = None
    """None until it has been hashed; of a folder, imagend.models.digest()"""
    weights_sha256: str | None = None
    record: Record | None = None

    def document(self) -> dict[str, Any]:
        """As it stands in catalog.json: no paths, which are the operator's."""
        model, judged = self.model, self.model.architecture
        return {
            "kind": model.kind.value,
            "name": model.name,
            "base": judged.base or None,
            "family": judged.family or None,
            "format": judged.format,
            "size": model.size,
            "sha256": self.sha256,
            "autov2": self.sha256[:10] if self.sha256 else None,
            "autov3": self.weights_sha256[:12] if self.weights_sha256 else None,
            "trigger_words": list(self.trigger_words or (self.record.trigger_words if self.record else ())),
            "trained_on": self.trained_on,
            "prediction_type": judged.prediction_type,
            "zero_snr": judged.zero_snr,
            "preset": presets.guess(model.name) if model.kind is ModelKind.BASE else None,
            "native_size": judged.native_size or None,
            "has_vae": judged.has_vae,
            "inpainting": judged.inpainting,
            "record": self.record.public() if self.record else None,
        }


@dataclass(frozen=True)
class Catalog:
    entries: Mapping[Key, Entry] = field(default_factory=dict)
    refused: Mapping[Key, JobFailed] = field(default_factory=dict)
    arriving: frozenset[Key] = frozenset()
    """what is still being copied"""

    def find(self, name: str, kind: ModelKind = ModelKind.BASE) -> Model:
        """By its name; a pin in it is no matter here. Raises UnknownModel, AmbiguousModel, ModelArriving, and what was
        found to be wrong with the model."""
        return self.entry(name, kind).model

    def entry(self, name: str, kind: ModelKind) -> Entry:
        """Raises as find()."""
        name = wanted(name).name
        if (kind, name) in self.entries:
            return self.entries[kind, name]
        keys = (*self.entries, *self.refused, *self.arriving)
        key = (kind, self._match(name, kind, {one for of, one in keys if of is kind}))
        if key in self.refused:
            raise self.refused[key].with_traceback(None)  # else it keeps the frames of every job that got it
        if key not in self.entries:
            raise ModelArriving(kind.noun, key[1])
        return self.entries[key]

    def _match(self, name: str, kind: ModelKind, known: set[str]) -> str:
        """A refusal lists only what can be used."""
        try:
            return match(name, kind, known)
        except UnknownModel:
            return match(name, kind, {one for of, one in self.entries if of is kind})

    def document(self, updated: str) -> dict[str, Any]:
        """catalog.json. Public."""
        refused = sorted(self.refused.items())
        return {
            "schema": SCHEMA,
            "updated": updated,
            "models": [entry.document() for _, entry in sorted(self.entries.items())],
            "refused": [{"kind": kind.value, "name": name, "why": str(why)} for (kind, name), why in refused],
            "arriving": [{"kind": kind.value, "name": name} for kind, name in sorted(self.arriving)],
        }


def told(metadata: Mapping[str, str]) -> tuple[tuple[str, ...], str | None]:
    """Trigger words and the base model, from the metadata of a file: modelspec (https://github.com/Stability-AI/
    ModelSpec) and kohya-ss's, whose ss_tag_frequency counts the captions' tags per folder of pictures."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    words = tuple(_short(word) for word in phrase.split(",") if word.strip()) or _frequent_tags(metadata)
    base = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    return words[:MAX_TRIGGER_WORDS], _short(stem(base)) if base else None


def _frequent_tags(metadata: Mapping[str, str]) -> tuple[str, ...]:
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return ()
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and 0 < count < 2**31:
                counts[_short(tag)] += count
    return tuple(tag for tag, _ in counts.most_common(MAX_TRIGGER_WORDS) if tag)


def _short(text: str) -> str:
    """A stranger's text on one line."""
    return "".join(letter for letter in " ".join(text[:1000].split()) if letter.isprintable())[:_MAX_TEXT].strip()
