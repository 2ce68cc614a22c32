"""A picture that was made from another one, as an artifact of its job: saved and marked, nothing painted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from PIL import Image

from imagend.control import Preprocess
from imagend.errors import NoSpace
from imagend.manifest import Artifact
from imagend.mask_spec import MakeMask
from imagend.upscaling import Upscale
from imagend.worker import images
from imagend.worker.pictures import Picture

if TYPE_CHECKING:
    from imagend.worker.main import Context

FILE = "0000.png"


def save(
    image: Image.Image,
    source: Picture,
    spec: Upscale | Preprocess | MakeMask,
    context: Context,
    start: float,
    file: str = FILE,
) -> Artifact:
    """Write it durably into the draft; `start` is when work on it began (time.perf_counter). Raises NoSpace."""
    pixels = images.pixels_sha256(image)
    item = {"spec": spec.model_dump(mode="json"), "index": 0, "pixels_sha256": pixels, "engine": context.engine}
    text = images.mark(source.is_made_by_ai, item if spec.metadata == "full" else None)
    try:
        with context.timed("saving"):
            data = images.save_png(image, context.folder / file, text)
    except OSError as error:
        raise NoSpace(error.strerror) from None
    return images.describe(image, file, data, pixels, 0, None, round(time.perf_counter() - start, 6))
