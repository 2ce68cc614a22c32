"""Encoded texts in main memory, by all that decides their bits; the least recently used go first. Bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

Encoded = tuple[torch.Tensor, ...]


class PromptCache:
    """A hit is the same bits: what is kept is a copy. Who is given it copies it again, or leaves it as it is."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[Hashable, Encoded] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def find(self, key: Hashable) -> Encoded | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Hashable, encoded: Encoded) -> None:
        size = _bytes(encoded)
        if size > self._limit_bytes:  # it would drive out all others, and then itself
            return
        self.bytes += size - _bytes(self._kept.pop(key, ()))
        self._kept[key] = tuple(tensor.detach().to("cpu", copy=True) for tensor in encoded)
        while self.bytes > self._limit_bytes:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0


def _bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in encoded)
