"""A picture, made larger by Lanczos: the same bits as Pillow's own resize. No model, and no GPU, has a part in it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, ClassVar

import PIL
from PIL import Image

from imagend import __version__
from imagend.errors import BadPicture
from imagend.manifest import Artifact
from imagend.upscaling import Upscale
from imagend.worker.decode import MAX_SIDE
from imagend.worker.pictures import describe, open_pictures
from imagend.worker.worked_on import save

if TYPE_CHECKING:
    from imagend.worker.main import Context

STAGE = "upscaling"


class Lanczos:
    """Pillow's own resize."""

    versions: ClassVar[dict[str, str]] = {"pillow": PIL.__version__}

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize((image.width * self._scale, image.height * self._scale), Image.Resampling.LANCZOS)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": "Lanczos", "scale": self._scale}


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
    with context.timed(STAGE):
        image = Lanczos(spec.scale)(picture.image)
    context.progress(STAGE, 0, 1, 1, 1)
    return (save(image, picture, spec, context, start),)
