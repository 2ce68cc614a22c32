"""For which model a LoRA is, from its tensors' names and shapes. Pure. Whether its shapes fit is asked at the base.

Names: kohya-ss's sd-scripts (lora_unet_…, lora_te1_…), LyCORIS (hada, lokr, oft), diffusers and peft (unet.…lora_A).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from imagend.architecture import Architecture, ModelKind
from imagend.header import Header, Tensor
from imagend.widths import TURN_DOWN, cross_attention, width_of

LORA = re.compile(
    r"lora_(?:down|up|A|B|mid)\b|lora\.(?:down|up)\.|\.hada_[wt]\d|\.lokr_[wt]\d|\.oft_(?:blocks|diag)|\.boft_|"
    r"\.dora_scale$|^lora_(?:unet|te\d?)_.*\.(?:diff|diff_b|w_norm|b_norm|on_input|weight|alpha)$"
)
_LYCORIS = re.compile(r"\.(?:hada_[wt]\d|lokr_[wt]\d|oft_|boft_|diff|diff_b|w_norm|b_norm|on_input)")
_TRANSFORMERS = re.compile(
    r"^(?:lora_unet|lora_transformer|transformer|diffusion_model|base_model\.model)[._](?:transformer[._])?"
    r"(?:double_blocks|single_blocks|single_transformer_blocks|joint_blocks|transformer_blocks|blocks|layers)[._]"
)
_ONLY_SDXL = re.compile(
    r"^lora_te[12]_|^text_encoder_2\.|transformer_blocks[._]\d*[1-9]\d*[._]"  # SD 1.5 has one transformer block a place
)
_NEVER_SDXL = re.compile(  # its first blocks have no attention
    r"^lora_te_|down_blocks[._]0[._]attentions|up_blocks[._]3[._]|input_blocks[._][12][._]1[._]"
)


def recognise_lora(header: Header) -> Architecture:
    """Raises ValueError: "it is …"."""
    tensors = header.tensors
    if any(_TRANSFORMERS.search(name) for name in tensors):
        raise ValueError(f"a LoRA for a diffusion transformer (Flux, SD 3 and their like): {TURN_DOWN}")
    if any(name.startswith("lora_prior_") for name in tensors):
        raise ValueError(f"a LoRA for Stable Cascade: {TURN_DOWN}")
    cross = cross_attention(tensors)
    if cross in (768, 1024, 1280):
        raise ValueError(f"a LoRA for {width_of(cross)} (cross-attention of {cross}): {TURN_DOWN}")
    base = "sdxl" if cross else _by_structure(tensors) or _by_metadata(header.metadata)
    return Architecture(
        ModelKind.LORA,
        _format(tensors),
        base=base,
        has_text_encoders=any(name.startswith(("lora_te", "text_encoder")) for name in tensors),
        cross_attention_dim=cross,
    )


def _by_structure(tensors: Mapping[str, Tensor]) -> str:
    if any(_ONLY_SDXL.search(name) for name in tensors):
        return "sdxl"
    if any(_NEVER_SDXL.search(name) for name in tensors):
        raise ValueError(f"a LoRA for SD 1.5 or SD 2: {TURN_DOWN}")
    return ""


def _by_metadata(metadata: Mapping[str, str]) -> str:
    """Where the tensors do not tell, as in a LoRA for convolutions only."""
    said = metadata.get("ss_base_model_version", "") or metadata.get("modelspec.architecture", "")
    if re.match(r"sdxl|stable-diffusion-xl", said):
        return "sdxl"
    if said:
        raise ValueError(f"a LoRA for {ascii(said)[1:61].rstrip(chr(39))}, as its metadata says: {TURN_DOWN}")
    return ""


def _format(tensors: Mapping[str, Tensor]) -> str:
    if any(_LYCORIS.search(name) for name in tensors):
        return "lycoris"
    return "kohya" if any(name.startswith(("lora_unet_", "lora_te")) for name in tensors) else "diffusers"
