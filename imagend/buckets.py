"""Resolution buckets: in which size a picture of a dataset is trained, so that little of it is cut off. Pure."""

from __future__ import annotations

from functools import cache
from math import isqrt, log
from typing import NamedTuple

SMALL = 512
"""Below it sides are multiples of 8, which is a pixel of latents; from it on of 64, as kohya-ss has it."""


class Size(NamedTuple):
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@cache
def sizes(resolution: int) -> tuple[Size, ...]:
    """All of at most resolution x resolution pixels, half to twice as wide, each as high as that leaves room for."""
    step = 8 if resolution < SMALL else 64
    area, least, most = resolution * resolution, resolution // 2, resolution * 2
    wide = (width for width in range(-(-least // step) * step, most + 1, step))
    found = {Size(width, min(most, area // width) // step * step) for width in wide}
    found |= {Size(size.height, size.width) for size in found}
    square = isqrt(area) // step * step
    return tuple(
        sorted(size for size in found | {Size(square, square)} if min(size) >= max(step, least // step * step))
    )


def nearest(width: int, height: int, resolution: int) -> Size:
    """The one whose shape is most like that of a picture; of two alike the larger."""
    shape = log(width / height)
    return min(
        sizes(resolution), key=lambda size: (abs(log(size.width / size.height) - shape), -size.width * size.height)
    )
