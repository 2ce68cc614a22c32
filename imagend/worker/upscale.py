"""A picture, made larger by Lanczos: the same bits as Pillow's own resize. No model, and no GPU, has a part in it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import PIL
from PIL import Image

from imagend import __version__
from imagend.errors import BadPicture
from imagend.job import Upscale
from imagend.manifest import Artifact
from imagend.worker.decode import MAX_SIDE
from imagend.worker.pictures import describe, open_pictures
from imagend.worker.worked_on import save

if TYPE_CHECKING:
    from imagend.worker.main import Context

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
    return (save(image, picture, spec, context, start),)
