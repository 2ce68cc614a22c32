"""Detectors on a GPU: there only while they look, and in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")

from engine_conftest import REF  # noqa: E402

from benchmarks.stock import Stock  # noqa: E402
from imagend.messages import Run  # noqa: E402
from imagend.models import Models  # noqa: E402
from imagend.worker import detect  # noqa: E402
from imagend.worker.detect import Detectors, Found  # noqa: E402
from imagend.worker.main import Context  # noqa: E402

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


def find(by: Detectors, painter: Any) -> Found:
    context = Context(Run(job=REF, kind="mask", spec={}, folder="/nowhere"), painter.pipelines, painter._say, 0.0)
    return by.find(NOISE, ("the car", "a dog"), 0.5, 0.5, context)


@pytest.fixture
def root(stock: Stock) -> Path:
    if not (stock.root / "detection").is_dir():
        detectors.save(stock.root)
    return stock.root


def test_they_find_what_the_cpu_finds_and_leave_the_device(
    painters: Any, root: Path, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    painter = painters()
    painter.run(tmp_path, **job)
    before = vram()
    found = find(painter.pipelines.detectors, painter)
    assert vram() == before
    expected = find(Detectors(Models(root), "cpu", lambda: None), painter)
    assert sorted(found.scores) == pytest.approx(sorted(expected.scores), abs=0.01)
    assert (np.asarray(found.mask) == np.asarray(expected.mask)).mean() > 0.95


def test_a_shortage_sends_the_pipeline_away_and_it_comes_back_the_same(
    painters: Any, root: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = painters()
    before = painter.run(tmp_path / "before", **job)
    outlined, devices = detect._outlined, []

    def scarce(*args: Any) -> Found:
        devices.append(args[-2].type)
        if len(devices) == 1:
            torch.empty(1 << 50, device=args[-2])  # a real one
        made: Found = outlined(*args)
        return made

    monkeypatch.setattr(detect, "_outlined", scarce)
    find(painter.pipelines.detectors, painter)
    assert len(devices) == 2
    assert painter.pipelines.ladder.placement.mode is None
    after = painter.run(tmp_path / "after", **job)
    assert after.artifacts[0].pixels_sha256 == before.artifacts[0].pixels_sha256
