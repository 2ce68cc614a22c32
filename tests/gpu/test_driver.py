"""What NVIDIA's driver really says."""

from __future__ import annotations

import pytest
import torch

from imagend.daemon.gpus import Driver

pytestmark = pytest.mark.gpu


def test_the_driver_tells_of_the_gpu_that_pytorch_paints_on() -> None:
    driver = Driver()
    assert driver.look() is True
    assert driver.seen.available, driver.seen.why
    gpu, total = driver.seen.devices[0], torch.cuda.get_device_properties(0).total_memory
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.vram_total_mb == pytest.approx(total / 2**20, rel=0.05)
    assert 0 <= gpu.vram_used_mb <= gpu.vram_total_mb
