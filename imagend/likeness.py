"""Two manifests of one job, compared: which pictures are the same bits, and what painted them differently. Pure.

Manifests of older versions say less: what only one of them records is no difference, but it may be the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Parts of `engine`, likeliest cause first; what is not named here comes after them, in order.
_ORDER = (
    *("model", "vae", "loras", "embeddings", "controlnets", "ip_adapter", "preprocessors", "upscaler", "pictures"),
    *("detectors", "edit"),
    "scheduler",
    *("dtype", "versions", "device_name", "device", "threads"),
)
_MODES = ("mode", "vae_tile", "upscaler_tile", "exact")


@dataclass(frozen=True)
class Picture:
    file: str
    seed: int | None
    was: str
    """pixels_sha256"""
    is_: str

    @property
    def equal(self) -> bool:
        return self.was == self.is_


@dataclass(frozen=True)
class Difference:
    """`component` is a path in the manifest, such as model.sha256, loras.NAME.sha256, versions.torch or memory.mode."""

    component: str
    was: Any
    is_: Any


@dataclass(frozen=True)
class Likeness:
    pictures: tuple[Picture, ...]
    differences: tuple[Difference, ...]
    unrecorded: tuple[str, ...]
    """what only one of the manifests records"""

    @property
    def equal(self) -> bool:
        return all(picture.equal for picture in self.pictures)


def compare(was: Mapping[str, Any], is_: Mapping[str, Any]) -> Likeness:
    """Of two manifests with pictures; the second one's job was sent with the first one's spec. Of a set, it may lack
    some of them."""
    found = {one["file"]: one["pixels_sha256"] for one in is_["artifacts"]}
    pictures = tuple(
        Picture(one["file"], one.get("seed"), one["pixels_sha256"], found.get(one["file"], ""))
        for one in was["artifacts"]
    )
    before, after = _deciding(was), _deciding(is_)
    differences = [
        Difference(*found) for part in before if part in after for found in _walk(part, before[part], after[part])
    ]
    return Likeness(pictures, tuple(differences), tuple(sorted(before.keys() ^ after.keys())))


def _deciding(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a picture's bits, part by part."""
    engine = dict(manifest.get("engine") or {})
    if "device" in engine:
        engine["device"] = str(engine["device"]).partition(":")[0]  # cuda:1 paints as cuda:0 does
    parts = {part: engine[part] for part in (*_ORDER, *engine) if part in engine}
    memory = manifest.get("memory") or {}
    if mode := {key: memory[key] for key in _MODES if key in memory}:
        parts["memory"] = mode
    spec = {f"spec.{key}": value for key, value in manifest["spec"].items() if value is not None}
    return spec | parts


def _walk(path: str, was: Any, is_: Any) -> Iterator[tuple[str, Any, Any]]:
    was, is_ = _named(was), _named(is_)
    if isinstance(was, dict) and isinstance(is_, dict):
        for key in (*was, *(key for key in is_ if key not in was)):
            yield from _walk(f"{path}.{key}", was.get(key), is_.get(key))
    elif was != is_:
        yield path, was, is_


def _named(value: Any) -> Any:
    """A list of things that have names, by their names."""
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: item for item in value}
    return value
