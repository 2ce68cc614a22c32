"""The options of imagend submit that say which part of a picture is meant: the field `mask` of a job, from text."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from imagend.cli import drop
from imagend.fields import PICTURE
from imagend.mask_field import Mask

_BOX = re.compile(r"\d+(,\d+){3}")
_WHOLE = "whole"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # one that is not there is no words
_REFINING = ("expand", "blur", "invert", "threshold", "text_threshold")


def configure(fields: Any) -> None:
    fields.add_argument(
        "--mask",
        dest="mask",
        metavar="MASK",
        action="append",
        help="of edit and mask: the part of the picture that is meant: a black and white picture, as for --image; "
        "LEFT,TOP,RIGHT,BOTTOM in pixels; what to find in it, in words; or `whole`. Boxes and words may be given more "
        "than once",
    )
    fields.add_argument(
        "--find",
        dest="mask_find",
        metavar="TEXT",
        action="append",
        help="of edit and mask: what the mask is to find in the picture, in words; give it again for more of them",
    )
    for name in _REFINING:
        takes = {"action": "store_true", "default": None} if name == "invert" else {"metavar": "VALUE"}
        fields.add_argument(
            f"--mask-{name.replace('_', '-')}",
            dest=f"mask_{name}",
            help=(Mask.model_fields[name].description or "").replace("%", "%%"),
            **takes,
        )


def field(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The field, with what options say of it; None without any of them. What does not go together is refused where the
    whole job is checked."""
    refined = {name: getattr(arguments, f"mask_{name}") for name in _REFINING}
    named = _named(arguments.mask or [])
    if arguments.mask_find:
        named["find"] = [*named.get("find", ()), *arguments.mask_find]
    given = {name: text for name, text in refined.items() if text is not None}
    return named | {name: text if isinstance(text, bool) else drop.number(text) for name, text in given.items()} or None


def _named(texts: list[str]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for text in texts:
        if _BOX.fullmatch(text):
            named.setdefault("boxes", []).append([int(edge) for edge in text.split(",")])
        elif text == _WHOLE:
            named["whole"] = True
        elif re.fullmatch(PICTURE, text) or Path(text).suffix.lower() in _PICTURES or Path(text).is_file():
            named["image"] = text
        else:
            named.setdefault("find", []).append(text)
    return named
