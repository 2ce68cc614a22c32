"""Where an interrupted training goes on: adapter, optimizer, losses and step, in one file of the draft.

Safetensors, written in one step and durably: a crash leaves the last one or the one before. It is of one recipe (spec,
dataset, weights, libraries); that of another one is passed over, and so is one that cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from imagend import files
from imagend.errors import NoSpace

FILE = ".checkpoint.safetensors"


@dataclass
class Checkpoint:
    step: int
    """steps that are done"""
    tensors: Mapping[str, torch.Tensor]
    """adapter.NAME, and of the optimizer exp_avg.NAME, exp_avg_sq.NAME, step.NAME"""
    losses: list[float] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    """of the loss, in fp16"""
    seconds: float = 0.0
    """spent in all"""

    def write(self, folder: Path, recipe: str) -> None:
        """Raises NoSpace."""
        told = {"recipe": recipe, "step": self.step, "scaler": self.scaler, "seconds": self.seconds}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        try:
            files.write(folder / FILE, save(tensors, {"imagend": json.dumps(told)}), 0o600)
        except OSError as error:
            raise NoSpace(error.strerror) from None


def find(folder: Path, recipe: str) -> Checkpoint | None:
    """The one that an earlier attempt left, if it is whole and of this recipe."""
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            told = json.loads((file.metadata() or {})["imagend"])
            if told["recipe"] != recipe:
                return None
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  it is no dict
        losses = tensors.pop("losses").tolist()
        return Checkpoint(int(told["step"]), tensors, losses, dict(told["scaler"]), float(told["seconds"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
