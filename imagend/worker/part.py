"""One component of a pipeline and its weights: lifted into main memory, poured into a module. It loads nothing.

A module outlives its weights: where another base's component is built alike, its weights are poured into the module
that is there, so that what was compiled for it, or adapted, survives. On a GPU tensors keep their addresses, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_ALIGNED = 64
"""Bytes; so torch allocates. From a mapped file weights come as they lie there, and CPU kernels round by that."""
_SAMPLED = 8
"""tensors of a component that are looked at, and values of each"""
_IRRELEVANT = {"transformers_version", "dtype", "torch_dtype", "architectures"}


class Part:
    """A component as loaded: its module, and its weights, which leave it for `weights` or for another's module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.tensors: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        self.weights: dict[str, torch.Tensor] | None = {name: one.data for name, one in self.tensors.items()}
        """in main memory; None while they are only in a seat, or lost"""
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self._build = type(module), _config(module), {name: _form(tensor) for name, tensor in self.tensors.items()}
        names = list(self.tensors)[:: max(1, len(self.tensors) // _SAMPLED)]
        self._sample = {name: _first(self.tensors[name]).clone() for name in names}

    def fits(self, other: Part) -> bool:
        """Whether the weights of one can be poured into the module of the other."""
        return self._build == other._build

    def empty(self) -> None:
        """Let go of what the module holds; the module stays."""
        for tensor in self.tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def is_intact(self, frame: Part, storage: tuple[torch.dtype, ...] = ()) -> bool:
        """Whether `frame` holds this part's weights, by a sample; what is of a `storage` type is not compared."""
        names = [name for name in self._sample if frame.tensors[name].dtype not in storage]
        found = [_first(frame.tensors[name]) for name in names]
        if any(one.is_meta or one.shape != self._sample[name].shape for name, one in zip(names, found, strict=True)):
            return False
        if any(one.dtype != self._sample[name].dtype for name, one in zip(names, found, strict=True)):
            return False
        return all(torch.equal(one.cpu(), self._sample[name]) for name, one in zip(names, found, strict=True))


class Seat:
    """A place in the pipeline: a module (`frame`'s), and whose weights are in it (`filling`; None: nobody's)."""

    def __init__(self, part: Part) -> None:
        self.frame = part
        self.filling: Part | None = None
        self.take(part)

    def take(self, part: Part) -> bool:
        """Let a part sit here. False if the module had to make way for the part's own."""
        if self.filling is part:
            return True
        stays = self.frame.fits(part)
        if not stays:
            self.frame.empty()
            self.frame = part
        self._pour(part)
        return stays

    def lift(self, keep: bool) -> None:
        """Take the weights out, into main memory or nowhere. On a GPU the module keeps its place, to be poured into."""
        if self.filling is None:
            return
        part, self.filling = self.filling, None
        if not keep:
            part.weights = None
        elif part.weights is None:
            mapped = Mapped()
            part.weights = {name: mapped.own(tensor.data.cpu()) for name, tensor in self.frame.tensors.items()}
        for tensor in self.frame.tensors.values():
            if tensor.device.type == "cpu":
                tensor.data = torch.empty(0, dtype=tensor.dtype)

    def _pour(self, part: Part) -> None:
        assert part.weights is not None
        self.filling = None
        copied = False
        for name, tensor in self.frame.tensors.items():
            if tensor.device.type == "cpu":
                tensor.data = part.weights[name]
            else:
                tensor.data.copy_(part.weights[name])
                copied = True
        if not copied:
            part.weights = None
        if part is not self.frame:
            part.empty()
        self.filling = part


class Mapped:
    """Which weights lie in files that are mapped (mmap(2)), as of now."""

    def __init__(self) -> None:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) .*\.(?:safetensors|sft)(?: \(deleted\))?$", line) for line in lines]
        self._ranges = [(int(one[1], 16), int(one[2], 16)) for one in found if one]

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or its copy in memory of ours where it lies in a file, which may change, or unevenly."""
        address = tensor.data_ptr()
        mapped = any(begin <= address < end for begin, end in self._ranges)
        return tensor.clone() if mapped or address % _ALIGNED else tensor


def own(module: Any) -> None:
    """Take a module's weights out of mapped files. The same weights then give the same bits, from whatever file."""
    mapped = Mapped()
    for tensor in module.state_dict(keep_vars=True).values():
        tensor.data = mapped.own(tensor.data)


def _config(module: Any) -> dict[str, Any]:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {key: value for key, value in config.items() if key not in _IRRELEVANT and not key.startswith("_")}


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _first(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach()
    while data.ndim > 1 and len(data):
        data = data[0]
    return data.reshape(-1)[:_SAMPLED]
