"""ControlNets: the same bits as diffusers' own call, in every memory mode; the base as it was; and seen to guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import diffusers
import loras
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image, ImageOps

from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.messages import Progress

MASK_NET = REPOSITORY / "models" / "controlnet" / "shapes-xl-mask"
PROMPT = "a red circle on a blue background"
QUICK = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0}
LEFT, RIGHT = "masks/left", "masks/right"


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A white disc on black, on the left and on the right."""
    folder = tmp_path_factory.mktemp("masks")
    found = {}
    for name, x in ((LEFT, 36), (RIGHT, 92)):
        yy, xx = np.mgrid[:128, :128]
        disc = ((xx - x) ** 2 + (yy - 64) ** 2 < 26**2) * np.uint8(255)
        found[name] = folder / f"{name[6:]}.png"
        Image.fromarray(np.repeat(disc[..., None], 3, 2)).save(found[name])
    return found


@pytest.fixture(scope="module")
def bare() -> Any:
    return load_plain()


@pytest.fixture(scope="module")
def net() -> Any:
    return owned(MASK_NET)


def owned(folder: Path) -> Any:
    """Not mapped from its file, whose alignment decides bits."""
    net = diffusers.ControlNetModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    return net


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def shown(path: Path) -> Image.Image:
    return Image.fromarray(pixels(path))


def plainly(bare: Any, nets: Any, seed: int, scheduler: Any = None, **arguments: Any) -> np.ndarray:
    """One plain diffusers call."""
    bare.scheduler = scheduler or diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    kind = "StableDiffusionXLControlNet" + ("Img2Img" if "control_image" in arguments else "") + "Pipeline"
    pipe = getattr(diffusers, kind)(**bare.components, controlnet=nets, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4.0} | arguments
    return np.asarray(pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0])


def without(bare: Any, seed: int) -> np.ndarray:
    bare.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    return np.asarray(bare(**QUICK, generator=torch.Generator("cpu").manual_seed(seed)).images[0])


def one(image: str = LEFT, **fields: Any) -> dict[str, Any]:
    return {"model": "shapes-xl-mask", "image": image} | fields


@pytest.mark.parametrize(
    ("control", "fields", "arguments"),
    [
        ({}, {}, {"controlnet_conditioning_scale": 0.5}),
        ({"control_strength": 1.0}, {}, {"controlnet_conditioning_scale": 1.0}),
        (
            {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
            {},
            {"controlnet_conditioning_scale": 0.5, "control_guidance_start": 0.2, "control_guidance_end": 0.7},
        ),
        ({}, {"guidance_scale": 1.0}, {"controlnet_conditioning_scale": 0.5, "guidance_scale": 1.0}),
        (
            {},
            {"negative_prompt": "a green star"},
            {"controlnet_conditioning_scale": 0.5, "negative_prompt": "a green star"},
        ),
    ],
)
def test_a_picture_equals_a_plain_diffusers_call_bit_for_bit(
    painter: Painter,
    bare: Any,
    net: Any,
    masks: dict[str, Path],
    tmp_path: Path,
    control: dict[str, Any],
    fields: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    ended = painter.run(tmp_path, masks, **QUICK | fields, seed=7, count=2, control=[one(**control)])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    for index, seed in enumerate((7, 8)):
        expected = plainly(bare, net, seed, image=shown(masks[LEFT]), **arguments)
        assert (pixels(tmp_path / f"{index:04d}.png") == expected).all()
        assert (expected != without(bare, seed)).any()


def test_one_job_after_the_other_each_has_its_own_scheduler(
    painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    config = diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler").config
    for name in ("HeunDiscreteScheduler", "DDIMScheduler"):
        painter.run(tmp_path / name, masks, **QUICK, seed=1, scheduler=name, control=[one()])
        own = getattr(diffusers, name).from_config(config)
        expected = plainly(bare, net, 1, own, image=shown(masks[LEFT]), controlnet_conditioning_scale=0.5)
        assert (pixels(tmp_path / name / "0000.png") == expected).all()


def test_several_at_once(painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path) -> None:
    control = [one(LEFT, control_strength=0.7), one(RIGHT, control_strength=0.4, control_guidance_end=0.5)]
    ended = painter.run(tmp_path, masks, **QUICK, seed=7, control=control)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    expected = plainly(
        bare,
        [net, net],
        7,
        image=[shown(masks[LEFT]), shown(masks[RIGHT])],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 0.5],
    )
    assert (pixels(tmp_path / "0000.png") == expected).all()


def test_with_a_picture_to_begin_with(
    painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    ended = painter.run(tmp_path, masks, **QUICK, seed=7, image=RIGHT, strength=0.8, control=[one()])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    right, left = shown(masks[RIGHT]), shown(masks[LEFT])
    expected = plainly(bare, net, 7, image=right, control_image=left, strength=0.8, controlnet_conditioning_scale=0.5)
    assert (pixels(tmp_path / "0000.png") == expected).all()


def test_a_strength_of_0_is_no_control_and_the_base_is_itself_again(
    painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    """For diffusers, too, bit for bit; here the ControlNet is not even loaded."""
    bases = without(bare, 7)
    assert (plainly(bare, net, 7, image=shown(masks[LEFT]), controlnet_conditioning_scale=0.0) == bases).all()
    painter.run(tmp_path / "a", masks, **QUICK, seed=7, control=[one(control_strength=1.0)])
    ended = painter.run(tmp_path / "b", masks, **QUICK, seed=7, control=[one(control_strength=0.0)])
    assert ended.engine["controlnets"] == []
    painter.run(tmp_path / "c", **QUICK, seed=7)
    for name in "bc":
        assert (pixels(tmp_path / name / "0000.png") == bases).all()
    assert (pixels(tmp_path / "a" / "0000.png") != bases).any()


def test_it_paints_where_the_mask_is(painter: Painter, masks: dict[str, Path], tmp_path: Path) -> None:
    """The prompt does not say where. shapes-xl-mask is a trained ControlNet: its card has the figures."""
    for name, side in ((LEFT, 1), (RIGHT, -1)):
        control = [one(name, control_strength=1.0)]
        painter.run(tmp_path / name, masks, **QUICK | {"num_inference_steps": 8}, seed=3, control=control)
        picture = pixels(tmp_path / name / "0000.png").astype(int)
        red = picture[..., 0] > picture[..., 2]
        left, right = red[:, :64].mean(), red[:, 64:].mean()
        assert side * (left - right) > 0.2
        disc = pixels(masks[name])[..., 0] > 0
        assert (red & disc).sum() / (red | disc).sum() > 0.7


def test_a_control_picture_is_brought_to_size_as_a_picture_to_begin_with_is(
    painter: Painter, bare: Any, net: Any, tmp_path: Path
) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (90, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    places = {LEFT: tmp_path / "wide.png"}
    painter.run(tmp_path / "a", places, **QUICK, seed=3, width=96, height=128, control=[one()])
    fitted = ImageOps.fit(Image.fromarray(noise), (96, 128), Image.Resampling.LANCZOS)
    expected = plainly(bare, net, 3, image=fitted, width=96, height=128, controlnet_conditioning_scale=0.5)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()


def test_edges_are_taken_from_a_plain_picture(
    painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    control = [one(type="canny", preprocess=True)]
    ended = painter.run(tmp_path, masks, **QUICK, seed=3, control=control)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    edges = cv2.Canny(pixels(masks[LEFT]), 100, 200)
    assert 100 < (edges > 0).sum() < 400
    image = Image.fromarray(np.stack([edges] * 3, axis=2))
    expected = plainly(bare, net, 3, image=image, controlnet_conditioning_scale=0.5)
    assert (pixels(tmp_path / "0000.png") == expected).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mode", [Mode.MODEL_OFFLOAD, Mode.GROUP_OFFLOAD, Mode.SEQUENTIAL])
def test_memory_modes_that_only_move_weights_change_no_bit(
    painter: Painter,
    bare: Any,
    net: Any,
    masks: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    several: bool,
) -> None:
    monkeypatch.setattr(painter.pipelines.ladder, "modes", (mode,))
    monkeypatch.setattr(painter.pipelines.ladder, "seen", {})
    control = [one(LEFT), one(RIGHT)] if several else [one()]
    ended = painter.run(tmp_path / "a", masks, **QUICK, seed=7, control=control)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.memory["mode"] == mode
    images = [shown(masks[LEFT]), shown(masks[RIGHT])]
    arguments = {"image": images, "controlnet_conditioning_scale": [0.5, 0.5]} if several else {"image": images[0]}
    expected = plainly(bare, [net, net] if several else net, 7, **{"controlnet_conditioning_scale": 0.5} | arguments)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    painter.run(tmp_path / "b", **QUICK, seed=7)
    painter.pipelines.ladder.placement.release()
    assert (pixels(tmp_path / "b" / "0000.png") == without(bare, 7)).all()


def test_with_a_lora_and_weights_that_the_planner_counts(
    net: Any, plain: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "models"
    for kind, source in (("diffusers", EMBEDDED), ("controlnet", MASK_NET)):
        (root / kind).mkdir(parents=True)
        (root / kind / source.name).symlink_to(source)
    path = loras.save(loras.random(plain, 1), root / "loras" / "one.safetensors")
    painter = Painter(root)
    fields = {**QUICK, "seed": 7, "loras": [{"name": "one", "weight": 0.8}]}
    ended = painter.run(tmp_path / "a", masks, **fields, control=[one()])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    own = load_plain()
    own.load_lora_weights(path)
    own.set_adapters(own.get_active_adapters(), 0.8)
    expected = plainly(own, net, 7, image=shown(masks[LEFT]), controlnet_conditioning_scale=0.5)
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    anatomy = painter.pipelines.ladder.placement.anatomy(painter.pipelines.controlnets._pipe)
    assert anatomy["controlnet_bytes"] == sum(one.nbytes for one in net.parameters())
    assert anatomy["controlnets"] == 1


def test_the_components_are_shared_and_the_controlnet_stays_loaded(
    painter: Painter, masks: dict[str, Path], tmp_path: Path
) -> None:
    painter.run(tmp_path / "a", masks, **QUICK, seed=7, control=[one()])
    pipe, base = painter.pipelines.controlnets._pipe, painter.pipelines.switch.pipe
    assert all(getattr(pipe, name) is part for name, part in base.components.items())
    painter.run(tmp_path / "b", **QUICK, seed=7)
    ended = painter.run(tmp_path / "c", masks, **QUICK, seed=7, control=[one()])
    assert "controlnets" not in (ended.loading or {})
    assert (pixels(tmp_path / "a" / "0000.png") == pixels(tmp_path / "c" / "0000.png")).all()


def test_each_step_is_a_cancel_point_and_what_is_painted_stays(
    painter: Painter, bare: Any, net: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    def interrupt(message: Any) -> None:
        if isinstance(message, Progress) and (message.picture, message.step) == (1, 2):
            painter.worker.stop()

    painter.hear = interrupt
    job = {**QUICK, "seed": 5, "count": 2, "control": [one()]}
    assert painter.run(tmp_path, masks, **job).outcome is Outcome.CANCELLED
    first = (tmp_path / "0000.png").stat()
    painter.hear = None
    assert painter.run(tmp_path, masks, **job).outcome is Outcome.SUCCEEDED
    assert (tmp_path / "0000.png").stat() == first  # not painted again
    expected = plainly(bare, net, 6, image=shown(masks[LEFT]), controlnet_conditioning_scale=0.5)
    assert (pixels(tmp_path / "0001.png") == expected).all()


def test_a_single_file_paints_as_its_folder_does(masks: dict[str, Path], painter: Painter, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (root / "controlnet").mkdir()
    (root / "controlnet" / "alone.safetensors").symlink_to(MASK_NET / "diffusion_pytorch_model.safetensors")
    ended = Painter(root).run(tmp_path / "a", masks, **QUICK, seed=7, control=[one(model="alone")])
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    painter.run(tmp_path / "b", masks, **QUICK, seed=7, control=[one()])
    assert (pixels(tmp_path / "a" / "0000.png") == pixels(tmp_path / "b" / "0000.png")).all()


def test_the_manifest_tells_of_the_controlnet(painter: Painter, masks: dict[str, Path], tmp_path: Path) -> None:
    ended = painter.run(tmp_path, masks, **QUICK, seed=7, control=[one()])
    (told,) = ended.engine["controlnets"]
    assert told["name"] == "shapes-xl-mask"
    assert len(told["sha256"]) == 64
    assert [picture["name"] for picture in ended.engine["pictures"]] == [LEFT]


def test_a_missing_controlnet_says_what_to_get(painter: Painter, masks: dict[str, Path], tmp_path: Path) -> None:
    ended = painter.run(tmp_path, masks, **QUICK, control=[{"type": "depth", "image": LEFT}])
    assert ended.failure.error.code == "MODEL_NOT_FOUND"
    assert "imagend fetch https://huggingface.co/diffusers/controlnet-depth-sdxl-1.0" in ended.failure.error.message
    ended = painter.run(tmp_path, masks, **QUICK, control=[one(model="shapes-xl-masc")])
    assert "Known are: shapes-xl-mask" in ended.failure.error.message


def test_one_for_a_model_of_another_size_is_refused_and_the_base_paints_on(
    bare: Any, masks: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    config = {**diffusers.ControlNetModel.load_config(MASK_NET), "block_out_channels": [16, 32, 48]}
    other = diffusers.ControlNetModel.from_config(config)
    other.save_pretrained(root / "controlnet" / "depth")
    painter = Painter(root)
    ended = painter.run(tmp_path / "a", masks, **QUICK, seed=7, control=[{"type": "depth", "image": LEFT}])
    assert ended.failure.error.code == "MODEL_UNUSABLE"
    assert "made for a model of another size" in ended.failure.error.message
    painter.run(tmp_path / "b", **QUICK, seed=7)
    assert (pixels(tmp_path / "b" / "0000.png") == without(bare, 7)).all()
