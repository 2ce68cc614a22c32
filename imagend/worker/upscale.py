"""A picture, made larger by Lanczos: the same bits as Pillow's own resize. No model, and no GPU, has a part in it."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

import PIL
from PIL import Image

from imagend import __version__
from imagend.errors import BadPicture, NoSpace
from imagend.job import Upscale
from imagend.manifest import Artifact
from imagend.worker import images
from imagend.worker.decode import MAX_SIDE
from imagend.worker.pictures import describe, open_pictures

if TYPE_CHECKING:
    from imagend.worker.main import Context

FILE = "0000.png"
STAGE = "upscaling"


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Enlarge the picture into the draft. Raises BadPicture, NoSpace, Interrupt."""
    spec = Upscale.model_validate_json(json.dumps(spec_fields))
    context.progress(STAGE, 0, 1, 0, 1)
    start = time.perf_counter()
    pictures = open_pictures(spec.pictures, context.pictures)
    context.engine |= {"versions": {"imagend": __version__, "pillow": PIL.__version__}, "pictures": describe(pictures)}
    picture = pictures[spec.image]
    size = picture.image.width * spec.scale, picture.image.height * spec.scale
    if max(size) > MAX_SIDE:
        what = (
            f"{spec.scale} times as large it has {size[0]}x{size[1]} pixels; at most {MAX_SIDE}x{MAX_SIDE} are possible"
        )
        raise BadPicture(spec.image, what, "Ask for a smaller scale, or send a smaller one")
    with context.timed("upscaling"):
        image = picture.image.resize(size, Image.Resampling.LANCZOS)
    context.progress(STAGE, 0, 1, 1, 1)
    pixels = images.pixels_sha256(image)
    item = {"spec": spec.model_dump(mode="json"), "index": 0, "pixels_sha256": pixels, "engine": context.engine}
    text = images.mark(picture.is_made_by_ai, item if spec.metadata == "full" else None)
    try:
        with context.timed("saving"):
            data = images.save_png(image, context.folder / FILE, text)
    except OSError as error:
        raise NoSpace(error.strerror) from None
    artifact = Artifact(
        index=0,
        file=FILE,
        width=image.width,
        height=image.height,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels,
        seed=None,
        seconds=round(time.perf_counter() - start, 6),
    )
    return (artifact,)
