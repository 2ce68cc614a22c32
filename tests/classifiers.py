"""A small safety classifier that can be trusted: it calls a picture unsafe as it is red, by weights that are set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

LABELS = ("normal", "nsfw")
_LINEAR = 1e6
"""An epsilon so large that a layer norm only takes away the mean."""


def save(folder: Path, labels: tuple[str, ...] = LABELS, steep: float = 8.0, at: float = 0.5, **config: Any) -> Path:
    """Write one into a folder. At a redness of `at` (mean of red, less that of green and blue, all from 0 to 1) it says
    0.5 for the last label."""
    made = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=2,
        layer_norm_eps=_LINEAR,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **config,
    )
    model = ViTForImageClassification(made)
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for name in weights:
        if "layernorm" in name and name.endswith("weight"):
            weights[name] += _LINEAR**0.5
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            weights[name] += torch.eye(2)
    redness = torch.tensor([0.5, -0.25, -0.25]).reshape(3, 1, 1).expand(3, 4, 4) / 16  # pixels come from -1 to 1
    weights["vit.embeddings.patch_embeddings.projection.weight"] += torch.stack((redness, -redness))
    seen = 4 / 5  # four patches, and the token that looks at them
    weights["classifier.weight"][-1, 0] = steep / seen
    weights["classifier.bias"][-1] = -steep * at
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
