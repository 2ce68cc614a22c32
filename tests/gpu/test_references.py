"""On CUDA: references in every memory mode, the same bits where the mode promises it, and nothing left in the base."""

from __future__ import annotations

from pathlib import Path

import adapters
import numpy as np
import pytest
from conftest import REPOSITORY
from engine_conftest import EMBEDDED
from gpu.conftest import GpuPainter, clear
from PIL import Image

from imagend.job import Outcome
from imagend.memory_plan import Mode, Rung

JOB = {
    "prompt": "a red circle",
    "seed": 7,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "width": 256,
    "height": 256,
}


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_every_memory_mode_shows_them(device: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (root / "controlnet").symlink_to(REPOSITORY / "models" / "controlnet")
    adapters.encoder(root / "clip_vision" / "tiny")
    adapters.adapter(root / "ipadapter" / "tiny.safetensors", form)
    pictures = {}
    for number in range(2):
        pictures[f"leona/{number}"] = tmp_path / f"{number}.png"
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures[f"leona/{number}"])
    references = [{"image": name, "strength": 0.8} for name in pictures]
    control = [{"model": "shapes-xl-mask", "image": "leona/0"}]
    found = {}
    for mode in Mode:
        painter = GpuPainter(device, root)
        monkeypatch.setattr(painter.pipelines.ladder, "modes", (mode,))
        for name, fields in (
            ("bare", {}),
            ("one", {"references": references[:1]}),
            ("two", {"references": references, "control": control}),
            ("after", {}),
        ):
            ended = painter.run(tmp_path / f"{mode}-{name}", pictures, **JOB, **fields)
            assert ended.outcome is Outcome.SUCCEEDED, (mode, name, ended.failure)
            assert ended.memory["mode"] == mode
            found[mode, name] = ended.artifacts[0].pixels_sha256
        assert found[mode, "bare"] == found[mode, "after"]
        assert len({found[mode, name] for name in ("bare", "one", "two")}) == 3
        if Rung(mode).exact:
            assert all(found[mode, name] == found[Mode.RESIDENT, name] for name in ("bare", "one", "two"))
        clear(device, [painter])
