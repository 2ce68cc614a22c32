"""Small siblings of the embedded model: other weights, single files, other VAEs. Made anew, the same each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file

from benchmarks import single_file

EMBEDDED = REPOSITORY / "models" / "diffusers" / "shapes-xl"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def folder(path: Path, seed: int, dtype: torch.dtype = torch.float16, configs: Mapping[str, Any] | None = None) -> Path:
    """A diffusers folder as the embedded model's, its weights moved by noise. `configs`: path in it → changed keys."""
    shutil.copytree(EMBEDDED, path, ignore=shutil.ignore_patterns("*.py", "*.png", "README*"))
    generator = torch.Generator().manual_seed(seed)
    for component in COMPONENTS:
        (weights,) = (path / component).glob("*.safetensors")
        moved = {
            name: (tensor + torch.randn(tensor.shape, generator=generator) * 0.01).to(dtype)
            for name, tensor in load_file(weights).items()
        }
        save_file(moved, weights, metadata={"format": "pt"})
    for name, changes in (configs or {}).items():
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def checkpoint(folder: Path, path: Path, without: str = " ", marks: Mapping[str, str] | None = None) -> Path:
    """A folder as one file, `without` the tensors that start so; `marks`: empty tensors and, with a dot, metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    single_file.write(folder, path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(without)}
    tensors |= {name: torch.empty(0) for name in marks or {} if "." not in name}
    save_file(tensors, path, metadata={name: text for name, text in (marks or {}).items() if "." in name})
    return path
