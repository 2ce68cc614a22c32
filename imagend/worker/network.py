"""Networks that enlarge pictures (ESRGAN and its like), by spandrel: tile by tile, smaller ones where memory is short.

Tiles overlap and are blended there; a picture of one tile has the bits of a plain spandrel call.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.torch import load_file

from imagend.errors import BrokenModel, OutOfMemory, UnsupportedSetting, UnusableModel
from imagend.fields import MAX_SIDE
from imagend.memory_plan import OVERLAP, UPSCALER_TILES, upscaler_tile
from imagend.models import Model, digest
from imagend.upscaling import STAGE
from imagend.worker.bases import errors_of
from imagend.worker.shortage import Catch, clean_up

if TYPE_CHECKING:
    from imagend.worker.main import Context

MAX_BETWEEN = 4 * MAX_SIDE
"""Pixels a side of what a network makes, before it is scaled down to what was asked for: 3 GiB of main memory."""
_ARCHITECTURES = {"ESRGAN": "ESRGANArch", "Compact": "CompactArch"}
Said = Callable[[int, int], None]


class Network:
    """One upscaler at a scale, for the pictures of one job. Its weights are read when the first one is enlarged."""

    def __init__(self, model: Model, scale: int, context: Context) -> None:
        """Raises UnusableModel, UnsupportedSetting, BrokenWeights."""
        self._model, self._scale, self._context = model, scale, context
        self._models, self._device = context.pipelines.models, torch.device(context.pipelines.device)
        self._architecture = _architecture(model, self._models.header(model).tensors)
        self._loaded: Any = None
        self._tile = 0
        self.versions = {"pillow": PIL.__version__, "spandrel": version("spandrel"), "torch": version("torch")}

    def describe(self) -> dict[str, Any]:
        """For the manifest: all that decides the pixels where memory is plenty."""
        files = self._models.digests(self._model)
        told = {"name": self._model.name, "sha256": digest(files), "files": files, "scale": self._scale}
        return told | {"tile": UPSCALER_TILES[0], "overlap": OVERLAP}

    @property
    def exact(self) -> bool:
        """Whether what is made now has the bits that it has where memory is plenty."""
        return self._tile in (0, UPSCALER_TILES[0])

    def __call__(self, image: Image.Image, said: Said) -> Image.Image:
        """As often as it takes, as AUTOMATIC1111 has it; what is then too large is scaled down by Lanczos. `said` is
        told of each tile. Raises UnusableModel, UnsupportedSetting, BrokenModel, OutOfMemory, Interrupt."""
        size = image.width * self._scale, image.height * self._scale
        if self._loaded is None:
            self._load()
        passes = math.ceil(round(math.log(self._scale, self._loaded.scale), 6))
        if (side := max(image.size) * self._loaded.scale**passes) > MAX_BETWEEN:
            what = f"makes {side} pixels a side before it is scaled down; at most {MAX_BETWEEN} are possible"
            raise UnsupportedSetting(f"upscaler: {self._model.name!r} {what}. Name one of a smaller scale")
        for number in range(passes):
            image = self._enlarged(image, partial(_said_of_all, said, number, passes))
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)

    def _load(self) -> None:
        with self._context.timed("model_loading"):
            self._models.check(self._model)
            try:
                with errors_of(self._model), Catch() as caught:
                    self._loaded = self._built(_canonical(load_file(self._model.path)))
            except (IndexError, ArithmeticError, AssertionError) as error:  # a tensor of an unlikely shape
                raise BrokenModel(self._model.name, f"its tensors do not fit ({type(error).__name__})") from None
            self._models.check_unchanged(self._model)
            if caught.said is not None:
                raise OutOfMemory(self._device, 0, 0, "loading the upscaler", "Free memory on the device")

    def _built(self, state: dict[str, Any]) -> Any:
        with torch.device("meta"), warnings.catch_warnings():  # are names and shapes right? before room is made
            warnings.simplefilter("ignore")  # that nothing is copied
            found = self._architecture.load(dict(state))
        _check(self._model, found)
        return self._architecture.load(state).to(self._device).eval()

    def _enlarged(self, image: Image.Image, said: Said) -> Image.Image:
        """By the network's own scale; each time memory runs out with tiles of half the size. Raises OutOfMemory."""
        gauge, memory = self._context.pipelines.ladder.gauge, self._context.memory
        if not self._tile:
            self._tile = upscaler_tile(image.width, image.height, *self._build(), gauge.available())
        while True:
            with Catch() as caught:
                made = self._in_tiles(image, self._tile, said)
                memory |= {"upscaler_tile": self._tile, "exact": memory.get("exact", True) and self.exact}
                return made
            clean_up(self._device)
            self._context.pipelines.free_caches()
            smaller = next((tile for tile in UPSCALER_TILES if tile < self._tile), None)
            rung = f"tile/{self._tile}"
            memory["retries"] = [*memory.get("retries", ()), {"stage": STAGE, "rung": rung, "said": caught.said}]
            self._context.short_of_memory(STAGE, rung, None if smaller is None else f"tile/{smaller}")
            if smaller is None:
                tried = "; ".join(retry["rung"] for retry in memory["retries"] if retry["stage"] == STAGE)
                raise OutOfMemory(self._device, *image.size, tried, "Or leave `upscaler` out")
            self._tile = smaller

    def _build(self) -> tuple[int, int]:
        """Channels of the widest tensors that the network makes, and how much larger than its picture they are."""
        width = max(len(tensor) for tensor in self._loaded.model.state_dict().values() if tensor.ndim == 4)
        return width, 1 if self._loaded.architecture.id == "Compact" else self._loaded.scale  # it enlarges at its end

    def _in_tiles(self, image: Image.Image, tile: int, said: Said) -> Image.Image:
        scale = self._loaded.scale
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        rows, columns = spans(image.height, tile), spans(image.width, tile)
        canvas = torch.zeros(3, image.height * scale, image.width * scale)
        done = 0
        for top, bottom in rows:
            across = _weights(top, bottom, image.height, scale)[:, None]
            for left, right in columns:
                made = self._loaded(pixels[:, :, top:bottom, left:right].to(self._device))[0].cpu()
                where = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
                canvas[:, *where] += made * across * _weights(left, right, image.width, scale)
                done += 1
                said(done, len(rows) * len(columns))
        return Image.fromarray((canvas.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _said_of_all(said: Said, number: int, passes: int, done: int, of: int) -> None:
    said(number * of + done, passes * of)


def spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Where tiles begin and end along a side: as few as do, of one size but for a pixel, each OVERLAP into the next."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - OVERLAP) / (tile - OVERLAP))
    edges = [number * (length - OVERLAP) // count for number in range(count + 1)]
    return [(edges[number], edges[number + 1] + OVERLAP) for number in range(count)]


def _weights(begin: int, end: int, length: int, scale: int) -> torch.Tensor:
    """How much a tile counts along a side: those of two neighbours add up to 1 wherever they overlap."""
    ramp = (torch.arange(OVERLAP * scale) + 0.5) / (OVERLAP * scale)
    weights = torch.ones((end - begin) * scale)
    if begin > 0:
        weights[: len(ramp)] = ramp
    if end < length:
        weights[-len(ramp) :] = 1 - ramp
    return weights


def _architecture(model: Model, names: Any) -> Any:
    """The architecture that a file's tensors show by their names. Raises UnusableModel, UnsupportedSetting."""
    if importlib.util.find_spec("spandrel") is None:
        raise UnsupportedSetting(
            "upscaler: networks need spandrel, which is not installed here: pip install --no-deps spandrel. "
            "Or leave `upscaler` out"
        )
    state = _canonical(dict.fromkeys(names))
    kinds = [getattr(part_of_spandrel(f"architectures.{name}"), kind) for name, kind in _ARCHITECTURES.items()]
    numbers = [int(digits) for name in state for digits in re.findall(r"(?<![^.])\d{1,9}(?![^.])", name)]
    found = next((kind() for kind in kinds if kind().detect(state)), None)
    if found is None:
        raise UnusableModel(model.kind.noun, model.name, f"none of {', '.join(_ARCHITECTURES)} by its tensors' names")
    if max(numbers, default=0) > len(state):  # as many layers are made as the last one's number says
        raise BrokenModel(model.name, "its layers are numbered beyond their number")
    return found


def _canonical(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = part_of_spandrel("__helpers.canonicalize").canonicalize_state_dict(state)
    return found


def part_of_spandrel(name: str) -> Any:
    """Without what its __init__ imports: forty architectures, two of which need torchvision, which cannot be had beside
    every PyTorch."""
    if "spandrel" not in sys.modules:
        spec = importlib.util.find_spec("spandrel")
        assert spec is not None
        sys.modules["spandrel"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"spandrel.{name}")


def _check(model: Model, found: Any) -> None:
    if (found.input_channels, found.output_channels) != (3, 3):
        raise UnusableModel(model.kind.noun, model.name, f"made for {found.input_channels} channels, not for RGB")
    if found.scale < 2:
        raise UnusableModel(model.kind.noun, model.name, "one that repairs pictures and makes none larger (1x)")
