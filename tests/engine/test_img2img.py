"""Pictures to begin with: the same bits as diffusers' own img2img call, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import loras
import numpy as np
import pytest
import torch
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image, ImageOps

from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.messages import Progress
from imagend.worker import img2img

PROMPT = "a large red circle on a blue background"
NAME = "shapes/front"
QUICK = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0, "image": NAME, "strength": 0.6}


@pytest.fixture(scope="module")
def square(painter: Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A green square on white, of the model's own size."""
    image = Image.new("RGB", (128, 128), "white")
    image.paste((0, 160, 0), (32, 32, 96, 96))
    path = tmp_path_factory.mktemp("pictures") / "front.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def bare() -> Any:
    return load_plain()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def plainly(bare: Any, image: Image.Image, seed: int, scheduler: Any = None, **arguments: Any) -> np.ndarray:
    """One plain diffusers call."""
    bare.scheduler = scheduler or diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**bare.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0, "strength": 0.6} | arguments
    return np.asarray(pipe(**call, image=image, generator=torch.Generator("cpu").manual_seed(seed)).images[0])


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"strength": 1.0}, {"strength": 1.0}),
        ({"strength": None, "num_inference_steps": 7}, {"strength": 0.3, "num_inference_steps": 7}),
        ({"negative_prompt": "a green star"}, {"negative_prompt": "a green star"}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"clip_skip": 1}, {"clip_skip": 1}),
    ],
)
def test_a_picture_equals_a_plain_diffusers_call_bit_for_bit(
    painter: Painter, bare: Any, square: Path, tmp_path: Path, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    given = {name: value for name, value in (QUICK | fields).items() if value is not None}
    ended = painter.run(tmp_path, {NAME: square}, **given, seed=7, count=2)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    for index, seed in enumerate((7, 8)):
        expected = plainly(bare, Image.open(square), seed, **arguments)
        assert (pixels(tmp_path / f"{index:04d}.png") == expected).all()


@pytest.mark.parametrize(
    "name", ["DPM++ 2M Karras", "Euler a", "Heun", "DDIMScheduler", "LCMScheduler", "UniPCMultistepScheduler"]
)
def test_with_other_schedulers(painter: Painter, bare: Any, square: Path, tmp_path: Path, name: str) -> None:
    ended = painter.run(tmp_path, {NAME: square}, **QUICK, seed=1, scheduler=name)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    told = ended.engine["scheduler"]
    scheduler = getattr(diffusers, told["class"]).from_config(painter.pipelines.switch.pipe.scheduler.config)
    assert (pixels(tmp_path / "0000.png") == plainly(bare, Image.open(square), 1, scheduler)).all()


def test_it_keeps_what_the_picture_shows(painter: Painter, square: Path, tmp_path: Path) -> None:
    """The less strength, the nearer to the picture; the prompt's red circle comes with much of it."""
    given = np.asarray(Image.open(square), int)
    far = []
    for strength in (0.3, 0.6, 1.0):
        painter.run(tmp_path / str(strength), {NAME: square}, **QUICK | {"strength": strength}, seed=7)
        far.append(np.abs(pixels(tmp_path / str(strength) / "0000.png").astype(int) - given).mean())
    assert far == sorted(far)
    assert far[0] < 0.5 * far[2]


def test_a_picture_of_another_size_is_scaled_to_cover_and_cropped(painter: Painter, bare: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (90, 200, 3), np.uint8)
    wide = Image.fromarray(noise)
    wide.save(tmp_path / "wide.png")
    painter.run(tmp_path / "a", {NAME: tmp_path / "wide.png"}, **QUICK, seed=3, width=96, height=128)
    expected = plainly(bare, ImageOps.fit(wide, (96, 128), Image.Resampling.LANCZOS), 3)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()


def test_transparency_is_white_and_orientation_is_honoured(painter: Painter, bare: Any, tmp_path: Path) -> None:
    ghost = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    ghost.paste((200, 0, 0, 255), (0, 0, 128, 40))
    ghost.save(tmp_path / "ghost.png")
    painter.run(tmp_path / "a", {NAME: tmp_path / "ghost.png"}, **QUICK, seed=3)
    flat = Image.new("RGB", (128, 128), "white")
    flat.paste((200, 0, 0), (0, 0, 128, 40))
    assert (pixels(tmp_path / "a" / "0000.png") == plainly(bare, flat, 3)).all()
    exif = flat.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    flat.rotate(90).save(tmp_path / "turned.png", exif=exif)
    painter.run(tmp_path / "b", {NAME: tmp_path / "turned.png"}, **QUICK, seed=3)
    assert (pixels(tmp_path / "b" / "0000.png") == plainly(bare, flat, 3)).all()


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("upcast", [False, True])
def test_in_half_precision_also_where_the_vae_is_kept_in_float32(square: Path, tmp_path: Path, upcast: bool) -> None:
    """As on a GPU. diffusers widens and narrows such a VAE around the encoding and again around the decoding."""
    folder = tmp_path / "models" / "diffusers" / "shapes-xl"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.py"))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(settings | {"force_upcast": upcast}))
    painter = Painter(tmp_path / "models")
    painter.pipelines.dtype = torch.float16
    small = {"width": 64, "height": 64}
    ended = painter.run(tmp_path / "a", {NAME: square}, **QUICK, **small, seed=7, count=2)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert painter.pipelines.switch.pipe.vae.dtype is (torch.float32 if upcast else torch.float16)
    half = load_plain(folder, torch.float16)
    image = ImageOps.fit(Image.open(square), (64, 64), Image.Resampling.LANCZOS)
    for index, seed in enumerate((7, 8)):
        assert (pixels(tmp_path / "a" / f"{index:04d}.png") == plainly(half, image, seed)).all()


def test_with_a_lora_and_the_base_is_itself_again(bare: Any, plain: Any, square: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    path = loras.save(loras.random(plain, 1), root / "loras" / "one.safetensors")
    painter = Painter(root)
    ended = painter.run(tmp_path / "a", {NAME: square}, **QUICK, seed=7, loras=[{"name": "one", "weight": 0.8}])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    own = load_plain()
    own.load_lora_weights(path)
    own.set_adapters(own.get_active_adapters(), 0.8)
    expected = plainly(own, Image.open(square), 7)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    painter.run(tmp_path / "b", {NAME: square}, **QUICK, seed=7)
    without = plainly(bare, Image.open(square), 7)
    assert (pixels(tmp_path / "b" / "0000.png") == without).all()
    assert (expected != without).any()


@pytest.mark.parametrize("mode", [Mode.MODEL_OFFLOAD, Mode.GROUP_OFFLOAD, Mode.SEQUENTIAL])
def test_memory_modes_that_only_move_weights_change_no_bit(
    painter: Painter, bare: Any, square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    monkeypatch.setattr(painter.pipelines.ladder, "modes", (mode,))
    monkeypatch.setattr(painter.pipelines.ladder, "seen", {})
    ended = painter.run(tmp_path, {NAME: square}, **QUICK, seed=7)
    painter.pipelines.ladder.placement.release()
    assert ended.memory["mode"] == mode
    assert (pixels(tmp_path / "0000.png") == plainly(bare, Image.open(square), 7)).all()


def test_a_shortage_while_the_picture_is_encoded_climbs_and_is_told(
    painter: Painter, square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter.pipelines.ladder, "seen", {})
    pipe = painter.pipelines.get("shapes-xl", lambda: None)
    runs: list[int] = []

    def once(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    hook = pipe.vae.encoder.register_forward_pre_hook(once)
    try:
        ended = painter.run(tmp_path, {NAME: square}, **QUICK, seed=7)
    finally:
        hook.remove()
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert [one["stage"] for one in ended.memory["retries"]] == ["decoding"]
    assert ended.memory["vae_tile"]
    assert not ended.memory["exact"]


def test_the_components_are_shared_and_the_picture_is_encoded_once(
    painter: Painter, square: Path, tmp_path: Path
) -> None:
    pipe = painter.pipelines.get("shapes-xl", lambda: None)
    made = img2img.pipeline(pipe)
    assert made.unet is pipe.unet
    assert made.vae is pipe.vae
    runs: list[int] = []
    hook = pipe.vae.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    painter.run(tmp_path, {NAME: square}, **QUICK, seed=7, count=3)
    hook.remove()
    assert len(runs) == 1


def test_progress_counts_the_steps_that_are_done_and_each_is_a_cancel_point(
    painter: Painter, bare: Any, square: Path, tmp_path: Path
) -> None:
    def interrupt(message: Any) -> None:
        if isinstance(message, Progress) and (message.picture, message.step) == (1, 2):
            painter.worker.stop()

    painter.hear = interrupt
    assert painter.run(tmp_path, {NAME: square}, **QUICK, seed=5, count=2).outcome is Outcome.CANCELLED
    steps = [(one.step, one.steps) for one in painter.said if isinstance(one, Progress) and one.stage == "painting"]
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 3), (1, 3), (2, 3)]
    first = (tmp_path / "0000.png").stat()
    painter.hear = None
    assert painter.run(tmp_path, {NAME: square}, **QUICK, seed=5, count=2).outcome is Outcome.SUCCEEDED
    assert (tmp_path / "0000.png").stat() == first  # not painted again
    assert (pixels(tmp_path / "0001.png") == plainly(bare, Image.open(square), 6)).all()


def test_a_draft_that_was_painted_from_another_picture_is_painted_again(
    painter: Painter, square: Path, tmp_path: Path
) -> None:
    first = painter.run(tmp_path / "draft", {NAME: square}, **QUICK, seed=5)
    Image.new("RGB", (128, 128), "black").save(tmp_path / "other.png")
    second = painter.run(tmp_path / "draft", {NAME: tmp_path / "other.png"}, **QUICK, seed=5)
    assert first.artifacts[0].pixels_sha256 != second.artifacts[0].pixels_sha256


def test_manifest_and_infotext_tell_of_the_picture(painter: Painter, square: Path, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, {NAME: square}, **QUICK, seed=5)
    digest = hashlib.sha256(square.read_bytes()).hexdigest()
    assert ended.engine["pictures"] == [{"name": NAME, "sha256": digest, "width": 128, "height": 128}]
    infotext = Image.open(tmp_path / "0000.png").text["parameters"]  # type: ignore[attr-defined]
    assert "Denoising strength: 0.6" in infotext


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x89PNG\r\n\x1a\nbut no more", "it is none of PNG, JPEG, WEBP"),
        (b"GIF89a\1\0\1\0\0\0\0;", "it is none of PNG, JPEG, WEBP. Convert it"),
        (b"", "it is none of"),
    ],
)
def test_a_picture_that_is_none_fails_the_job_before_a_model_is_loaded(tmp_path: Path, raw: bytes, why: str) -> None:
    (tmp_path / "front.png").write_bytes(raw)
    painter = Painter()
    ended = painter.run(tmp_path / "draft", {NAME: tmp_path / "front.png"}, **QUICK)
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert why in ended.failure.error.message
    assert NAME in ended.failure.error.message
    assert painter.pipelines.switch.pipe is None


def test_animations_and_pictures_of_20000_pixels_are_refused(painter: Painter, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 1)).save(tmp_path / "long.png")
    for file, why in {"moving.png": "it is an animation", "long.png": "at most 4096x4096"}.items():
        ended = painter.run(tmp_path / "draft", {NAME: tmp_path / file}, **QUICK)
        assert ended.outcome is Outcome.FAILED
        assert why in ended.failure.error.message
