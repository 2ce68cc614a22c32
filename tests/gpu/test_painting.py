"""On CUDA: the same bits every time and as plain diffusers has them, in any company; cancelled jobs leave nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_conftest import REF
from PIL import Image

from benchmarks.stock import Stock
from benchmarks.studio import Studio
from imagend.job import Outcome
from imagend.messages import Progress
from imagend.worker import vae
from imagend.worker.encode import encode


def pixels(ended: Any) -> list[str]:
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return [artifact.pixels_sha256 for artifact in ended.artifacts]


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_as_plain_diffusers_paints(painters: Any, plain: Any, job: dict[str, Any], tmp_path: Path) -> None:
    ended = painters().run(tmp_path, **job | {"prompt": "a lighthouse"})
    expected = plain(
        "a lighthouse",
        negative_prompt=job["negative_prompt"],
        generator=torch.Generator("cpu").manual_seed(job["seed"]),
        **{key: job[key] for key in ("width", "height", "num_inference_steps", "guidance_scale")},
    ).images[0]
    ours = np.asarray(Image.open(tmp_path / ended.artifacts[0].file).convert("RGB"))
    assert (ours == np.asarray(expected)).all()
    assert ours.std() > 1  # noise, not one colour


def test_twice_among_others_and_in_another_process(
    painters: Any, stock: Stock, device: str, job: dict[str, Any], tmp_path: Path
) -> None:
    painter = painters()
    (alone,) = pixels(painter.run(tmp_path / "alone", **job))
    many = pixels(painter.run(tmp_path / "many", **{**job, "seed": job["seed"] - 1, "count": 3}))
    assert many[1] == alone
    assert len(set(many)) == 3
    painter.run(tmp_path / "other", **job | {"width": job["width"] + 64, "prompt": "a mill", "scheduler": "DPM++ 2M"})
    assert pixels(painter.run(tmp_path / "again", **job)) == [alone]
    with Studio(device, stock.root) as studio:
        assert studio.paint(**job).pixels == (alone,)


def test_cancelled_at_a_step_and_the_next_job_is_as_ever(painters: Any, job: dict[str, Any], tmp_path: Path) -> None:
    painter = painters()
    before = pixels(painter.run(tmp_path / "before", **job))

    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and message.step == 2:
            painter.worker.cancel(REF)

    painter.hear = cancel
    assert painter.run(tmp_path / "cancelled", **job).outcome is Outcome.CANCELLED
    assert max(one.step for one in painter.said if isinstance(one, Progress)) == 2
    painter.hear = None
    assert pixels(painter.run(tmp_path / "after", **job)) == before


def test_many_cancelled_jobs_hold_no_video_memory(
    painters: Any, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    painter = painters()
    painter.run(tmp_path / "warm", **job)
    before = vram()

    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and message.step == 1:
            painter.worker.cancel(REF)

    painter.hear = cancel
    for number in range(3):
        painter.run(tmp_path / str(number), **job | {"seed": number})
    assert vram() <= before + (1 << 20)


def test_a_vae_that_overflows_in_float16_is_decoded_in_float32(plain: Any, device: str, job: dict[str, Any]) -> None:
    plain.vae.register_to_config(force_upcast=False)
    plain.vae.to(torch.float16)
    with torch.no_grad():
        plain.vae.decoder.conv_in.weight *= 20_000
    embeddings = encode(plain, "a lighthouse", None, "plain", None)
    shape = {key: job[key] for key in ("width", "height")}
    generator = torch.Generator("cpu").manual_seed(1)
    latents = plain(**embeddings, **shape, num_inference_steps=2, generator=generator, output_type="latent").images
    with torch.no_grad():
        half = plain.vae.decode(latents.half() / plain.vae.config.scaling_factor, return_dict=False)[0]
    assert not half.isfinite().all()
    image = vae.decode(plain, latents)
    assert plain.vae.dtype is torch.float16  # as it was
    plain.vae.to(torch.float32)
    assert (np.asarray(image) == np.asarray(vae.decode(plain, latents))).all()
    assert np.asarray(image).std() > 1


def test_switching_gives_each_base_its_bits_and_frees_what_the_other_held(
    painters: Any, stock: Stock, job: dict[str, Any], vram: Callable[[], int], tmp_path: Path
) -> None:
    painter = painters(base_cache_gb=0.0)
    names = [stock.folder(number) for number in (0, 1)]
    empty = vram()
    pictures, held = [], []
    for number, name in enumerate([*names, *names]):
        pictures.append(pixels(painter.run(tmp_path / str(number), **job | {"model": name})))
        held.append(vram() - empty)
    assert pictures[:2] == pictures[2:]
    assert pictures[0] != pictures[1]
    assert min(held) > 1 << 30
    assert max(held) - min(held) < 64 << 20


def test_a_lora_changes_the_picture_and_leaves_the_base_as_it_was(
    painters: Any, stock: Stock, job: dict[str, Any], tmp_path: Path
) -> None:
    painter, loras = painters(), [{"name": stock.lora(), "weight": 1.0}]
    before = pixels(painter.run(tmp_path / "before", **job))
    changed = pixels(painter.run(tmp_path / "with", **job, loras=loras))
    assert changed != before
    assert pixels(painter.run(tmp_path / "after", **job)) == before
    assert pixels(painter.run(tmp_path / "again", **job, loras=loras)) == changed
