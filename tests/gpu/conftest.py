"""Fixtures of the CUDA tests: workers in this process on a GPU, and models with random weights that are large enough.

IMAGEND_TEST_DEVICE=cpu runs those that measure no video memory on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")

from engine_conftest import Painter  # noqa: E402

from benchmarks.stock import Stock  # noqa: E402
from imagend.messages import WorkerSettings  # noqa: E402
from imagend.models import Models  # noqa: E402
from imagend.worker.main import Worker  # noqa: E402
from imagend.worker.pipelines import Pipelines, StableDiffusionXLPipeline  # noqa: E402

GIB = 1 << 30
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.gpu)


class GpuPainter(Painter):
    """A worker on a device, in this process, with settings."""

    def __init__(self, device: str, root: Path, **settings: Any) -> None:
        super().__init__(root)
        self.pipelines = Pipelines(device, Models(root), WorkerSettings(**settings))
        self.worker = Worker(self.pipelines, self._say, interval_s=0.0)


@pytest.fixture(scope="session")
def device() -> str:
    wanted = os.environ.get("IMAGEND_TEST_DEVICE", "cuda:0")
    if wanted != "cpu" and not torch.cuda.is_available():
        pytest.skip(
            f"PyTorch {torch.__version__} sees no CUDA device; docs/gpu.md: how to run this on a machine with one"
        )
    return wanted


@pytest.fixture
def vram(device: str) -> Callable[[], int]:
    """Bytes that PyTorch's allocator has in use, after all that nobody uses has been given back."""
    if device == "cpu":
        pytest.skip("measures video memory")

    def used() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(device))

    return used


@pytest.fixture(scope="session")
def stock(device: str, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """On a GPU bases of SDXL's widths with few layers: 1.6 GB each, so that where weights lie makes a difference."""
    model = "slim" if device != "cpu" else "shapes-xl"
    stock = Stock(tmp_path_factory.mktemp("models"), model, torch.float16)
    stock.folder(0)
    stock.folder(1)
    return stock


@pytest.fixture
def painters(device: str, stock: Stock) -> Iterator[Callable[..., GpuPainter]]:
    """Makes workers, one at a time; nothing of them is left on the device, nor a limit."""
    made: list[GpuPainter] = []

    def make(**settings: Any) -> GpuPainter:
        clear(device, made)
        made.append(GpuPainter(device, stock.root, **settings))
        return made[-1]

    yield make
    clear(device, made)


def clear(device: str, made: list[GpuPainter]) -> None:
    for painter in made:
        painter.pipelines.switch.forget()
    made.clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.fixture
def job(device: str, stock: Stock) -> dict[str, Any]:
    """A quick one, on the stock's first base."""
    side = 512 if device != "cpu" else 64
    shape = {"width": side, "height": side, "num_inference_steps": 4, "guidance_scale": 4.0}
    return {
        "model": stock.folder(0),
        "prompt": "a (red)1.3 lighthouse",
        "negative_prompt": "blurry",
        "seed": 7,
        **shape,
    }


@pytest.fixture
def plain(device: str, stock: Stock) -> Iterator[Any]:
    """diffusers alone, on the same weights and device, in the dtype that imagend paints in there."""
    dtype = torch.float16 if device != "cpu" else torch.float32
    path = stock.root / "diffusers" / stock.folder(0)
    pipe = StableDiffusionXLPipeline.from_pretrained(path, dtype=dtype, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if device == "cpu":
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()  # mapped files are not aligned, which changes a CPU's bits
    yield pipe.to(device)
    del pipe
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
