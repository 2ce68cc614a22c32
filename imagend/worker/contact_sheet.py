"""A contact sheet: all pictures of a set in one, small, each with its name. Of the same pictures, the same bytes.

Lettered in Pillow's own bitmap font, which no version of FreeType draws otherwise. What failed is an empty place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from imagend.errors import NoSpace
from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.set_field import CONTACT_SHEET
from imagend.worker import images

if TYPE_CHECKING:
    from imagend.worker.main import Context

MIN_SIDE, SIDE = 160, 256
"""Pixels a side for each picture, as the largest of them is: 64 make at most 2120 x 2296. None is enlarged."""
_GAP, _LABEL = 8, 22
_GROUND, _EMPTY, _INK = "#ffffff", "#d9d9d9", "#000000"


def save(spec: Generate, artifacts: Sequence[Artifact], context: Context) -> Artifact:
    """Write the sheet of a set's pictures durably into the draft. Raises NoSpace."""
    start = time.perf_counter()
    planned = [plan for plan in spec.planned if plan.role is None]
    made = {artifact.file for artifact in artifacts}
    places = [
        (Path(plan.file).stem, context.folder / plan.file)
        if plan.file in made
        else (f"{Path(plan.file).stem}: {context.failed[str(plan.item)].code}", None)
        for plan in planned
    ]
    try:
        with context.timed("saving"):
            sheet = draw(places)
            data = images.save_png(sheet, context.folder / CONTACT_SHEET, images.mark(made_by_ai=True, item=None))
    except OSError as error:
        raise NoSpace(error.strerror) from None
    seconds = round(time.perf_counter() - start, 6)
    pixels = images.pixels_sha256(sheet)
    artifact = images.describe(sheet, CONTACT_SHEET, data, pixels, len(planned), None, seconds)
    return artifact.model_copy(update={"role": "contact_sheet"})


def draw(places: Sequence[tuple[str, Path | None]]) -> Image.Image:
    """Names and pictures, row by row."""
    columns = math.ceil(math.sqrt(len(places)))
    rows = math.ceil(len(places) / columns)
    side = min(SIDE, max(MIN_SIDE, *(_side(path) for _, path in places)))
    wide, high = side + _GAP, side + _LABEL + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), _GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    for number, (name, path) in enumerate(places):
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        if path is None:
            pen.rectangle((left, top, left + side - 1, top + side - 1), _EMPTY)
        else:
            with Image.open(path) as picture:
                small = picture.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
        pen.text((left, top + side + 4), _fitted(name, font, side), _INK, font)
    return sheet


def _side(path: Path | None) -> int:
    if path is None:
        return 0
    with Image.open(path) as picture:
        return max(picture.size)


def _fitted(name: str, font: ImageFont.ImageFont, width: int) -> str:
    """As much of a name as there is room for."""
    while font.getlength(name) > width:
        name = f"{name[:-3].rstrip('.')}.."
    return name
