"""The kind `mask`: a picture's mask, to be looked at before anything is painted in it. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from imagend.fields import OfOnePicture, Planned
from imagend.mask_field import Mask

MASK, OVERLAY = "mask.png", "overlay.png"


class MakeMask(OfOnePicture):
    """The mask that an edit with the same `image` and `mask` would paint in. Nothing is drawn: there is no seed."""

    mask: Mask = Field(description="The part of the picture that is meant; as of edit.")
    metadata: Literal["full", "none"] = Field("full", description="Whether the PNGs say how they were made.")

    @property
    def pictures(self) -> tuple[str, ...]:
        """The input pictures that the job names, each once."""
        return tuple(dict.fromkeys(name for name in (self.image, self.mask.image) if name is not None))

    @property
    def planned(self) -> tuple[Planned, ...]:
        return Planned(MASK, None), Planned(OVERLAY, None, None, "overlay")
