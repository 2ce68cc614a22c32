"""SDXL with random weights, written from its configs: speed and memory depend on shapes, not on values. No download.

Weights are drawn as torch draws those of a new layer (uniform, within 1 / sqrt(fan in)), norms are 1 and biases 0, so
that half precision paints finite noise. Each tensor is drawn and written by itself: memory stays at a few of them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

Shapes = Mapping[str, Sequence[int]]
Overrides = Mapping[str, Mapping[str, Any]]
"""component → keys of its config.json that shall be otherwise"""

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
SLIM: Overrides = {
    "unet": {"transformer_layers_per_block": [0, 1, 2], "layers_per_block": 1},
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}
"""SDXL's widths with few layers: some 0.7 billion weights, made in seconds, for tests of what needs size"""

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def build(
    configs: Path, folder: Path, dtype: torch.dtype = torch.float16, overrides: Overrides | None = None, seed: int = 0
) -> None:
    """Write a diffusers folder: `configs` (a folder without weights, or whose weights are ignored), and weights."""
    shutil.copytree(configs, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "*.png", "README*"))
    for number, component in enumerate(WEIGHTS, seed * len(WEIGHTS)):
        path = folder / component / "config.json"
        config = json.loads(path.read_text()) | dict((overrides or {}).get(component, {}))
        path.write_text(json.dumps(config, indent=2))
        write(folder / component / WEIGHTS[component], shapes(component, config), dtype, number)


def shapes(component: str, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The names and shapes of a component's weights."""
    with torch.device("meta"):
        model = _model(component, dict(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _model(component: str, config: dict[str, Any]) -> Any:
    match component:
        case "unet":
            return UNet2DConditionModel.from_config(config)
        case "vae":
            return AutoencoderKL.from_config(config)
        case "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config))
        case _:
            return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def write(path: Path, tensors: Shapes, dtype: torch.dtype, seed: int) -> None:
    """A safetensors file of random weights. Format: https://github.com/huggingface/safetensors, "Format"."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()

        def fill(number: int, name: str) -> None:
            drawn = draw(name, tensors[name], dtype, seed * 10_000 + number)  # torch's generator takes 32 bits of it
            data, at = memoryview(drawn.view(torch.uint8).numpy()).cast("B"), header[name]["data_offsets"][0]
            while data:
                count = os.pwrite(file.fileno(), data, 8 + len(text) + at)
                data, at = data[count:], at + count

        list(pool.map(fill, range(len(tensors)), tensors))


def lora(folder: Path, path: Path, rank: int = 16) -> None:
    """A LoRA for all attention of a folder's UNet and text encoders, in kohya's format and names."""
    tensors: dict[str, Sequence[int]] = {}
    for component, prefix, adapted in _ADAPTED:
        config = json.loads((folder / component / "config.json").read_text())
        for name, shape in shapes(component, config).items():
            stem = name.removesuffix(".weight")
            if not re.search(adapted, name):
                continue
            if component == "text_encoder" and not stem.startswith(
                "text_model."
            ):  # transformers dropped it, kohya did not
                stem = f"text_model.{stem}"
            key = f"{prefix}_{stem.replace('.', '_')}"
            tensors |= {f"{key}.alpha": [], f"{key}.lora_down.weight": [rank, shape[1]]}
            tensors[f"{key}.lora_up.weight"] = [shape[0], rank]
    write(path, tensors, torch.float16, 0)


_ADAPTED = (
    ("unet", "lora_unet", r"attn\d\.to_(q|k|v|out\.0)\.weight$"),
    ("text_encoder", "lora_te1", r"self_attn\.(q|k|v|out)_proj\.weight$"),
    ("text_encoder_2", "lora_te2", r"self_attn\.(q|k|v|out)_proj\.weight$"),
)


def ip_adapter(folder: Path, path: Path) -> None:
    """A plain IP-Adapter for a folder's UNet and for image_encoder(), with h94/IP-Adapter's names."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    cross = config["cross_attention_dim"]
    tensors: dict[str, Sequence[int]] = {
        "image_proj.proj.weight": [4 * cross, VIT_H["projection_dim"]],
        "image_proj.proj.bias": [4 * cross],
        "image_proj.norm.weight": [cross],
        "image_proj.norm.bias": [cross],
    }
    with torch.device("meta"):
        unet = _model("unet", config)
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(names):  # odd ones: those between them are of self-attention
        hidden = unet.get_submodule(name).to_q.out_features
        tensors |= {f"ip_adapter.{2 * number + 1}.{one}.weight": [hidden, cross] for one in ("to_k_ip", "to_v_ip")}
    write(path, tensors, torch.float16, 0)


VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
"""CLIP-ViT-H-14, whose embeddings most IP-Adapters for SDXL read"""


def image_encoder(folder: Path, layers: int = 32) -> None:
    """One of its size, as transformers saves it."""
    config = CLIPVisionConfig(**VIT_H | {"num_hidden_layers": layers}, architectures=["CLIPVisionModelWithProjection"])
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    write(folder / "model.safetensors", shapes, torch.float16, 0)


def draw(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One tensor's values, as one row. Contiguous."""
    if len(shape) < 2:
        return torch.full((math.prod(shape),), 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(math.prod(shape), dtype=dtype).uniform_(-bound, bound, generator=generator)
