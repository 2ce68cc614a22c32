"""LoRAs as a job names them: weights per block, and `<lora:name:0.8>` in AUTOMATIC1111 prompts. Pure: it loads none.

Blocks are diffusers' (pipe.set_adapters): `{"unet": {"down": …, "mid": …, "up": …}, "text_encoder": …}`. What is left
out has the LoRA's own weight; diffusers would give it 1. Tags: AUTOMATIC1111's modules/extra_networks.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_LORAS = 16
MAX_WEIGHT = 2.0
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *TEXT_ENCODERS)
Blocks = Mapping[str, Any]

_SIDES = ("down", "mid", "up")
_BLOCK = re.compile(r"block_\d{1,2}")
_TAG = re.compile(r"<lora:([^<>]*)>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.\w+\.(\d+)|(mid)_block\.")


class Tag(NamedTuple):
    """`<lora:name:te:unet>`: blocks are None where both weights are the same."""

    name: str
    weight: float
    blocks: dict[str, Any] | None


def tags(prompt: str) -> tuple[str, list[Tag]]:
    """A prompt without its tags, and these. Raises ValueError, which says what to change."""
    return _TAG.sub("", prompt), [_tag(match[1]) for match in _TAG.finditer(prompt)]


def _tag(inside: str) -> Tag:
    """Messages do not repeat it: it is of a prompt, and they may reach a log."""
    name, *arguments = inside.split(":")
    places = ["te", "unet"]
    weights: dict[str, float] = {}
    for argument in arguments:
        key, equals, value = argument.rpartition("=")
        key = key.strip() if equals else places.pop(0) if places else ""
        if key not in ("te", "unet") or not _NUMBER.fullmatch(value.strip()):
            raise ValueError("has a <lora:…> that is neither <lora:name:weight> nor <lora:name:te=weight:unet=weight>")
        weights[key] = _weight(value.strip())
    te = weights.get("te", 1.0)
    unet = weights.get("unet", te)
    return Tag(name.strip(), unet, None if te == unet else dict.fromkeys(TEXT_ENCODERS, te))


def _weight(number: str) -> float:
    if abs(value := float(number)) > MAX_WEIGHT:
        raise ValueError(f"has a <lora:…> with a weight beyond ±{MAX_WEIGHT:g}; use a smaller one")
    return value


def tag(name: str, weight: float, blocks: Blocks | None) -> str:
    """As it stands in infotext; of weights per block only those that a tag can say."""
    te, unet = ((blocks or {}).get(part, weight) for part in ("text_encoder", "unet"))
    unet = weight if isinstance(unet, Mapping) else unet
    return f"<lora:{name}:{unet:g}>" if te == unet else f"<lora:{name}:{te:g}:{unet:g}>"


def check_blocks(blocks: Blocks) -> None:
    """Raises ValueError where it is not what a job may say."""
    _check_keys(blocks, PARTS, "blocks")
    for part, given in blocks.items():
        if part == "unet" and isinstance(given, Mapping):
            _check_keys(given, _SIDES, "unet")
            for side, value in given.items():
                _check_side(value, side)
        else:
            _check_number(given, part)


def _check_side(value: Any, side: str) -> None:
    blocks = {side: value}
    if side != "mid" and isinstance(value, Mapping):
        blocks = {f"{side}.{name}": one for name, one in value.items()}
        if not all(_BLOCK.fullmatch(name) for name in value):
            raise ValueError(f"has under {side} what is no block; blocks are called block_0, block_1 and so on")
    for where, one in blocks.items():
        for number in one if isinstance(one, (list, tuple)) and 0 < len(one) <= 16 else (one,):
            _check_number(number, where)


def _check_keys(value: Any, known: Sequence[str], where: str) -> None:
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"has {_shown(unknown[0])} in {where}; known are: {', '.join(known)}")


def _check_number(value: Any, where: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > MAX_WEIGHT:
        raise ValueError(f"must have a number of -{MAX_WEIGHT:g} to {MAX_WEIGHT:g} for {where}")


def check_fit(blocks: Blocks | None, lengths: Mapping[str, int]) -> None:
    """Whether a UNet has the blocks that are named. `lengths`: how many layers each has, such as "down.0". Else
    ValueError."""
    unet = (blocks or {}).get("unet")
    for side, value in unet.items() if isinstance(unet, Mapping) else ():
        named = {"mid.": value} if side == "mid" else {f"{side}.": value}
        if isinstance(value, Mapping):
            named = {f"{side}.{name.removeprefix('block_')}": one for name, one in value.items()}
        for place, one in named.items():
            found = {
                length
                for key, length in lengths.items()
                if key == place or (place[-1] == "." and key.startswith(place))
            }
            if not found:
                raise ValueError(f"it has no block {place}; known are: {', '.join(sorted(lengths))}")
            if isinstance(one, (list, tuple)) and len(one) != 1 and found != {len(one)}:
                raise ValueError(f"{place.rstrip('.')} has {len(one)} weights, and its blocks have {found} layers")


def weight_at(weight: float, blocks: Blocks | None, part: str, path: str) -> float:
    """The weight of one layer, by its place in the UNet ("down_blocks.1.attentions.0.…") or in a text encoder."""
    given = (blocks or {}).get(part, weight)
    place = _PLACE.match(path)
    if isinstance(given, Mapping):
        given = given.get(place[1] or place[4], weight) if place else weight
    if isinstance(given, Mapping):
        given = given.get(f"block_{int(place[2])}", weight) if place and place[2] else weight
    if isinstance(given, (list, tuple)):
        given = given[min(int(place[3] or 0), len(given) - 1) if place else 0]
    return float(given)


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
