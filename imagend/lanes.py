"""Which lane a job goes by: each has workers of its own, and none waits for another's. Pure."""

from __future__ import annotations

import enum

NETWORK = "network"
"""The device of the workers that fetch: no device at all."""


class Lane(enum.StrEnum):
    """PAINT: workers with a device. FETCH: processes that alone know the network, each started for one job."""

    PAINT = "paint"
    FETCH = "fetch"


def lane_of(kind: object) -> Lane:
    """Of a job, by its kind as its file has it."""
    return Lane.FETCH if kind == "fetch" else Lane.PAINT


def lane_at(device: str) -> Lane:
    """Of a worker, by its device."""
    return Lane.FETCH if device == NETWORK else Lane.PAINT
