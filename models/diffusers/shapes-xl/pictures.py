"""The data set: draws coloured shapes and says in words what it drew; it knows nothing of torch or of the model."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Size = tuple[int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 30),
    "purple": (130, 40, 170),
    "orange": (245, 140, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "pink": (250, 150, 190),
    "grey": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Offset from the middle, as a share of the side.
POSITIONS = {
    "on the left": (-0.25, 0.0),
    "on the right": (0.25, 0.0),
    "at the top": (0.0, -0.25),
    "at the bottom": (0.0, 0.25),
    "in the center": (0.0, 0.0),
}
# Radius, as a share of the side.
SIZES = {"small": 0.16, "large": 0.34, "": 0.25}
PAIR_RADIUS = 0.19
PREFIXES = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "a photo of ", "masterpiece, best quality, ")

# Drawn larger by this factor and shrunk: smooth edges without an antialiasing drawer.
OVERSIZE = 2
# How often two things are drawn, and the sizes one thing is chosen from; the second of each is for fine-tuning.
TWO = {False: 0.25, True: 0.4}
ONE = {False: tuple(SIZES), True: ("small", "small", "large", "", "")}


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Colour, hole: Colour
) -> None:
    """Draw one shape about (x, y); `hole` is the colour seen through a ring."""
    r = radius
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif shape == "star":
        spokes = [(i * math.pi / 5, r * (0.45 if i % 2 else 1.1)) for i in range(10)]
        draw.polygon([(x + s * math.sin(a), y - s * math.cos(a)) for a, s in spokes], fill=fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=fill)
        draw.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=hole)
    else:
        raise ValueError(f"no such shape: {shape}")


def named(words: str) -> str:
    """The words with their article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def sample(rng: random.Random, size: Size = (128, 128), hard: bool = False) -> tuple[Image.Image, str]:
    """Invent a picture, one thing anywhere or (a quarter) two side by side, and its caption; size is (width, height).

    `hard` asks for more pictures of two things and of small ones.
    """
    background = rng.choice(list(COLOURS))
    ground = _jittered(rng, background)
    image = Image.new("RGB", (OVERSIZE * size[0], OVERSIZE * size[1]), ground)
    draw = ImageDraw.Draw(image)
    two = rng.random() < TWO[hard]
    text = _draw_two(draw, rng, background, ground) if two else _draw_one(draw, rng, background, ground, ONE[hard])
    if rng.random() < 0.92:
        text += f" on {named(background)} background"
    if rng.random() < 0.12:  # the terse way: "red circle blue"
        text = text.replace(" on a ", " ").replace(" background", "").replace(" and", ",")
    return image.resize(size, Image.Resampling.BOX), rng.choice(PREFIXES) + text


def dataset(count: int, seed: int, size: Size = (128, 128), hard: bool = False) -> tuple[np.ndarray, list[str]]:
    """The same pictures, as bytes (count, height, width, 3), and captions for the same seed."""
    rng = random.Random(seed)
    images = np.empty((count, size[1], size[0], 3), np.uint8)
    captions = []
    for i in range(count):
        image, text = sample(rng, size, hard)
        images[i] = np.asarray(image)
        captions.append(text)
    return images, captions


def _draw_one(
    draw: ImageDraw.ImageDraw, rng: random.Random, background: str, ground: Colour, sizes: tuple[str, ...]
) -> str:
    width, height = draw.im.size
    colour = rng.choice([c for c in COLOURS if c != background])
    shape = rng.choice(SHAPES)
    size = rng.choice(sizes)
    position = rng.choice(list(POSITIONS)) if rng.random() < 0.5 else ""
    dx, dy = POSITIONS.get(position, (0.0, 0.0))
    spread = 0.02 if position else 0.08
    x, y = 0.5 + dx + rng.uniform(-spread, spread), 0.5 + dy + rng.uniform(-spread, spread)
    radius = SIZES[size] * (1 + rng.uniform(-0.08, 0.08)) * (0.8 if dx or dy else 1.0)
    radius *= min(width, height)
    draw_shape(draw, shape, width * x, height * y, radius, _jittered(rng, colour), ground)
    return " ".join(w for w in (named(f"{size} {colour} {shape}".strip()), position) if w)


def _draw_two(draw: ImageDraw.ImageDraw, rng: random.Random, background: str, ground: Colour) -> str:
    width, height = draw.im.size
    names = []
    for dx in (-0.25, 0.25):
        colour = rng.choice([c for c in COLOURS if c != background])
        shape = rng.choice(SHAPES)
        x, y = 0.5 + dx + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.05, 0.05)
        radius = PAIR_RADIUS * (1 + rng.uniform(-0.08, 0.08))
        radius *= min(width, height)
        draw_shape(draw, shape, width * x, height * y, radius, _jittered(rng, colour), ground)
        names.append(named(f"{colour} {shape}"))
    return " and ".join(names)


def _jittered(rng: random.Random, name: str) -> Colour:
    r, g, b = (max(0, min(255, int(v + rng.uniform(-10, 10)))) for v in COLOURS[name])
    return (r, g, b)
