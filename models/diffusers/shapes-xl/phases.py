"""The loop that trains the UNet and both text encoders on latents of one or of many sizes; train.py says on which."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from networks import NOISE, PromptEncoder
from pictures import Size
from prose import surrounded
from torch import Tensor, nn

BATCH = 24
KEEP_EVERY = 300
# How often a batch's prompts are cut into so many chunks.
CHUNKS = {1: 72, 2: 14, 3: 7, 4: 4, 6: 3}


@dataclass(frozen=True)
class Phase:
    """A stretch of UNet training: how fast it learns, and what noise it sees.

    A noise step is drawn as 1000 * u ** power with u uniform: below 1, noisy steps are drawn more often.
    """

    name: str
    steps: int
    rates: tuple[float, float]  # of the UNet and of the text encoders
    warm_up: int
    flat: float
    offset_noise: float
    power: float
    mixed: bool = False  # all sizes, and long prompts too


@dataclass(frozen=True)
class Pool:
    """Pictures of one size, as latents, and how often a batch is drawn from it."""

    size: Size
    latents: Tensor
    captions: list[str]
    weight: int = 1

    @property
    def relative_size(self) -> float:
        return self.size[0] * self.size[1] / 128**2


def train_phase(
    phase: Phase, steps: int, unet: nn.Module, encoder: PromptEncoder, pools: list[Pool], keep: Callable[[int], None]
) -> None:
    """Predict the noise; the averaged (EMA) weights stay in both networks. `keep` is called with those, too."""
    rng = random.Random(0)
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    text_parameters, parameters = list(encoder.parameters()), [*unet.parameters(), *encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    groups = [{"params": list(unet.parameters())}, {"params": text_parameters}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.99))
    report = Progress(phase.name, steps)
    for step in range(steps):
        set_learning_rate(optimizer, phase.rates, step, steps, warm_up=phase.warm_up, flat=phase.flat)
        (pool,) = rng.choices(pools, [pool.weight for pool in pools])
        (chunks,) = rng.choices(list(CHUNKS), list(CHUNKS.values())) if phase.mixed else (1,)
        # So many that a step costs about the same, whatever the size.
        batch = max(4, min(40, round(BATCH / pool.relative_size / (1 + 0.1 * (chunks - 1)))))
        chosen = torch.randint(0, len(pool.latents), (batch,))
        prompts = [pool.captions[i] for i in chosen.tolist()]
        if phase.mixed:
            prompts = [lengthened(rng, prompt, chunks) for prompt in prompts]
        hidden, pooled = dropped(encoder, prompts, chunks, nicely=rng.random() < 0.7)
        # More pixels need more noise to drown the same thing.
        power = phase.power / pool.relative_size**0.25
        noisy, noise, t, weight = noised(pool.latents[chosen], alphas, phase.offset_noise, power)
        width, height = pool.size
        time_ids = torch.tensor([height, width, 0, 0, height, width]).float().expand(batch, 6)  # original, crop, target
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = unet(noisy, t, hidden, added_cond_kwargs=conditions).sample
        error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        descend((error * weight).mean(), optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.998, (2 + step) / (11 + step)))
        report(step, error.mean())
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
            swap(parameters, average)
            keep(step + 1)
            swap(parameters, average)
    swap(parameters, average)


@torch.no_grad()
def swap(parameters: list[nn.Parameter], others: list[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        mine = parameter.clone()
        parameter.copy_(other)
        other.copy_(mine)


def lengthened(rng: random.Random, prompt: str, chunks: int) -> str:
    """Filler about the prompt, to fill about so many chunks; often none for one chunk, now and then for more."""
    if rng.random() < (0.85 if chunks == 1 else 0.1):
        return prompt
    words = 24 * (chunks - 1) + rng.randint(4, 18)  # three tokens a word
    return surrounded(rng, prompt, words)


def dropped(encoder: PromptEncoder, prompts: list[str], chunks: int, nicely: bool) -> tuple[Tensor, Tensor]:
    """Embed, some prompts as empty, some as zeros: guidance compares with the one or the other, by who calls."""
    fate = torch.rand(len(prompts))
    prompts = ["" if f < 0.05 else p for p, f in zip(prompts, fate.tolist(), strict=True)]
    hidden, pooled = encoder(prompts, chunks, nicely)
    keep = 1 - ((fate >= 0.05) & (fate < 0.12)).float()
    return hidden * keep[:, None, None], pooled * keep[:, None]


def noised(latents: Tensor, alphas: Tensor, offset: float, power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, their noise with an offset per channel, the noise steps, and half plain, half min-SNR weights."""
    count = len(latents)
    noise = torch.randn_like(latents) + offset * torch.randn(count, 4, 1, 1)
    t = (1000 * torch.rand(count) ** power).long().clamp(0, 999)
    alpha = alphas[t].view(count, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    snr = (alpha / (1 - alpha)).flatten()
    return noisy, noise, t, 0.5 + 0.5 * snr.clamp(max=5) / snr


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
