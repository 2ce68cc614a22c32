"""The field `control` of a job, and the kind `preprocess`: ControlNets and their pictures. Pure."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from imagend.errors import JobFailed, NoControlNet, UnsupportedSetting
from imagend.fields import Frozen, ModelName, OfOnePicture, PictureName, Side

MAX_CONTROLS = 4


class ControlType(enum.StrEnum):
    """What a control picture shows. The names of ControlNets for it hold the word."""

    CANNY = "canny"
    POSE = "pose"
    DEPTH = "depth"


_EXAMPLES = {
    ControlType.CANNY: "xinsir/controlnet-canny-sdxl-1.0",
    ControlType.POSE: "xinsir/controlnet-openpose-sdxl-1.0",
    ControlType.DEPTH: "diffusers/controlnet-depth-sdxl-1.0",
}
PREPROCESSORS = {
    ControlType.POSE: "usyd-community/vitpose-base-simple",
    ControlType.DEPTH: "depth-anything/Depth-Anything-V2-Small-hf",
}
"""where a model is to be had that makes control pictures; for edges none is needed"""


class Control(Frozen):
    """A ControlNet and the picture that guides it."""

    type: ControlType | None = Field(
        None,
        description="What the control picture shows: canny, pose or depth. The ControlNet is then the one whose name "
        "holds that word; `model` names another one.",
    )
    model: ModelName | None = Field(
        None, description="A ControlNet by name: a folder or a file, without its extension, under models/controlnet/."
    )
    image: PictureName = Field(description="The control picture, as `image` names one; scaled and cut as `image` is.")
    control_strength: float = Field(
        0.5, ge=0.0, le=1.0, description="How strongly it guides (controlnet_conditioning_scale); 0 is not at all."
    )
    control_guidance_start: float = Field(0.0, ge=0.0, le=1.0, description="From which part of the steps on it guides.")
    control_guidance_end: float = Field(1.0, ge=0.0, le=1.0, description="To which part of the steps it guides.")
    preprocess: bool = Field(
        False, description="Whether `image` is a plain picture, from which the control picture is to be made first."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Control:
        if self.type is None and self.model is None:
            raise ValueError(f"needs a type ({', '.join(ControlType)}) or the model of a ControlNet")
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError("control_guidance_start must be less than control_guidance_end")
        if self.preprocess and self.type is None:
            raise ValueError(f"preprocess goes with a type: {', '.join(ControlType)}")
        return self


class Preprocess(OfOnePicture):
    """A control picture, made from a plain one: what a generate job with `preprocess` shows its ControlNet."""

    type: ControlType = Field(description="What the control picture shows: canny (edges), pose or depth.")
    width: Side | None = Field(
        None, description="Pixels, with height: those of the job to come; the picture's own if left out."
    )
    height: Side | None = Field(None, description="Pixels, with width: the picture is scaled and cut as for a job.")
    metadata: Literal["full", "none"] = Field("full", description="Whether the PNG says how it was made.")

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if (self.width is None) != (self.height is None):
            raise ValueError("width: goes with height; give both, or neither")
        return self


def choose(type_: ControlType, names: Sequence[str]) -> str:
    """The ControlNet for a type, of those there are. Raises NoControlNet, UnsupportedSetting."""
    found = [name for name in names if type_ in name.casefold()]
    if len(found) > 1:
        shown = ", ".join(sorted(found)[:20])
        raise UnsupportedSetting(f"control: of type {type_} there are {shown}. Name one in `model`")
    if not found:
        raise NoControlNet(type_, _EXAMPLES[type_])
    return found[0]


def chosen(spec: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The ControlNets that a job's fields mean by their type alone, of those there are."""
    found = []
    for one in spec.get("control") or ():
        if one.get("model") is None:
            with contextlib.suppress(JobFailed):  # none, or several: the worker will say so
                found.append(choose(ControlType(one["type"]), names))
    return found
