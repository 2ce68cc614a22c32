"""Base models: from folders and single files, each with plain diffusers' bits; switched in place, kept, and rebuilt."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import siblings
import torch
from engine_conftest import EMBEDDED, Painter
from PIL import Image
from safetensors.torch import load_file, save_file

from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.messages import WorkerSettings
from imagend.worker.pipelines import Pipelines, StableDiffusionXLPipeline

SIZE = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
JOB = SIZE | {"prompt": "a large red circle on a blue background", "seed": 5}
MIB = 1 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    diffusers, checkpoints = root / "diffusers", root / "checkpoints"
    diffusers.mkdir()
    (diffusers / "shapes-xl").symlink_to(EMBEDDED)
    pony = siblings.folder(diffusers / "pony", 1, torch.float32)
    siblings.folder(diffusers / "other build", 2, configs={"text_encoder/config.json": {"hidden_act": "gelu"}})
    siblings.checkpoint(pony, checkpoints / "pony v6 (fp32).safetensors")
    siblings.checkpoint(EMBEDDED, checkpoints / "shapes.safetensors")
    siblings.checkpoint(pony, checkpoints / "bare.safetensors", without="first_stage_model.")
    siblings.checkpoint(pony, checkpoints / "half.safetensors", without="model.diffusion_model.output_blocks.2.")
    siblings.checkpoint(pony, checkpoints / "noob.safetensors", marks={"v_pred": "", "ztsnr": ""})
    vaes = root / "vae"
    shutil.copytree(pony / "vae", vaes / "folder")
    weights = load_file(checkpoints / "pony v6 (fp32).safetensors")
    prefix = "first_stage_model."
    file = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    save_file(file, vaes / "file.safetensors")
    shutil.copy(pony / "vae" / "diffusion_pytorch_model.safetensors", vaes / "named as in diffusers.safetensors")
    return root


@pytest.fixture(scope="module")
def worker(root: Path) -> Painter:
    return Painter(root)


@pytest.fixture
def few(worker: Painter) -> Pipelines:
    """Fresh pipelines that keep nothing beside the current base."""
    return Pipelines("cpu", worker.models, WorkerSettings(base_cache_gb=0.0))


def pixels(ended: Any, folder: Path) -> np.ndarray:
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return np.asarray(Image.open(folder / "0000.png").convert("RGB"))


def paint(worker: Painter, folder: Path, **fields: Any) -> np.ndarray:
    return pixels(worker.run(folder, **JOB | fields), folder)


_plain: dict[str, np.ndarray] = {}


def plainly(path: Path, **parts: Any) -> np.ndarray:
    """The picture of JOB by diffusers alone."""
    key = f"{path} {sorted(parts)}"
    if key not in _plain:
        options = {"dtype": torch.float32, "add_watermarker": False, **parts}
        if path.is_dir():
            pipe = StableDiffusionXLPipeline.from_pretrained(path, **options)
        else:
            options |= {"config": str(EMBEDDED), "local_files_only": True}
            pipe = StableDiffusionXLPipeline.from_single_file(path, **options)
        pipe.set_progress_bar_config(disable=True)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            for tensor in module.parameters():
                tensor.data = tensor.data.clone()  # out of the mapped file: where it lies there would decide last bits
        image = pipe(JOB["prompt"], generator=torch.Generator("cpu").manual_seed(5), **SIZE).images[0]
        _plain[key] = np.asarray(image)
    return _plain[key]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one == other).all())


# Folders and single files


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("pony v6 (fp32)", "checkpoints/pony v6 (fp32).safetensors"),
        ("shapes", "checkpoints/shapes.safetensors"),
        ("pony", "diffusers/pony"),
    ],
)
def test_a_base_paints_plain_diffusers_bits(worker: Painter, root: Path, tmp_path: Path, name: str, path: str) -> None:
    assert same(paint(worker, tmp_path, model=name), plainly(root / path))


def test_a_single_file_paints_its_folders_bits(worker: Painter, root: Path, tmp_path: Path) -> None:
    """In float32, where the files are mapped as they are, and in float16, where they are widened."""
    assert same(paint(worker, tmp_path / "a", model="pony v6 (fp32)"), plainly(root / "diffusers/pony"))
    assert same(paint(worker, tmp_path / "b", model="shapes"), plainly(EMBEDDED))
    assert not same(plainly(EMBEDDED), plainly(root / "diffusers/pony"))


def test_a_checkpoints_marks_choose_what_the_scheduler_predicts(worker: Painter, tmp_path: Path) -> None:
    ended = worker.run(tmp_path, **JOB | {"model": "noob"})
    config = ended.engine["scheduler"]["config"]
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert config["timestep_spacing"] == "trailing"


def test_a_checkpoint_that_lacks_weights_is_refused_and_nothing_is_harmed(worker: Painter, tmp_path: Path) -> None:
    ended = worker.run(tmp_path / "half", **JOB | {"model": "half"})
    assert ended.failure.error.code == "MODEL_UNUSABLE"
    assert "it lacks some of its weights" in ended.failure.error.message
    assert same(paint(worker, tmp_path / "after"), plainly(EMBEDDED))


def test_a_checkpoint_without_a_vae_asks_for_one(worker: Painter, tmp_path: Path) -> None:
    ended = worker.run(tmp_path, **JOB | {"model": "bare"})
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert "Name one in `vae`" in ended.failure.error.message


# Switching


def test_a_switch_between_bases_of_one_build_keeps_the_modules(worker: Painter, root: Path, tmp_path: Path) -> None:
    paint(worker, tmp_path / "first", model="shapes-xl")
    before = dict(worker.pipelines.switch.pipe.components)
    parameter = next(before["unet"].parameters())
    ended = worker.run(tmp_path / "second", **JOB | {"model": "pony"})
    assert same(pixels(ended, tmp_path / "second"), plainly(root / "diffusers/pony"))
    after = worker.pipelines.switch.pipe.components
    for name in siblings.COMPONENTS:
        assert after[name] is before[name]
    assert next(after["unet"].parameters()) is parameter
    assert sorted(ended.loading["in_place"]) == sorted(siblings.COMPONENTS)
    for part in worker.pipelines.switch.base.parts.values():  # the other base's own modules hold nothing
        assert not any(tensor.numel() for tensor in part.tensors.values())
    assert (ended.loading["from"], ended.loading["to"]) == ("shapes-xl", "pony")
    assert ended.loading["seconds"] > 0
    assert same(paint(worker, tmp_path / "third", model="shapes-xl"), plainly(EMBEDDED))


def test_a_component_of_another_build_makes_way(worker: Painter, root: Path, tmp_path: Path) -> None:
    paint(worker, tmp_path / "first", model="shapes-xl")
    before = dict(worker.pipelines.switch.pipe.components)
    assert same(paint(worker, tmp_path / "second", model="other build"), plainly(root / "diffusers/other build"))
    after = worker.pipelines.switch.pipe.components
    assert after["text_encoder"] is not before["text_encoder"]
    assert after["unet"] is before["unet"]
    assert not any(tensor.numel() for tensor in before["text_encoder"].parameters())  # what it held is freed
    assert same(paint(worker, tmp_path / "third", model="shapes-xl"), plainly(EMBEDDED))


def test_what_was_painted_with_lately_is_not_read_again(worker: Painter, root: Path, tmp_path: Path) -> None:
    read = []
    for number, name in enumerate(("pony", "shapes-xl", "pony", "shapes-xl")):
        ended = worker.run(tmp_path / str(number), **JOB | {"model": name})
        expected = plainly(root / "diffusers" / name)
        assert same(pixels(ended, tmp_path / str(number)), expected)
        read.append(ended.loading["bytes_read"])
    assert read[2:] == [0, 0]
    assert worker.run(tmp_path / "same", **JOB).loading is None  # no switch, no report


def test_a_file_that_changed_is_read_again(root: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    file = models / "checkpoints" / "a.safetensors"
    siblings.checkpoint(root / "diffusers" / "pony", file)
    worker = Painter(models)
    assert same(paint(worker, tmp_path / "one", model="a"), plainly(root / "diffusers/pony"))
    siblings.checkpoint(EMBEDDED, file)
    assert same(paint(worker, tmp_path / "two", model="a"), plainly(EMBEDDED))


def test_without_a_cache_only_the_current_base_is_held(few: Pipelines) -> None:
    bytes_of_one = 0
    for name in ("shapes-xl", "pony", "shapes-xl"):
        few.get(name, lambda: None)
        bytes_of_one = sum(part.bytes for part in few.switch.base.parts.values())
        assert held(few) == bytes_of_one
    assert bytes_of_one > MIB


def test_the_least_recently_used_base_goes_first(worker: Painter) -> None:
    one = sum(part.bytes for part in load(Pipelines("cpu", worker.models), "shapes-xl").parts.values())
    pipelines = Pipelines("cpu", worker.models, WorkerSettings(base_cache_gb=1.5 * one / (1 << 30)))
    for name in ("shapes-xl", "pony", "shapes", "pony", "shapes-xl"):
        load(pipelines, name)
    assert [model.name for model in pipelines.switch._kept] == ["pony", "shapes-xl"]
    assert held(pipelines) == 2 * one


def load(pipelines: Pipelines, name: str) -> Any:
    pipelines.get(name, lambda: None)
    return pipelines.switch.base


def held(pipelines: Pipelines) -> int:
    """Bytes of weights that anything keeps alive, in seats and beside them."""
    switch = pipelines.switch
    kept = [part for loaded in switch._kept.values() for part in loaded.parts.values()]
    tensors = [tensor for part in kept for tensor in (*part.tensors.values(), *(part.weights or {}).values())]
    tensors += [tensor for seat in switch._seats.values() for tensor in seat.frame.tensors.values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}.values())


# VAEs


@pytest.mark.parametrize("name", ["folder", "file", "named as in diffusers"])
def test_another_vae_decodes(worker: Painter, root: Path, name: str) -> None:
    pipe = worker.pipelines.get("shapes-xl", lambda: None, name)
    expected = load_file(root / "diffusers/pony/vae/diffusion_pytorch_model.safetensors")
    found = pipe.vae.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert worker.pipelines.describe()["vae"]["name"] == name
    own = worker.pipelines.get("shapes-xl", lambda: None).vae.state_dict()
    assert not all(torch.equal(own[key], tensor) for key, tensor in expected.items())
    assert worker.pipelines.describe()["vae"] is None


def test_a_checkpoint_without_a_vae_paints_with_another(worker: Painter, root: Path) -> None:
    pipe = worker.pipelines.get("bare", lambda: None, "file")
    image = pipe(JOB["prompt"], generator=torch.Generator("cpu").manual_seed(5), **SIZE).images[0]
    assert same(np.asarray(image), plainly(root / "diffusers/pony"))


# Health


def _nan(pipe: Any) -> None:
    next(pipe.text_encoder_2.parameters()).data.fill_(float("nan"))


def _fused(pipe: Any) -> None:
    for parameter in pipe.unet.parameters():
        parameter.data += 0.01


def _meta(pipe: Any) -> None:
    next(pipe.vae.parameters()).data = next(pipe.vae.parameters()).data.to(torch.float64)


def _exchanged(pipe: Any) -> None:
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config)


def _hooked(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("harm", [_nan, _fused, _meta, _exchanged, _hooked])
def test_a_broken_pipeline_is_rebuilt(worker: Painter, tmp_path: Path, harm: Any) -> None:
    paint(worker, tmp_path / "before")
    harm(worker.pipelines.switch.pipe)
    ended = worker.run(tmp_path / "after", **JOB)
    assert same(pixels(ended, tmp_path / "after"), plainly(EMBEDDED))
    assert ended.loading["rebuilt"]
    assert "rebuilt" not in (worker.run(tmp_path / "again", **JOB).loading or {})


@pytest.mark.parametrize("mode", [Mode.RESIDENT, Mode.MODEL_OFFLOAD, Mode.GROUP_OFFLOAD, Mode.FP8, Mode.SEQUENTIAL])
def test_a_base_is_switched_in_every_memory_mode(worker: Painter, root: Path, mode: Mode) -> None:
    pipelines, placement = worker.pipelines, worker.pipelines.ladder.placement
    unets = set()
    try:
        for name in ("shapes-xl", "pony", "shapes-xl"):
            pipe = pipelines.get(name, lambda: None)
            placement.apply(pipe, mode)
            assert pipelines.get(name, lambda: None) is pipe  # healthy in this mode
            image = pipe(JOB["prompt"], generator=torch.Generator("cpu").manual_seed(5), **SIZE).images[0]
            assert same(np.asarray(image), plainly(root / "diffusers" / name)) or mode is Mode.FP8
            unets.add(id(pipe.unet))
        assert len(unets) == 1
    finally:
        placement.release()
    assert pipelines.switch.trouble() is None


# Pins


def test_a_pinned_base_paints_its_own_bits_or_none(worker: Painter, root: Path, tmp_path: Path) -> None:
    sha256 = worker.run(tmp_path / "plain", **JOB | {"model": "pony"}).engine["model"]["sha256"]
    ended = worker.run(tmp_path / "own", **JOB | {"model": f"pony@{sha256[:10]}"})
    assert same(pixels(ended, tmp_path / "own"), plainly(root / "diffusers/pony"))
    ended = worker.run(tmp_path / "other", **JOB | {"model": f"shapes-xl@{sha256[:10]}"})
    assert ended.failure.error.code == "MODEL_REPLACED"
    assert f"must begin with {sha256[:10]}" in ended.failure.error.message
    assert ended.failure.error.detail["sha256"] != sha256
    assert same(paint(worker, tmp_path / "after"), plainly(EMBEDDED))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_base_that_is_replaced_while_it_loads_is_not_taken_for_the_other(
    root: Path, tmp_path: Path, pinned: bool
) -> None:
    """After its digest was known, before its bytes were read."""
    models = tmp_path / "models"
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    file, other = models / "checkpoints" / "a.safetensors", tmp_path / "other.safetensors"
    siblings.checkpoint(root / "diffusers" / "pony", file)
    siblings.checkpoint(EMBEDDED, other)
    worker = Painter(models)
    pin = f"@{hashlib.sha256(file.read_bytes()).hexdigest()[:10]}" if pinned else ""
    worker.hear = lambda message: other.replace(file) if message.type == "progress" and other.exists() else None
    ended = worker.run(tmp_path / "one", **JOB | {"model": f"a{pin}"})
    assert (ended.failure.error.code, other.exists()) == ("MODEL_REPLACED", False)
    if pinned:
        ended = worker.run(tmp_path / "two", **JOB | {"model": f"a{pin}"})
        assert ended.failure.error.code == "MODEL_REPLACED"
    assert same(paint(worker, tmp_path / "three", model="a"), plainly(EMBEDDED))
