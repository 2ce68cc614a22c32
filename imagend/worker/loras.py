"""The LoRAs of a job on a pipeline. They stay loaded, the least recently used go first; the base is never changed.

Never fused: taking a fused one out is not exact. In a pipeline they stand in the order of their names, so that the
order in a job decides no bit.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from imagend.architecture import ModelKind
from imagend.errors import ImagendError, UnfitLora, UnsupportedSetting
from imagend.generate_spec import Generate
from imagend.lora import TEXT_ENCODERS, check_fit, weight_at
from imagend.lora_field import Lora
from imagend.memory_plan import Stage
from imagend.models import Model, Models
from imagend.worker.adapters import Adapters
from imagend.worker.lora_file import Weights, judge, read
from imagend.worker.shortage import is_out_of_memory

_FAILED = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, SafetensorError)


class Context(Protocol):
    """Of a job (worker.main.Context), what is needed here."""

    loading: dict[str, Any]
    failed: dict[str, ImagendError]

    def progress(self, stage: str) -> None: ...


@dataclass(frozen=True)
class _Resident:
    adapter: str
    model: Model
    sha256: str
    autov3: str
    encodes: frozenset[str]
    """which text encoders it changes"""
    bytes: int


@dataclass(frozen=True)
class _Used:
    resident: _Resident
    lora: Lora

    def weight(self, part: str, path: str) -> float:
        return weight_at(self.lora.weight, self.lora.blocks, part, path)


class Loras:
    """Those that are loaded for one pipeline at a time."""

    def __init__(self, models: Models, limit_bytes: int) -> None:
        self._models, self._limit_bytes = models, limit_bytes
        self._adapters: Adapters | None = None
        self._residents: OrderedDict[tuple[str, tuple[str, ...]], _Resident] = OrderedDict()
        self._used: tuple[_Used, ...] = ()
        self._count = 0

    def apply(self, pipe: Any, spec: Generate, release: Callable[[], None], context: Context) -> None:
        """Let a completed spec's LoRAs, and no others, act on the pipeline. `release` takes a memory mode off it.

        What fails leaves the pipeline bare, or as it was. Raises UnknownModel, AmbiguousModel, UnusableModel,
        BrokenWeights, UnfitLora, UnsupportedSetting, Interrupt.
        """
        wanted = self._wanted(spec.loras)
        if self._adapters is not None and not self._adapters.are_on(pipe):
            self.forget()
        for model, lora in wanted:
            self._check(model, lora, pipe)
        if self._adapters is None:
            if not wanted:
                return
            self._adapters = Adapters(pipe)
        keys = [_key(model) for model, _ in wanted]
        known = [self._residents[key].adapter for key in keys if key in self._residents]
        if len(known) < len(keys) or tuple(known) != self._adapters.placed:
            release()
            self._change([model for model, _ in wanted], pipe, self._adapters, context)
        for key in keys:
            self._residents.move_to_end(key)
        self._used = tuple(_Used(self._residents[key], lora) for key, (_, lora) in zip(keys, wanted, strict=True))
        self._adapters.weigh({used.resident.adapter: used.weight for used in self._used})

    def _change(self, models: list[Model], pipe: Any, adapters: Adapters, context: Context) -> None:
        """Load what is missing, put these in place, and let go of what is too much."""
        self.detach()
        for model in models:
            if _key(model) not in self._residents:
                self._load(model, pipe, adapters, context)
        keys = [_key(model) for model in models]
        self._evict(adapters, set(keys))
        adapters.place([self._residents[key].adapter for key in keys])

    def _check(self, model: Model, lora: Lora, pipe: Any) -> None:
        """Whether it goes with the pipeline, before anything is touched."""
        if _key(model) not in self._residents:
            judge(self._models, model, pipe)
        try:
            check_fit(lora.blocks, _lengths(pipe.unet))
        except ValueError as error:
            raise UnsupportedSetting(f"loras: the blocks of {lora.name!r} do not fit this model: {error}") from None

    def detach(self) -> None:
        """Leave the pipeline bare; what is loaded stays loaded. No memory mode may be on it."""
        self._used = ()
        if self._adapters is not None:
            self._adapters.rest()

    def forget(self) -> None:
        """Let go of the pipeline and of all that is loaded."""
        self.detach()
        self._residents.clear()
        self._adapters = None

    @property
    def bytes(self) -> int:
        return sum(resident.bytes for resident in self._residents.values())

    def fingerprint(self) -> Hashable:
        """All that the LoRAs in use change of what the text encoders make of a text; nothing if they change none."""
        return tuple(
            (used.resident.sha256, weights)
            for used in self._used
            if any(weights := tuple(used.weight(part, "") * (part in used.resident.encodes) for part in TEXT_ENCODERS))
        )

    def describe(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [
            {
                "name": used.resident.model.name,
                "sha256": used.resident.sha256,
                "autov3": used.resident.autov3[:12],
                "weight": used.lora.weight,
            }
            | ({"blocks": dict(used.lora.blocks)} if used.lora.blocks else {})
            for used in self._used
        ]

    def _wanted(self, loras: tuple[Lora, ...]) -> list[tuple[Model, Lora]]:
        """Each with its file, by name. One whose weights are all 0 is looked for, but does nothing."""
        found = [(self._models.find(lora.name, ModelKind.LORA), lora) for lora in loras]
        names = [model.name for model, _ in found]
        for model, lora in found:
            if names.count(model.name) > 1:
                raise UnsupportedSetting(f"loras: {lora.name!r} is {model.name!r}, which is named twice. Name it once")
        acting = [(model, lora) for model, lora in found if lora.weight or lora.blocks]
        return sorted(acting, key=lambda pair: pair[0].name)

    def _load(self, model: Model, pipe: Any, adapters: Adapters, context: Context) -> None:
        context.progress(Stage.LOADING)
        start = time.perf_counter()
        weights = read(self._models, model, pipe)
        self._models.check_unchanged(model)
        self._count += 1
        adapter = f"imagend{self._count:09d}"  # of one length: peft looks for names within names
        try:
            size = adapters.load(adapter, weights)
        except torch.AcceleratorError:  # the device's trouble, not the file's
            raise
        except _FAILED as error:
            if is_out_of_memory(error):
                raise
            raise UnfitLora(model.name, " ".join(str(error).split())[:300]) from None
        self._residents[_key(model)] = _resident(adapter, model, weights, size)
        seconds = round(time.perf_counter() - start, 6)
        context.loading.setdefault("loras", []).append({"name": model.name, "seconds": seconds, "bytes": size})

    def _evict(self, adapters: Adapters, wanted: set[tuple[str, tuple[str, ...]]]) -> None:
        """Files that were replaced, then the least recently used, until the others fit."""
        current = {
            model.name: key
            for key, model in ((key, one.model) for key, one in self._residents.items())
            if key in wanted
        }
        for key, resident in list(self._residents.items()):
            replaced = current.get(resident.model.name, key) != key
            if key not in wanted and (replaced or self.bytes > self._limit_bytes):
                adapters.drop(resident.adapter)
                del self._residents[key]


def _key(model: Model) -> tuple[str, tuple[str, ...]]:
    """Another version of a file is another LoRA."""
    return str(model.path), model.version


def _resident(adapter: str, model: Model, weights: Weights, size: int) -> _Resident:
    encodes = frozenset(part for part in TEXT_ENCODERS if any(name.startswith(f"{part}.") for name in weights.tensors))
    return _Resident(adapter, model, weights.sha256, weights.autov3, encodes, size)


def _lengths(unet: Any) -> dict[str, int]:
    """How many layers each block has: "down.0": 2, "mid.": 1 …"""
    sides = {"down": unet.down_blocks, "up": unet.up_blocks}
    return {"mid.": 1} | {
        f"{side}.{number}": len(block.resnets) for side, blocks in sides.items() for number, block in enumerate(blocks)
    }
