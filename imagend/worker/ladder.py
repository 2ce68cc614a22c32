"""One device's memory: where its pipeline's weights are, how much there is, what was seen of it. Paints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagend.memory_plan import Experience, Mode
from imagend.worker.gauge import Gauge
from imagend.worker.memory import Placement

MAX_EXPERIENCES = 256


class Ladder:
    def __init__(self, device: str, limit_gb: float | None = None) -> None:
        self.gauge = Gauge(device, limit_gb)
        self.placement = Placement(device)
        # On the CPU the weights are where they always are, in the computer's memory: there is nowhere to move them.
        self.modes = (Mode.RESIDENT,) if self.gauge.device.type == "cpu" else tuple(Mode)
        self.seen: dict[str, Experience] = {}

    def recall(self, known: Mapping[str, Any]) -> None:
        """What the daemon remembers of earlier workers; what this one has seen itself counts more."""
        for key, value in known.items():
            self.seen.setdefault(key, Experience.model_validate(value))

    def learn(self, key: str, experience: Experience) -> None:
        self.seen.pop(key, None)
        self.seen[key] = experience
        while len(self.seen) > MAX_EXPERIENCES:
            del self.seen[next(iter(self.seen))]
