"""The embedded model paints what it is asked for; its score and its training run as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_conftest import EMBEDDED, Painter
from PIL import Image


@pytest.fixture(scope="module")
def score() -> Any:
    sys.path.insert(0, str(EMBEDDED))
    try:
        import score
    finally:
        sys.path.remove(str(EMBEDDED))
    return score


@pytest.mark.parametrize(("size", "least"), [(128, 0.8), (192, 0.8), (64, 0.5)])
def test_pictures_show_background_colour_and_shape(
    painter: Painter, score: Any, tmp_path: Path, size: int, least: float
) -> None:
    asked = score.questions(24)
    answers = []
    for number, question in enumerate(asked):
        fields = {"prompt": question.prompt, "width": size, "height": size, "seed": number}
        painter.run(tmp_path / str(number), **fields, num_inference_steps=12, guidance_scale=4.0)
        answers.append(score.analyse(Image.open(tmp_path / str(number) / "0000.png")))
    right = score.score(answers, asked)
    assert right["background"] == 1.0
    assert right["colour"] >= 0.9
    assert right["all_three"] >= least


def test_the_metric_reads_properly_drawn_pictures(score: Any) -> None:
    assert score.ground_truth(score.questions(60), 128)["all_three"] == 1.0


def test_score_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, str(EMBEDDED / "score.py"), "--json", "--count", "6", "--num-inference-steps", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all_three"] >= 0.5


def test_training_runs_from_beginning_to_end_in_small(tmp_path: Path) -> None:
    command = [sys.executable, str(EMBEDDED / "train.py"), "--out", str(tmp_path / "model"), "--scale", "0.001"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model" / "model_index.json").exists()
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").exists()
