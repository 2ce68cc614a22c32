"""What the tests of LoRAs share: small ones for the embedded model, trained or random, in two formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
STEPS, RATE, BATCH = 40, 1e-3, 4


def layers(pipe: Any, part: str, kinds: tuple[type, ...] = (torch.nn.Linear,)) -> Iterator[tuple[str, Any]]:
    """The layers of a part that LoRAs are made for, by path."""
    for path, module in getattr(pipe, part).named_modules():
        wanted = "attn" in path or isinstance(module, torch.nn.Conv2d) if part == "unet" else ".layers." in f".{path}"
        if wanted and isinstance(module, kinds):
            yield path, module


def random(pipe: Any, seed: int, *parts: str, rank: int = 4, scale: float = 0.2, conv: bool = False) -> Tensors:
    """In diffusers' format, without alphas."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if conv else (torch.nn.Linear,)
    tensors = {}
    for part in parts or ("unet",):
        for path, module in layers(pipe, part, kinds):
            out, inside, *kernel = module.weight.shape
            down, up = (rank, inside, *kernel), (out, rank, *(1 for _ in kernel))
            tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(down, generator=generator) * scale
            tensors[f"{part}.{path}.lora_B.weight"] = torch.randn(up, generator=generator) * scale
    return tensors


def kohya(tensors: Tensors, pipe: Any, alpha: float | dict[str, float] | None = None) -> Tensors:
    """The same in kohya's names. `alpha`: of all layers, or of those whose path ends so."""
    heads = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    found = {}
    for name, tensor in tensors.items():
        part, _, path = name.partition(".")
        path, _, piece = path.partition(".lora_")
        head = heads[part] + path.removeprefix("text_model.").replace(".", "_")
        found[f"{head}.lora_{'down' if piece[0] == 'A' else 'up'}.weight"] = tensor
        own = alpha if not isinstance(alpha, dict) else next((v for k, v in alpha.items() if path.endswith(k)), None)
        if own is not None:
            found[f"{head}.alpha"] = torch.tensor(own)
    return found


def save(tensors: Tensors, path: Path, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def trained(pipe: Any, picture: torch.Tensor, prompt: str) -> Tensors:
    """Trained for some seconds until every prompt gives one picture: (1, 3, height, width), -1 to 1."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=[*ATTENTION, "conv1", "conv2"])
    pipe.unet.add_adapter(config)
    weights = [weight for weight in pipe.unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompt)
        latents = pipe.vae.encode(picture).latent_dist.mode() * pipe.vae.config.scaling_factor
    size = picture.shape[-1]
    times = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    sigmas = pipe.scheduler.alphas_cumprod
    for _ in range(STEPS):
        step = torch.randint(200, 1000, (BATCH,))
        noise = torch.randn(BATCH, *latents.shape[1:])
        alpha = sigmas[step].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        conditions = {"text_embeds": pooled.repeat(BATCH, 1), "time_ids": times.repeat(BATCH, 1)}
        found = pipe.unet(noisy, step, embeds.repeat(BATCH, 1, 1), added_cond_kwargs=conditions).sample
        loss = torch.nn.functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {f"unet.{name}": value.detach().clone() for name, value in get_peft_model_state_dict(pipe.unet).items()}
    pipe.unload_lora_weights()
    return tensors
