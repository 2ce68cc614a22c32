"""A trained adapter as files: in diffusers' format, and as kohya-ss and the programs after it name it.

Written here and not by safetensors, which orders metadata as it likes: the same adapter gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from imagend.train_spec import Train
from imagend.worker.trainee import OF_TEXT_ENCODERS

Parts = Mapping[str, Mapping[str, torch.Tensor]]
"""Trainee.tensors()"""
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HEADS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def diffusers_file(parts: Parts, spec: Train, dtype: torch.dtype, told: Mapping[str, str]) -> bytes:
    """PART.PATH.lora_A.weight; alpha stands in the metadata, where diffusers looks for it."""
    tensors = {f"{part}.{_path(part, name)}": one for part, pieces in parts.items() for name, one in pieces.items()}
    config: dict[str, Any] = {}
    for part in parts:
        targets = sorted(spec.targets if part == "unet" else OF_TEXT_ENCODERS)
        own = {"r": spec.rank, "lora_alpha": _alpha(spec), "target_modules": targets}
        config |= {f"{part}.{key}": value for key, value in own.items()}
    return serialize(tensors, dtype, {**told, "lora_adapter_metadata": json.dumps(config, sort_keys=True)})


def kohya_file(parts: Parts, spec: Train, dtype: torch.dtype, told: Mapping[str, str]) -> bytes:
    """lora_unet_PATH.lora_down.weight, with an alpha for each layer."""
    tensors = {}
    for part, pieces in parts.items():
        for name, one in pieces.items():
            path, _, piece = _path(part, name).partition(".lora_")
            layer = _HEADS[part] + path.replace(".", "_")
            tensors[f"{layer}.lora_{'down' if piece[0] == 'A' else 'up'}.weight"] = one
            tensors[f"{layer}.alpha"] = torch.tensor(float(_alpha(spec)))
    return serialize(tensors, dtype, told)


def serialize(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    """The safetensors format: length of the header, header as JSON, tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    pieces, begin = [], 0
    for name, tensor in sorted(tensors.items()):
        piece = tensor.detach().cpu().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": _TYPES[dtype], "shape": [*tensor.shape], "data_offsets": [begin, begin + len(piece)]}
        pieces.append(piece)
        begin += len(piece)
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *pieces))


def metadata(spec: Train, own: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself: ours whole, and what other programs look for (kohya-ss's ss_…, modelspec)."""
    model = own["model"]
    return {
        "imagend": json.dumps({**own, "spec": spec.model_dump(mode="json", exclude_none=True)}, sort_keys=True),
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": spec.name,
        "modelspec.trigger_phrase": ", ".join(spec.trigger_words),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": str(_alpha(spec)),
        "ss_output_name": spec.name,
        "ss_sd_model_name": str(model["name"]),
        "ss_new_sd_model_hash": str(model["sha256"]),
        "ss_learning_rate": str(spec.learning_rate),
        "ss_steps": str(spec.max_train_steps),
        "ss_seed": str(spec.seed),
    }


def _alpha(spec: Train) -> float:
    return spec.alpha or spec.rank


def _path(part: str, name: str) -> str:
    """transformers calls the first text encoder's layers without `text_model.`, under which all others know them."""
    return f"text_model.{name}" if part != "unet" and not name.startswith("text_model.") else name
