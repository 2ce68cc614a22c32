"""From a job's mask to pixels: white where the picture is meant, black where not, grey between. Pure, on the CPU.

The order is that of the field: what was named, grown, inverted, blurred. The blur is a Gaussian of a finite width, so
that the mask is exactly black beyond it.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw

from imagend.errors import BadMask
from imagend.mask_field import Mask

HALF = 128
"""From this grey on a pixel is meant, where a mask must be black and white."""


def combine(size: tuple[int, int], mask: Mask, given: Image.Image | None = None) -> Image.Image:
    """The mask of a picture of `size` (width, height), in mode "L". `given` is the mask picture that the job names, or
    what a detector found. Raises BadMask."""
    if mask.whole:
        return Image.new("L", size, 255)
    pixels = np.asarray(_named(size, mask, given))
    if mask.expand:
        pixels = _grown(pixels, mask.expand)
    if mask.invert:
        pixels = 255 - pixels
    if not (pixels >= HALF).any():
        raise BadMask("it marks nothing", _REMEDIES[mask.invert])
    return Image.fromarray(blurred(pixels, mask.blur))


_REMEDIES = {
    False: "Paint what is meant white in it, or give a larger part, or less to shrink it by",
    True: "It is inverted, and nothing is left over: give a smaller part, or leave invert out",
}


def _named(size: tuple[int, int], mask: Mask, given: Image.Image | None) -> Image.Image:
    if mask.boxes is not None:
        return _boxes(size, mask.boxes)
    assert given is not None
    if given.size != size:
        raise BadMask(
            f"it has {given.width}x{given.height} pixels, and its picture {size[0]}x{size[1]}",
            "Send a mask of the picture's size",
        )
    return given.convert("L")


def _boxes(size: tuple[int, int], boxes: tuple[tuple[int, int, int, int], ...]) -> Image.Image:
    drawn = Image.new("L", size, 0)
    for left, top, right, bottom in boxes:
        if left >= size[0] or top >= size[1]:
            what = (
                f"the box {left},{top},{right},{bottom} lies outside the picture, which has {size[0]}x{size[1]} pixels"
            )
            raise BadMask(what, "Give its pixels from the top left corner: left, top, right, bottom")
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return drawn


def _grown(pixels: np.ndarray, by: int) -> np.ndarray:
    """Black and white: all that is at most `by` pixels from it (dilation by a disc); negative, the same of the rest."""
    meant = pixels >= HALF
    far = meant if by < 0 else ~meant
    if far.all():  # then there is no distance to anything
        return np.where(meant, 255, 0).astype(np.uint8)
    near = cv2.distanceTransform(far.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= abs(by)
    return np.where(near if by > 0 else ~near, 255, 0).astype(np.uint8)


def blurred(pixels: np.ndarray, blur: int) -> np.ndarray:
    """Faded by a Gaussian as wide as `blur` (the next odd number), as if the picture went on beyond its border."""
    if blur < 2:
        return pixels
    width = blur | 1
    return np.asarray(cv2.GaussianBlur(pixels, (width, width), 0, borderType=cv2.BORDER_REPLICATE))
