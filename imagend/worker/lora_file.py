"""One LoRA file: whether it fits a pipeline, and its weights under the pipeline's own names. It changes no pipeline.

diffusers renames kohya's and its own older names. What it would drop or guess is refused or done here: it leaves out
kohya's DoRA scales with a warning, loses alphas of text encoders where they differ by layer, and gives what it finds in
a file's metadata to peft's configuration. Here a layer's alpha is read from the file, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer

from imagend.errors import BrokenWeights, UnfitLora
from imagend.header import Header
from imagend.lora import PARTS
from imagend.models import Model, Models

_LYCORIS = re.compile(
    r"\.(hada|lokr|oft|boft|glora|ia3|lora_mid|diff|diff_b|w_norm|b_norm|on_input|reshape_weight)(?![a-z])"
)
_PIECE = re.compile(r"\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?)$")
_SHOWN = 80


@dataclass(frozen=True)
class Layer:
    """What a LoRA does to one layer of a part. `names` are its tensors', in the file as diffusers has renamed it."""

    part: str
    path: str
    pieces: dict[str, tuple[int, ...]]
    """shapes by what peft calls them: lora_A.weight of (rank, …in), lora_B.weight of (out, rank) …"""


@dataclass(frozen=True)
class Weights:
    """A LoRA in memory, as pipe.load_lora_into_unet and …_text_encoder take it."""

    sha256: str
    autov3: str
    """SHA-256 of what follows the header (Civitai calls its first 12 digits AutoV3)"""
    tensors: dict[str, torch.Tensor]
    alphas: dict[tuple[str, str], float]
    """by part and path, where the file has them; elsewhere alpha is the rank"""
    rank_stabilised: bool
    """whether alpha is divided by the rank's square root (https://arxiv.org/abs/2312.03732)"""


def judge(models: Models, model: Model, pipe: Any) -> None:
    """By the header alone, whether every tensor has its place in the pipeline. Raises BrokenWeights, UnfitLora."""
    header = models.header(model)
    if strange := next((name for name in header.tensors if _LYCORIS.search(name)), None):
        raise UnfitLora(
            model.name,
            f"it is a LyCORIS of a kind that diffusers cannot load ({strange[:_SHOWN]}); a plain LoRA can be",
        )
    if any(name.endswith("dora_scale") for name in header.tensors):
        raise UnfitLora(
            model.name, "it is a DoRA in kohya's format, which diffusers cannot load; one in diffusers' format can be"
        )
    tensors = {
        name: torch.ones(one.shape)
        if len(one.shape) == 0 or one.shape == (1,)
        else torch.empty(one.shape, device="meta")
        for name, one in header.tensors.items()
    }
    renamed, _ = _renamed(tensors, model, pipe)
    modules = {part: dict(getattr(pipe, part).named_modules()) for part in PARTS}
    for layer in _layers(renamed, model, pipe):
        _check(layer, modules[layer.part].get(layer.path), model)


def read(models: Models, model: Model, pipe: Any) -> Weights:
    """Raises BrokenWeights, UnfitLora."""
    try:
        data = model.path.read_bytes()
        tensors = load(data)
    except OSError as error:
        raise BrokenWeights(model.path.name, error.strerror or "it cannot be read") from None
    except (SafetensorError, ValueError, KeyError):
        raise BrokenWeights(model.path.name, "it changed while it was read") from None
    header = models.header(model)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {
        n: t.shape for n, t in header.tensors.items()
    }:
        raise BrokenWeights(model.path.name, "it changed while it was read")
    renamed, alphas = _renamed(tensors, model, pipe)
    dtype = pipe.unet.dtype
    bad = next((name for name, tensor in renamed.items() if not tensor.to(dtype).isfinite().all()), None)
    if bad is not None:
        raise UnfitLora(model.name, f"{bad[:_SHOWN]} holds what is no number, or too large a one for {dtype}")
    rest = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    found = _alphas(renamed, alphas, pipe)
    stabilised = False
    if not alphas and (told := _adapter_metadata(header)):
        found, stabilised = _told_alphas(told, _layers(renamed, model, pipe))
    return Weights(hashlib.sha256(data).hexdigest(), hashlib.sha256(rest).hexdigest(), renamed, found, stabilised)


def _renamed(tensors: Mapping[str, Any], model: Model, pipe: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """In diffusers' names, and kohya's alphas."""
    try:
        renamed, alphas = pipe.lora_state_dict(dict(tensors), unet_config=pipe.unet.config)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UnfitLora(model.name, f"diffusers cannot read its tensors' names ({_told(error)})") from None
    return renamed, alphas or {}


def _paths(names: Iterable[str], pipe: Any) -> dict[str, tuple[str, str]]:
    """Where each tensor belongs: part, and path with what peft calls it there."""
    found: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): name for name in names if name.startswith(f"{part}.")}
        if part == "unet":
            own = own if not own or "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own)
        elif own:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            if not hasattr(getattr(pipe, part), "text_model"):
                own = {name.removeprefix("text_model."): value for name, value in own.items()}
        found |= {name: (part, path) for path, name in own.items()}
    return found


def _layers(tensors: Mapping[str, Any], model: Model, pipe: Any) -> list[Layer]:
    paths = _paths(tensors, pipe)
    found: dict[tuple[str, str], Layer] = {}
    for name, tensor in tensors.items():
        part, path = paths.get(name, ("", name))
        piece = _PIECE.search(path)
        if not part or piece is None:
            raise UnfitLora(model.name, f"{name[:_SHOWN]} is no tensor of a LoRA for UNet or text encoders")
        key = part, path[: piece.start()]
        found.setdefault(key, Layer(*key, {})).pieces[piece[1]] = tuple(tensor.shape)
    return list(found.values())


def _check(layer: Layer, module: Any, model: Model) -> None:
    where = f"{layer.part}.{layer.path}"[:_SHOWN]
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(base, "weight", None)
    if weight is None or not isinstance(base, (torch.nn.Linear, torch.nn.Conv2d)):
        raise UnfitLora(model.name, f"it changes {where}, which this model does not have")
    down, up = layer.pieces.get("lora_A.weight", ()), layer.pieces.get("lora_B.weight", ())
    out, inside, *kernel = weight.shape
    groups = getattr(base, "groups", 1)
    if len(down) != len(weight.shape) or len(up) != len(weight.shape) or down[0] != up[1] or not down[0]:
        raise UnfitLora(
            model.name, f"it has for {where} tensors of {down} and {up}, which are no pair for {tuple(weight.shape)}"
        )
    if (up[0], down[1], *down[2:]) != (out, inside * groups, *kernel) or any(side != 1 for side in up[2:]):
        raise UnfitLora(
            model.name, f"it changes {up[0]}x{down[1]} weights of {where}, and there this model has {out}x{inside}"
        )
    for name, shape in layer.pieces.items():
        if name.startswith(("lora_B.bias", "lora_magnitude")) and max(shape, default=0) != out:
            raise UnfitLora(model.name, f"{name} of {where} is {shape}, and the layer {out} wide")


def _alphas(tensors: Mapping[str, Any], alphas: Mapping[str, float], pipe: Any) -> dict[tuple[str, str], float]:
    paths = _paths(tensors, pipe)
    found = {}
    for name, alpha in alphas.items():
        bare = name.removesuffix(".alpha")
        part, path = paths[bare if bare in paths else f"{bare}.lora.down.weight"]
        found[part, _PIECE.sub("", path)] = float(alpha)
    return found


def _adapter_metadata(header: Header) -> dict[str, Any]:
    """What diffusers' save_lora_weights notes of a LoRA's configuration."""
    try:
        told = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _told_alphas(told: Mapping[str, Any], layers: list[Layer]) -> tuple[dict[tuple[str, str], float], bool]:
    """Of it, the alphas; a pattern is a path or its end, as peft has it."""
    found = {}
    for layer in layers:
        patterns = told.get(f"{layer.part}.alpha_pattern")
        own = (
            [v for k, v in patterns.items() if f".{layer.path}".endswith(f".{k.lstrip('^')}")]
            if isinstance(patterns, dict)
            else []
        )
        alpha = own[0] if own else told.get(f"{layer.part}.lora_alpha")
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            found[layer.part, layer.path] = float(alpha)
    return found, any(told.get(f"{part}.use_rslora") is True for part in PARTS)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__
