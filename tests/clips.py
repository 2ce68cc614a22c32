"""A CLIP text encoder, tiny and untrained, as a folder in models/clip_text/: of transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from conftest import REPOSITORY


def save(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
        )
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    words = REPOSITORY / "imagend" / "sdxl" / "tokenizer_2"
    transformers.CLIPTokenizer.from_pretrained(words).save_pretrained(folder)
    return folder
