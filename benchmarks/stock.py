"""The models that the GPU benchmark measures: random weights at the shapes of full-size SDXL or a smaller sibling."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import random_sdxl, single_file

REPOSITORY = Path(__file__).parents[1]
FULL_SIZE = REPOSITORY / "imagend" / "sdxl"
MODELS = {
    "full": (FULL_SIZE, {}),
    "slim": (FULL_SIZE, random_sdxl.SLIM),
    "shapes-xl": (REPOSITORY / "models" / "diffusers" / "shapes-xl", {}),
}
"""what can be built: configs, and what of them shall be otherwise"""


def random_picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (512, 512, 3), dtype=np.uint8))


@dataclass
class Stock:
    """A models folder. What is asked for is made when it is not there; names are those that jobs use."""

    root: Path
    model: str
    dtype: torch.dtype
    made: dict[str, float] = field(default_factory=dict)
    """seconds by what was made"""

    def folder(self, number: int = 0) -> str:
        """A base as a diffusers folder; other numbers have other weights."""
        name = f"random-{self.model}-{number}"
        target = self.root / "diffusers" / name
        if not target.exists():
            configs, overrides = MODELS[self.model]
            self._make(target, lambda path: random_sdxl.build(configs, path, self.dtype, overrides, seed=number))
        return name

    def single_file(self) -> str:
        """The weights of folder 0 as one checkpoint."""
        name = f"random-{self.model}"
        target = self.root / "checkpoints" / f"{name}.safetensors"
        if not target.exists():
            folder = self.root / "diffusers" / self.folder()
            self._make(target, lambda path: single_file.write(folder, path))
        return name

    def lora(self) -> str:
        """A LoRA of rank 16 on all attention of UNet and text encoders."""
        name = f"random-{self.model}-lora"
        target = self.root / "loras" / f"{name}.safetensors"
        if not target.exists():
            folder = self.root / "diffusers" / self.folder()
            self._make(target, lambda path: random_sdxl.lora(folder, path))
        return name

    def ip_adapter(self) -> str:
        """A plain IP-Adapter, and the image encoder that it reads by."""
        name = f"random-{self.model}-ip-adapter"
        target = self.root / "ipadapter" / f"{name}.safetensors"
        if not target.exists():
            folder = self.root / "diffusers" / self.folder()
            layers = 32 if self.model == "full" else 2
            encoder = self.root / "clip_vision" / f"random-{self.model}-encoder"
            self._make(encoder, lambda path: random_sdxl.image_encoder(path, layers))
            self._make(target, lambda path: random_sdxl.ip_adapter(folder, path))
        return name

    def pictures(self, count: int) -> dict[str, str]:
        """Noise, by the names that jobs use."""
        found = {}
        for number in range(count):
            path = self.root / f"reference-{number}.png"
            random_picture(number).save(path)
            found[f"noise/{number}"] = str(path)
        return found

    def _make(self, target: Path, write: Callable[[Path], None]) -> None:
        """Under another name first: what was interrupted must not be taken for whole."""
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        start = time.perf_counter()
        write(temporary)
        temporary.rename(target)
        self.made[target.name] = time.perf_counter() - start
