"""Which pictures a step of training sees, and what is drawn for it: all of it follows from seed and step alone.

So a training that was interrupted goes on with the very pictures and noise that it would have had. What is drawn is
drawn on the CPU: the same on every device.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch

from imagend.worker.dataset import Example


def generator(seed: int, *what: object) -> torch.Generator:
    """For one purpose, such as ("step", 3)."""
    text = "/".join(map(str, (seed, *what)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


class Batches:
    """Epochs of batches; each batch of one bucket. The last of a bucket in an epoch may be smaller."""

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._buckets: dict[object, list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            self._buckets[example.bucket] += [index] * example.entry.repeats
        self.per_epoch = sum(-(-len(members) // size) for members in self._buckets.values())
        self._epoch, self._batches = -1, list[list[int]]()

    def at(self, number: int) -> list[int]:
        """The examples of a batch, counted from the beginning of the training."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        drawn = generator(self._seed, "epoch", epoch)
        batches = []
        for _, members in sorted(self._buckets.items()):
            order = [members[index] for index in torch.randperm(len(members), generator=drawn).tolist()]
            batches += [order[first : first + self._size] for first in range(0, len(order), self._size)]
        return [batches[index] for index in torch.randperm(len(batches), generator=drawn).tolist()]
