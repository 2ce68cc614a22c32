"""Trains an image encoder and an IP-Adapter for shapes-xl: paint what the reference shows.

Both at once, by the base's own task: its pictures without noise, told by a picture and, half of the time, a prompt. In
pieces, each of which goes on where the last one ended. Nothing is written but OUT (shapes-xl-eye/ and
shapes-xl-reference.safetensors, half precision) and STATE (what the next piece begins with).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

BASE = Path(__file__).resolve().parents[2] / "diffusers" / "shapes-xl"
sys.path.insert(0, str(BASE))

from networks import NOISE, PromptEncoder  # noqa: E402
from phases import Progress, descend, noised, say, set_learning_rate, swap  # noqa: E402
from pictures import dataset  # noqa: E402
from train import as_tensor, encode_all  # noqa: E402

PICTURES, STEPS, BATCH = 2500, 1500, 16
RATE = 1e-3
SIDE, TOKENS, PROJECTED = 64, 4, 64
WITHOUT_PROMPT, WITHOUT_PICTURE = 0.5, 0.1
EYE, ADAPTER = "shapes-xl-eye", "shapes-xl-reference.safetensors"


def new_eye() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
            projection_dim=PROJECTED,
        )
    )


def attend(unet: UNet2DConditionModel) -> list[str]:
    """Give the UNet an untrained adapter, whose keys and values are the prompt's, as in the paper; the names of its
    attention processors, in diffusers' order."""
    cross = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    weights = {}
    for number, name in enumerate(names):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        weights[f"{2 * number + 1}.to_k_ip.weight"] = attention.to_k.weight.detach().clone()
        weights[f"{2 * number + 1}.to_v_ip.weight"] = attention.to_v.weight.detach().clone()
    projection = {
        "proj.weight": torch.randn(TOKENS * cross, PROJECTED) / PROJECTED**0.5,
        "proj.bias": torch.zeros(TOKENS * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)
    return names


def as_seen(pictures: Tensor) -> Tensor:
    """As CLIP's image processor shows them: of SIDE x SIDE pixels, normalised. Half of them mirrored, each moved a bit:
    a reference is not a template."""
    pixels = F.interpolate(pictures.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    shift = torch.randint(-6, 7, (2,)).tolist()
    pixels = F.pad(pixels, (6, 6, 6, 6), mode="replicate")
    pixels = pixels[..., 6 + shift[0] : 6 + shift[0] + SIDE, 6 + shift[1] : 6 + shift[1] + SIDE]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def train(out: Path, state: Path, steps: int, seconds: float) -> None:
    """Up to `steps` in all, and no longer than `seconds`."""
    started = time.monotonic()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(BASE / "vae").float()
    encoder = PromptEncoder(BASE)
    encoder.load(BASE)
    encoder.requires_grad_(False)
    names, eye = attend(unet), new_eye()
    trained = torch.nn.ModuleList([eye, unet.encoder_hid_proj, *(unet.attn_processors[name] for name in names)])
    parameters = [one.requires_grad_() for one in trained.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, betas=(0.9, 0.99))
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        first, average = kept["step"], kept["average"]
        trained.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
    images, captions = dataset(PICTURES, seed=11)
    pictures = as_tensor(images)
    latents = encode_all(vae, pictures) * vae.config.scaling_factor
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    report = Progress("ip-adapter", steps)
    step = first
    while step < steps and time.monotonic() - started < seconds:
        torch.manual_seed(1000 + step)
        set_learning_rate(optimizer, (RATE,), step, steps, warm_up=50, flat=0.5)
        chosen = torch.randint(0, PICTURES, (BATCH,))
        dropped = torch.rand(BATCH) < WITHOUT_PROMPT
        prompts = ["" if drop else captions[i] for i, drop in zip(chosen.tolist(), dropped, strict=True)]
        seen = eye(as_seen(pictures[chosen])).image_embeds
        seen = torch.where(torch.rand(BATCH, 1) < WITHOUT_PICTURE, torch.zeros_like(seen), seen)
        error, weight = losses(unet, encoder(prompts), latents[chosen], seen, alphas)
        descend((error * weight).mean(), optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.995, (2 + step) / (11 + step)))
        report(step, error.mean())
        step += 1
    state.parent.mkdir(parents=True, exist_ok=True)
    kept = {"weights": trained.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **kept}, state)
    swap(parameters, average)
    write(out, eye, unet, names)
    say(f"ip-adapter: {step} of {steps} steps, {time.monotonic() - started:.0f} s for the last {step - first}")


def losses(
    unet: UNet2DConditionModel, texts: tuple[Tensor, Tensor], latents: Tensor, seen: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the noise predicted with references, picture by picture, and their weights."""
    hidden, pooled = texts
    noisy, noise, t, weight = noised(latents, alphas, offset=0.25, power=0.6)
    time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128]).expand(len(latents), 6)
    conditions = {"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [seen[:, None]]}
    predicted = unet(noisy, t, hidden, added_cond_kwargs=conditions).sample
    return F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)), weight


def write(out: Path, eye: CLIPVisionModelWithProjection, unet: UNet2DConditionModel, names: list[str]) -> None:
    """As h94/IP-Adapter has them."""
    eye.half().save_pretrained(out / EYE)
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    tensors = {
        "image_proj.proj.weight": projection.image_embeds.weight,
        "image_proj.proj.bias": projection.image_embeds.bias,
        "image_proj.norm.weight": projection.norm.weight,
        "image_proj.norm.bias": projection.norm.bias,
    }
    for number, name in enumerate(names):
        processor = unet.attn_processors[name]
        tensors[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        tensors[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, out / ADAPTER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for both; made if absent")
    parser.add_argument("--state", type=Path, required=True, help="file to go on from and to write; made if absent")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps in all (default {STEPS})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end this piece after so long")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.state, options.steps, options.seconds)


if __name__ == "__main__":
    main()
