"""On CUDA: each memory mode needs less than resident and paints what it promises; a limit is kept, by climbing.

The last file: after a shortage cuDNN may keep to other algorithms, with other bits, for as long as this process lives.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu_parts import failed_before
from benchmarks.stock import Stock
from imagend.job import Outcome
from imagend.memory_plan import Experience, Mode, Rung, Stage, label
from imagend.messages import Known, MemoryShort, Progress

GIB = 1 << 30
PAINTED = (Stage.ENCODING, Stage.PAINTING, Stage.DECODING)


def known_as(ended: Any, experience: dict[str, Any], limit_bytes: int | None = None) -> Known:
    """What a daemon would remember of the same work, on a device of another size if there is a limit."""
    name, total, *rest = ended.memory["seen"]["key"].split("|")
    total = total if limit_bytes is None else str(limit_bytes >> 20)
    return Known(memory={"|".join([name, total, *rest]): experience})


def optimist(model: str) -> dict[str, Any]:
    """As if everything fitted: the first attempt is then resident, whatever the limit."""
    return Experience(model=model, peaks={label(stage, Rung()): 1 for stage in PAINTED}).model_dump()


def test_modes_need_less_and_less_and_paint_what_they_promise(
    painters: Any, stock: Stock, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    resident = painters().run(tmp_path / "resident", **job)
    peaks: dict[Mode, int] = {Mode.RESIDENT: resident.memory["peak_bytes"]}
    assert resident.memory["mode"] == "resident"
    for mode in list(Mode)[1:]:
        painter = painters()
        painter.known = known_as(resident, failed_before(Rung(mode), job["width"], job["model"]))
        for attempt in ("first", "second"):
            ended = painter.run(tmp_path / f"{mode}-{attempt}", **job)
            assert ended.outcome is Outcome.SUCCEEDED, ended.failure
            assert (ended.memory["mode"], ended.memory["retries"]) == (mode, [])
            same = ended.artifacts[0].pixels_sha256 == resident.artifacts[0].pixels_sha256
            assert same == ended.memory["exact"] == Rung(mode).exact
        image = Image.open(tmp_path / f"{mode}-first" / ended.artifacts[0].file)
        assert np.asarray(image).std() > 1
        peaks[mode] = ended.memory["peak_bytes"]
    assert peaks[Mode.MODEL_OFFLOAD] < peaks[Mode.RESIDENT]
    assert peaks[Mode.SEQUENTIAL] <= peaks[Mode.MODEL_OFFLOAD]


def test_a_limit_is_kept_and_planned_for(
    painters: Any, job: dict[str, Any], vram: Callable[[], int], device: str, tmp_path: Path
) -> None:
    resident = painters().run(tmp_path / "resident", **job)
    limit = resident.memory["peak_bytes"] - (256 << 20)
    painter = painters(vram_limit_gb=limit / GIB)
    torch.cuda.reset_peak_memory_stats(device)
    ended = painter.run(tmp_path / "limited", **job)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.memory["mode"] != "resident"
    assert torch.cuda.max_memory_reserved(device) <= limit
    same = ended.artifacts[0].pixels_sha256 == resident.artifacts[0].pixels_sha256
    assert same or not ended.memory["exact"]


def test_a_real_shortage_climbs_and_paints_the_same_bits(
    painters: Any, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    resident = painters().run(tmp_path / "resident", **job)
    weights = int(resident.memory["seen"]["key"].split("|")[4]) << 20
    limit = weights + (128 << 20)  # far less than a whole picture's decoding takes
    painter = painters(vram_limit_gb=limit / GIB)
    painter.known = known_as(resident, optimist(job["model"]), limit)
    ended = painter.run(tmp_path / "short", **job)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.memory["retries"]
    assert "out of memory" in ended.memory["retries"][0]["said"]
    assert next(one.rung for one in painter.said if isinstance(one, MemoryShort)) == "resident"
    same = ended.artifacts[0].pixels_sha256 == resident.artifacts[0].pixels_sha256
    assert same or not ended.memory["exact"]
    again = painter.run(tmp_path / "again", **job)  # learned: no shortage any more
    assert again.memory["retries"] == []
    assert again.memory["mode"] != "resident"


def test_a_shortage_while_decoding_does_not_paint_again(
    painters: Any, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    large = job | {"width": 1024, "height": 1024}
    resident = painters().run(tmp_path / "resident", **large)
    peaks = resident.memory["seen"]["peaks"]
    painting, decoding = (peaks[label(stage, Rung())] for stage in (Stage.PAINTING, Stage.DECODING))
    assert decoding > painting, "this model's VAE needs no more than its UNet: the test needs another one"
    limit = (painting + decoding) // 2
    painter = painters(vram_limit_gb=limit / GIB)
    painter.known = known_as(resident, optimist(job["model"]), limit)
    ended = painter.run(tmp_path / "short", **large)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert {retry["stage"] for retry in ended.memory["retries"]} == {"decoding"}
    steps = [one.step for one in painter.said if isinstance(one, Progress) and one.stage == "painting"]
    assert steps == sorted(set(steps))


def test_what_fits_nowhere_fails_with_advice_and_the_next_job_paints(
    painters: Any, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    small = job | {"width": 256, "height": 256}
    before = painters().run(tmp_path / "before", **small)
    painter = painters(vram_limit_gb=0.7)
    ended = painter.run(tmp_path / "large", **job | {"width": 2048, "height": 2048, "num_inference_steps": 1})
    assert ended.failure is not None
    assert ended.failure.error.code == "OUT_OF_MEMORY"
    assert "2048x2048" in ended.failure.error.message
    after = painter.run(tmp_path / "after", **small)
    assert after.outcome is Outcome.SUCCEEDED, after.failure
    same = after.artifacts[0].pixels_sha256 == before.artifacts[0].pixels_sha256
    assert same or not after.memory["exact"]


@pytest.mark.parametrize("mode", [Mode.MODEL_OFFLOAD, Mode.GROUP_OFFLOAD])
def test_a_mode_that_is_taken_back_holds_no_video_memory(
    painters: Any, stock: Stock, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path, mode: Mode
) -> None:
    resident = painters().run(tmp_path / "resident", **job)
    painter = painters()
    empty = vram()
    painter.known = known_as(resident, failed_before(Rung(mode), job["width"], job["model"]))
    painter.run(tmp_path / "offloaded", **job)
    painter.pipelines.ladder.placement.release()
    painter.pipelines.prompts.clear()
    gc.collect()
    assert vram() - empty < 64 << 20
