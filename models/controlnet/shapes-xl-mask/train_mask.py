"""Trains a ControlNet for shapes-xl on masks: white where the thing shall be, black elsewhere.

In pieces, each of which goes on where the last one ended, bit for bit as one run would: what is drawn in a step follows
from its number. Nothing is written but OUT (the model, half precision) and STATE (what the next piece begins with).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

BASE = Path(__file__).resolve().parents[2] / "diffusers" / "shapes-xl"
sys.path.insert(0, str(BASE))

from networks import NOISE, PromptEncoder  # noqa: E402
from phases import Progress, descend, noised, say, set_learning_rate, swap  # noqa: E402
from pictures import dataset  # noqa: E402
from score import VISIBLE  # noqa: E402
from train import as_tensor, encode_all  # noqa: E402

PICTURES, STEPS, BATCH = 2500, 1500, 16
RATE = 1e-3
# Without a prompt only the mask says where and what: that makes the network look at it.
WITHOUT_PROMPT = 0.3
# The usual (16, 32, 96, 256) are for photographs.
MASK_CHANNELS = (8, 16, 32, 64)


def mask_of(picture: np.ndarray) -> np.ndarray:
    """White where a drawn picture differs from its background, as its corner shows it; one more axis of 3."""
    distance = np.abs(picture.astype(int) - picture[..., :1, :1, :]).sum(-1)
    return np.repeat(np.where(distance > VISIBLE, 255, 0).astype(np.uint8)[..., None], 3, -1)


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A copy of the UNet's first half. What embeds the mask does not end in zeros, as is usual, but small: the zero
    convolutions behind suffice to begin as the base alone, and from two zeros in a row it learned nothing in minutes.
    """
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=MASK_CHANNELS)
    torch.nn.init.kaiming_normal_(controlnet.controlnet_cond_embedding.conv_out.weight)
    return controlnet


def train(out: Path, state: Path, steps: int, seconds: float) -> None:
    """Up to `steps` in all, and no longer than `seconds`."""
    started = time.monotonic()
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(BASE / "vae").float()
    encoder = PromptEncoder(BASE)
    encoder.load(BASE)
    encoder.requires_grad_(False)
    torch.manual_seed(0)
    controlnet = new_controlnet(unet)
    parameters = list(controlnet.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, betas=(0.9, 0.99))
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        first, average = kept["step"], kept["average"]
        controlnet.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
    images, captions = dataset(PICTURES, seed=11)
    latents = encode_all(vae, as_tensor(images)) * vae.config.scaling_factor
    masks = as_tensor(mask_of(images))
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    report = Progress("controlnet", steps)
    step = first
    while step < steps and time.monotonic() - started < seconds:
        torch.manual_seed(1000 + step)
        set_learning_rate(optimizer, (RATE,), step, steps, warm_up=50, flat=0.5)
        chosen = torch.randint(0, PICTURES, (BATCH,))
        dropped = torch.rand(BATCH) < WITHOUT_PROMPT
        prompts = ["" if drop else captions[i] for i, drop in zip(chosen.tolist(), dropped, strict=True)]
        error, weight = losses(unet, controlnet, encoder(prompts), latents[chosen], masks[chosen], alphas)
        descend((error * weight).mean(), optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.995, (2 + step) / (11 + step)))
        report(step, error.mean())
        step += 1
    state.parent.mkdir(parents=True, exist_ok=True)
    kept = {"weights": controlnet.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **kept}, state)
    swap(parameters, average)
    controlnet.register_to_config(_name_or_path="")  # else a path of this machine
    controlnet.half().save_pretrained(out)
    say(f"controlnet: {step} of {steps} steps, {time.monotonic() - started:.0f} s for the last {step - first}")


def losses(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    texts: tuple[Tensor, Tensor],
    latents: Tensor,
    masks: Tensor,
    alphas: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of the noise predicted under control, picture by picture, and their weights."""
    hidden, pooled = texts
    noisy, noise, t, weight = noised(latents, alphas, offset=0.25, power=0.6)
    time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128]).expand(len(latents), 6)
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    down, middle = controlnet(noisy, t, hidden, masks.float() / 255, added_cond_kwargs=conditions, return_dict=False)
    predicted = unet(
        noisy,
        t,
        hidden,
        added_cond_kwargs=conditions,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    return F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)), weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the ControlNet; made if absent")
    parser.add_argument("--state", type=Path, required=True, help="file to go on from and to write; made if absent")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps in all (default {STEPS})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end this piece after so long")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.state, options.steps, options.seconds)


if __name__ == "__main__":
    main()
