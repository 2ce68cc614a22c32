"""Trains an upscaler for shapes-xl's pictures: a Real-ESRGAN "compact" network (SRVGGNetCompact) of twice the size.

It sees drawn pictures of 256x256, shrunk to 128x128, and learns to tell the former from the latter.
No discriminator: there is no texture to invent. What is drawn follows from the seeds. Nothing is written but OUT.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from imagend.worker.network import part_of_spandrel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "diffusers" / "shapes-xl"))

from pictures import sample  # noqa: E402

SCALE, WIDTH, LAYERS = 2, 24, 6
PICTURES, STEPS, BATCH, CROP = 400, 2000, 16, 40
RATE = 2e-3


def drawn(count: int, seed: int) -> np.ndarray:
    """Pictures of 256x256, as the set that shapes-xl was trained on."""
    rng = random.Random(seed)
    return np.stack([np.asarray(sample(rng, (256, 256), hard=number % 2 > 0)[0]) for number in range(count)])


def shrunk(pictures: np.ndarray) -> np.ndarray:
    """To half their size, by Lanczos."""
    height, width = pictures.shape[1] // SCALE, pictures.shape[2] // SCALE
    small = [Image.fromarray(one).resize((width, height), Image.Resampling.LANCZOS) for one in pictures]
    return np.stack([np.asarray(one) for one in small])


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def new_network() -> torch.nn.Module:
    network: torch.nn.Module = part_of_spandrel("architectures.Compact.__arch.SRVGG").SRVGGNetCompact(
        num_feat=WIDTH, num_conv=LAYERS, upscale=SCALE
    )
    return network


def train(out: Path, steps: int) -> None:
    started = time.monotonic()
    torch.manual_seed(0)
    network = new_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    large = drawn(PICTURES, seed=21)
    small, large = as_tensor(shrunk(large)), as_tensor(large)
    places = where_something_is(small)
    for step in range(steps):
        chosen = places[torch.randint(len(places), (BATCH,))].tolist()
        low = torch.stack([small[n, :, y : y + CROP, x : x + CROP] for n, y, x in chosen])
        high = torch.stack(
            [large[n, :, y * SCALE : (y + CROP) * SCALE, x * SCALE : (x + CROP) * SCALE] for n, y, x in chosen]
        )
        loss = F.l1_loss(network(low), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5} of {steps}  loss {loss.item():.5f}  {time.monotonic() - started:.0f} s", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, out)


def where_something_is(pictures: torch.Tensor) -> torch.Tensor:
    """Corners (picture, top, left) of crops whose middle is near an edge: most of a picture is flat."""
    edges = F.max_pool2d((pictures - F.avg_pool2d(pictures, 3, 1, 1)).abs().amax(1, keepdim=True), 9, 1, 4) > 0.1
    middles = edges[:, 0, CROP // 2 : -CROP // 2 + 1, CROP // 2 : -CROP // 2 + 1]
    return middles.nonzero()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "2x.safetensors", help="file for the network")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default {STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.steps)


if __name__ == "__main__":
    main()
