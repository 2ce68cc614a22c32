"""The field `mask` of a job: which part of its picture is meant. Pure; worker/masks.py makes pixels of it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from imagend.fields import MAX_SIDE, Frozen, PictureName, printable

BLUR = 21
THRESHOLD, TEXT_THRESHOLD = 0.35, 0.25  # GroundingDINO's own
MAX_BLUR = 255
MAX_EXPAND = 512
MAX_BOXES = 64
MAX_TEXTS = 16


T = TypeVar("T")


def _box(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise ValueError("a box is left, top, right, bottom, in pixels from the top left corner; this one is empty")
    return box


def _several(find: object) -> object:
    """One text, or several."""
    if isinstance(find, str):
        return (find,)
    if not isinstance(find, (list, tuple)):
        raise ValueError("must be a text, or a list of texts")
    return tuple(find)


def _some(several: tuple[T, ...]) -> tuple[T, ...]:
    if not several:
        raise ValueError("is empty; leave it out, or give at least one")
    return several


def _text(text: str) -> str:
    if not text.strip(" ."):
        raise ValueError("must say what to find, such as: the car")
    return printable(text)


_Edge = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Box = Annotated[tuple[_Edge, _Edge, _Edge, _Edge], AfterValidator(_box)]
_MAX_TEXT = 200
Text = Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(_text)]
Texts = Annotated[
    tuple[Text, ...],
    Field(max_length=MAX_TEXTS),
    AfterValidator(_some),
    BeforeValidator(_several),
    WithJsonSchema(
        {
            "anyOf": [
                text := {"type": "string", "maxLength": _MAX_TEXT},
                {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_TEXTS},
            ]
        }
    ),
]


class Mask(Frozen):
    """A part of a picture: one of `image`, `boxes`, `find` and `whole`, and what becomes of its edge."""

    image: PictureName | None = Field(
        None,
        description="A mask, as `image` names a picture, and of that picture's size: white is meant, black is not.",
    )
    boxes: Annotated[tuple[Box, ...], Field(max_length=MAX_BOXES), AfterValidator(_some)] | None = Field(
        None,
        description="Rectangles in pixels of the picture, from its top left corner: left, top, right, bottom.",
    )
    find: Texts | None = Field(
        None, description="What to look for in the picture, in words: `the car`, or several: `[the car, a dog]`."
    )
    whole: bool = Field(False, description="The whole picture.")
    threshold: float | None = Field(
        None, ge=0.0, le=1.0, description="Of find: how sure the detector must be of an object; 0.35 if left out."
    )
    text_threshold: float | None = Field(
        None, ge=0.0, le=1.0, description="Of find: how sure that a word is meant; 0.25 if left out."
    )
    expand: int = Field(
        0,
        ge=-MAX_EXPAND,
        le=MAX_EXPAND,
        description="By how many pixels the part is made to grow on all sides, or to shrink, if negative.",
    )
    invert: bool = Field(False, description="Whether all but the part is meant, after it has grown.")
    blur: int = Field(
        BLUR,
        ge=0,
        le=MAX_BLUR,
        description="Over how many pixels its edge fades (the width of a Gaussian kernel); 0 is a hard edge.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Mask:
        given = [name for name in ("image", "boxes", "find") if getattr(self, name) is not None]
        given += ["whole"] if self.whole else []
        if len(given) != 1:
            found = f"not {' and '.join(given)}" if given else "none is there"
            raise ValueError(f"takes one of image, boxes, find and whole; {found}")
        if self.find is None and (self.threshold is not None or self.text_threshold is not None):
            raise ValueError("threshold and text_threshold go with find; leave them out")
        if self.whole and (self.invert or self.expand):
            raise ValueError("whole takes neither expand nor invert; leave them out")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """What to find."""
        return self.find or ()
