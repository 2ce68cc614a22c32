"""Which lane a job goes by: each has workers of its own, and none waits for another's. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from imagend.job import Job
from imagend.upscaling import LANCZOS, is_lanczos

NETWORK = "network"
"""The device of the workers that fetch: no device at all."""
HOST = "host"
"""That of the workers of the lane CPU: of all devices only the CPU, whatever GPUs there are."""
_OF_DEVICES = {NETWORK: "fetch", HOST: "cpu"}


class Lane(enum.StrEnum):
    """PAINT: workers with a device. CPU: workers beside them, for what needs no GPU; without any, the others do it.
    FETCH: processes that alone know the network, each started for one job. TRAIN: has no workers of its own, but those
    of PAINT, where painting leaves them time (imagend.daemon.giving_way)."""

    PAINT = "paint"
    CPU = "cpu"
    FETCH = "fetch"
    TRAIN = "train"


def lane_by(kind: object, upscaler: object, default_upscaler: str = LANCZOS, mask: object = None) -> Lane:
    """Of a job, by what stands in its file, and in config.yaml where it names no upscaler: Lanczos,
    preprocessors and masks need no GPU, but for those masks that words name."""
    if isinstance(kind, str) and kind in (Lane.FETCH, Lane.TRAIN):
        return Lane(kind)
    if kind == "preprocess":
        return Lane.CPU
    if kind == "mask":
        return Lane.PAINT if _by_words(mask) else Lane.CPU
    by = default_upscaler if upscaler is None else upscaler
    return Lane.CPU if kind == "upscale" and isinstance(by, str) and is_lanczos(by) else Lane.PAINT


def _by_words(mask: object) -> bool:
    """Of the field as it stands in a file, or as it was read."""
    return (mask.get("find") if isinstance(mask, Mapping) else getattr(mask, "find", None)) is not None


def lane_of(job: Job, default_upscaler: str = LANCZOS) -> Lane:
    return lane_by(job.kind, getattr(job.spec, "upscaler", None), default_upscaler, getattr(job.spec, "mask", None))


def lane_at(device: str) -> Lane:
    """Of a worker, by its device."""
    return Lane(_OF_DEVICES.get(device, "paint"))
