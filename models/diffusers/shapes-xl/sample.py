"""Paints sample.png: a row for each seed, a column for each prompt; it judges nothing."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

PROMPTS = (
    "a red circle on a blue background",
    "a green square on a yellow background",
    "a small white star on a black background",
    "a large purple ring on an orange background",
    "a blue triangle at the top on a white background",
    "a pink cross on the left on a green background",
    "a yellow circle and a red square on a grey background",
    "a black triangle and a white ring on a purple background",
)
SEEDS = (0, 1, 2)


def grid(pipe: StableDiffusionXLPipeline, size: int = 128) -> Image.Image:
    """All prompts by all seeds, 14 steps at guidance scale 4."""
    sheet = Image.new("RGB", (size * len(PROMPTS), size * len(SEEDS)))
    for column, prompt in enumerate(PROMPTS):
        for row, seed in enumerate(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            made = pipe(
                prompt, height=size, width=size, num_inference_steps=14, guidance_scale=4.0, generator=generator
            )
            sheet.paste(made.images[0], (size * column, size * row))
    return sheet


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=here, help="pipeline folder (default: this one)")
    parser.add_argument("--out", type=Path, default=here / "sample.png", help="picture to write (default: sample.png)")
    options = parser.parse_args()
    pipe = StableDiffusionXLPipeline.from_pretrained(options.model, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    grid(pipe).save(options.out)


if __name__ == "__main__":
    main()
