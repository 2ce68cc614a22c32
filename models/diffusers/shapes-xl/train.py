"""Trains shapes-xl from nothing: tokenizers, VAE, UNet with both text encoders in two phases, half-precision export.

Seeded and counted in steps. Nothing is read but this folder, nothing is written but OUT. Smoke run: --scale 0.005.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from networks import NOISE, PromptEncoder, initialise_as_block_mean, new_unet, new_vae, train_tokenizers
from pictures import dataset
from torch import Tensor, nn

SEED = 0
VAE_PICTURES, UNET_PICTURES = 6000, 8000
BATCH = 24


@dataclass(frozen=True)
class Phase:
    """A stretch of UNet training: how fast it learns, and what noise it sees.

    A noise step is drawn as 1000 * u ** power with u uniform: below 1, noisy steps are drawn more often.
    """

    name: str
    steps: int
    warm_up: int
    flat: float
    offset_noise: float
    power: float


VAE_STEPS = 2393
# The first phase learns colour and place but leaves backgrounds grey: the mean of a picture leaks through SDXL's
# noise schedule. Offset noise and more noisy steps, in the second, cure that and bring the shapes.
PHASES = (
    Phase("unet 1", 1000, warm_up=100, flat=0.4, offset_noise=0.05, power=1.0),
    Phase("unet 2", 2018, warm_up=40, flat=0.3, offset_noise=0.25, power=0.7),
)


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


def train_phase(phase: Phase, unet: nn.Module, encoder: PromptEncoder, latents: Tensor, captions: list[str]) -> None:
    """Predict the noise; the averaged (EMA) weights stay in both networks."""
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    text_parameters, parameters = list(encoder.parameters()), [*unet.parameters(), *encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    groups = [{"params": list(unet.parameters())}, {"params": text_parameters}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.99))
    time_ids = torch.tensor([128, 128, 0, 0, 128, 128.0]).expand(BATCH, 6)  # original size, crop, target size
    report = Progress(phase.name, phase.steps)
    for step in range(phase.steps):
        set_learning_rate(optimizer, (1.2e-3, 6e-4), step, phase.steps, warm_up=phase.warm_up, flat=phase.flat)
        chosen = torch.randint(0, len(latents), (BATCH,))
        hidden, pooled = dropped(encoder, [captions[i] for i in chosen.tolist()])
        noisy, noise, t, weight = noised(latents[chosen], alphas, phase)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = unet(noisy, t, hidden, added_cond_kwargs=conditions).sample
        error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        descend((error * weight).mean(), optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.998, (2 + step) / (11 + step)))
        report(step, error.mean())
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def dropped(encoder: PromptEncoder, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embed, some prompts as empty, some as zeros: guidance compares with the one or the other, by who calls."""
    fate = torch.rand(len(prompts))
    hidden, pooled = encoder(["" if f < 0.05 else p for p, f in zip(prompts, fate.tolist(), strict=True)])
    keep = 1 - ((fate >= 0.05) & (fate < 0.12)).float()
    return hidden * keep[:, None, None], pooled * keep[:, None]


def noised(latents: Tensor, alphas: Tensor, phase: Phase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, their noise with an offset per channel, the noise steps, and half plain, half min-SNR weights."""
    count = len(latents)
    noise = torch.randn_like(latents) + phase.offset_noise * torch.randn(count, 4, 1, 1)
    t = (1000 * torch.rand(count) ** phase.power).long().clamp(0, 999)
    alpha = alphas[t].view(count, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    snr = (alpha / (1 - alpha)).flatten()
    return noisy, noise, t, 0.5 + 0.5 * snr.clamp(max=5) / snr


def train(out: Path, scale: float) -> None:
    """All stages; from save_pretrained on, the model is there."""

    def scaled(number: int, least: int = 2) -> int:
        return max(least, round(number * scale))

    out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(scaled(VAE_STEPS), min(VAE_PICTURES, scaled(VAE_PICTURES, 500)))
    images, captions = dataset(min(UNET_PICTURES, scaled(UNET_PICTURES, 100)), seed=7)
    latents = encode_all(vae, as_tensor(images)) * vae.config.scaling_factor
    train_tokenizers(out, captions[:4000])
    torch.manual_seed(SEED)
    encoder, unet = PromptEncoder(out), new_unet()
    for phase in PHASES:
        train_phase(replace(phase, steps=scaled(phase.steps)), unet, encoder, latents, captions)
    StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=encoder.one.half(),
        text_encoder_2=encoder.two.half(),
        tokenizer=encoder.tokenizers[0],
        tokenizer_2=encoder.tokenizers[1],
        unet=unet.half(),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(out)


def say(text: str) -> None:
    print(text, flush=True)


class Progress:
    """Prints a stage's mean figure every so often."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.every = stage, steps, max(1, min(100, steps // 4))
        self.started = time.monotonic()
        self.recent: list[float] = []

    def __call__(self, step: int, figure: Tensor) -> None:
        self.recent.append(float(figure.detach()))
        if (step + 1) % self.every == 0:
            mean = sum(self.recent) / len(self.recent)
            say(f"{self.stage}: step {step + 1}/{self.steps} {time.monotonic() - self.started:.0f} s loss {mean:.4f}")
            self.recent.clear()


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peaks: tuple[float, ...], step: int, steps: int, *, warm_up: int, flat: float
) -> None:
    """Warm up, hold for the share `flat` of the run, then fall in a line to 2 %; a peak for each parameter group."""
    done = step / steps
    share = min(1.0, (step + 1) / warm_up) * (1.0 if done < flat else max(0.02, (1 - done) / (1 - flat)))
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """One optimizer step, with the gradient's length limited to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.scale)


if __name__ == "__main__":
    main()
