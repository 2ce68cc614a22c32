"""kind: edit. The same bits as diffusers' own inpainting call on the same pictures, and not a bit outside the mask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import detectors
import diffusers
import loras
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from engine_conftest import EMBEDDED, REF, Painter, load_plain
from PIL import Image, ImageDraw, ImageFilter

from benchmarks import random_sdxl, single_file
from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.messages import Progress, Run
from imagend.worker import images, inpaint
from imagend.worker.main import Context
from imagend.worker.pictures import open_pictures

PROMPT = "a large blue circle on a yellow background"
MASK_NET = REPOSITORY / "models" / "controlnet" / "shapes-xl-mask"
NAME, MASK = "shapes/front", "shapes/mask"
QUICK = {"kind": "edit", "prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0, "image": NAME}
BOX = {"boxes": [[30, 40, 101, 90]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def noise(folder: Path) -> Path:
    """Whose every pixel would show it if it were touched."""
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (128, 128, 3), np.uint8)).save(folder / "noise.png")
    return folder / "noise.png"


@pytest.fixture(scope="module")
def bare() -> Any:
    return load_plain()


def pixels(path: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))


def plainly(
    bare: Any, image: Image.Image, mask: Image.Image, seed: int, scheduler: Any = None, **arguments: Any
) -> np.ndarray:
    """One plain diffusers call, of what it takes and no more: pictures."""
    bare.scheduler = scheduler or diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**bare.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0, "strength": 1.0}
    call |= {"width": image.width, "height": image.height} | arguments
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(**call, image=image, mask_image=mask, generator=generator).images[0])


def cells(*box: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask


# The bits


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"strength": 0.6}, {"strength": 0.6}),
        ({"negative_prompt": "a green star"}, {"negative_prompt": "a green star"}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    ],
)
def test_a_whole_picture_equals_a_plain_diffusers_call_bit_for_bit(
    painter: Painter, bare: Any, noise: Path, tmp_path: Path, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    ended = painter.run(tmp_path, {NAME: noise}, **QUICK | fields, mask={"whole": True}, seed=7, count=2)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    for index, seed in enumerate((7, 8)):
        expected = plainly(bare, Image.open(noise), cells(0, 0, 128, 128), seed, **arguments)
        assert (pixels(tmp_path / f"{index:04d}.png") == expected).all()


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M Karras", "LCMScheduler"])
def test_a_part_equals_a_plain_call_and_the_rest_stays(
    painter: Painter, bare: Any, noise: Path, tmp_path: Path, name: str, strength: float
) -> None:
    """Those that draw noise at each step show whether as many numbers were drawn before."""
    mask = BOX | {"blur": 0}
    ended = painter.run(tmp_path, {NAME: noise}, **QUICK, mask=mask, seed=3, scheduler=name, strength=strength)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    told = ended.engine["scheduler"]
    scheduler = getattr(diffusers, told["class"]).from_config(painter.pipelines.switch.pipe.scheduler.config)
    expected = plainly(bare, Image.open(noise), cells(24, 40, 104, 96), 3, scheduler, strength=strength)
    made, before = pixels(tmp_path / "0000.png"), pixels(noise)
    inside = np.zeros((128, 128), bool)
    inside[40:90, 30:101] = True
    assert (made[inside] == expected[inside]).all()
    assert (made[~inside] == before[~inside]).all()
    assert (made[inside] != before[inside]).mean() > 0.9


def test_a_mask_picture_fades_over_21_pixels_and_no_further(painter: Painter, noise: Path, tmp_path: Path) -> None:
    cells(64, 0, 128, 128).save(tmp_path / "mask.png")
    places = {NAME: noise, MASK: tmp_path / "mask.png"}
    painter.run(tmp_path / "hard", places, **QUICK, mask={"image": MASK, "blur": 0}, seed=3)
    painter.run(tmp_path / "soft", places, **QUICK, mask={"image": MASK}, seed=3)
    before, hard, soft = pixels(noise), pixels(tmp_path / "hard/0000.png"), pixels(tmp_path / "soft/0000.png")
    assert (soft[:, :54] == before[:, :54]).all()
    assert (soft[:, 74:] == hard[:, 74:]).all()
    assert (soft[:, 58:70] != before[:, 58:70]).any(axis=(0, 2)).all()


def test_in_a_model_made_for_inpainting(noise: Path, tmp_path: Path) -> None:
    """Of 9 channels, as a folder and as a single file; to paint without a picture it is refused."""
    root = tmp_path / "models"
    nine = root / "diffusers" / "nine"
    random_sdxl.build(EMBEDDED, nine, torch.float32, {"unet": {"in_channels": 9}})
    (root / "checkpoints").mkdir()
    single_file.write(nine, root / "checkpoints" / "one-file.safetensors", {})
    painter, bare = Painter(root), load_plain(nine)
    for model in ("nine", "one-file"):
        for strength in (0.6, 1.0):
            folder = tmp_path / f"{model}-{strength}"
            job = QUICK | {"model": model, "strength": strength, "seed": 5, "mask": BOX | {"blur": 0}}
            ended = painter.run(folder, {NAME: noise}, **job)
            assert ended.outcome is Outcome.SUCCEEDED, ended.failure
            expected = plainly(bare, Image.open(noise), cells(24, 40, 104, 96), 5, strength=strength)
            made = pixels(folder / "0000.png")
            assert (made[40:90, 30:101] == expected[40:90, 30:101]).all()
    ended = painter.run(tmp_path / "new", model="nine", prompt=PROMPT)
    assert "it only repaints pictures, by jobs of kind edit" in ended.failure.error.message


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("upcast", [False, True])
def test_in_half_precision_also_where_the_vae_is_kept_in_float32(noise: Path, tmp_path: Path, upcast: bool) -> None:
    folder = tmp_path / "models" / "diffusers" / "shapes-xl"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.py"))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(settings | {"force_upcast": upcast}))
    painter = Painter(tmp_path / "models")
    painter.pipelines.dtype = torch.float16
    quick = QUICK | {"num_inference_steps": 2}
    ended = painter.run(tmp_path / "a", {NAME: noise}, **quick, mask={"whole": True}, seed=7)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    half = load_plain(folder, torch.float16)
    expected = plainly(half, Image.open(noise), cells(0, 0, 128, 128), 7, num_inference_steps=2)
    assert (pixels(tmp_path / "a/0000.png") == expected).all()


# What is seen


def test_make_the_circle_blue(painter: Painter, tmp_path: Path) -> None:
    """A red circle on white, painted by the model itself; the mask is where it is."""
    painter.run(tmp_path / "a", prompt="a large red circle on a white background", seed=1, num_inference_steps=20)
    before = pixels(tmp_path / "a/0000.png").astype(int)
    red = (before[..., 0] > 150) & (before[..., 1:].max(axis=2) < 110)
    assert 0.1 < red.mean() < 0.7
    Image.fromarray((red * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    job = QUICK | {"prompt": "a large blue circle on a white background", "num_inference_steps": 20}
    places = {NAME: tmp_path / "a/0000.png", MASK: tmp_path / "mask.png"}
    ended = painter.run(tmp_path / "b", places, **job, mask={"image": MASK, "expand": 3, "blur": 5}, seed=2)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    after = pixels(tmp_path / "b/0000.png").astype(int)
    blue = (after[..., 2] > after[..., 0] + 60) & (after[..., 2] > after[..., 1] + 30)
    assert blue[red].mean() > 0.9
    far = np.asarray(Image.fromarray((red * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(13))) == 0
    assert (after[far] == before[far]).all()
    assert far.mean() > 0.2


# Sizes


def test_a_large_picture_is_painted_at_the_models_size_and_comes_back_in_its_own(
    painter: Painter, bare: Any, tmp_path: Path
) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 255, (211, 333, 3), np.uint8))
    noise.save(tmp_path / "large.png")
    mask = {"boxes": [[100, 50, 200, 150]], "blur": 0}
    ended = painter.run(tmp_path / "a", {NAME: tmp_path / "large.png"}, **QUICK, mask=mask, seed=3)
    told = ended.engine["edit"]
    assert (told["width"], told["height"], told["crop"]) == (160, 104, (0, 0, 333, 211))
    assert (ended.artifacts[0].width, ended.artifacts[0].height) == (333, 211)
    small = noise.resize((160, 104), Image.Resampling.LANCZOS)
    painted = Image.fromarray(plainly(bare, small, cells(48, 24, 96, 80, size=(160, 104)), 3))
    expected = np.asarray(painted.resize((333, 211), Image.Resampling.LANCZOS))
    made = pixels(tmp_path / "a/0000.png")
    assert (made[50:150, 100:200] == expected[50:150, 100:200]).all()
    made = made.copy()
    made[50:150, 100:200] = np.asarray(noise)[50:150, 100:200]
    assert (made == np.asarray(noise)).all()


def test_of_a_small_mask_only_its_surroundings_are_painted(painter: Painter, bare: Any, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 255, (256, 300, 3), np.uint8))
    noise.save(tmp_path / "large.png")
    job = QUICK | {"mask": {"boxes": [[20, 200, 60, 240]], "blur": 0}, "padding_mask_crop": 12, "seed": 3}
    ended = painter.run(tmp_path / "a", {NAME: tmp_path / "large.png"}, **job)
    told = ended.engine["edit"]
    assert (told["width"], told["height"], told["crop"]) == (128, 128, (8, 188, 72, 252))
    crop = noise.crop((8, 188, 72, 252)).resize((128, 128), Image.Resampling.LANCZOS)
    painted = Image.fromarray(plainly(bare, crop, cells(24, 24, 104, 104), 3))
    expected = np.asarray(painted.resize((64, 64), Image.Resampling.LANCZOS))
    made = pixels(tmp_path / "a/0000.png")
    assert (made[200:240, 20:60] == expected[12:52, 12:52]).all()
    made = made.copy()
    made[200:240, 20:60] = np.asarray(noise)[200:240, 20:60]
    assert (made == np.asarray(noise)).all()


@pytest.mark.parametrize(
    ("size", "remedy"), [((31, 128), "Make it larger"), ((2049, 64), "Make it smaller"), ((20, 3000), "Make it larger")]
)
def test_a_picture_beyond_the_limits_is_refused(
    painter: Painter, tmp_path: Path, size: tuple[int, int], remedy: str
) -> None:
    Image.new("RGB", size).save(tmp_path / "wrong.png")
    ended = painter.run(tmp_path / "a", {NAME: tmp_path / "wrong.png"}, **QUICK, mask={"whole": True})
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    what = f"it has {size[0]}x{size[1]} pixels; to be edited by this model it may have 32 to 2048 a side"
    assert ended.failure.error.message == f"The picture {NAME} cannot be used: {what}. {remedy}."


def refusal(painter: Painter, folder: Path, places: dict[str, Path], **fields: Any) -> tuple[str, str]:
    ended = painter.run(folder, places, **QUICK | fields)
    assert not list(folder.glob("*.png"))
    return ended.failure.error.code, ended.failure.error.message


def test_every_refusal_says_what_to_do(painter: Painter, noise: Path, tmp_path: Path) -> None:
    """Of what only the worker can see, before a model is loaded."""
    bad = {name: tmp_path / f"{name}.png" for name in ("small", "black", "gif", "cut", "huge", "moving")}
    Image.new("L", (64, 64), 255).save(bad["small"])
    Image.new("L", (128, 128), 127).save(bad["black"])
    Image.new("L", (128, 128), 255).save(bad["gif"], format="GIF")
    bad["cut"].write_bytes(noise.read_bytes()[:3000])
    Image.new("1", (4097, 8), 1).save(bad["huge"])
    frames = [Image.new("L", (128, 128), shade) for shade in (0, 255)]
    frames[0].save(bad["moving"], format="WEBP", save_all=True, append_images=frames[1:])
    usable = "The mask cannot be used: "
    picture = f"The picture {MASK} cannot be used: "
    expected = {
        "small": f"{usable}it has 64x64 pixels, and its picture 128x128. Send a mask of the picture's size.",
        "black": f"{usable}it marks nothing. Paint what is meant white in it, or give a larger part, or less to "
        "shrink it by.",
        "gif": f"{picture}it is none of PNG, JPEG, WEBP. Convert it.",
        "cut": f"{picture}it is damaged (OSError). Save it anew.",
        "huge": f"{picture}it has 4097x8 pixels; at most 4096x4096 are possible. Make it smaller.",
        "moving": f"{picture}it is an animation. Send one picture of it.",
    }
    before = painter.pipelines.switch.pipe
    for name, says in expected.items():
        found = refusal(painter, tmp_path / "a", {NAME: noise, MASK: bad[name]}, mask={"image": MASK})
        assert found == ("INVALID_PARAMETERS", says)
        if says.startswith(picture):
            found = refusal(painter, tmp_path / "a", {NAME: bad[name]}, mask={"whole": True})
            assert found == ("INVALID_PARAMETERS", says.replace(MASK, NAME))
    outside = "the box 128,0,140,9 lies outside the picture, which has 128x128 pixels"
    remedy = "Give its pixels from the top left corner: left, top, right, bottom"
    found = refusal(painter, tmp_path / "a", {NAME: noise}, mask={"boxes": [[128, 0, 140, 9]]})
    assert found == ("INVALID_PARAMETERS", f"{usable}{outside}. {remedy}.")
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    (tmp_path / "models" / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    without = Painter(tmp_path / "models")
    code, says = refusal(without, tmp_path / "a", {NAME: noise}, mask={"find": "the car"})
    assert without.pipelines.switch.pipe is None
    assert code == "MODEL_NOT_FOUND"
    assert "imagend fetch https://huggingface.co/IDEA-Research/grounding-dino-tiny" in says
    assert painter.pipelines.switch.pipe is before


# Transparency


@pytest.fixture(scope="module")
def ghost(folder: Path) -> Path:
    """Noise in all four channels: colours also where nothing can be seen."""
    values = np.random.default_rng(4).integers(0, 256, (128, 128, 4), np.uint8)
    values[:20, :, 3] = 0
    Image.fromarray(values).save(folder / "ghost.png")
    return folder / "ghost.png"


def test_transparency_is_kept_outside_the_mask_and_white_behind_what_is_painted(
    painter: Painter, bare: Any, ghost: Path, tmp_path: Path
) -> None:
    ended = painter.run(tmp_path, {NAME: ghost}, **QUICK, mask=BOX | {"blur": 0}, seed=3)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    made, before = pixels(tmp_path / "0000.png", "RGBA"), pixels(ghost, "RGBA")
    inside = np.zeros((128, 128), bool)
    inside[40:90, 30:101] = True
    assert (made[~inside] == before[~inside]).all()
    assert (made[inside][:, 3] == 255).all()
    expected = plainly(bare, flat(ghost), cells(24, 40, 104, 96), 3)
    assert (made[inside][:, :3] == expected[inside]).all()


def flat(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def test_where_the_mask_fades_so_does_transparency(painter: Painter, ghost: Path, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (128, 128), (9, 200, 30, 0))
    clear.save(tmp_path / "clear.png")
    painter.run(tmp_path / "a", {NAME: tmp_path / "clear.png"}, **QUICK, mask=BOX, seed=3)
    painter.run(tmp_path / "b", {NAME: tmp_path / "clear.png"}, **QUICK, mask=BOX, seed=3, transparency="white")
    kept, white = Image.open(tmp_path / "a/0000.png"), pixels(tmp_path / "b/0000.png")
    alpha = np.asarray(kept)[..., 3]
    assert alpha[65, 65] == 255
    assert alpha[5, 5] == 0
    assert set(np.unique(alpha)) > {0, 255}
    over = np.asarray(Image.alpha_composite(Image.new("RGBA", kept.size, "white"), kept).convert("RGB"))
    assert np.abs(over.astype(int) - white).max() <= 2  # what was painted, in front of white: rounded twice


def test_it_may_be_filled_with_white(painter: Painter, ghost: Path, tmp_path: Path) -> None:
    painter.run(tmp_path, {NAME: ghost}, **QUICK, mask=BOX | {"blur": 0}, seed=3, transparency="white")
    with Image.open(tmp_path / "0000.png") as image:
        assert image.mode == "RGB"
    outside = np.ones((128, 128), bool)
    outside[40:90, 30:101] = False
    assert (pixels(tmp_path / "0000.png")[outside] == np.asarray(flat(ghost))[outside]).all()


# With all else that a job may have


def test_with_a_lora_and_the_base_is_itself_again(bare: Any, plain: Any, noise: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    path = loras.save(loras.random(plain, 1), root / "loras" / "one.safetensors")
    painter, job = Painter(root), QUICK | {"mask": {"whole": True}, "seed": 7}
    ended = painter.run(tmp_path / "a", {NAME: noise}, **job, loras=[{"name": "one", "weight": 0.8}])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    own = load_plain()
    own.load_lora_weights(path)
    own.set_adapters(own.get_active_adapters(), 0.8)
    white = cells(0, 0, 128, 128)
    expected = plainly(own, Image.open(noise), white, 7)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    painter.run(tmp_path / "b", {NAME: noise}, **job)
    without = plainly(bare, Image.open(noise), white, 7)
    assert (pixels(tmp_path / "b" / "0000.png") == without).all()
    assert (expected != without).any()


@pytest.mark.parametrize("mode", [Mode.MODEL_OFFLOAD, Mode.GROUP_OFFLOAD, Mode.SEQUENTIAL])
def test_in_a_memory_mode_it_is_the_same(noise: Path, tmp_path: Path, mode: Mode) -> None:
    """Modes are in the modules, which the inpainting pipelines share; and afterwards the base is itself again."""
    painter, new = Painter(), {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1}
    control = {"model": "shapes-xl-mask", "image": NAME}
    jobs: list[dict[str, Any]] = [QUICK | {"mask": BOX, "seed": 7, "control": one} for one in ([], [control])]
    first = [painter.run(tmp_path / "a", {NAME: noise}, **job) for job in (*jobs, new)]
    painter.pipelines.ladder.modes = (mode,)
    second = [painter.run(tmp_path / "b", {NAME: noise}, **job) for job in (*jobs, new)]
    for before, after in zip(first, second, strict=True):
        assert after.outcome is Outcome.SUCCEEDED, after.failure
        assert after.memory["mode"] == mode
        assert after.artifacts[0].pixels_sha256 == before.artifacts[0].pixels_sha256
    assert len({ended.artifacts[0].pixels_sha256 for ended in first}) == 3


def test_a_shortage_while_the_picture_is_encoded_climbs_and_is_told(
    painter: Painter, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        ended = painter.run(tmp_path, {NAME: noise}, **QUICK, mask=BOX | {"blur": 0}, seed=7)
    finally:
        hook.remove()
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.memory["vae_tile"]
    assert not ended.memory["exact"]
    made, before = pixels(tmp_path / "0000.png"), pixels(noise)
    assert (made[:40] == before[:40]).all()


def test_a_control_picture_and_a_references_mask_are_cut_as_the_picture_is(painter: Painter, tmp_path: Path) -> None:
    large = Image.fromarray(np.random.default_rng(2).integers(0, 255, (256, 256, 3), np.uint8))
    where = cells(100, 100, 200, 200, size=(256, 256)).convert("RGB")
    large.save(tmp_path / "large.png")
    where.save(tmp_path / "where.png")
    places = {NAME: tmp_path / "large.png", "shapes/where": tmp_path / "where.png"}
    control = {"model": "shapes-xl-mask", "image": "shapes/where", "control_strength": 1.0}
    job = QUICK | {"mask": {"boxes": [[120, 120, 180, 180]], "blur": 0}, "padding_mask_crop": 20, "seed": 3}
    ended = painter.run(tmp_path / "a", places, **job, control=[control])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.engine["edit"]["crop"] == (100, 100, 200, 200)
    crop = large.crop((100, 100, 200, 200)).resize((128, 128), Image.Resampling.LANCZOS)
    crop.save(tmp_path / "crop.png")
    Image.new("RGB", (128, 128), "white").save(tmp_path / "white.png")
    places = {NAME: tmp_path / "crop.png", "shapes/where": tmp_path / "white.png"}
    alone = painter.run(
        tmp_path / "b", places, **QUICK, seed=3, control=[control], mask={"boxes": [[25, 25, 103, 103]], "blur": 0}
    )
    painted = Image.open(tmp_path / "b/0000.png").resize((100, 100), Image.Resampling.LANCZOS)
    made = Image.open(tmp_path / "a/0000.png").crop((130, 130, 170, 170))
    assert (np.asarray(made) == np.asarray(painted.crop((30, 30, 70, 70)))).all()
    assert alone.outcome is Outcome.SUCCEEDED
    assert painter.run(tmp_path / "c", places, **job).artifacts[0].pixels_sha256 != ended.artifacts[0].pixels_sha256


def controlled(bare: Any, control: Image.Image, image: Image.Image, mask: Image.Image, seed: int) -> np.ndarray:
    net = diffusers.ControlNetModel.from_pretrained(MASK_NET, local_files_only=True, dtype=torch.float32)
    for parameter in net.parameters():  # not mapped from its file, whose alignment decides bits
        parameter.data = parameter.data.clone()
    bare.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(bare.scheduler.config)
    pipe = diffusers.StableDiffusionXLControlNetInpaintPipeline(
        **bare.components, controlnet=net, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0, "strength": 0.7}
    call |= {"control_image": control, "controlnet_conditioning_scale": 0.8}
    return np.asarray(
        pipe(**call, image=image, mask_image=mask, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
    )


@pytest.mark.parametrize("channels", [4, 9])
def test_with_a_controlnet_it_equals_diffusers_pipeline_for_both(noise: Path, tmp_path: Path, channels: int) -> None:
    """As a folder, and as a single file, which does not say how it is built."""
    root = tmp_path / "models"
    random_sdxl.build(EMBEDDED, root / "diffusers" / "base", torch.float32, {"unet": {"in_channels": channels}})
    (root / "controlnet").mkdir()
    (root / "controlnet" / "folder").symlink_to(MASK_NET)
    (root / "controlnet" / "alone.safetensors").symlink_to(MASK_NET / "diffusion_pytorch_model.safetensors")
    cells(0, 0, 64, 128).convert("RGB").save(tmp_path / "where.png")
    painter, places = Painter(root), {NAME: noise, MASK: tmp_path / "where.png"}
    job = QUICK | {"model": "base", "strength": 0.7, "scheduler": "Euler a", "seed": 5, "mask": BOX | {"blur": 0}}
    bare = load_plain(root / "diffusers" / "base")
    expected = controlled(bare, Image.open(tmp_path / "where.png"), Image.open(noise), cells(24, 40, 104, 96), 5)
    for name in ("folder", "alone"):
        control = {"model": name, "image": MASK, "control_strength": 0.8}
        ended = painter.run(tmp_path / name, places, **job, control=[control])
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure
        assert (pixels(tmp_path / name / "0000.png")[40:90, 30:101] == expected[40:90, 30:101]).all()


def test_what_is_found_by_words_is_what_is_painted(tmp_path: Path) -> None:
    """By detectors that were never taught: what they find has no meaning, but a mask all the same."""
    noise = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(noise)
    root = tmp_path / "models"
    detectors.save(root)
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    painter = Painter(root)
    mask = {"find": ["the car", "a dog"], "threshold": 0.5, "text_threshold": 0.5, "blur": 0}
    ended = painter.run(tmp_path / "a", {NAME: noise}, **QUICK, mask=mask, seed=3)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert {one["find"] for one in ended.engine["found"]} <= {"the car", "a dog"}
    assert len(ended.engine["detectors"]) == 2
    assert ended.timings["detecting"] > 0
    run = Run(job=REF, kind="edit", spec={}, folder=str(tmp_path))
    texts, context = ("the car", "a dog"), Context(run, painter.pipelines, painter._say, 0.0)
    found = painter.pipelines.detectors.find(Image.open(noise).convert("RGB"), texts, 0.5, 0.5, context).mask
    made, before, black = pixels(tmp_path / "a/0000.png"), pixels(noise), np.asarray(found) == 0
    assert (made[black] == before[black]).all()
    assert (made[~black] != before[~black]).any()
    nothing = painter.run(tmp_path / "b", {NAME: noise}, **QUICK, mask=mask | {"threshold": 1.0})
    assert nothing.failure.error.code == "NOTHING_FOUND"


# On the way


def test_it_says_what_it_did(painter: Painter, noise: Path, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, {NAME: noise}, **QUICK, mask=BOX, seed=7, count=2, strength=0.6)
    stages = {"model_loading", "masking", "encoding", "painting", "compositing", "saving"}
    assert set(ended.timings) == stages
    told = ended.engine["edit"]
    assert (told["width"], told["height"], told["crop"]) == (128, 128, (0, 0, 128, 128))
    assert len(told["mask_sha256"]) == 64
    assert [one["name"] for one in ended.engine["pictures"]] == [NAME]
    steps = [(one.picture, one.step, one.steps) for one in painter.said if one.stage == "painting"]
    assert steps == [(picture, step, 3) for picture in (0, 1) for step in range(4)]
    with Image.open(tmp_path / "0000.png") as image:
        text = image.text
    assert "compositeWithTrainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]
    assert "Denoising strength: 0.6" in text["parameters"]
    assert "Size: 128x128" in text["parameters"]
    assert json.loads(text["imagend"])["spec"]["mask"]["boxes"] == [[30, 40, 101, 90]]


def test_an_edited_picture_stays_marked_when_it_is_worked_on(painter: Painter, noise: Path, tmp_path: Path) -> None:
    painter.run(tmp_path, {NAME: noise}, **QUICK, mask=BOX, metadata="none")
    path = str(tmp_path / "0000.png")
    assert open_pictures((NAME,), {NAME: path})[NAME].is_made_by_ai
    assert images._COMPOSITE.encode() in Path(path).read_bytes()


@pytest.mark.parametrize("stage", ["masking", "encoding", "painting"])
def test_cancelled_at_any_stage_it_leaves_the_base_as_it_was(noise: Path, tmp_path: Path, stage: str) -> None:
    painter = Painter()
    new = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1}
    before = painter.run(tmp_path / "a", **new).artifacts[0].pixels_sha256

    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and message.stage == stage:
            painter.worker.stop()

    painter.hear = cancel
    ended = painter.run(tmp_path / "b", {NAME: noise}, **QUICK, mask=BOX, seed=1)
    assert ended.outcome is Outcome.CANCELLED
    assert not list((tmp_path / "b").glob("*.png"))
    painter.hear = None
    whole = painter.run(tmp_path / "b", {NAME: noise}, **QUICK, mask=BOX, seed=1)
    assert whole.outcome is Outcome.SUCCEEDED
    assert painter.run(tmp_path / "c", **new).artifacts[0].pixels_sha256 == before


def test_another_attempt_paints_only_what_is_missing(painter: Painter, noise: Path, tmp_path: Path) -> None:
    job = QUICK | {"mask": BOX, "seed": 7, "count": 3}
    whole = painter.run(tmp_path / "whole", {NAME: noise}, **job)

    def cancel(message: Any) -> None:
        if isinstance(message, Progress) and (message.stage, message.picture) == ("painting", 2):
            painter.worker.stop()

    painter.hear = cancel
    assert painter.run(tmp_path / "cut", {NAME: noise}, **job).outcome is Outcome.CANCELLED
    painter.hear = None
    kept = (tmp_path / "cut/0001.png").stat().st_mtime_ns
    again = painter.run(tmp_path / "cut", {NAME: noise}, **job)
    assert [one.pixels_sha256 for one in again.artifacts] == [one.pixels_sha256 for one in whole.artifacts]
    assert (tmp_path / "cut/0001.png").stat().st_mtime_ns == kept
    assert {one.picture for one in painter.said if isinstance(one, Progress) and one.stage == "painting"} == {2}
    changed = painter.run(tmp_path / "cut", {NAME: noise}, **job | {"mask": BOX | {"expand": 1}})
    assert changed.artifacts[1].pixels_sha256 != whole.artifacts[1].pixels_sha256


def test_the_picture_is_encoded_once_for_all_seeds(
    painter: Painter, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = inpaint.img2img.encode, []

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return encode(*arguments)

    monkeypatch.setattr(inpaint.img2img, "encode", counting)
    painter.run(tmp_path, {NAME: noise}, **QUICK, mask=BOX, count=3)
    assert len(calls) == 1
