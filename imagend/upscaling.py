"""Making pictures larger, as jobs name it: the kind `upscale`, and the step `upscale` of a chain. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from imagend.fields import MAX_PAINTED, MAX_SIDE, Frozen, ModelName, OfOnePicture, PictureName

Scale = Literal[2, 4]
LANCZOS = "Lanczos"
STAGE = "upscaling"
_UPSCALER = (
    "A network: a file under models/upscale_models/, without its extension, as `imagend models` lists them, perhaps "
    "pinned: name@sha256; or Lanczos, which is none. default_upscaler of config.yaml if left out."
)


def is_lanczos(upscaler: str) -> bool:
    """Whether a job's text means no network, but Pillow's own resize."""
    return upscaler.casefold() == LANCZOS.casefold()


class Upscale(OfOnePicture):
    """A picture, made larger by a network or by Lanczos. Nothing is drawn, and so there is no seed."""

    image: PictureName = Field(
        description="The picture: ENTITY/VIEW in reference/, or sha256:… of one that was sent along. What comes out "
        "may have 4096 pixels a side."
    )
    scale: Scale = Field(2, description="How many times as wide and as high.")
    upscaler: ModelName | None = Field(None, description=_UPSCALER)
    metadata: Literal["full", "none"] = Field("full", description="Whether the PNG says how it was made.")


class UpscaleStep(Frozen):
    """The same, of each picture that the step before has made; with `strength` it is AUTOMATIC1111's hires fix."""

    scale: Scale = Field(2, description="How many times as wide and as high; to 4096 pixels a side.")
    upscaler: ModelName | None = Field(None, description=_UPSCALER)
    strength: float | None = Field(
        None,
        ge=0.01,
        le=1.0,
        description="How far to paint anew from each enlarged picture (img2img), with all else as the job says: 0.2 to "
        "0.4 adds detail; to 2048 pixels a side. Nothing is painted anew if left out.",
    )


class Chain(Frozen):
    """What is done with the pictures of a `generate` job once they are painted."""

    upscale: UpscaleStep = Field(description="Make each of them larger; `{}` for all defaults.")

    @property
    def steps(self) -> tuple[str, ...]:
        """Of the whole job, in order; the folders of its pictures have these names."""
        return "generate", "upscale"

    def check(self, width: int | None, height: int | None, is_set: bool) -> None:
        """Whether pictures of this size, as far as it is known, can become so large. Raises ValueError."""
        if is_set:
            raise ValueError("chain: does not go with items; enlarge the pictures of a set by jobs of the kind upscale")
        step = self.upscale
        if (side := step.scale * max(width or 0, height or 0)) > (limit := MAX_PAINTED if step.strength else MAX_SIDE):
            anew = " where they are painted anew" if step.strength else ""
            raise ValueError(
                f"chain: would make pictures of {side} pixels a side, and at most {limit} are possible{anew}; ask for "
                f"a smaller scale, width or height{', or leave strength out' if anew else ''}"
            )
