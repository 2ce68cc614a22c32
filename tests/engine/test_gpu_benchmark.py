"""benchmarks/gpu.py in small, on the CPU: every part but those that need CUDA runs through real workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import failed_before
from imagend.memory_plan import Experience, Mode, Rung, Work, plan


def measured(tmp_path: Path, *parts: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by part."""
    out = tmp_path / "out.jsonl"
    options = ["--device", "cpu", "--model", "shapes-xl", "--size", "64", "--steps", "1"]
    gpu.main([*parts, *options, "--models", str(tmp_path / "models"), "--out", str(out)])
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["part"], []).append(row)
    return rows


def test_folder_and_single_file_are_loaded_and_paint_the_same(tmp_path: Path) -> None:
    rows = measured(tmp_path, "load", "caps")
    assert [(row["loaded from"], row["same bits"]) for row in rows["load"]] == [
        ("diffusers folder", True),
        ("single file", True),
    ]
    assert all(row["first job, s"] >= row["model loaded, s"] > 0 for row in rows["load"])
    assert all(row["main memory, GB"] > 0.1 and row["peak, GB"] > 0 for row in rows["load"])
    assert "CUDA" in rows["caps"][0]["card, GB"]
    assert {row["made"] for row in rows["made"]} == {"random-shapes-xl-0", "random-shapes-xl.safetensors"}


def test_an_edit_is_measured_stage_by_stage(tmp_path: Path) -> None:
    *edits, again = measured(tmp_path, "edit")["edit"]
    stages = {"masking, s", "encoding, s", "denoising and decoding, s", "compositing, s"}
    assert [row["picture"] for row in edits] == ["64x64"] * 4 + ["128x128"] * 2
    assert all(stages <= row.keys() for row in edits)
    assert again["bits as before"]


def test_a_training_step_is_measured_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    rows = measured(tmp_path, "train")["train"]
    assert len(rows) == 4
    assert all(row["step, s"] > 0 and row["peak, GB"] > 0 and row["bits as before"] for row in rows)
    assert rows[3]["parameters"] > rows[0]["parameters"] == rows[2]["parameters"]


def test_a_rung_is_measured_in_a_worker_that_was_told_that_the_others_failed(tmp_path: Path) -> None:
    rows = measured(tmp_path, "modes")["modes"]
    assert [(row["memory mode"], row["promised"], row["bits as resident"]) for row in rows] == [
        ("resident", True, True),
        ("resident, VAE in tiles of 32", False, False),
    ]


@pytest.mark.parametrize("rung", [*map(Rung, Mode), Rung(Mode.RESIDENT, 512)])
def test_on_a_gpu_each_rung_is_planned_that_is_to_be_measured(rung: Rung) -> None:
    """What the workers are told makes their planner choose it, on a device where all would fit."""
    work = Work(
        width=1024,
        height=1024,
        batch=2,
        text_encoder_bytes=(250 << 20, 1400 << 20),
        unet_bytes=5 << 30,
        vae_bytes=170 << 20,
        layer_bytes=50 << 20,
        unet_channels=320,
        unet_itemsize=2,
        vae_channels=256,
        vae_itemsize=2,
    )
    experience = Experience.model_validate(failed_before(rung, 1024, "it"))
    assert plan(work, 140 << 30, tuple(Mode), experience) == rung


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"cuda:0.*no CUDA device.*docs/gpu\.md"):
        gpu.main([])
