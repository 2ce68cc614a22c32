"""Small random IP-Adapters for the embedded model's UNet, and an image encoder. The same each time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from siblings import EMBEDDED
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

HIDDEN, PROJECTED = 48, 40
_TOKENS, _DEPTH, _INNER = 4, 4, 64


def encoder(path: Path, seed: int = 5, projected: int = PROJECTED) -> Path:
    """A folder as transformers saves it."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=projected,
    )
    CLIPVisionModelWithProjection(config).eval().save_pretrained(path)
    return path


def adapter(path: Path, form: str = "plain", seed: int = 6, width: int = 0) -> Path:
    """One file, as h94/IP-Adapter has them. `width`: of the embeddings it reads."""
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((EMBEDDED / "unet" / "config.json").read_text())
    cross = config["cross_attention_dim"]

    def random(*shape: int, by: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * by

    tensors = _plain(random, cross, width or PROJECTED) if form == "plain" else _plus(random, cross, width or HIDDEN)
    for number, hidden in enumerate(_hidden_sizes()):
        for name in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{name}.weight"] = random(hidden, cross)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _hidden_sizes() -> list[int]:
    """Of each cross-attention, in diffusers' order."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(EMBEDDED / "unet"))
    return [
        unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]


def _plain(random: object, cross: int, width: int) -> dict[str, torch.Tensor]:
    assert callable(random)
    return {
        "image_proj.proj.weight": random(_TOKENS * cross, width),
        "image_proj.proj.bias": random(_TOKENS * cross),
        "image_proj.norm.weight": 1 + random(cross),
        "image_proj.norm.bias": random(cross),
    }


def _plus(random: object, cross: int, width: int) -> dict[str, torch.Tensor]:
    assert callable(random)
    tensors = {
        "image_proj.latents": random(1, _TOKENS, _INNER),
        "image_proj.proj_in.weight": random(_INNER, width),
        "image_proj.proj_in.bias": random(_INNER),
        "image_proj.proj_out.weight": random(cross, _INNER),
        "image_proj.proj_out.bias": random(cross),
        "image_proj.norm_out.weight": 1 + random(cross),
        "image_proj.norm_out.bias": random(cross),
    }
    for layer in range(_DEPTH):
        start = f"image_proj.layers.{layer}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            tensors |= {f"{start}.{norm}.weight": 1 + random(_INNER), f"{start}.{norm}.bias": random(_INNER)}
        tensors |= {
            f"{start}.0.to_q.weight": random(64, _INNER),
            f"{start}.0.to_kv.weight": random(128, _INNER),
            f"{start}.0.to_out.weight": random(_INNER, 64),
            f"{start}.1.1.weight": random(4 * _INNER, _INNER),
            f"{start}.1.3.weight": random(_INNER, 4 * _INNER),
        }
    return tensors
