"""The same job gives the same picture, whatever was painted before it, whatever went wrong, and in a fresh worker."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import siblings
import torch
from diffusers import EulerAncestralDiscreteScheduler
from engine_conftest import EMBEDDED, REF, Painter
from PIL import Image
from prompts import LONG, ONE, THREE, save
from safetensors.torch import save_file

from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.messages import Progress

SIZE = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
PROMPTS = {"prompt": "a large red circle on a blue background", "negative_prompt": "a green star"}
JOB = SIZE | PROMPTS | {"scheduler": "Euler a", "seed": 11, "count": 2}


@pytest.fixture(scope="module")
def root(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/: the embedded model, a sibling, the same as one file, one cut off, a VAE, embeddings and LoRAs."""
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    sibling = siblings.folder(root / "diffusers" / "sibling", seed=1)
    siblings.checkpoint(sibling, root / "checkpoints" / "single.safetensors")
    shutil.copytree(sibling / "vae", root / "vae" / "other")
    broken = root / "diffusers" / "broken"
    shutil.copytree(sibling, broken)
    (weights,) = (broken / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    for inversion in (ONE, THREE):
        save(inversion, root / "embeddings")
    (root / "loras").mkdir()
    for name, parts in {"painting": ("unet",), "reading": ("text_encoder", "text_encoder_2")}.items():
        save_file(a_lora(plain, parts), root / "loras" / f"{name}.safetensors")
    return root


def a_lora(pipe: Any, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of rank 4, on the queries of all attention layers."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for part in parts:
        for path, module in getattr(pipe, part).named_modules():
            if path.endswith(("to_q", "q_proj")):
                width = module.weight.shape
                tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(4, width[1], generator=generator) * 0.3
                tensors[f"{part}.{path}.lora_B.weight"] = torch.randn(width[0], 4, generator=generator) * 0.3
    return tensors


@pytest.fixture(scope="module")
def worker(root: Path) -> Painter:
    return Painter(root)


@pytest.fixture(scope="module")
def expected(plain: Any) -> list[np.ndarray]:
    """The pictures of JOB, by plain diffusers."""
    plain.scheduler = EulerAncestralDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    call = SIZE | PROMPTS
    return [
        np.asarray(plain(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0]) for seed in (11, 12)
    ]


@pytest.fixture
def _many_modes(worker: Painter, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, with room enough."""
    ladder = worker.pipelines.ladder
    monkeypatch.setattr(ladder, "modes", tuple(Mode))
    monkeypatch.setattr(ladder, "seen", {})
    monkeypatch.setattr(ladder.gauge, "available", lambda held=0: 8 << 30)
    yield
    ladder.placement.release()


def pixels(folder: Path, index: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{index:04d}.png").convert("RGB"))


def paints(worker: Painter, folder: Path, expected: list[np.ndarray]) -> bool:
    """Whether JOB gives the expected pictures."""
    ended = worker.run(folder, **JOB)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return all((pixels(folder, index) == one).all() for index, one in enumerate(expected))


def another(**fields: Any) -> Callable[[Painter, Path], None]:
    """A job that succeeds with other pixels."""

    def paint(worker: Painter, folder: Path) -> None:
        ended = worker.run(folder, **JOB | fields)
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure

    return paint


def cancelled(worker: Painter, folder: Path) -> None:
    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and message.step == 2:
            worker.worker.cancel(REF)

    worker.hear = cancel
    try:
        assert worker.run(folder, **JOB | {"prompt": "a zorp"}).outcome is Outcome.CANCELLED
    finally:
        worker.hear = None


def failing(**fields: Any) -> Callable[[Painter, Path], None]:
    def fail(worker: Painter, folder: Path) -> None:
        assert worker.run(folder, **JOB | fields).outcome is Outcome.FAILED

    return fail


def short_of_memory(part: str, last: Mode) -> Callable[[Painter, Path], None]:
    """A job of another size climbs the ladder until a mode is reached."""

    def climb(worker: Painter, folder: Path) -> None:
        pipe, placement = worker.pipelines.get("shapes-xl", lambda: None), worker.pipelines.ladder.placement
        worker.pipelines.prompts.clear()

        def exhausted(*_: Any) -> None:
            if placement.mode is not last:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        hook = getattr(pipe, part).register_forward_pre_hook(exhausted)
        try:
            ended = worker.run(folder, **JOB | {"prompt": "a zorp", "width": 128})
        finally:
            hook.remove()
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure
        assert ended.memory["mode"] == last.value

    return climb


DISTURBANCES: dict[str, Callable[[Painter, Path], None]] = {
    "the same job": another(),
    "another prompt": another(prompt="a blue star", negative_prompt=None),
    "a long weighted prompt": another(prompt=f"({LONG}:0.5)", prompt_syntax="a1111", clip_skip=1),
    "another scheduler": another(scheduler="DPM++ 2M Karras"),
    "another size": another(width=128, height=96),
    "embeddings": another(prompt="a zorp", negative_prompt="embedding:glimb"),
    "another base": another(model="sibling"),
    "another base of a single file": another(model="single"),
    "another VAE": another(vae="other"),
    "another base with embeddings": another(model="sibling", prompt="glimb"),
    "a LoRA": another(loras=[{"name": "painting", "weight": 0.7}]),
    "a LoRA for the text encoders": another(loras=[{"name": "reading", "weight": 1.5}]),
    "LoRAs with an embedding on another base": another(
        model="sibling", prompt="a zorp", loras=[{"name": "reading", "weight": -1.0}, {"name": "painting"}]
    ),
    "a cancelled job": cancelled,
    "a base that cannot be loaded": failing(model="broken"),
    "a job with a missing LoRA": failing(loras=[{"name": "painting"}, {"name": "gone"}]),
    "a job with a missing embedding": failing(prompt="embedding:gone"),
    "a job that the model refuses": failing(clip_skip=30),
    "encoding short of memory": short_of_memory("text_encoder", Mode.MODEL_OFFLOAD),
    "painting short of memory": short_of_memory("unet", Mode.GROUP_OFFLOAD),
    "painting in fp8": short_of_memory("unet", Mode.FP8),
}


@pytest.mark.usefixtures("_many_modes")
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_after(worker: Painter, expected: list[np.ndarray], tmp_path: Path, disturbance: str) -> None:
    DISTURBANCES[disturbance](worker, tmp_path / "between")
    assert paints(worker, tmp_path / "after", expected)


def test_from_the_cache_and_without(worker: Painter, expected: list[np.ndarray], tmp_path: Path) -> None:
    for number in range(2):
        assert paints(worker, tmp_path / str(number), expected)
    worker.pipelines.prompts.clear()
    assert paints(worker, tmp_path / "without", expected)


def test_in_a_fresh_worker(root: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    assert paints(Painter(root), tmp_path, expected)


def test_what_disturbs_does_paint_something_else(worker: Painter, expected: list[np.ndarray], tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    for number, fields in enumerate(
        [
            {"model": "sibling"},
            {"model": "single"},
            {"vae": "other"},
            {"loras": [{"name": "painting"}]},
            {"loras": [{"name": "reading"}]},
            {"prompt": "a zorp"},
            {"scheduler": "DPM++ 2M Karras"},
            {"clip_skip": 1},
        ]
    ):
        worker.run(tmp_path / str(number), **JOB | fields)
        assert (pixels(tmp_path / str(number), 0) != expected[0]).any()


def test_a_job_with_a_lora_is_the_same_with_the_cache_and_without(worker: Painter, tmp_path: Path) -> None:
    """Between the two, the text encoders are used without it and with another weight."""
    job = JOB | {"loras": [{"name": "reading", "weight": 1.5}], "count": 1}
    shas = [worker.run(tmp_path / "a", **job).artifacts[0].pixels_sha256]
    for number, weight in enumerate((0.0, 0.5)):
        other = worker.run(tmp_path / str(number), **job | {"loras": [{"name": "reading", "weight": weight}]})
        assert other.artifacts[0].pixels_sha256 != shas[0]
    shas.append(worker.run(tmp_path / "b", **job).artifacts[0].pixels_sha256)
    worker.pipelines.prompts.clear()
    shas.append(worker.run(tmp_path / "c", **job).artifacts[0].pixels_sha256)
    assert len(set(shas)) == 1
