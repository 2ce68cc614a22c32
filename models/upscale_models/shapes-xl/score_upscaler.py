"""Scores the upscaler: peak signal-to-noise ratio to the true picture, beside Lanczos, in decibels; more is better.

"drawn" are pictures of 256x256 that it was not trained on, shrunk to 128x128 and enlarged again. "painted" are pictures
of shapes-xl, 128x128, shrunk to 64x64 and enlarged again: what it was not trained on, with the painter's own edges.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
BASE = HERE.parents[1] / "diffusers" / "shapes-xl"
sys.path[:0] = [str(HERE), str(BASE)]

from pictures import COLOURS, SHAPES  # noqa: E402
from train_upscaler import SCALE, as_tensor, drawn, new_network, shrunk  # noqa: E402


def painted(count: int) -> np.ndarray:
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for seed in range(count):
        colour, ground = list(COLOURS)[seed % 10], list(COLOURS)[(seed + 3) % 10]
        prompt = f"a {colour} {SHAPES[seed % len(SHAPES)]} on a {ground} background"
        generator = torch.Generator("cpu").manual_seed(seed)
        made = pipe(prompt, num_inference_steps=12, guidance_scale=4.0, generator=generator).images[0]
        found.append(np.asarray(made.convert("RGB")))
    return np.stack(found)


def by_lanczos(small: np.ndarray) -> np.ndarray:
    size = small.shape[2] * SCALE, small.shape[1] * SCALE
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.LANCZOS)) for one in small])


def by_network(small: np.ndarray, network: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        found = torch.cat([network(one[None]) for one in as_tensor(small)])
    return (found.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def psnr(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Of each picture."""
    error = ((found.astype(float) - true.astype(float)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / error.clip(min=1e-3))


def score(large: np.ndarray, network: torch.nn.Module) -> dict[str, float]:
    small = shrunk(large)
    lanczos, ours = psnr(by_lanczos(small), large), psnr(by_network(small, network), large)
    told = {"lanczos": lanczos.mean(), "network": ours.mean(), "better than lanczos": (ours > lanczos).mean()}
    return {name: round(float(value), 3) for name, value in told.items()}


def sample(large: np.ndarray, network: torch.nn.Module, path: Path) -> None:
    """The middles of pictures: shrunk (its pixels enlarged), by Lanczos, by the network, the true one; a row each."""
    small = shrunk(large)
    rows = [np.repeat(np.repeat(small, SCALE, 1), SCALE, 2), by_lanczos(small), by_network(small, network), large]
    side = large.shape[1]
    crop = slice(side // 4, side * 3 // 4)
    sheet = np.concatenate([np.concatenate(list(row[:, crop, crop]), 1) for row in rows], 0)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="pictures of each (default 100)")
    parser.add_argument("--sample", type=Path, help="a PNG to write: four pictures, enlarged by each")
    options = parser.parse_args()
    torch.set_num_threads(2)
    network = new_network().eval()
    network.load_state_dict(load_file(HERE / "2x.safetensors"))
    held_out = drawn(options.count, seed=99)
    if options.sample:
        sample(held_out[:4], network, options.sample)
    print(json.dumps({"drawn": score(held_out, network)}), flush=True)
    print(json.dumps({"painted": score(painted(options.count), network)}))


if __name__ == "__main__":
    main()
