"""How much memory there is, as the machine, a control group and a limit of the process say it in their files."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from imagend.worker import gauge  # noqa: E402
from imagend.worker.gauge import Gauge  # noqa: E402

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 GiB, 8 of them free; this process has 1 GiB in memory and 4 in its address space. No limits."""
    monkeypatch.setattr(gauge, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(gauge, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable:  {8 * MIB} kB\n")
    status = f"Name:\tpython\nVmSize:\t {4 * MIB} kB\nVmHWM:\t {2 * MIB} kB\nVmRSS:\t {MIB} kB\n"
    (tmp_path / "proc/self/status").write_text(status)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu:/old\n0::/system.slice/imagend.service\n")
    return tmp_path


def in_group(machine: Path, limit: str) -> None:
    group = machine / "cgroup/system.slice/imagend.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{3 << 30}\n")
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {1 << 30}\nactive_file 9\n")


def limited(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (size, resource.RLIM_INFINITY))


def test_the_machine_s_free_memory_and_what_is_held_already_are_available(machine: Path) -> None:
    assert Gauge("cpu").total_bytes == 16 << 30
    assert Gauge("cpu").available() == 8 << 30
    assert Gauge("cpu").available(held=5) == (8 << 30) + 5


@pytest.mark.parametrize(("limit", "available"), [("max", 8), (f"{6 << 30}", 4), (f"{2 << 30}", 0), (f"{64 << 30}", 8)])
def test_a_control_group_says_no_first(machine: Path, limit: str, available: int) -> None:
    in_group(machine, limit)
    assert Gauge("cpu").available() == available << 30


def test_of_a_gpu_s_shortages_those_that_nobody_told_of_were_swallowed(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge("cpu")
    assert gauge.swallowed() == 0
    gauge.device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})  # nothing has been allocated yet
    assert gauge.swallowed() == 0
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": 3})
    gauge.told = 2
    assert gauge.swallowed() == 1


def test_a_limit_on_the_address_space_says_no_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 5 << 30)
    assert Gauge("cpu").available() == 1 << 30


def test_the_peak_is_what_the_process_grew_by_since_the_start(machine: Path) -> None:
    cpu = Gauge("cpu")
    cpu.start()
    assert (machine / "proc/self/clear_refs").read_text() == "5"
    assert cpu.peak(held=7) == (1 << 30) + 7


def test_a_real_peak_is_seen() -> None:
    cpu = Gauge("cpu")
    cpu.start()
    assert torch.ones(16 * MIB).numel() == 16 * MIB  # 4 bytes each
    assert 63 * MIB < cpu.peak() < 96 * MIB
    cpu.start()
    assert cpu.peak() < 32 * MIB


class Cuda:
    """What torch.cuda says of a GPU of 24 GiB, of which others use 4 and we hold 3."""

    fraction: float | None = None

    def get_device_properties(self, _: Any) -> Any:
        return type("Properties", (), {"total_memory": 24 << 30, "name": "a GPU"})

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        return 17 << 30, 24 << 30

    def memory_reserved(self, _: Any) -> int:
        return 3 << 30

    def set_per_process_memory_fraction(self, fraction: float, _: Any) -> None:
        self.fraction = fraction


@pytest.mark.parametrize(
    ("limit_gb", "total", "available", "fraction"),
    [(None, 24, 20, None), (11.0, 11, 11, 11 / 24), (32.0, 24, 20, None)],
)
def test_a_gpu_may_be_made_smaller(
    monkeypatch: pytest.MonkeyPatch, limit_gb: float | None, total: int, available: int, fraction: float | None
) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = Gauge("cuda:0", limit_gb)
    assert (gpu.total_bytes, gpu.available()) == (total << 30, available << 30)
    assert cuda.fraction == fraction
