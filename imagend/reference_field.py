"""The field `references` of a job: pictures that show an IP-Adapter what is wanted. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from imagend.errors import NoIpAdapter, UnsupportedSetting
from imagend.fields import Frozen, PictureName

MAX_REFERENCES = 4
STRENGTH = 0.6


class Role(enum.StrEnum):
    """What a reference shows of its subject."""

    FRONT = "front"
    SIDE = "side"
    BACK = "back"
    BACKGROUND = "background"


class Influence(enum.StrEnum):
    """What a reference decides: by which layers of the UNet it acts (InstantStyle, https://arxiv.org/abs/2404.02733)."""

    ALL = "all"
    STYLE = "style"
    LAYOUT = "layout"


_BLOCKS = {Influence.STYLE: "up_blocks.0", Influence.LAYOUT: "down_blocks.2"}
"""the second attention of each; in a UNet that has no second one there, the first"""


class Reference(Frozen):
    """A picture to go by, and how strongly."""

    image: PictureName = Field(
        description="The picture, as `image` names one. What counts is its middle, as large as it is wide and high."
    )
    strength: float = Field(
        STRENGTH, ge=0.0, le=1.0, description="How strongly it acts (ip_adapter_scale); 0 is not at all."
    )
    role: Role | None = Field(
        None, description="What it shows: front, side, back or background. It is told in the manifest; each role once."
    )
    influence: Influence = Field(
        Influence.ALL, description="What it decides: all, its style alone, or its layout alone (InstantStyle)."
    )
    mask: PictureName | None = Field(
        None,
        description="Where it acts: a picture that is white there and black elsewhere, scaled and cut as `image` is.",
    )


def check(references: Sequence[Reference], adapter: str | None) -> None:
    """What the fields say together. Raises ValueError, the field first."""
    roles = [reference.role for reference in references if reference.role]
    if twice := next((role for role in roles if roles.count(role) > 1), None):
        raise ValueError(f"references: the role {twice} is there twice; give each role once, or none")
    if adapter is not None and not references:
        raise ValueError("ip_adapter: goes with references, the pictures that it reads; name one, or leave it out")


def acting(references: Sequence[Reference], strength: float) -> tuple[Reference, ...]:
    """Those that do anything, each as strong as it is in all."""
    strengths = [reference.strength * strength for reference in references]
    return tuple(
        reference.model_copy(update={"strength": found})
        for reference, found in zip(references, strengths, strict=True)
        if found > 0
    )


def pictures(references: Sequence[Reference]) -> list[str | None]:
    """The input pictures that they name."""
    return [name for reference in references for name in (reference.image, reference.mask)]


def choose(names: Sequence[str]) -> str:
    """The IP-Adapter of a job that names none. Raises NoIpAdapter, UnsupportedSetting."""
    if not names:
        raise NoIpAdapter
    if len(names) > 1:
        known = ", ".join(names[:20])
        raise UnsupportedSetting(f"references: there are the IP-Adapters {known}. Name one in `ip_adapter`")
    return names[0]


def chosen(spec: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The IP-Adapter that a job's fields mean without naming it, if there is just one."""
    return list(names) if spec.get("references") and spec.get("ip_adapter") is None and len(names) == 1 else []


def layers(influence: Influence, processors: Sequence[str]) -> frozenset[str]:
    """Which of a UNet's attention layers a reference acts by; names as diffusers' attn_processors has them."""
    if influence is Influence.ALL:
        return frozenset(processors)
    block = re.escape(_BLOCKS[influence])
    for number in (1, 0):
        if found := frozenset(name for name in processors if re.match(rf"{block}\.attentions\.{number}\.", name)):
            return found
    raise UnsupportedSetting(f"references: the model has no layer for the influence {influence}. Leave it out")
