"""Which Stable Diffusion a weight file is for, by the width of the text that its cross-attention reads. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from imagend.header import Tensor

TURN_DOWN = "imagend paints with SDXL"
UNION = "a ControlNet of many types in one (Union), which imagend has not: get one for one type"
_BY_WIDTH = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}
_READS_TEXT = re.compile(r"attn2[._](?:processor[._])?to_[kv](?:_lora)?[._]")


def width_of(cross_attention_dim: int) -> str:
    return _BY_WIDTH.get(cross_attention_dim, "unknown")


def cross_attention(tensors: Mapping[str, Tensor]) -> int:
    """The input width of the first projection that reads the text, of a network or of a LoRA on it; 0 if none does.

    Of a LoRA's two matrices it is the `down` (A) one that has it; of LyCORIS' Hadamard pairs the `b` ones.
    """
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or not _READS_TEXT.search(name):
            continue
        if name.endswith((".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight")):
            return tensor.shape[1]
        if name.endswith((".hada_w1_b", ".hada_w2_b", ".diff", "to_k.weight", "to_v.weight")):
            return tensor.shape[1]
    return 0
