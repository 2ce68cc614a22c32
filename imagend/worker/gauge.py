"""How much memory a device has, may give, and gave at most. Measures; decides nothing.

On a GPU: what PyTorch's allocator has in use (max_memory_allocated); CUDA's own context comes on top of it. On the CPU:
resident memory of this process (proc(5): VmHWM), as far as the machine, its control group and RLIMIT_AS let it grow.
"""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path

import torch

GIB = 1 << 30
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


class Gauge:
    """Of one device. `limit_gb` (GiB) makes a GPU behave as one that has no more."""

    def __init__(self, device: str, limit_gb: float | None = None) -> None:
        self.device = torch.device(device)
        self.total_bytes, self.name = _of_cpu() if self.device.type == "cpu" else _of_cuda(self.device)
        if limit_gb is not None and self.device.type == "cuda" and limit_gb * GIB < self.total_bytes:
            torch.cuda.set_per_process_memory_fraction(limit_gb * GIB / self.total_bytes, self.device)
            self.total_bytes = int(limit_gb * GIB)
        self.told = 0
        """shortages that PyTorch's allocator told us of"""
        self._base = 0

    def available(self, held: int = 0) -> int:
        """Bytes that a job may use, `held` included: what this process holds already and a job may use."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return min(self.total_bytes, int(free) + int(torch.cuda.memory_reserved(self.device)))
        return held + max(0, min(_room()))

    def start(self) -> None:
        """From now on the peak counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # not every container lets us: then the peak is that of all time
            (_PROC / "self/clear_refs").write_text(_RESET_PEAK)
        self._base = _own("VmRSS")

    def peak(self, held: int = 0) -> int:
        """Bytes in use at most since start(); `held` as for available().

        On the CPU it may be too little: what the C library has kept of what was given back before is not seen.
        """
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return held + max(0, _own("VmHWM") - self._base)

    def swallowed(self) -> int:
        """Shortages so far that a library kept to itself: where cuDNN finds no room to work in, PyTorch takes another
        algorithm, with other bits, and stays with it as long as this process lives (ATen/native/cudnn/Conv_v8.cpp)."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self.device).get("num_ooms", 0)) - self.told


def host_room() -> int:
    """Bytes of main memory that this process may still take."""
    return max(0, min(_room()))


def _of_cuda(device: torch.device) -> tuple[int, str]:
    properties = torch.cuda.get_device_properties(device)
    return int(properties.total_memory), str(properties.name)


def _of_cpu() -> tuple[int, str]:
    return _field(_PROC / "meminfo", "MemTotal"), "cpu"


def _room() -> list[int]:
    """Bytes that this process may still take, by each of those who may say no."""
    room = [_field(_PROC / "meminfo", "MemAvailable")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        room.append(limit - _own("VmSize"))
    with contextlib.suppress(OSError, ValueError, IndexError):  # no cgroup v2, or no limit: "max"
        group = _CGROUPS / re.findall(r"^0::/(.*)$", (_PROC / "self/cgroup").read_text(), re.MULTILINE)[0]
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file", 1)
        room.append(limit - used)
    return room


def _own(name: str) -> int:
    return _field(_PROC / "self/status", name)


def _field(path: Path, name: str, unit: int = 1024) -> int:
    """A number of a file with lines of `name: number kB` or `name number`."""
    found = re.search(rf"^{name}:?\s+(\d+)", path.read_text(), re.MULTILINE)
    return int(found[1]) * unit if found else 0
