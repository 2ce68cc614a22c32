"""A picture, made larger: by a network, or by Lanczos, which needs no model and no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import PIL
import torch
from PIL import Image

from imagend import __version__
from imagend.architecture import ModelKind
from imagend.errors import BadPicture, NoUpscaler, UnknownModel
from imagend.manifest import Artifact
from imagend.upscaling import STAGE, Upscale, is_lanczos
from imagend.worker.decode import MAX_SIDE
from imagend.worker.network import Network
from imagend.worker.pictures import describe, open_pictures
from imagend.worker.worked_on import save

if TYPE_CHECKING:
    from imagend.worker.main import Context

_EXAMPLE = "Comfy-Org/Real-ESRGAN_repackaged/blob/main/RealESRGAN_x4plus.safetensors"


class Upscaler(Protocol):
    """For the pictures of one job. `versions` are those of the libraries that decide the bits."""

    @property
    def versions(self) -> dict[str, str]: ...
    @property
    def exact(self) -> bool:
        """Whether what is made now has the bits that it has where memory is plenty."""

    def describe(self) -> dict[str, Any]:
        """For the manifest."""

    def __call__(self, image: Image.Image, said: Callable[[int, int], None]) -> Image.Image:
        """`said` is told how many parts are done, of how many."""


class Lanczos:
    """Pillow's own resize."""

    versions: ClassVar[dict[str, str]] = {"pillow": PIL.__version__}
    exact = True

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, image: Image.Image, said: Callable[[int, int], None]) -> Image.Image:
        size = image.width * self._scale, image.height * self._scale
        large = image.resize(size, Image.Resampling.LANCZOS)
        said(1, 1)
        return large

    def describe(self) -> dict[str, Any]:
        return {"name": "Lanczos", "scale": self._scale}


def choose(upscaler: str | None, scale: int, context: Context) -> Upscaler:
    """Raises NoUpscaler, and what Models.find() and Network() do."""
    if upscaler is None or is_lanczos(upscaler):
        return Lanczos(scale)
    models = context.pipelines.models
    models.learn(context.known.digests)
    try:
        model = models.find(upscaler, ModelKind.UPSCALER)
    except UnknownModel as unknown:
        _, name, known = unknown.args
        raise NoUpscaler(name, known, _EXAMPLE) from None
    return Network(model, scale, context)


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Enlarge the picture into the draft. Raises JobFailed, NoSpace, Interrupt."""
    spec = Upscale.model_validate_json(json.dumps(spec_fields))
    context.progress(STAGE, 0, 1, 0, 1)
    start = time.perf_counter()
    pictures = open_pictures(spec.pictures, context.pictures)
    picture = pictures[spec.image]
    size = picture.image.width * spec.scale, picture.image.height * spec.scale
    if max(size) > MAX_SIDE:
        what = (
            f"{spec.scale} times as large it has {size[0]}x{size[1]} pixels; at most {MAX_SIDE}x{MAX_SIDE} are possible"
        )
        raise BadPicture(spec.image, what, "Ask for a smaller scale, or send a smaller one")
    upscaler = choose(spec.upscaler, spec.scale, context)
    context.engine |= {"versions": {"imagend": __version__, **upscaler.versions}, "pictures": describe(pictures)}
    context.engine["upscaler"] = upscaler.describe()
    if isinstance(upscaler, Network):
        context.engine |= {"device": context.pipelines.device, "threads": torch.get_num_threads()}
    with context.timed(STAGE):
        image = upscaler(picture.image, lambda done, of: context.progress(STAGE, 0, 1, done, of))
    return (save(image, picture, spec, context, start),)
