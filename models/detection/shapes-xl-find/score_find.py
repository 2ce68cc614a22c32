"""Scores a GroundingDINO on drawn pictures that it was not trained on: what is found by words.

A thing is found if a box overlaps its own by half (intersection over union). "Exactly" is a picture in which all that
the phrase names is found, and nothing else.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from scenes import COLOURS, SHAPES, Thing, scene

SIZE = 128
FIRST = 10**6
"""Seeds from here on are no training step's."""


def load(folder: Path) -> Any:
    local: dict[str, Any] = {"local_files_only": True}
    images = transformers.GroundingDinoImageProcessorPil.from_pretrained(folder, **local)
    processor = transformers.GroundingDinoProcessor(images, transformers.BertTokenizer.from_pretrained(folder, **local))
    network = transformers.GroundingDinoForObjectDetection.from_pretrained(folder, dtype=torch.float32, **local)
    return processor, network.eval()


@torch.no_grad()
def find(models: Any, image: Image.Image, phrase: str, threshold: float) -> np.ndarray:
    processor, network = models
    inputs = processor(images=image, text=[[phrase]], return_tensors="pt")
    (found,) = processor.post_process_grounded_object_detection(
        network(**inputs), inputs["input_ids"], threshold=threshold, target_sizes=[image.size[::-1]]
    )
    boxes: np.ndarray = found["boxes"].numpy()
    return boxes


def overlap(a: Any, b: Any) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = (high - low).clip(0).prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def questions(count: int) -> list[tuple[Image.Image, str, list[Thing]]]:
    """(picture, phrase, what it names): of a colour and a shape; every fourth phrase is drawn by lot."""
    asked = []
    for seed in range(FIRST, FIRST + count):
        rng = random.Random(seed)
        image, things = scene(rng, (SIZE, SIZE))
        one = rng.choice(things)
        phrase = f"the {one.colour} {one.shape}"
        if seed % 4 == 3:
            phrase = f"the {rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        asked.append((image, phrase, [thing for thing in things if thing.is_called(phrase)]))
    return asked


def score(models: Any, asked: list[tuple[Image.Image, str, list[Thing]]], threshold: float) -> dict[str, float]:
    hits = wanted = wrong = exact = 0
    overlaps = []
    for image, phrase, named in asked:
        boxes = find(models, image, phrase, threshold)
        best = [max((overlap(np.array(thing.box), box) for box in boxes), default=0.0) for thing in named]
        others = any(all(overlap(np.array(thing.box), box) <= 0.5 for thing in named) for box in boxes)
        seen = [one > 0.5 for one in best]
        hits, wanted, wrong = hits + sum(seen), wanted + len(named), wrong + others
        exact += all(seen) and not others
        overlaps += [one for one in best if one > 0.5]
    return {
        "threshold": threshold,
        "found": round(hits / wanted, 3),
        "pictures_with_something_else": round(wrong / len(asked), 3),
        "exactly": round(exact / len(asked), 3),
        "overlap_of_found": round(float(np.mean(overlaps)), 3),
    }


def sample(models: Any, asked: list[tuple[Image.Image, str, list[Thing]]], threshold: float) -> Image.Image:
    """Twelve pictures, twice as large, with their phrases and the boxes that were found."""
    sheet = Image.new("RGB", (4 * 272 + 16, 3 * 292 + 16), "white")
    for number, (image, phrase, _) in enumerate(asked[:12]):
        left, top = 16 + number % 4 * 272, 16 + number // 4 * 292
        sheet.paste(image.resize((256, 256), Image.Resampling.NEAREST), (left, top))
        pen = ImageDraw.Draw(sheet)
        pen.text((left, top + 260), phrase, "black", ImageFont.load_default_imagefont())
        for box in find(models, image, phrase, threshold) * 2:
            pen.rectangle((left + box[0], top + box[1], left + box[2], top + box[3]), outline="#ff00ff", width=3)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.15, 0.2, 0.25, 0.3, 0.35])
    parser.add_argument("--sample", type=Path, help="write a picture of some instead; at the first threshold")
    options = parser.parse_args()
    models, asked = load(options.model), questions(options.count)
    if options.sample:
        sample(models, asked, options.thresholds[0]).quantize(64).save(options.sample, optimize=True)
        return
    for threshold in options.thresholds:
        print(json.dumps(score(models, asked, threshold)), flush=True)


if __name__ == "__main__":
    main()
