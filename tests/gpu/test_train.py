"""Training on a GPU: in half precision, in video memory that is given back, and with too little of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Trainer, circles

from imagend.messages import MemoryShort, Progress


@pytest.fixture
def dataset(device: str, tmp_path: Path) -> Path:
    return circles(tmp_path / "datasets" / "circles", 4, size=512 if device != "cpu" else 64)


@pytest.fixture
def wanted(job: dict[str, Any]) -> dict[str, Any]:
    own = {"max_train_steps": 8, "learning_rate": 1e-4, "rank": 4, "seed": 1, "checkpointing_steps": 2}
    return {"model": job["model"], "resolution": job["width"], "train_batch_size": 2, **own}


def losses(draft: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (draft / "loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_base_is_bit_equal_afterwards(
    painters: Callable[..., Any],
    device: str,
    dataset: Path,
    job: dict[str, Any],
    wanted: dict[str, Any],
    tmp_path: Path,
    precision: str,
) -> None:
    if device == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    painter = painters()
    before = painter.run(tmp_path / "before", **job).artifacts[0].pixels_sha256
    ended = Trainer(painter, dataset).run(tmp_path / "draft", **wanted, mixed_precision=precision)
    assert ended.outcome == "succeeded", ended.failure
    assert all(loss == loss and loss > 0 for loss in losses(tmp_path / "draft"))
    assert painter.run(tmp_path / "after", **job).artifacts[0].pixels_sha256 == before


def test_its_memory_is_given_back(
    painters: Callable[..., Any],
    vram: Callable[[], int],
    dataset: Path,
    job: dict[str, Any],
    wanted: dict[str, Any],
    tmp_path: Path,
) -> None:
    painter = painters()
    painter.run(tmp_path / "before", **job)
    trainer = Trainer(painter, dataset)
    trainer.run(tmp_path / "first", **wanted)  # what libraries keep for good, they have then
    before = vram()
    assert trainer.run(tmp_path / "second", **wanted, train_text_encoder=True).outcome == "succeeded"
    assert vram() <= before + (16 << 20)


def test_a_shortage_is_answered_with_gradient_checkpointing(
    painters: Callable[..., Any],
    vram: Callable[[], int],
    dataset: Path,
    wanted: dict[str, Any],
    tmp_path: Path,
) -> None:
    """With a limit between what both need."""
    painter = painters()
    plain = Trainer(painter, dataset).run(tmp_path / "plain", **wanted)
    sparing = Trainer(painter, dataset).run(tmp_path / "sparing", **wanted, gradient_checkpointing=True)
    peaks = [ended.memory["peak_bytes"] for ended in (plain, sparing)]
    assert peaks[1] < peaks[0]
    painter = painters(vram_limit_gb=sum(peaks) / 2 / (1 << 30))
    ended = Trainer(painter, dataset).run(tmp_path / "short", **wanted)
    assert ended.outcome == "succeeded", ended.failure
    assert ended.engine["training"]["gradient_checkpointing"]
    assert [one.then for one in painter.said if isinstance(one, MemoryShort)] == ["gradient checkpointing"]


def test_told_to_stop_it_goes_on_where_it_was(
    painters: Callable[..., Any], dataset: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    painter = painters()
    trainer = Trainer(painter, dataset)

    def hear(message: Any) -> None:
        if isinstance(message, Progress) and (message.stage, message.step) == ("training", 4):
            painter.worker.stop()

    painter.hear = hear
    assert trainer.run(tmp_path / "draft", **wanted).outcome == "cancelled"
    painter.hear = None
    assert trainer.run(tmp_path / "draft", **wanted).outcome == "succeeded"
    assert min(one.step for one in painter.said if isinstance(one, Progress) and one.stage == "training") == 5
    trainer.run(tmp_path / "whole", **wanted)
    assert losses(tmp_path / "draft") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)
