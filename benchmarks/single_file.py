"""A diffusers folder of SDXL as the single file that Stability AI's own code, ComfyUI and A1111 read: same weights.

The names are those of https://github.com/Stability-AI/generative-models; diffusers' from_single_file() makes of it what
the folder holds, bit for bit. Memory stays at one tensor: the folder's files are mapped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = "conditioner.embedders.0.transformer.text_model."
_TEXT_2 = "conditioner.embedders.1.model."
_QKV = ("q_proj", "k_proj", "v_proj")

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_TEXT_2_PARTS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write(folder: Path, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `folder` (a diffusers SDXL folder in safetensors, one file a component) as one checkpoint."""
    with ExitStack() as stack:
        parts = list(_parts(folder, stack))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, dtype, shape, size, _ in parts:
            begin, end = end, end + size
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, _, _, _, read in parts:
                file.write(memoryview(read().contiguous().view(-1).view(torch.uint8).numpy()))


Part = tuple[str, str, list[int], int, Callable[[], torch.Tensor]]
"""name, dtype, shape, bytes, and how to read it"""


def _parts(folder: Path, stack: ExitStack) -> Iterator[Part]:
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (weights,) = (folder / component).glob("*.safetensors")
        file = stack.enter_context(safe_open(weights, framework="pt"))
        config = json.loads((folder / component / "config.json").read_text())
        for name in file.keys():  # noqa: SIM118  it is no dict
            if (original := _original(component, name, config)) is None:
                continue
            part = file.get_slice(name)
            yield _part(component, name, original, part.get_dtype(), part.get_shape(), file.get_tensor)


def _part(component: str, name: str, original: str, dtype: str, shape: list[int], get: Any) -> Part:
    size = math.prod(shape) * torch.empty((), dtype=_TORCH[dtype]).element_size()
    if original.endswith(("in_proj_weight", "in_proj_bias")):  # open_clip keeps query, key and value in one

        def read() -> torch.Tensor:
            return torch.cat([get(name.replace("q_proj", one)) for one in _QKV])

        return original, dtype, [3 * shape[0], *shape[1:]], 3 * size, read
    if original.endswith("text_projection"):  # x @ projection, where torch's Linear has projection @ x
        return original, dtype, shape[::-1], size, lambda: get(name).T
    if component == "vae" and ".attn_1." in original and len(shape) == 2:  # convolutions of 1x1 there
        return original, dtype, [*shape, 1, 1], size, lambda: get(name)
    return original, dtype, shape, size, lambda: get(name)


_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _original(component: str, name: str, config: Mapping[str, Any]) -> str | None:
    """The checkpoint's name for a tensor; None for keys and values, which go with their query."""
    match component:
        case "unet":
            return _UNET + _unet(name, config["layers_per_block"])
        case "vae":
            return _VAE + _vae(name, len(config["block_out_channels"]))
        case "text_encoder":
            return _TEXT + name.removeprefix("text_model.")
        case _:
            return None if re.search(r"\.[kv]_proj\.", name) else _TEXT_2 + _text_2(name)


def _unet(name: str, layers: int) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        part, number, rest = found.groups()
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(number)}"
        return f"{place}.{_resnet(rest) if part == 'resnets' else rest}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert found, name
    way, block, part, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.2.{rest}"  # after resnet and attention: SDXL has both
    place = f"input_blocks.{1 + block * (layers + 1) + number}"
    if way == "up":
        place = f"output_blocks.{block * (layers + 1) + number}"
    return f"{place}.0.{_resnet(rest)}" if part == "resnets" else f"{place}.1.{rest}"


def _resnet(rest: str) -> str:
    stem, _, kind = rest.rpartition(".")
    return f"{_RESNET[stem]}.{kind}"


def _vae(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name):
        block, rest = levels - 1 - int(found[1]), found[4]
        place = f"block.{found[3]}" if found[2] == "resnets" else "upsample"
        name = f"decoder.up.{block}.{place}.{rest}"
    return _replaced(name, _VAE_PARTS)


def _text_2(name: str) -> str:
    name = name.removeprefix("text_model.")
    if name == "text_projection.weight":
        return "text_projection"
    if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
        return f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"
    return _replaced(name, _TEXT_2_PARTS)


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    """`name` with each of the parts, between dots, called as the checkpoint calls it."""
    for ours, theirs in parts.items():
        name = re.sub(rf"(?<![\w]){re.escape(ours)}(?![\w])", theirs, name)
    return name
