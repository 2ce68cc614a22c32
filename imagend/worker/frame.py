"""Where in a picture an edit paints, and at which size: cut out, and put back so that nothing else changes. Pure."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagend.fields import MAX_PAINTED
from imagend.memory_plan import FACTOR
from imagend.worker.masks import HALF

_MIN_SIDE = 64
_MOST_LONG = 2
"""A crop is made wider or higher, where there is room, until it is at most so many times as long as it is wide: beyond
that SDXL has seen little."""

Box = tuple[int, int, int, int]


class Frame(NamedTuple):
    """A rectangle of a picture (left, top, right, bottom), and the size in which it is painted."""

    box: Box
    width: int
    height: int

    def cut(self, image: Image.Image) -> Image.Image:
        """The rectangle of a picture, as large as it is painted."""
        return _resized(image.crop(self.box), (self.width, self.height))

    def cells(self, mask: Image.Image) -> Image.Image:
        """The mask for the pipeline, black and white: each pixel of the latents that the mask touches is painted, so
        that no part of it is too thin to be seen there."""
        meant = mask.point(lambda grey: 255 * (grey >= HALF)).crop(self.box)
        pixels = np.asarray(meant.resize((self.width, self.height), Image.Resampling.BOX)) > 0
        cells = pixels.reshape(self.height // FACTOR, FACTOR, self.width // FACTOR, FACTOR).any(axis=(1, 3))
        return Image.fromarray(np.kron(cells, np.full((FACTOR, FACTOR), 255, np.uint8)).astype(np.uint8))

    def put_back(self, painted: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
        """The picture (RGB or RGBA) with what was painted, as far as the mask is white. Where it is black, each of its
        pixels stays as it is; what was painted is opaque."""
        patch = _resized(painted, (self.box[2] - self.box[0], self.box[3] - self.box[1]))
        whole = Image.new("RGB", picture.size)
        whole.paste(patch, self.box[:2])
        if picture.mode == "RGB":
            return Image.composite(whole, picture, mask)
        return _over(np.asarray(whole), np.asarray(picture), np.asarray(mask)[..., None])


def frame(mask: Image.Image, native_size: int, padding: int | None) -> Frame:
    """For a picture with this mask and a model that paints native_size x native_size pixels: all of it, or only the
    mask and `padding` pixels around it."""
    box = (0, 0, *mask.size) if padding is None else _around(mask, padding)
    return Frame(box, *fitted(box[2] - box[0], box[3] - box[1], native_size))


def fitted(width: int, height: int, native_size: int) -> tuple[int, int]:
    """A size of the same shape and of as many pixels as the model was trained for, each side a multiple of 8."""
    scale = min(native_size / sqrt(width * height), MAX_PAINTED / max(width, height))
    wide, high = (max(_MIN_SIDE, round(side * scale / FACTOR) * FACTOR) for side in (width, height))
    return wide, high


def _around(mask: Image.Image, padding: int) -> Box:
    found = mask.getbbox()
    assert found is not None  # masks.combine() refuses one that marks nothing
    left, right = _span(found[0] - padding, found[2] + padding, 0, mask.width)
    top, bottom = _span(found[1] - padding, found[3] + padding, 0, mask.height)
    left, right = _span(left, right, -(-(bottom - top) // _MOST_LONG), mask.width)
    top, bottom = _span(top, bottom, -(-(right - left) // _MOST_LONG), mask.height)
    return left, top, right, bottom


def _span(first: int, last: int, least: int, limit: int) -> tuple[int, int]:
    """From `first` to `last`, made at least so long around its middle, moved and cut to lie between 0 and a limit."""
    first, last = max(0, first), min(limit, last)
    least = min(least, limit)
    if last - first < least:
        first = min(max(0, (first + last - least) // 2), limit - least)
        last = first + least
    return first, last


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _over(painted: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Of a picture with transparency: mixed as colours that cover so much."""
    new, old = mask / 255.0, picture[..., 3:] / 255.0 * (1 - mask / 255.0)
    cover = new + old
    colour = (painted * new + picture[..., :3] * old) / np.maximum(cover, 1e-9)
    mixed = np.concatenate([colour, cover * 255], axis=2).round().astype(np.uint8)
    return Image.fromarray(np.where(mask > 0, mixed, picture))
