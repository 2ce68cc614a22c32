"""What the tests of prompts share: textual inversions of their own making for the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from imagend.mentions import Mention, Names
from imagend.worker.text_encoder import Inversion, Text

WIDTHS = 64, 96
LONG = "a red circle, on a green square. " * 12


def made(name: str, count: int, seed: int) -> Inversion:
    generator = torch.Generator().manual_seed(seed)
    vectors = tuple(torch.randn(count, width, generator=generator) * 0.5 for width in WIDTHS)
    return Inversion(name, f"{seed:064x}", vectors)


ONE, THREE = made("zorp", 1, 1), made("glimb", 3, 2)


def splitter(*inversions: Inversion) -> Callable[[str], Text]:
    names = Names([inversion.name for inversion in inversions])
    by_name = {inversion.name: inversion for inversion in inversions}

    def split(text: str) -> Text:
        return [by_name[piece.names[0]] if isinstance(piece, Mention) else piece for piece in names.split(text)]

    return split


BOTH = splitter(ONE, THREE)


def save(inversion: Inversion, folder: Path) -> Path:
    """As kohya, ComfyUI and diffusers' trainers write them."""
    path = folder / f"{inversion.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(("clip_l", "clip_g"), inversion.vectors, strict=True)), path)
    return path


def by_diffusers(pipe: Any, prompt: str, negative_prompt: str | None = None, clip_skip: int | None = None) -> Any:
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompt, negative_prompt=negative_prompt, clip_skip=clip_skip)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    return dict(zip(names, embeds, strict=True))


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
