"""Pictures of one to four of shapes-xl's things anywhere on a ground, and phrases for some of them; knows no torch."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

BASE = Path(__file__).resolve().parents[2] / "diffusers" / "shapes-xl"
sys.path.insert(0, str(BASE))

from pictures import COLOURS, OVERSIZE, SHAPES, draw_shape  # noqa: E402

ANY = ("thing", "object", "shape")
BEFORE = ("", "", "a ", "the ")
WORDS = (*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses", *ANY, "a", "an", "the", "and", "on")
Size = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """`box` (x0, y0, x1, y1) and `mask` are of what is seen of it, in pixels."""

    colour: str
    shape: str
    box: Box
    mask: np.ndarray

    def is_called(self, phrase: str) -> bool:
        words = phrase.split()
        colours, shapes = set(words) & set(COLOURS), {word for word in SHAPES if {word, f"{word}s"} & set(words)}
        return (not colours or self.colour in colours) and (not shapes or self.shape in shapes)


def scene(rng: random.Random, size: Size) -> tuple[Image.Image, list[Thing]]:
    """Things that do not touch, up to four; size is (width, height)."""
    width, height = OVERSIZE * size[0], OVERSIZE * size[1]
    background = rng.choice(list(COLOURS))
    ground = _jittered(rng, background)
    image = Image.new("RGB", (width, height), ground)
    things: list[Thing] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        for _ in range(10):  # tries to find it a place
            radius = rng.uniform(0.09, 0.34) * min(width, height)
            x, y = rng.uniform(radius, width - radius), rng.uniform(1.1 * radius, height - radius)
            if all((x - a) ** 2 + (y - b) ** 2 > (1.15 * (radius + c)) ** 2 for a, b, c in taken):
                break
        else:
            continue
        taken.append((x, y, radius))
        colour = rng.choice([one for one in COLOURS if one != background])
        shape = rng.choice(SHAPES)
        draw_shape(ImageDraw.Draw(image), shape, x, y, radius, _jittered(rng, colour), ground)
        mask = Image.new("L", (width, height))
        draw_shape(ImageDraw.Draw(mask), shape, x, y, radius, 255, 0)
        seen = np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        things.append(Thing(colour, shape, box, seen))
    image = image.resize(size, Image.Resampling.BOX)
    return _worn(rng, image), things


def phrases(rng: random.Random, things: list[Thing]) -> list[str]:
    """One or two, for things that are there and that are not; none of which both name the same thing."""
    found: list[str] = []
    for _ in range(rng.choice((1, 2, 3))):
        like = rng.choice(things) if rng.random() < 0.7 else None
        colour = like.colour if like else rng.choice(list(COLOURS))
        shape = like.shape if like else rng.choice(SHAPES)
        kind = rng.random()
        words = f"{colour} {shape}" if kind < 0.6 else f"{shape}" if kind < 0.8 else f"{colour} {rng.choice(ANY)}"
        phrase = rng.choice(BEFORE) + words
        if not any(thing.is_called(phrase) and thing.is_called(other) for thing in things for other in found):
            found.append(phrase)
    return found


def _worn(rng: random.Random, image: Image.Image) -> Image.Image:
    """As pictures come that were painted or compressed: now and then soft and uneven."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), (image.height, image.width, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def _jittered(rng: random.Random, name: str) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, int(value + rng.uniform(-12, 12)))) for value in COLOURS[name])
    return (r, g, b)
