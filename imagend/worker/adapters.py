"""peft's layers on one pipeline's UNet and text encoders: put in place for a job, and taken out exactly.

Out of a job the pipeline is what it was before any LoRA: the same modules, no layer in between, no mark of peft. A LoRA
that is loaded rests in the computer's memory; only those of the job go to the device, with the modules they are in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import CRITICAL
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    import diffusers
    import transformers
    from peft.tuners.tuners_utils import BaseTunerLayer

from imagend.lora import PARTS
from imagend.worker.lora_file import Weights

Weigh = Callable[[str, str], float]
"""part, path of a layer → weight"""


@dataclass(eq=False)
class _Place:
    """One layer that some LoRA changes. `resting`: the pieces of each LoRA not in use, and where they belong."""

    part: str
    path: str
    parent: torch.nn.Module
    child: str
    tuner: Any
    resting: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)


class Adapters:
    """Those of one pipeline."""

    def __init__(self, pipe: Any) -> None:
        self._loader = type(pipe)
        self._modules = {part: getattr(pipe, part) for part in PARTS}
        self._places: dict[tuple[str, str], _Place] = {}
        self._home: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.placed: tuple[str, ...] = ()

    def are_on(self, pipe: Any) -> bool:
        """Whether it is made of the modules that these were made for."""
        return all(getattr(pipe, part) is module for part, module in self._modules.items())

    def load(self, name: str, weights: Weights) -> int:
        """Make a LoRA's layers, and let it rest; its bytes. What fails leaves nothing behind. None may be placed."""
        assert not self.placed
        for place in self._places.values():
            setattr(place.parent, place.child, place.tuner)
        loaded = False
        try:
            with _quiet():
                self._load(name, weights)
            self._settle(name, weights)
            loaded = True
        finally:
            self._take_out()
            if not loaded:
                self.drop(name)
        return sum(data.nbytes for _, data in self._home[name])

    def place(self, names: Sequence[str]) -> None:
        """Put LoRAs in place, and no others."""
        self.rest()
        self.placed = tuple(names)
        for place in self._places.values():
            used = [name for name in names if name in place.resting]
            for name in used:
                for container, piece in place.resting.pop(name):
                    container[name] = piece
            if used:
                setattr(place.parent, place.child, place.tuner)

    def weigh(self, weights: dict[str, Weigh]) -> None:
        """How strongly each of the LoRAs in place acts, in this order. Where its weight is 0, it does not run."""
        for place in self._places.values():
            acting = []
            for name, weigh in weights.items():
                used = name in place.tuner.scaling and name not in place.resting
                if used and (weight := weigh(place.part, place.path)):
                    place.tuner.set_scale(name, weight)
                    acting.append(name)
            place.tuner.set_adapter(acting, inference_mode=True)

    def rest(self) -> None:
        """Take all out: the pipeline is bare. To be called with no memory mode on it."""
        if self.placed:
            self._take_out()

    def drop(self, name: str) -> None:
        """Forget a LoRA. It must not be in place."""
        self._home.pop(name, None)
        for key, place in list(self._places.items()):
            for container, piece in place.resting.pop(name, ()):
                container[name] = piece
            place.tuner.delete_adapter(name)
            if not place.tuner.scaling:
                del self._places[key]

    def _load(self, name: str, weights: Weights) -> None:
        """By diffusers, each part that the LoRA changes."""
        parts = [part for part in PARTS if any(key.startswith(f"{part}.") for key in weights.tensors)]
        for part in parts:
            module = self._modules[part]
            options = {"network_alphas": None, "adapter_name": name, "low_cpu_mem_usage": True}
            if part == "unet":
                self._loader.load_lora_into_unet(weights.tensors, unet=module, **options)
            else:
                self._loader.load_lora_into_text_encoder(weights.tensors, text_encoder=module, prefix=part, **options)

    def _settle(self, name: str, weights: Weights) -> None:
        """Give each layer its alpha, and each tensor its type, in memory of its own: bits depend on its alignment."""
        self._home[name] = []
        dtypes = {part: module.dtype for part, module in self._modules.items()}
        for place in self._find():
            tuner = place.tuner
            if name not in tuner.scaling:
                continue
            tuner.eval()
            tuner.lora_alpha[name] = weights.alphas.get((place.part, place.path), tuner.lora_alpha[name])
            if weights.rank_stabilised:
                tuner.use_rslora[name] = True
            for _, piece in _pieces(tuner, name):
                for tensor in piece.parameters() if isinstance(piece, torch.nn.Module) else (piece,):
                    tensor.data = tensor.data.to(device="cpu", dtype=dtypes[place.part], copy=True)
                    self._home[name].append((tensor, tensor.data))

    def _find(self) -> Iterator[_Place]:
        """Every layer of peft's in the pipeline, known or new."""
        for part, whole in self._modules.items():
            modules = dict(whole.named_modules())
            for path, module in modules.items():
                if isinstance(module, BaseTunerLayer):
                    parent, _, child = path.rpartition(".")
                    bare = path.replace(".base_layer", "")
                    yield self._places.setdefault((part, bare), _Place(part, bare, modules[parent], child, module))

    def _take_out(self) -> None:
        for place in list(self._find()):
            setattr(place.parent, place.child, place.tuner.get_base_layer())
            names = set(place.tuner.scaling) - place.resting.keys()
            for name in names:
                place.resting[name] = _pieces(place.tuner, name)
                for container, _ in place.resting[name]:
                    del container[name]
            place.tuner.set_adapter([], inference_mode=True)
        for home in self._home.values():
            for tensor, data in home:
                tensor.data = data
        for module in self._modules.values():
            module.__dict__.pop("peft_config", None)
            module._hf_peft_config_loaded = False
        self.placed = ()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a table of all weights that a LoRA does not hold, as it should not."""
    loggers = [diffusers.utils.logging, transformers.utils.logging]
    before = [one.get_verbosity() for one in loggers]
    for one in loggers:
        one.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, verbosity in zip(loggers, before, strict=True):
            one.set_verbosity(verbosity)


def _pieces(tuner: Any, name: str) -> list[tuple[Any, Any]]:
    containers = (getattr(tuner, attribute) for attribute in tuner.adapter_layer_names if hasattr(tuner, attribute))
    return [(container, container[name]) for container in containers if name in container]
