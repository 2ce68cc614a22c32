"""Scores the IP-Adapter: shows it a picture of a thing, and looks in what is painted for the same.

With no prompt, only the reference says what is wanted. With a prompt that names another colour, the prompt and the
reference disagree: then it is seen how far the strength lets each have its way.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1]
BASE = MODELS / "diffusers" / "shapes-xl"
sys.path.insert(0, str(BASE))

from pictures import COLOURS, draw_shape  # noqa: E402
from score import Question, analyse, questions, score  # noqa: E402

SIDE = 128


def drawn(question: Question) -> Image.Image:
    """The reference: the thing, in the middle."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), COLOURS[question.background])
    fill, hole = COLOURS[question.colour], COLOURS[question.background]
    draw_shape(ImageDraw.Draw(picture), question.shape, SIDE, SIDE, 0.5 * SIDE, fill, hole)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def load(eye: Path, adapter: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(eye, dtype=torch.float32).eval()
    size = pipe.image_encoder.config.image_size
    pipe.feature_extractor = CLIPImageProcessorPil(size=size, crop_size=size)
    tensors: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(adapter).items():
        part, _, rest = name.partition(".")
        tensors[part][rest] = tensor.float()
    pipe.load_ip_adapter(tensors, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, asked: list[Question], prompts: list[str], strength: float, steps: int) -> list[np.ndarray]:
    """One picture a question."""
    pipe.set_ip_adapter_scale(strength)
    return [
        np.asarray(
            pipe(
                prompt=prompt,
                ip_adapter_image=drawn(question),
                height=SIDE,
                width=SIDE,
                num_inference_steps=steps,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(number),
            ).images[0]
        )
        for number, (question, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eye", type=Path, default=HERE, help="the image encoder (default: this one)")
    default = MODELS / "ipadapter" / "shapes-xl-reference.safetensors"
    parser.add_argument("--adapter", type=Path, default=default, help="the IP-Adapter (default: the one beside it)")
    parser.add_argument("--count", type=int, default=60, help="pictures for each strength (default 60)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default 12)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.3, 0.6, 1.0])
    parser.add_argument("--sheet", type=Path, help="write references and pictures of the first ten here")
    options = parser.parse_args()
    pipe, asked = load(options.eye, options.adapter), questions(options.count, seed=7)
    others = questions(options.count, seed=8)
    rows = [[drawn(question) for question in asked[:10]]]
    for what, prompts in (
        ("no prompt", [""] * len(asked)),
        ("a prompt of another thing", [one.prompt for one in others]),
    ):
        for strength in options.strengths:
            pictures = paint(pipe, asked, prompts, strength, options.steps)
            answers = [analyse(picture) for picture in pictures]
            rows.append([Image.fromarray(picture) for picture in pictures[:10]])
            found = {"like_the_reference": score(answers, asked)}
            if prompts[0]:
                found["like_the_prompt"] = score(answers, others)
            print(json.dumps({"with": what, "strength": strength, **found}), flush=True)
    if options.sheet is not None:
        sheet = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                sheet.paste(image, (SIDE * x, SIDE * y))
        sheet.quantize(128, dither=Image.Dither.NONE).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
