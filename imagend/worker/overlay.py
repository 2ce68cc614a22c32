"""A mask on its picture, to be looked at: what is meant is red, and each box has its words and its score.

Lettered in Pillow's own bitmap font, which no version of FreeType draws otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
_TINT, _INK, _PAPER = "#ff0000", "#000000", "#ffe000"
_SHARE = 128
"""of the tint, where the mask is white; of 255"""


def overlay(image: Image.Image, mask: Image.Image, boxes: Sequence[tuple[Box, str]]) -> Image.Image:
    """Of an RGB picture and its mask ("L"); each box with its label."""
    drawn = image.copy()
    share = ImageChops.multiply(mask, Image.new("L", mask.size, _SHARE))
    drawn.paste(Image.new("RGB", image.size, _TINT), mask=share)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default_imagefont()
    for (left, top, right, bottom), label in boxes:
        x, y = max(0, round(left)), max(0, round(top))
        pen.rectangle((x, y, min(image.width, round(right)) - 1, min(image.height, round(bottom)) - 1), outline=_PAPER)
        if label:
            width, height = round(font.getlength(label)) + 3, 12
            x, y = max(0, min(x, image.width - width)), y - height if y >= height else y
            pen.rectangle((x, y, x + width - 1, y + height - 1), _PAPER)
            pen.text((x + 2, y + 1), label, _INK, font)
    return drawn
