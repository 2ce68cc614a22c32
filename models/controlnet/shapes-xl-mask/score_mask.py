"""Scores the ControlNet: paints things where a mask says, and looks in the pixels where they are.

The prompt names the shape, and not its place. "In place" is a painted thing that overlaps its mask by half of what the
two cover together (intersection over union), "alike" by three quarters.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageDraw

BASE = Path(__file__).resolve().parents[2] / "diffusers" / "shapes-xl"
sys.path.insert(0, str(BASE))

from pictures import COLOURS, POSITIONS, SHAPES, draw_shape, named  # noqa: E402
from score import VISIBLE, nearest_colour  # noqa: E402

SIDE = 128


def questions(count: int, seed: int = 5) -> list[tuple[str, str, str, Image.Image]]:
    """(prompt, colour, background, mask): a mask anywhere among the places, of a thing that the prompt only names."""
    rng = random.Random(seed)
    asked = []
    for _ in range(count):
        background = rng.choice(list(COLOURS))
        colour = rng.choice([c for c in COLOURS if c != background])
        shape, (dx, dy) = rng.choice(SHAPES), rng.choice(list(POSITIONS.values()))
        mask = Image.new("RGB", (SIDE, SIDE))
        x, y, radius = SIDE * (0.5 + dx), SIDE * (0.5 + dy), SIDE * rng.uniform(0.18, 0.26)
        draw_shape(ImageDraw.Draw(mask), shape, x, y, radius, (255, 255, 255), (0, 0, 0))
        asked.append((f"{named(colour)} {shape} on {named(background)} background", colour, background, mask))
    return asked


def seen(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a picture differs from its background, and the background's colour: its commonest border's."""
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    distance = np.abs(picture - background).sum(-1)
    return distance > max(VISIBLE, np.percentile(distance, 99.5) / 2), background


def score(pictures: list[np.ndarray], asked: list[tuple[str, str, str, Image.Image]]) -> dict[str, float]:
    overlaps, colours = [], []
    for picture, (_, colour, background, mask) in zip(pictures, asked, strict=True):
        thing, around = seen(picture.astype(int))
        wanted = np.asarray(mask)[..., 0] > 0
        overlaps.append((thing & wanted).sum() / (thing | wanted).sum())
        middle = np.median(picture[wanted], axis=0)
        colours.append(nearest_colour(middle) == colour and nearest_colour(around) == background)
    found = np.array(overlaps)
    return {
        "overlap": round(float(found.mean()), 3),
        "in_place": round(float((found > 0.5).mean()), 3),
        "alike": round(float((found > 0.75).mean()), 3),
        "colours": round(float(np.mean(colours)), 3),
    }


def paint(model: Path, strength: float, asked: list[tuple[str, str, str, Image.Image]], steps: int) -> list[np.ndarray]:
    """One picture a question; with strength 0 by the base's own pipeline."""
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    if strength:
        net = ControlNetModel.from_pretrained(model, local_files_only=True, dtype=torch.float32)
        pipe = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(asked), 10):
        part = asked[start : start + 10]
        control = {"image": [one[3] for one in part], "controlnet_conditioning_scale": strength} if strength else {}
        made = pipe(
            prompt=[one[0] for one in part],
            **control,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        )
        pictures += [np.asarray(image) for image in made.images]
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the ControlNet (default: this one)")
    parser.add_argument("--count", type=int, default=60, help="pictures for each strength (default 60)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default 12)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 0.75, 1.0])
    parser.add_argument("--sheet", type=Path, help="write masks and pictures of the first ten here")
    options = parser.parse_args()
    asked = questions(options.count)
    rows = [[one[3] for one in asked[:10]]]
    for strength in options.strengths:
        pictures = paint(options.model, strength, asked, options.steps)
        rows.append([Image.fromarray(picture) for picture in pictures[:10]])
        print(json.dumps({"strength": strength, **score(pictures, asked)}), flush=True)
    if options.sheet is not None:
        sheet = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                sheet.paste(image, (SIDE * x, SIDE * y))
        sheet.quantize(128, dither=Image.Dither.NONE).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
