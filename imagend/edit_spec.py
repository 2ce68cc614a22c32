"""What a job of kind edit asks for: a picture, a part of it, and what to paint there. Pure data: no disk, no clock."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from imagend.control import MAX_CONTROLS
from imagend.fields import PictureName
from imagend.generate_spec import Generate
from imagend.mask_field import MAX_EXPAND, Mask

MIN_SIDE, MAX_EDITED = 256, 2048
"""of a picture that a model of 1024 pixels edits; the lower one is a quarter of what a model paints"""

_SIZE = "an edit has the size of its picture"
_NEW = "it is for new pictures, of the kind generate"
UNFIT = {
    "width": _SIZE,
    "height": _SIZE,
    "image_type": _NEW,
    "items": _NEW,
    "table": _NEW,
    "chain": "enlarge what an edit has made by a job of the kind upscale",
}
"""Fields of generate that do not apply, and why."""


def _without_unfit(schema: dict[str, Any]) -> None:
    for name in UNFIT:
        del schema["properties"][name]


class Edit(Generate):
    """A part of a picture, painted anew. Names and meanings: diffusers' StableDiffusionXLInpaintPipeline."""

    model_config = ConfigDict(json_schema_extra=_without_unfit)
    default_strength: ClassVar[float] = 1.0

    image: PictureName = Field(
        description="The picture to edit: ENTITY/VIEW in reference/, or sha256:… of one that was sent along; 256 to "
        "2048 pixels a side. What comes out has its size, and outside the mask its pixels, bit for bit."
    )
    mask: Mask = Field(description="The part of the picture that is painted anew.")
    strength: float | None = Field(
        None,
        ge=0.01,
        le=1.0,
        description="How far to go from what is there: so much of the steps is done, as in diffusers; 1 if left out, "
        "which begins with noise alone. 0.5 to 0.9 keeps shapes and changes colours and textures.",
    )
    path: Literal["auto", "simple", "complex"] = Field(
        "auto",
        description="Which way it goes: simple (inpainting alone), complex (guided by what of the original stays, and "
        "by references), or by the words of the prompt (docs/routing.md).",
    )
    guide: tuple[Literal["pose", "depth"], ...] | None = Field(
        None,
        max_length=2,
        description="What of the original guides it on the complex way: pose, depth, or both, made of `image` for "
        "ControlNets. Left out, what the words leave as it is, as far as there are models for it.",
    )
    padding_mask_crop: int | None = Field(
        None,
        ge=0,
        le=MAX_EXPAND,
        description="For small masks: only the mask and so many pixels around it are painted, as large as the model "
        "paints, and put back. Left out, the whole picture is.",
    )
    transparency: Literal["keep", "white"] = Field(
        "keep",
        description="What becomes of a picture's transparency: kept outside the mask, or filled with white. What is "
        "painted is opaque, and sees white behind the picture.",
    )

    @model_validator(mode="after")
    def _applies(self) -> Edit:
        for name, why in UNFIT.items():
            if getattr(self, name) not in (None, ()):
                raise ValueError(f"{name}: does not go with edit: {why}; leave it out")
        if self.guide and self.path == "simple":
            raise ValueError("guide: goes with the path complex; leave one of the two out")
        if len(self.control) + len(self.guide or ()) > MAX_CONTROLS:
            raise ValueError(
                f"guide: makes more than {MAX_CONTROLS} ControlNets, with those of control; leave some out"
            )
        return self

    @property
    def pictures(self) -> tuple[str, ...]:
        """The input pictures that the job names, each once."""
        named = (*super().pictures, self.mask.image)
        return tuple(dict.fromkeys(name for name in named if name is not None))
