"""What NVIDIA's driver says of its GPUs. On a thread of its own: a driver in trouble may not answer for long.

By NVML (nvidia-ml-py), which neither makes a CUDA context nor takes VRAM. Where there is no GPU it is not even loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagend.status import MB, Gpu, Gpus

EVERY_S = 2.0


class Driver:
    """`seen` is what it said last; `devices` is where the kernel shows GPUs."""

    def __init__(self, devices: Path = Path("/dev")) -> None:
        self._devices = devices
        self._ready = False
        self.seen = Gpus(available=False, why="not looked at yet")

    def serve(self) -> None:
        """Look for ever. Where there are no GPUs, none will come."""
        while self.look():
            threading.Event().wait(EVERY_S)

    def look(self) -> bool:
        """Ask once. False if it is of no use to ask again."""
        if not any(self._devices.glob("nvidia[0-9]*")):
            self.seen = Gpus(available=False, why="no NVIDIA GPU here (/dev/nvidia0)")
            return False
        import pynvml  # here: it is as large as our daemon

        try:
            if not self._ready:
                pynvml.nvmlInit()
                self._ready = True
            self.seen = _ask(pynvml)
        except pynvml.NVMLError as error:
            self._ready = False
            self.seen = Gpus(available=False, why=f"NVML: {error}")
        return True


def _ask(nvml: Any) -> Gpus:
    devices = tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    return Gpus(available=bool(devices), driver=str(nvml.nvmlSystemGetDriverVersion()), devices=devices)


def _gpu(nvml: Any, index: int) -> Gpu:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    return Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(gpu)),
        vram_total_mb=memory.total // MB,
        vram_used_mb=memory.used // MB,
        vram_free_mb=memory.free // MB,
        temperature_c=_told(nvml, lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        utilization_percent=_told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
    )


def _told(nvml: Any, ask: Callable[[], int]) -> int | None:
    """Some GPUs, and parts of one (MIG), do not tell everything."""
    try:
        return int(ask())
    except nvml.NVMLError:
        return None
