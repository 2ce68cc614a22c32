"""The input pictures of a job: opened, checked, and brought to the size that is painted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from imagend.errors import BadPicture
from imagend.fields import digest_of
from imagend.worker.decode import decode, read_picture
from imagend.worker.images import AI_MARKS


@dataclass(frozen=True)
class Picture:
    """A picture without transparency: what shines through is white, as in most programs."""

    image: Image.Image
    sha256: str
    """of its file"""
    is_made_by_ai: bool
    """whether its metadata says so"""
    original: Image.Image
    """RGBA if it has transparency; else the same as `image`"""

    def sized(self, width: int, height: int) -> Image.Image:
        """Scaled (Lanczos) to cover width x height, what is over cut off around the middle; if it is so, untouched."""
        if self.image.size == (width, height):
            return self.image
        return ImageOps.fit(self.image, (width, height), Image.Resampling.LANCZOS)


def open_pictures(names: tuple[str, ...], places: Mapping[str, str]) -> dict[str, Picture]:
    """By name; `places` says where they are. Raises BadPicture."""
    return {name: _open(name, Path(places[name])) for name in names}


def describe(pictures: Mapping[str, Picture]) -> list[dict[str, Any]]:
    """For the manifest."""
    return [
        {"name": name, "sha256": one.sha256, "width": one.image.width, "height": one.image.height}
        for name, one in pictures.items()
    ]


def _open(name: str, path: Path) -> Picture:
    raw = read_picture(path, name)
    sha256 = hashlib.sha256(raw).hexdigest()
    if digest_of(name) not in (None, sha256):
        raise BadPicture(name, "the disk gave other bytes than were sent", "Send it again, with another job")
    image = decode(raw, name)
    return Picture(_opaque(image), sha256, is_made_by_ai=any(mark.encode() in raw for mark in AI_MARKS), original=image)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
