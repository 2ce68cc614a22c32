"""Small upscalers of random weights, built as their authors build them, the same each time; and jobs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_conftest import REF, Painter
from safetensors.torch import save_file

from imagend.messages import Run
from imagend.upscaling import Upscale
from imagend.worker.network import part_of_spandrel

NAME = "leona/front"


def upscale(painter: Painter, path: Path, folder: Path, name: str = NAME, **fields: Any) -> Any:
    """The worker's Ended."""
    painter.said = []
    spec = Upscale(image=name, **fields).model_dump(mode="json")
    folder.mkdir(exist_ok=True)
    run = Run(job=REF, kind="upscale", spec=spec, folder=str(folder), pictures={name: str(path)})
    return painter.worker.attempt(run, painter.worker.expect(run))


def compact(path: Path, scale: int = 4, seed: int = 0, **build: Any) -> Path:
    """A Real-ESRGAN "compact" (SRVGGNetCompact)."""
    kind = part_of_spandrel("architectures.Compact.__arch.SRVGG").SRVGGNetCompact
    return _saved(kind, path, seed, {"num_feat": 16, "num_conv": 4, "upscale": scale} | build)


def esrgan(path: Path, scale: int = 4, seed: int = 0, **build: Any) -> Path:
    """An ESRGAN (RRDBNet), its tensors named as in the old files."""
    kind = part_of_spandrel("architectures.ESRGAN.__arch.RRDB").RRDBNet
    return _saved(kind, path, seed, {"num_filters": 8, "num_blocks": 1, "scale": scale} | build)


def _saved(kind: Any, path: Path, seed: int, build: dict[str, Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = kind(**build).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
