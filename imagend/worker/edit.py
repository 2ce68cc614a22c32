"""A part of a picture, painted anew: what is outside of its mask stays as it is, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from imagend.edit_spec import MAX_EDITED, MIN_SIDE, Edit
from imagend.errors import BadPicture
from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.worker import inpaint, masking, masks
from imagend.worker.frame import Frame, frame
from imagend.worker.paint import Task, paint
from imagend.worker.pictures import Picture, describe, open_pictures

if TYPE_CHECKING:
    from imagend.worker.main import Context

_NATIVE = 1024  # SDXL's own size, which the least one is written for


class Editing(Task):
    """The rectangle of the picture that is painted, and how it goes back to its place."""

    def __init__(self, spec: Edit, pictures: Mapping[str, Picture], mask: Image.Image, where: Frame) -> None:
        super().__init__(spec, pictures)
        self._picture, self._keep = pictures[spec.image], spec.transparency == "keep"
        self._mask, self._frame, self._cells = mask, where, where.cells(mask)
        self._at = spec.model_copy(update={"width": where.width, "height": where.height})

    @property
    def at(self) -> Generate:
        return self._at

    def canvas(self, name: str) -> Image.Image:
        return self._frame.cut(self.pictures[name].sized(*self._mask.size))

    def begins_with(self, index: int) -> Image.Image:
        return self._frame.cut(self._picture.image)

    def encode(self, pipe: Any, image: Image.Image, dtype: torch.dtype) -> inpaint.Beginning:
        beginning: inpaint.Beginning = inpaint.encode(pipe, image, self._cells, dtype)
        return beginning

    def finish(self, image: Image.Image, context: Context) -> Image.Image:
        with context.timed("compositing"):
            original = self._picture.original if self._keep else self._picture.image
            return self._frame.put_back(image, original, self._mask)

    def describe(self, context: Context) -> None:
        context.engine["edit"] = {
            "width": self._frame.width,
            "height": self._frame.height,
            "crop": self._frame.box,
            "mask_sha256": hashlib.sha256(self._mask.tobytes()).hexdigest(),
        }


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Paint what is missing in the draft; return all pictures in order. Raises JobFailed, TryAgain, Interrupt."""
    context.pipelines.models.learn(context.known.digests)
    spec = Edit.model_validate_json(json.dumps(_way(spec_fields, context)))
    assert spec.model is not None
    context.progress("masking")
    pictures = open_pictures(spec.pictures, context.pictures)
    context.engine["pictures"] = describe(pictures)
    models = context.pipelines.models
    native_size = models.find(spec.model).native_size
    _check(spec.image, pictures[spec.image], native_size)
    given, _ = masking.given(spec.mask, pictures[spec.image].image, pictures, context)
    with context.timed("masking"):
        mask = masks.combine(pictures[spec.image].image.size, spec.mask, given)
        where = frame(mask, native_size, spec.padding_mask_crop)
    return paint(Editing(spec, pictures, mask, where), context)


def _way(spec_fields: dict[str, Any], context: Context) -> dict[str, Any]:
    """The spec of the way that it goes. Raises what ZeroShot.opinion() does."""
    if context.otherwise is None:
        return spec_fields
    context.progress("routing")
    with context.timed("routing"):
        context.route = context.pipelines.zero_shot.opinion(spec_fields["prompt"])
    return context.otherwise if context.route.path == "complex" else spec_fields


def _check(name: str, picture: Picture, native_size: int) -> None:
    """Raises BadPicture."""
    width, height = picture.image.size
    least = MIN_SIDE * native_size // _NATIVE
    if min(width, height) < least or max(width, height) > MAX_EDITED:
        what = f"it has {width}x{height} pixels; to be edited by this model it may have {least} to {MAX_EDITED} a side"
        raise BadPicture(name, what, "Make it larger" if min(width, height) < least else "Make it smaller")
