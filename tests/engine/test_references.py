"""References by an IP-Adapter: the same bits as diffusers' own call; nothing left of them afterwards; refusals."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import diffusers
import loras
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from diffusers.image_processor import IPAdapterMaskProcessor
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from imagend.job import Outcome
from imagend.memory_plan import Mode, Rung
from imagend.messages import Progress, WorkerSettings
from imagend.models import Models
from imagend.worker.embedding_cache import EmbeddingCache
from imagend.worker.pipelines import Pipelines

PROMPT = "a red circle on a blue background"
QUICK = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 4.0}
FRONT, BACK, LEFT = "leona/front", "leona/back", "masks/left"
EMPTY = "0" * 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the embedded model, an encoder, a plain adapter and a Plus."""
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (root / "controlnet").symlink_to(REPOSITORY / "models" / "controlnet")
    adapters.encoder(root / "clip_vision" / "tiny")
    loras.save(loras.random(load_plain(), 1), root / "loras" / "one.safetensors")
    for form in ("plain", "plus"):
        adapters.adapter(root / "ipadapter" / f"{form}.safetensors", form)
    return root


@pytest.fixture(scope="module")
def painter(root: Path) -> Painter:
    return Painter(root)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, dice = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    found = {}
    for name, size in ((FRONT, (40, 64)), (BACK, (64, 64))):
        found[name] = folder / f"{name[6:]}.png"
        Image.fromarray(dice.integers(0, 256, (*size, 3), dtype=np.uint8)).save(found[name])
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[:, :64] = 255
    found[LEFT] = folder / "left.png"
    Image.fromarray(mask).save(found[LEFT])
    return found


class Plain:
    """diffusers alone, with an IP-Adapter as its documentation loads it."""

    def __init__(self, root: Path, form: str, count: int = 1) -> None:
        self.pipe = load_plain()
        encoder = CLIPVisionModelWithProjection.from_pretrained(root / "clip_vision" / "tiny")
        self.pipe.image_encoder = _owned(encoder.eval())
        self.pipe.feature_extractor = CLIPImageProcessorPil(size=32, crop_size=32)
        tensors: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in load_file(root / "ipadapter" / f"{form}.safetensors").items():
            part, _, rest = name.partition(".")
            tensors[part][rest] = tensor
        several = {"subfolder": [""] * count, "weight_name": [""] * count}
        self.pipe.load_ip_adapter([tensors] * count, **several, image_encoder_folder=None)
        _owned(self.pipe.unet)

    def paint(self, scale: Any, *pictures: Path, seed: int = 7, **arguments: Any) -> np.ndarray:
        pipe = self.pipe
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
        pipe.set_ip_adapter_scale(scale)
        opened = [Image.open(path).convert("RGB") for path in pictures]
        kind = arguments.pop("kind", None)
        call = QUICK | {"ip_adapter_image": opened} | arguments
        if kind is not None:
            pipe = kind(**pipe.components, add_watermarker=False)
            pipe.set_progress_bar_config(disable=True)
        return np.asarray(pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0])


def _owned(module: Any) -> Any:
    """Not mapped from its file, whose alignment decides bits."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


@pytest.fixture(scope="module")
def plains(root: Path) -> dict[str, Plain]:
    return {form: Plain(root, form) for form in ("plain", "plus")}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def paint(painter: Painter, folder: Path, shown: dict[str, Path], *references: dict[str, Any], **fields: Any) -> Any:
    fields = {"ip_adapter": "plain"} | fields if references else fields
    return painter.run(folder, shown, **QUICK | {"seed": 7, "references": list(references)} | fields)


def painted(painter: Painter, folder: Path, shown: dict[str, Path], *references: Any, **fields: Any) -> np.ndarray:
    ended = paint(painter, folder, shown, *references, **fields)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return pixels(folder / "0000.png")


def one(image: str = FRONT, **fields: Any) -> dict[str, Any]:
    return {"image": image} | fields


@pytest.mark.parametrize("form", ["plain", "plus"])
@pytest.mark.parametrize(
    ("reference", "fields", "scale", "arguments"),
    [
        ({}, {}, 0.6, {}),
        ({"strength": 1.0}, {"reference_strength": 0.5}, 0.5, {}),
        ({}, {"guidance_scale": 1.0}, 0.6, {"guidance_scale": 1.0}),
        ({"influence": "style", "strength": 1.0}, {}, {"up": {"block_0": [0.0, 1.0]}}, {}),
        ({"influence": "layout", "strength": 1.0}, {}, {"down": {"block_2": [1.0]}}, {}),
    ],
)
def test_a_picture_equals_a_plain_diffusers_call_bit_for_bit(
    painter: Painter,
    plains: dict[str, Plain],
    shown: dict[str, Path],
    tmp_path: Path,
    form: str,
    reference: dict[str, Any],
    fields: dict[str, Any],
    scale: Any,
    arguments: dict[str, Any],
) -> None:
    found = painted(painter, tmp_path, shown, one(**reference), ip_adapter=form, **fields)
    assert (found == plains[form].paint(scale, shown[FRONT], **arguments)).all()
    assert (found != painted(painter, tmp_path / "without", shown, **fields)).any()


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_several_pictures_each_with_its_strength_and_place(
    painter: Painter, root: Path, shown: dict[str, Path], tmp_path: Path, form: str
) -> None:
    plain, strengths = Plain(root, form, count=2), [0.7, 0.3]
    first, second = one(FRONT, strength=0.7, role="front"), one(BACK, strength=0.3, role="back")
    found = painted(painter, tmp_path / "two", shown, first, second, ip_adapter=form)
    assert (found == plain.paint(strengths, shown[FRONT], shown[BACK])).all()
    found = painted(painter, tmp_path / "left", shown, first | {"mask": LEFT}, second, ip_adapter=form)
    left = IPAdapterMaskProcessor().preprocess(Image.open(shown[LEFT]).convert("RGB"))
    masks = {"ip_adapter_masks": [left, None]}
    assert (found == plain.paint(strengths, shown[FRONT], shown[BACK], cross_attention_kwargs=masks)).all()
    styled = painted(painter, tmp_path / "style", shown, first, second | {"influence": "style"}, ip_adapter=form)
    scale = [0.7, {"up": {"block_0": [0.0, 0.3]}}]
    assert (styled == plain.paint(scale, shown[FRONT], shown[BACK])).all()
    assert (painted(painter, tmp_path / "one", shown, first, ip_adapter=form) != found).any()


def test_with_a_picture_to_begin_with(
    painter: Painter, plains: dict[str, Plain], shown: dict[str, Path], tmp_path: Path
) -> None:
    found = painted(painter, tmp_path, shown, one(), image=BACK, strength=0.8)
    begin = Image.open(shown[BACK]).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    assert (found == plains["plain"].paint(0.6, shown[FRONT], kind=kind, image=begin, strength=0.8)).all()


def test_a_strength_of_nothing_is_no_reference_and_loads_nothing(
    painter: Painter, shown: dict[str, Path], tmp_path: Path
) -> None:
    bare = painted(painter, tmp_path / "bare", shown)
    for name, reference, fields in (("each", one(strength=0.0), {}), ("all", one(), {"reference_strength": 0.0})):
        ended = paint(painter, tmp_path / name, shown, reference, **fields)
        assert (pixels(tmp_path / name / "0000.png") == bare).all()
        assert "ip_adapter" not in ended.engine
        assert "ip_adapter" not in (ended.loading or {})
    mixed = painted(painter, tmp_path / "mixed", shown, one(), one(BACK, strength=0.0))
    assert (mixed == painted(painter, tmp_path / "one", shown, one())).all()


def test_nothing_is_left_of_it_in_the_base(painter: Painter, shown: dict[str, Path], tmp_path: Path) -> None:
    bare = painted(painter, tmp_path / "before", shown)
    unet = painter.pipelines.switch.pipe.unet
    keys, processors = list(unet.state_dict()), dict(unet.attn_processors)
    with_one = painted(painter, tmp_path / "with", shown, one())
    assert (with_one != bare).any()
    assert (painted(painter, tmp_path / "after", shown) == bare).all()
    assert list(unet.state_dict()) == keys
    assert unet.attn_processors == processors
    assert (unet.encoder_hid_proj, unet.config.encoder_hid_dim_type) == (None, None)
    again = paint(painter, tmp_path / "again", shown, one())
    assert "ip_adapter" not in (again.loading or {})  # it stayed in main memory
    assert (pixels(tmp_path / "again" / "0000.png") == with_one).all()


def test_together_with_a_lora_and_a_controlnet_as_in_plain_diffusers(
    painter: Painter, root: Path, shown: dict[str, Path], tmp_path: Path
) -> None:
    control = [{"model": "shapes-xl-mask", "image": LEFT}]
    loras_ = [{"name": "one", "weight": 0.8}]
    bare = painted(painter, tmp_path / "bare", shown)
    guided = painted(painter, tmp_path / "guided", shown, control=control)
    found = painted(painter, tmp_path / "all", shown, one(), control=control, loras=loras_)
    plain = Plain(root, "plain")
    plain.pipe.load_lora_weights(root / "loras" / "one.safetensors")
    plain.pipe.set_adapters(plain.pipe.get_active_adapters(), 0.8)
    net = _owned(diffusers.ControlNetModel.from_pretrained(root / "controlnet" / "shapes-xl-mask"))
    kind = partial(diffusers.StableDiffusionXLControlNetPipeline, controlnet=net)
    scale = {"controlnet_conditioning_scale": 0.5}
    expected = plain.paint(0.6, shown[FRONT], kind=kind, image=Image.open(shown[LEFT]), **scale)
    assert (found == expected).all()
    assert (painted(painter, tmp_path / "guided2", shown, control=control) == guided).all()
    assert (painted(painter, tmp_path / "bare2", shown) == bare).all()


def test_an_edit_by_a_reference_and_a_controlnet_as_in_plain_diffusers(
    painter: Painter, root: Path, shown: dict[str, Path], tmp_path: Path
) -> None:
    control = [{"model": "shapes-xl-mask", "image": LEFT}]
    edit = {"kind": "edit", "image": BACK, "mask": {"whole": True}, "strength": 0.8, "ip_adapter": "plain"}
    painted(painter, tmp_path, shown, one(FRONT, mask=LEFT), control=control, **edit)
    plain, size = Plain(root, "plain"), (128, 128)
    net = _owned(diffusers.ControlNetModel.from_pretrained(root / "controlnet" / "shapes-xl-mask"))
    with Image.open(shown[LEFT]) as left, Image.open(shown[BACK]) as back:
        whole = back.size
        where = ImageOps.fit(left.convert("RGB"), whole, Image.Resampling.LANCZOS)
        image, where = (one.resize(size, Image.Resampling.LANCZOS) for one in (back.convert("RGB"), where))
    expected = plain.paint(
        0.6,
        shown[FRONT],
        kind=partial(diffusers.StableDiffusionXLControlNetInpaintPipeline, controlnet=net),
        image=image,
        mask_image=Image.new("L", size, 255),
        control_image=where,
        controlnet_conditioning_scale=0.5,
        strength=0.8,
        cross_attention_kwargs={"ip_adapter_masks": [IPAdapterMaskProcessor().preprocess(where)]},
    )
    found = Image.fromarray(expected).resize(whole, Image.Resampling.LANCZOS)
    assert (pixels(tmp_path / "0000.png") == np.asarray(found)).all()


@pytest.mark.parametrize("form", ["plain", "plus"])
@pytest.mark.parametrize("mode", list(Mode)[1:])
def test_every_memory_mode_shows_them_and_those_that_only_move_weights_change_no_bit(
    painter: Painter,
    plains: dict[str, Plain],
    shown: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    form: str,
) -> None:
    bare = painted(painter, tmp_path / "bare", shown)
    monkeypatch.setattr(painter.pipelines.ladder, "modes", (mode,))
    monkeypatch.setattr(painter.pipelines.ladder, "seen", {})
    ended = paint(painter, tmp_path / "with", shown, one(), ip_adapter=form)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert ended.memory["mode"] == mode
    if Rung(mode).exact:
        assert (pixels(tmp_path / "with" / "0000.png") == plains[form].paint(0.6, shown[FRONT])).all()
        assert (painted(painter, tmp_path / "after", shown) == bare).all()
    painter.pipelines.ladder.placement.release()
    monkeypatch.undo()
    assert (painted(painter, tmp_path / "resident", shown) == bare).all()


def test_the_planner_counts_its_weights(painter: Painter, shown: dict[str, Path], tmp_path: Path) -> None:
    painted(painter, tmp_path / "bare", shown)
    pipe = painter.pipelines.switch.pipe
    bare = painter.pipelines.ladder.placement.anatomy(pipe)["unet_bytes"]
    painted(painter, tmp_path / "with", shown, one())
    added = sum(one.nbytes for part in painter.pipelines.ip_adapter._loaded.modules() for one in part.parameters())
    assert added > 0
    assert painter.pipelines.ladder.placement.anatomy(pipe)["unet_bytes"] == bare + added


def test_the_manifest_says_what_read_the_references(painter: Painter, shown: dict[str, Path], tmp_path: Path) -> None:
    ended = paint(painter, tmp_path, shown, one(), one(BACK, mask=LEFT))
    told = ended.engine["ip_adapter"]
    assert (told["name"], told["encoder"]["name"]) == ("plain", "tiny")
    assert len(told["sha256"]) == len(told["encoder"]["sha256"]) == len(EMPTY)
    assert [one["name"] for one in ended.engine["pictures"]] == [FRONT, BACK, LEFT]


def test_cancelled_while_pictures_are_encoded(painter: Painter, shown: dict[str, Path], tmp_path: Path) -> None:
    seen = []

    def hear(message: Any) -> None:
        if isinstance(message, Progress) and message.stage == "encoding" and message.pictures == 0:
            seen.append(message)
            painter.worker.cancel(message.job)

    painter.hear = hear
    assert paint(painter, tmp_path, shown, one(), one(BACK)).outcome is Outcome.CANCELLED
    painter.hear = None
    assert len(seen) == 1
    bare = painted(painter, tmp_path / "bare", shown)
    assert (bare == painted(painter, tmp_path / "bare2", shown)).all()


@pytest.mark.parametrize("colour", [(220, 30, 30), (30, 60, 220), (245, 220, 30)])
def test_it_is_seen_a_reference_decides_the_background(colour: tuple[int, int, int], tmp_path: Path) -> None:
    painter, shown = Painter(), {"shapes/one": tmp_path / "one.png"}
    picture = Image.new("RGB", (128, 128), colour)
    ImageDraw.Draw(picture).ellipse((40, 40, 90, 90), fill=(250, 250, 250))
    picture.save(shown["shapes/one"])
    job = {"prompt": "", "num_inference_steps": 12, "guidance_scale": 4.0, "count": 4, "seed": 1}

    def alike(folder: Path, **fields: Any) -> int:
        """How many have that background, by the median of their border."""
        ended = painter.run(folder, shown, **job, **fields)
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure
        painted = [pixels(folder / artifact.file) for artifact in ended.artifacts]
        borders = [np.median(np.concatenate([one[:6], one[-6:]]).reshape(-1, 3), axis=0) for one in painted]
        return sum(bool(np.abs(border - colour).sum() < 90) for border in borders)

    without = alike(tmp_path / "without")
    assert alike(tmp_path / "with", references=[one("shapes/one")]) >= 3 > without


# What cannot be


def failure(painter: Painter, folder: Path, shown: dict[str, Path], *references: Any, **fields: Any) -> str:
    ended = paint(painter, folder, shown, *references, **fields)
    assert ended.outcome is Outcome.FAILED
    return f"{ended.failure.error.code}: {ended.failure.error.message}"


def test_which_adapter_must_be_said_where_there_are_several(
    painter: Painter, shown: dict[str, Path], tmp_path: Path
) -> None:
    assert failure(painter, tmp_path, shown, one(), ip_adapter=None) == (
        "INVALID_PARAMETERS: references: there are the IP-Adapters plain, plus. Name one in `ip_adapter`"
    )


def test_without_an_adapter_or_its_encoder_the_error_says_what_to_fetch(
    root: Path, shown: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "models"
    (bare / "diffusers").mkdir(parents=True)
    (bare / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    painter = Painter(bare)
    assert failure(painter, tmp_path / "1", shown, one(), ip_adapter=None) == (
        "MODEL_NOT_FOUND: There is no IP-Adapter for this model under models/ipadapter/. Get one, such as by "
        "`imagend fetch https://huggingface.co/h94/IP-Adapter/blob/main/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors`."
    )
    (bare / "ipadapter").mkdir()
    shutil.copy(root / "ipadapter" / "plain.safetensors", bare / "ipadapter")
    adapters.encoder(bare / "clip_vision" / "narrow", projected=24)
    assert failure(painter, tmp_path / "2", shown, one(), ip_adapter=None) == (
        "MODEL_NOT_FOUND: The IP-Adapter 'plain' reads what a CLIP vision encoder of projection_dim 40 makes of a "
        "picture, and there is none under models/clip_vision/. Put a folder with its config.json "
        "and model.safetensors there: the folder models/image_encoder of https://huggingface.co/h94/IP-Adapter."
    )
    assert (painted(painter, tmp_path / "3", shown) == painted(painter, tmp_path / "4", shown)).all()


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_an_adapter_that_lacks_weights_is_refused_and_the_base_is_unharmed(
    root: Path, shown: dict[str, Path], tmp_path: Path, form: str
) -> None:
    own = tmp_path / "models"
    shutil.copytree(root, own, symlinks=True)
    painter = Painter(own)
    bare = painted(painter, tmp_path / "bare", shown)
    file = own / "ipadapter" / f"{form}.safetensors"
    for number, lost in enumerate(("ip_adapter.3.to_v_ip.weight", "image_proj.norm", "image_proj.layers.2")):
        left = {
            name: one for name, one in load_file(root / "ipadapter" / file.name).items() if not name.startswith(lost)
        }
        if lost.startswith("image_proj.layers") and form == "plain":
            continue
        save_file(left, file)
        assert "MODEL_" in failure(painter, tmp_path / str(number), shown, one(), ip_adapter=form)
        assert (painted(painter, tmp_path / f"bare{number}", shown) == bare).all()


# Embeddings are kept


@pytest.fixture
def keeping(root: Path, tmp_path: Path) -> Painter:
    own = tmp_path / "models"
    shutil.copytree(root, own, symlinks=True)
    return _painter(own, tmp_path / "embeddings")


def _painter(root: Path, folder: Path, mb: int = 1) -> Painter:
    painter = Painter(root)
    painter.pipelines = Pipelines("cpu", Models(root), WorkerSettings(embeddings=str(folder), embedding_cache_mb=mb))
    painter.worker._pipelines = painter.pipelines
    return painter


def encoded(painter: Painter) -> bool:
    """Whether the last job loaded the encoder."""
    encoder = painter.pipelines.ip_adapter._encoder
    return encoder is not None and encoder._loaded is not None


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_a_picture_is_encoded_once_and_its_embedding_reused_bit_for_bit(
    keeping: Painter, shown: dict[str, Path], tmp_path: Path, form: str
) -> None:
    first = painted(keeping, tmp_path / "1", shown, one(), ip_adapter=form)
    assert encoded(keeping)
    assert (painted(keeping, tmp_path / "2", shown, one(), ip_adapter=form) == first).all()
    assert not encoded(keeping)
    other = _painter(tmp_path / "models", tmp_path / "embeddings")  # after a restart
    assert (painted(other, tmp_path / "3", shown, one(), ip_adapter=form) == first).all()
    assert not encoded(other)


def test_a_picture_or_an_encoder_that_was_replaced_is_encoded_anew_and_the_old_embedding_goes(
    keeping: Painter, shown: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "embeddings"
    first = painted(keeping, tmp_path / "1", shown, one())
    assert len(list(cache.glob("*.safetensors"))) == 1
    replaced = shown | {FRONT: shown[BACK]}
    second = painted(keeping, tmp_path / "2", replaced, one())
    assert (first != second).any()
    assert encoded(keeping)
    assert len(list(cache.glob("*.safetensors"))) == 1
    shutil.rmtree(tmp_path / "models" / "clip_vision" / "tiny")
    adapters.encoder(tmp_path / "models" / "clip_vision" / "tiny", seed=9)
    third = painted(keeping, tmp_path / "3", replaced, one())
    assert (second != third).any()
    assert encoded(keeping)
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_what_is_damaged_or_refused_costs_only_the_work_again(
    keeping: Painter, shown: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "embeddings"
    first = painted(keeping, tmp_path / "1", shown, one())
    (file,) = cache.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    (cache / "index.json").write_text("[1")
    assert (painted(keeping, tmp_path / "2", shown, one()) == first).all()
    assert encoded(keeping)
    assert (painted(keeping, tmp_path / "3", shown, one()) == first).all()
    assert not encoded(keeping)
    shutil.rmtree(cache)
    cache.write_text("not a folder")
    assert (painted(keeping, tmp_path / "4", shown, one()) == first).all()


def test_the_least_recently_used_go_when_there_are_too_many(tmp_path: Path) -> None:
    one_kib = torch.zeros(256)
    cache = EmbeddingCache(tmp_path, 4000)

    def about(name: str) -> dict[str, str]:
        return {"name": name, "picture": name, "encoder_name": "tiny", "encoder": "1"}

    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        cache.put(about(name), {"positive": one_kib})
        path = cache._path(about(name))
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert cache.get(about("a")) is not None
    cache.put(about("d"), {"positive": one_kib})
    assert [name for name in "abcd" if cache.get(about(name)) is not None] == ["a", "c", "d"]
    told = json.loads((tmp_path / "index.json").read_text())
    assert sorted(one["name"] for one in told.values()) == ["a", "c", "d"]
    cache.put(about("e"), {"positive": torch.zeros(2000)})  # larger than all may be together
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
