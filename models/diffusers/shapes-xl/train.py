"""Trains shapes-xl from nothing: tokenizers, VAE, UNet with both text encoders in three phases, half-precision export.

Seeded and counted in steps. Nothing is read but this folder (and --from), nothing written but OUT, where the model lies
after every 300 steps of a phase. Smoke run: --scale 0.005.
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from networks import NOISE, PromptEncoder, initialise_as_block_mean, new_unet, new_vae, train_tokenizers
from phases import Phase, Pool, Progress, descend, say, set_learning_rate, train_phase
from pictures import Size, dataset
from torch import Tensor

SEED = 0
VAE_PICTURES, UNET_PICTURES = 6000, 8000
VAE_STEPS = 2393
# The first phase learns colour and place but leaves backgrounds grey: the mean of a picture leaks through SDXL's
# noise schedule. Offset noise and more noisy steps, in the second, cure that and bring the shapes.
# The third brings other sizes and longer prompts, and more of what is hard: small things and two of them.
PHASES = (
    Phase("phase1", 1000, (1.2e-3, 6e-4), warm_up=100, flat=0.4, offset_noise=0.05, power=1.0),
    Phase("phase2", 2018, (1.2e-3, 6e-4), warm_up=40, flat=0.3, offset_noise=0.25, power=0.7),
    Phase("phase3", 1700, (7e-4, 3.5e-4), warm_up=40, flat=0.4, offset_noise=0.25, power=0.7, mixed=True),
)
STAGES = ("vae", *(phase.name for phase in PHASES))
# Of the third phase, (width, height): how many pictures, and how often a batch is of that size.
SIZES: dict[Size, tuple[int, int]] = {
    (128, 128): (6000, 48),
    (64, 64): (3000, 9),
    (96, 96): (2500, 9),
    (160, 160): (1200, 6),
    (192, 192): (1200, 10),
    (256, 256): (1000, 10),
    (192, 128): (600, 2),
    (128, 192): (600, 2),
    (160, 96): (600, 2),
    (96, 160): (600, 2),
}


def train_vae(steps: int, count: int) -> AutoencoderKL:
    """Train by L1 and L2; bfloat16 and channels_last are faster for these convolutions, though not for the UNet's."""
    torch.manual_seed(SEED)
    pixels = as_tensor(dataset(count, seed=1)[0])
    vae = new_vae()
    initialise_as_block_mean(vae)
    vae = vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    report = Progress("vae", steps)
    for step in range(steps):
        set_learning_rate(optimizer, (1.5e-3,), step, steps, warm_up=50, flat=0.3)
        x = unit_range(pixels[torch.randint(0, count, (8,))]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample
        error = y.float() - x
        loss = error.abs().mean() + error.square().mean() + 1e-3 * z.float().square().mean()
        descend(loss, optimizer, parameters)
        report(step, error.square().mean())
    return finish_vae(vae.eval().to(memory_format=torch.contiguous_format), pixels[:500])


@torch.no_grad()
def finish_vae(vae: AutoencoderKL, pixels: Tensor) -> AutoencoderKL:
    """Set the scaling factor, and silence the variance, which was never trained: sampling then equals the mean."""
    z = encode_all(vae, pixels)
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -8
    error = vae.decode(z[:64]).sample.clamp(-1, 1) - unit_range(pixels[:64])
    psnr = -10 * torch.log10(error.square().mean() / 4)
    say(f"vae: PSNR {psnr:.1f} dB, scaling factor {vae.config.scaling_factor:.4f}")
    return vae


def train(out: Path, scale: float, start: str, source: Path | None) -> None:
    """The stages from `start` on; what comes before is read from `source`. After each phase the model is in `out`."""

    def scaled(number: int, least: int = 2) -> int:
        return max(least, round(number * scale))

    out.mkdir(parents=True, exist_ok=True)
    if source is None:
        vae = train_vae(scaled(VAE_STEPS), scaled(VAE_PICTURES, 500))
        train_tokenizers(out, dataset(4000, seed=7)[1])
        source = out
    else:
        vae = AutoencoderKL.from_pretrained(source / "vae").float()
    torch.manual_seed(SEED)
    encoder, unet = PromptEncoder(source), new_unet()
    if start not in STAGES[:2]:
        encoder.load(source)
        unet = UNet2DConditionModel.from_pretrained(source / "unet").float()
    for phase in PHASES[max(0, STAGES.index(start) - 1) :]:
        sizes = SIZES if phase.mixed else {(128, 128): (UNET_PICTURES, 1)}
        pools = [encoded(vae, size, scaled(n, 100), w, hard=phase.mixed) for size, (n, w) in sizes.items()]

        def keep(step: int, name: str = phase.name) -> None:
            say(f"{name}: kept after step {step}")
            export(out, vae, encoder, unet)

        torch.manual_seed(SEED + 1)
        train_phase(phase, scaled(phase.steps), unet, encoder, pools, keep)


def encoded(vae: AutoencoderKL, size: Size, count: int, weight: int, hard: bool) -> Pool:
    """Draw pictures and encode them."""
    images, captions = dataset(count, 1000 * size[0] + size[1] if hard else 7, size, hard)
    batch = max(2, round(20 * 128**2 / (size[0] * size[1])))
    return Pool(size, encode_all(vae, as_tensor(images), batch) * vae.config.scaling_factor, captions, weight)


def export(out: Path, vae: AutoencoderKL, encoder: PromptEncoder, unet: UNet2DConditionModel) -> None:
    """Save in half precision; what was given stays as it is."""
    half = [copy.deepcopy(part).half() for part in (vae, encoder.one, encoder.two, unet)]
    for part in (half[0], half[3]):
        part.register_to_config(_name_or_path="")  # else a path of this machine
    StableDiffusionXLPipeline(
        vae=half[0],
        text_encoder=half[1],
        text_encoder_2=half[2],
        tokenizer=encoder.tokenizers[0],
        tokenizer_2=encoder.tokenizers[1],
        unet=half[3],
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(out)


def as_tensor(images: object) -> Tensor:
    return torch.as_tensor(images).permute(0, 3, 1, 2)


def unit_range(pixels: Tensor) -> Tensor:
    return pixels.float().div(127.5).sub(1)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: Tensor, batch: int = 20) -> Tensor:
    """The means of bytes' latents, not yet scaled."""
    return torch.cat([vae.encode(unit_range(part)).latent_dist.mean for part in pixels.split(batch)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline; made if absent")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the step counts; for trying out (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--start", choices=STAGES, default=STAGES[0], help="first stage to run (default: all of them)")
    parser.add_argument("--from", dest="source", type=Path, help="model with the weights of the stages before --start")
    options = parser.parse_args()
    if (options.start != STAGES[0]) != (options.source is not None):
        parser.error("--start and --from belong together")
    torch.set_num_threads(options.threads)
    train(options.out, options.scale, options.start, options.source)


if __name__ == "__main__":
    main()
