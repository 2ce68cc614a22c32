"""Weight files made of names and shapes alone: whole to the gate, zero in every element."""

from __future__ import annotations

import math
from pathlib import Path

from fuzz.targets import safetensors

from imagend.header import Header, Tensor

Shapes = dict[str, list[int]]
UNET = "model.diffusion_model."
SDXL: Shapes = {
    f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048],
    f"{UNET}middle_block.1.transformer_blocks.9.norm1.weight": [1280],
    f"{UNET}label_emb.0.0.weight": [1280, 2816],
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [768],
    "conditioner.embedders.1.model.ln_final.weight": [1280],
    "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
}
VAE: Shapes = {"encoder.conv_in.weight": [1, 1, 3, 3], "decoder.conv_in.weight": [1, 4, 3, 3]}
LORA: Shapes = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 2048],
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": [640, 4],
}


def weights(shapes: Shapes, metadata: dict[str, str] | None = None) -> bytes:
    """One byte an element."""
    at = 0
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for name, shape in shapes.items():
        end = at + math.prod(shape)
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, end]}
        at = end
    return safetensors(entries, bytes(at))


def header(shapes: Shapes, metadata: dict[str, str] | None = None) -> Header:
    return Header({name: Tensor("F16", tuple(shape)) for name, shape in shapes.items()}, metadata or {})


def put(root: Path, path: str, shapes: Shapes, metadata: dict[str, str] | None = None) -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(weights(shapes, metadata))
    return target
