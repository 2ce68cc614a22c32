"""Scores a model by machine: asks for pictures in words, and reads background, colour and shape back from the pixels.

`analyse` and `analyse_halves` need numpy and Pillow alone, so tests can import them; torch is loaded by `paint`.
Chance is about 10 % for the background, 11 % for the colour and 17 % for the shape.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pictures import COLOURS, SHAPES, draw_shape, named
from PIL import Image, ImageDraw

Answer = tuple[str, str | None, str | None]

# The least difference that counts, summed over r, g and b; orange and yellow, the nearest pair, are 90 apart.
VISIBLE = 45

# Running text, unlike the word lists of the training, and partly of words that the vocabulary must spell out.
BEFORE = (
    "It was late in the afternoon, and the museum had nearly emptied. A visitor had forgotten a notebook on the bench "
    "near the entrance. She opened it and read the page twice, to be certain of what it asked for. "
)
AFTER = (
    " Please keep the edges tidy, and do not add any lettering. She closed the notebook, put it back where she had "
    "found it, and wondered who might have written such a peculiar request."
)


@dataclass(frozen=True)
class Question:
    """A prompt and what a picture of it must show."""

    prompt: str
    background: str
    colour: str
    shape: str


def nearest_colour(rgb: np.ndarray) -> str:
    """The name of the palette's colour nearest in RGB."""
    return min(COLOURS, key=lambda name: float(np.square(np.subtract(rgb, COLOURS[name])).sum()))


def analyse(image: Image.Image | np.ndarray) -> Answer:
    """Read (background, colour, shape) from a picture of one thing; the latter two are None where nothing is seen.

    The background is the border's median colour, the thing is all that differs from it, and its shape is the one
    whose outline, stretched to the same box, overlaps it best. Works at any size from 64 to 256.
    """
    pixels = _at_128(image)
    border = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
    return _read(pixels, np.median(border, axis=0))


def analyse_halves(image: Image.Image | np.ndarray) -> tuple[Answer, Answer]:
    """Read a picture of two things side by side: what `analyse` says of its left and of its right half."""
    pixels = _at_128(image)
    border = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    middle = pixels.shape[1] // 2
    return _read(pixels[:, :middle], background), _read(pixels[:, middle:], background)


def _at_128(image: Image.Image | np.ndarray) -> np.ndarray:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.convert("RGB")
    scale = 128 / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR)).astype(int)


def _read(pixels: np.ndarray, background: np.ndarray) -> Answer:
    distance = np.abs(pixels - background).sum(-1)
    # Half the contrast, so that an outline is found in the middle of its blur, whatever two colours meet there.
    differs = distance > max(VISIBLE, np.percentile(distance, 99.5) / 2)
    if differs.sum() < 30:
        return nearest_colour(background), None, None
    colour = nearest_colour(np.median(pixels[differs], axis=0))
    rows, columns = np.where(differs)
    # Percentiles, so that a stray pixel does not stretch the box.
    top, bottom = np.percentile(rows, [1, 99]).astype(int)
    left, right = np.percentile(columns, [1, 99]).astype(int)
    seen = _boxed(differs[top : bottom + 1, left : right + 1])
    overlap = {name: (seen & mask).sum() / (seen | mask).sum() for name, mask in _outlines().items()}
    return nearest_colour(background), colour, max(overlap, key=lambda name: overlap[name])


@cache
def _outlines() -> dict[str, np.ndarray]:
    outlines = {}
    for shape in SHAPES:
        image = Image.new("RGB", (256, 256))
        draw_shape(ImageDraw.Draw(image), shape, 128, 128, 80, (255, 255, 255), (0, 0, 0))
        mask = np.asarray(image)[..., 0] > 128
        rows, columns = np.where(mask)
        outlines[shape] = _boxed(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return outlines


def _boxed(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((32, 32)))


def questions(count: int, size: str = "", seed: int = 123) -> list[Question]:
    """One-thing questions, of one size if `size` names it; the same ones for the same seed."""
    rng = random.Random(seed)
    asked = []
    for _ in range(count):
        background = rng.choice(list(COLOURS))
        colour = rng.choice([c for c in COLOURS if c != background])
        shape = rng.choice(SHAPES)
        thing = f"{size} {colour} {shape}".strip()
        prompt = f"{named(thing)} on {named(background)} background"
        asked.append(Question(prompt, background, colour, shape))
    return asked


def lengthened(prompt: str, sentences_before: int) -> str:
    """`prompt` as one sentence of a text beyond 77 tokens; with 0 it comes first, else in a later 75-token chunk."""
    return BEFORE * sentences_before + prompt[0].upper() + prompt[1:] + "." + AFTER


def score(answers: list[Answer], asked: list[Question]) -> dict[str, float]:
    """The shares of right answers."""
    pairs = zip(answers, asked, strict=True)
    right = np.array([(a[0] == q.background, a[1] == q.colour, a[2] == q.shape) for a, q in pairs])
    shares = [*right.mean(0).tolist(), float(right.all(1).mean())]
    return dict(zip(("background", "colour", "shape", "all_three"), (round(s, 3) for s in shares), strict=True))


def ground_truth(asked: list[Question], size: int) -> dict[str, float]:
    """The score of properly drawn pictures: what the metric itself can reach."""
    answers = []
    for q in asked:
        image = Image.new("RGB", (2 * size, 2 * size), COLOURS[q.background])
        draw_shape(ImageDraw.Draw(image), q.shape, size, size, size / 2, COLOURS[q.colour], COLOURS[q.background])
        answers.append(analyse(image.resize((size, size), Image.Resampling.BOX)))
    return score(answers, asked)


def pair_questions(count: int, seed: int = 321) -> list[tuple[Question, Question]]:
    """Two things side by side; both questions hold the same prompt, the left thing's first."""
    rng = random.Random(seed)
    asked = []
    for _ in range(count):
        background = rng.choice(list(COLOURS))
        left, right = rng.sample([c for c in COLOURS if c != background], 2)
        shapes = rng.choice(SHAPES), rng.choice(SHAPES)
        prompt = f"{named(left)} {shapes[0]} and {named(right)} {shapes[1]} on {named(background)} background"
        first, second = (Question(prompt, background, c, s) for c, s in zip((left, right), shapes, strict=True))
        asked.append((first, second))
    return asked


@dataclass(frozen=True)
class Settings:
    """How the pictures are made."""

    size: int = 128
    num_inference_steps: int = 12
    guidance_scale: float = 4.0
    long: bool = False


def paint(model: Path, prompts: list[str], settings: Settings, batch: int = 10) -> list[np.ndarray]:
    """One picture a prompt, through the plain pipeline; long prompts are embedded by Compel, chunk by chunk."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(model, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        made = pipe(
            **(_long_embeddings(pipe, part) if settings.long else {"prompt": part}),
            height=settings.size,
            width=settings.size,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        )
        images += [np.asarray(image) for image in made.images]
    return images


def _long_embeddings(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    from compel import CompelForSDXL

    made = CompelForSDXL(pipe)(prompts, negative_prompt=[""] * len(prompts))
    return {
        "prompt_embeds": made.embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }


def examine(model: Path, count: int, settings: Settings, thing: str = "") -> dict[str, Any]:
    """Ask, paint, read, count. `thing` is "" or "small" for one thing, "two" for two side by side."""
    pairs = pair_questions(count) if thing == "two" else [(q,) for q in questions(count, thing)]
    prompts = [pair[0].prompt for pair in pairs]
    if settings.long:  # a third each: at the start, after one passage and after two
        prompts = [lengthened(p, i % 3) for i, p in enumerate(prompts)]
    started = time.monotonic()
    images = paint(model, prompts, settings)
    seconds = (time.monotonic() - started) / count
    answers = [analyse_halves(i) if thing == "two" else (analyse(i),) for i in images]
    shares = score([a for group in answers for a in group], [q for pair in pairs for q in pair])
    result: dict[str, Any] = {"thing": thing or "plain", "count": count, **asdict(settings), **shares}
    if settings.long:
        for place, name in enumerate(("at_the_start", "in_a_later_chunk", "in_a_much_later_chunk")):
            right = score([a for group in answers[place::3] for a in group], [q for p in pairs[place::3] for q in p])
            result[f"all_three_{name}"] = right["all_three"]
    return {**result, "seconds_per_picture": round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="pipeline folder (default: this one)")
    parser.add_argument("--count", type=int, default=120, help="prompts to ask (default 120)")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (default 128)")
    parser.add_argument("--num-inference-steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--small", action="store_true", help='ask for "a small ..."')
    parser.add_argument("--two", action="store_true", help="ask for two things side by side, counted one by one")
    parser.add_argument("--long", action="store_true", help="put the subject into a text beyond 77 tokens, by compel")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.count < 1 or options.size % 8 or not 64 <= options.size <= 256:
        parser.error("--count must be at least 1, --size a multiple of 8 from 64 to 256")
    settings = Settings(options.size, options.num_inference_steps, options.guidance_scale, options.long)
    result = examine(options.model, options.count, settings, "two" if options.two else "small" if options.small else "")
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:32} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
