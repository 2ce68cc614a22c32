"""Text, or text and a picture, to picture; and what a chain paints anew from pictures that it has enlarged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.worker import chain, img2img
from imagend.worker.paint import Task, paint
from imagend.worker.pictures import Picture, describe, open_pictures

if TYPE_CHECKING:
    from imagend.worker.main import Context


class Generation(Task):
    """From noise, or from the picture that the job names."""

    def begins_with(self, index: int) -> Image.Image | None:
        return self.canvas(self.spec.image) if self.spec.image is not None else None

    def encode(self, pipe: Any, image: Image.Image, dtype: torch.dtype) -> img2img.Beginning:
        beginning: img2img.Beginning = img2img.encode(pipe, image, dtype)
        return beginning


class Anew(Generation):
    """From the pictures that its chain has enlarged."""

    is_anew = True

    def __init__(self, spec: Generate, pictures: Mapping[str, Picture], enlarged: chain.Enlarged) -> None:
        super().__init__(spec, pictures)
        self._enlarged = enlarged

    @property
    def at(self) -> Generate:
        assert self.spec.enlarged is not None
        return self.spec.enlarged

    def begins_with(self, index: int) -> Image.Image:
        return self._enlarged(index)

    def describe(self, context: Context) -> None:
        self._enlarged.describe()

    def deciding(self) -> list[Any]:
        return [self._enlarged.digests]


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Paint what is missing in the draft, and go through its chain; return all pictures in order.

    Raises JobFailed, TryAgain, Interrupt.
    """
    spec = Generate.model_validate_json(json.dumps(spec_fields))
    pictures = open_pictures(spec.pictures, context.pictures)
    if pictures:
        context.engine["pictures"] = describe(pictures)
    if spec.chain is not None:
        return chain.run(spec, context, partial(_paint, spec, pictures, context))
    return _paint(spec, pictures, context)


def _paint(
    spec: Generate, pictures: Mapping[str, Picture], context: Context, enlarged: chain.Enlarged | None = None
) -> tuple[Artifact, ...]:
    return paint(Generation(spec, pictures) if enlarged is None else Anew(spec, pictures, enlarged), context)
