"""LoRAs in whole jobs: painted as diffusers paints with them, seen in the picture, and gone without a trace."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from engine_conftest import EMBEDDED, Painter, StableDiffusionXLPipeline, load_plain
from PIL import Image
from safetensors.torch import load_file, save_file

from imagend.job import Outcome
from imagend.memory_plan import Mode
from imagend.worker.part import own

JOB = {"prompt": "a red circle on a blue background", "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3}
JOB |= {"width": 64, "height": 64}
ALPHAS = {"fc1": 1.0, "q_proj": 3.0, "to_k": 1.0, "to_q": 8.0, "to_v": 2.0, "0": 6.0, "k_proj": 2.0}


@pytest.fixture(scope="module")
def bare() -> Any:
    """diffusers alone; each test takes its LoRAs out again."""
    return load_plain()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bare: Any) -> Path:
    """models/loras/ beside the embedded model: random ones and a trained one, and what cannot be used."""
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    sibling = root / "diffusers" / "sibling"
    shutil.copytree(EMBEDDED, sibling, ignore=shutil.ignore_patterns("*.py", "*.png"))
    (weights,) = (sibling / "unet").glob("*.safetensors")
    save_file({name: one * 1.02 for name, one in load_file(weights).items()}, weights, metadata={"format": "pt"})
    folder = root / "loras"
    unet = loras.random(bare, 1)
    both = loras.random(bare, 2, "unet", "text_encoder", "text_encoder_2")
    loras.save(unet, folder / "unet.safetensors")
    loras.save(loras.kohya(unet, bare, 4.0), folder / "unet-kohya.safetensors")
    loras.save(both, folder / "sub" / "all.safetensors")
    loras.save(loras.kohya(both, bare, 2.0), folder / "all-kohya.safetensors")
    loras.save(loras.random(bare, 3, "text_encoder"), folder / "one-encoder.safetensors")
    loras.save(loras.random(bare, 4, conv=True), folder / "conv.safetensors")
    wrong = {name: torch.zeros(4, 48) if name.endswith("A.weight") else one for name, one in unet.items()}
    loras.save(wrong, folder / "wide.safetensors")
    loras.save(
        {f"unet.no.such_{i}.lora_{x}.weight": torch.zeros(4, 4) for i in (1, 2) for x in "AB"}
        | {name.replace("blocks.1", "blocks.9"): one for name, one in unet.items()},
        folder / "elsewhere.safetensors",
    )
    kohya = loras.kohya(unet, bare, 4.0)
    first = next(iter(kohya)).partition(".")[0]
    loras.save(kohya | {f"{first}.dora_scale": torch.ones(32, 1)}, folder / "dora.safetensors")
    loras.save(
        {f"{first}.hada_w1_a": torch.ones(4, 4), "lora_unet_x.hada_w2_a": torch.ones(4, 4)}, folder / "loha.safetensors"
    )
    sd15 = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 768)
    }
    loras.save(sd15, folder / "sd15.safetensors")
    infinite = dict(unet)
    infinite[next(iter(unet))] = torch.full_like(next(iter(unet.values())), torch.inf)
    loras.save(infinite, folder / "infinite.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "unet.safetensors").read_bytes()[:-1])
    return folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> Painter:
    return Painter(folder.parent)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path / "0000.png").convert("RGB"))


def paint(worker: Painter, path: Path, *wanted: Any, **fields: Any) -> np.ndarray:
    given = {"loras": [{"name": one} if isinstance(one, str) else one for one in wanted]} if wanted else {}
    ended = worker.run(path, **JOB | given | fields)
    assert ended.outcome is Outcome.SUCCEEDED, (ended.failure.error.message, ended.failure.traceback)
    return pixels(path)


def by_diffusers(pipe: Any, folder: Path | None = None, **weights: Any) -> np.ndarray:
    """The pipeline's own call, with LoRAs as its documentation says; `weights` by file's name, in canonical order."""
    for number, name in enumerate(weights):
        pipe.load_lora_weights(f"{folder}/{name}.safetensors", adapter_name=f"x{number}")
    if weights:
        pipe.set_adapters([f"x{number}" for number in range(len(weights))], list(weights.values()))
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(EMBEDDED / "scheduler")
    call = {name: value for name, value in JOB.items() if name != "seed"}
    found = np.asarray(pipe(**call, generator=torch.Generator("cpu").manual_seed(3)).images[0])
    pipe.unload_lora_weights()
    return found


@pytest.fixture(scope="module")
def base(bare: Any, folder: Path) -> np.ndarray:
    return by_diffusers(bare)


@pytest.fixture(autouse=True)
def _the_base_is_unharmed(worker: Painter, base: np.ndarray, tmp_path: Path) -> Iterator[None]:
    """After every test, whatever it did: a job without LoRAs gives the base's own bits, by a bare pipeline."""
    yield
    assert (paint(worker, tmp_path / "afterwards") == base).all()
    pipe = worker.pipelines.switch.pipe
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        assert not any("lora" in name for name, _ in part.named_modules())
        assert not hasattr(part, "peft_config")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "weights",
    [
        {"unet": 1.0},
        {"unet-kohya": -0.5},
        {"sub/all": 0.7},
        {"all-kohya": 2.0},
        {"one-encoder": -2.0},
        {"conv": 0.5},
        {"sub/all": -0.4, "unet-kohya": 0.7},
        {"all-kohya": 0.3, "one-encoder": 1.0, "unet": -1.0},
    ],
    ids=str,
)
def test_a_job_paints_what_diffusers_paints(
    worker: Painter, bare: Any, base: np.ndarray, folder: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    expected = by_diffusers(bare, folder, **weights)
    wanted = [{"name": name, "weight": weight} for name, weight in weights.items()]
    assert (paint(worker, tmp_path / "a", *wanted) == expected).all()
    assert (paint(worker, tmp_path / "b", *reversed(wanted)) == expected).all()
    assert (expected != base).any()


BLOCKS = {
    "unet": {"down": 0.5, "mid": 0.0, "up": {"block_0": 1.5, "block_1": -1.0, "block_2": 0.25}},
    "text_encoder": 0.0,
    "text_encoder_2": -0.5,
}


@pytest.mark.filterwarnings("ignore")
def test_blocks_and_parts_have_weights_of_their_own(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    expected = by_diffusers(bare, folder, **{"sub/all": BLOCKS})
    assert (paint(worker, tmp_path / "a", {"name": "sub/all", "blocks": BLOCKS}) == expected).all()
    rest = {"unet": {"up": {"block_0": 1.5, "block_1": -1.0, "block_2": 0.25}, "mid": 0.0}, "text_encoder": 0.0}
    left_out = {"name": "sub/all", "weight": 0.5, "blocks": rest | {"text_encoder_2": -0.5}}
    assert (paint(worker, tmp_path / "b", left_out) == expected).all()


@pytest.mark.filterwarnings("ignore")
def test_tags_of_automatic1111(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    weights = {"unet": -0.5, "text_encoder": 0.7, "text_encoder_2": 0.7}
    expected = by_diffusers(bare, folder, **{"sub/all": weights, "unet": 1.0})
    job = JOB | {"prompt": f"{JOB['prompt']}<lora:all:0.7:-0.5>", "prompt_syntax": "a1111", "loras": [{"name": "unet"}]}
    ended = worker.run(tmp_path, **job)
    assert ended.outcome is Outcome.SUCCEEDED
    assert (pixels(tmp_path) == expected).all()
    text = Image.open(tmp_path / "0000.png").text["parameters"]  # type: ignore[attr-defined]
    files = [folder / "sub" / "all.safetensors", folder / "unet.safetensors"]
    bodies = [file.read_bytes() for file in files]
    autov3 = [hashlib.sha256(one[8 + int.from_bytes(one[:8], "little") :]).hexdigest()[:12] for one in bodies]
    assert text.startswith(f"{JOB['prompt']} <lora:sub/all:0.7:-0.5> <lora:unet:1>\n")
    assert f'Lora hashes: "sub/all: {autov3[0]}, unet: {autov3[1]}"' in text
    told = [(one["name"], one["sha256"], one["autov3"], one["weight"]) for one in ended.engine["loras"]]
    digests = [hashlib.sha256(one).hexdigest() for one in bodies]
    assert told == [("sub/all", digests[0], autov3[0], -0.5), ("unet", digests[1], autov3[1], 1.0)]


def test_both_formats_are_one(worker: Painter, folder: Path, tmp_path: Path) -> None:
    assert (paint(worker, tmp_path / "a", "unet") == paint(worker, tmp_path / "b", "unet-kohya")).all()


def test_alphas_may_differ_by_layer(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    """Against weights with the alphas multiplied in: diffusers itself loses those of the text encoders."""
    tensors = loras.random(bare, 5, "unet", "text_encoder", "text_encoder_2")
    loras.save(loras.kohya(tensors, bare, ALPHAS), folder / "alphas.safetensors")
    for name in tensors:
        if name.endswith("lora_B.weight"):
            path = name.removesuffix(".lora_B.weight")
            tensors[name] = tensors[name] * next((a / 4 for end, a in ALPHAS.items() if path.endswith(end)), 1.0)
    loras.save(tensors, folder / "multiplied.safetensors")
    one, other = (paint(worker, tmp_path / name, name).astype(int) for name in ("alphas", "multiplied"))
    assert abs(one - other).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_alphas_that_diffusers_notes(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    tensors = loras.random(bare, 6)
    told = '{"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}'
    loras.save(tensors, folder / "noted.safetensors", lora_adapter_metadata=told)
    expected = by_diffusers(bare, folder, noted=1.0)
    assert (paint(worker, tmp_path / "a", "noted") == expected).all()
    loras.save(tensors, folder / "not-noted.safetensors")
    assert (paint(worker, tmp_path / "b", "not-noted") != expected).any()


def test_no_weight_no_effect(worker: Painter, base: np.ndarray, tmp_path: Path) -> None:
    zeros = {"name": "unet", "blocks": {"unet": 0, "text_encoder": 0}}
    for number, wanted in enumerate(({"name": "sub/all", "weight": 0.0}, zeros)):
        assert (paint(worker, tmp_path / str(number), wanted) == base).all()


def test_what_it_was_trained_on_is_seen(
    worker: Painter, bare: Any, base: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    """Trained for seconds on a green picture: with it the picture is greener, with a weight below 0 less green."""
    green = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    loras.save(loras.trained(bare, green, "a red circle"), folder / "green.safetensors")

    more, less = (paint(worker, tmp_path / str(w), {"name": "green", "weight": w}) for w in (1.0, -1.0))
    greenness = [picture[..., 1].mean() for picture in (less, base, more)]
    assert greenness[0] + 10 < greenness[1] < greenness[2] - 10


def test_alternating_jobs_do_not_reload(worker: Painter, base: np.ndarray, tmp_path: Path) -> None:
    paint(worker, tmp_path / "0", "unet", "all-kohya")
    first = [paint(worker, tmp_path / "1", name) for name in ("unet", "all-kohya")]
    for number, (name, expected) in enumerate(2 * [("unet", first[0]), ("", base), ("all-kohya", first[1])]):
        ended = worker.run(tmp_path / f"x{number}", **JOB, **({"loras": [{"name": name}]} if name else {}))
        assert "loras" not in (ended.loading or {})
        assert (pixels(tmp_path / f"x{number}") == expected).all()


@pytest.mark.filterwarnings("ignore")
def test_they_stay_while_the_base_changes(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    """A base that is built alike takes the other's modules, and what is loaded for them."""
    expected = paint(worker, tmp_path / "0", "sub/all", "conv")
    ended = worker.run(tmp_path / "1", **JOB, model="sibling", loras=[{"name": "conv"}, {"name": "all"}])
    assert ended.loading["to"] == "sibling"
    assert "loras" not in ended.loading
    sibling = folder.parent / "diffusers" / "sibling"
    pipe = StableDiffusionXLPipeline.from_pretrained(sibling, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        own(part)
    assert (pixels(tmp_path / "1") == by_diffusers(pipe, folder, conv=1.0, **{"sub/all": 1.0})).all()
    assert (pixels(tmp_path / "1") != expected).any()
    assert (paint(worker, tmp_path / "2", "conv", "sub/all") == expected).all()


def test_what_stays_loaded_is_bounded(worker: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = worker.pipelines.loras
    first = paint(worker, tmp_path / "0", "unet")
    monkeypatch.setattr(kept, "_limit_bytes", 0)
    paint(worker, tmp_path / "1", "conv")
    loads = [worker.run(tmp_path / f"2{n}", **JOB, loras=[{"name": n}]).loading for n in ("unet", "conv", "unet")]
    assert [load["loras"][0]["name"] for load in loads] == ["unet", "conv", "unet"]
    assert kept.bytes == loads[0]["loras"][0]["bytes"]
    assert (pixels(tmp_path / "2unet") == first).all()


def test_the_least_recently_used_goes_first(worker: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = worker.pipelines.loras
    monkeypatch.setattr(kept, "_limit_bytes", 0)
    paint(worker, tmp_path / "0", "conv")
    monkeypatch.setattr(kept, "_limit_bytes", 2**30)
    paint(worker, tmp_path / "1", "unet")
    monkeypatch.setattr(kept, "_limit_bytes", kept.bytes)  # of these two, or of conv and the next one
    paint(worker, tmp_path / "2", "conv")
    paint(worker, tmp_path / "3", "unet-kohya")
    loads = [worker.run(tmp_path / f"4{n}", **JOB, loras=[{"name": n}]).loading or {} for n in ("conv", "unet")]
    assert ["loras" in load for load in loads] == [False, True]


def test_a_file_that_was_replaced_is_loaded_anew(worker: Painter, bare: Any, folder: Path, tmp_path: Path) -> None:
    found = []
    for number in (7, 8):
        path = loras.save(loras.random(bare, number), folder / "new.tmp")
        path.rename(folder / "changing.safetensors")
        found.append(paint(worker, tmp_path / str(number), "changing"))
    assert (found[0] != found[1]).any()
    names = [one.model.name for one in worker.pipelines.loras._residents.values()]
    assert names.count("changing") == 1


REFUSED = {
    "wide": ("INVALID_PARAMETERS", "'wide'", "48"),
    "elsewhere": ("INVALID_PARAMETERS", "'elsewhere'", "does not have"),
    "dora": ("INVALID_PARAMETERS", "'dora'", "DoRA"),
    "loha": ("INVALID_PARAMETERS", "'loha'", "LyCORIS"),
    "infinite": ("INVALID_PARAMETERS", "'infinite'", "no number"),
    "sd15": ("MODEL_UNUSABLE", "'sd15'", "SD 1.5"),
    "cut": ("MODEL_UNUSABLE", "cut.safetensors", "bytes"),
    "gone": ("MODEL_NOT_FOUND", "'gone'", "sub/all"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("beside", ["", "unet"])
def test_what_cannot_be_used_is_refused(worker: Painter, folder: Path, tmp_path: Path, name: str, beside: str) -> None:
    code, *words = REFUSED[name]
    wanted = [{"name": one} for one in (name, beside) if one]
    ended = worker.run(tmp_path, **JOB, loras=wanted)
    assert ended.outcome is Outcome.FAILED
    assert ended.failure.error.code == code
    for word in words:
        assert word in ended.failure.error.message


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([{"name": "all"}, {"name": "sub/all"}], "named twice"),
        ([{"name": "unet", "blocks": {"unet": {"up": {"block_7": 1}}}}], "no block up.7"),
        ([{"name": "unet", "blocks": {"unet": {"down": [1, 1, 1, 1, 1]}}}], "5 weights"),
    ],
)
def test_what_does_not_go_together_is_refused(worker: Painter, tmp_path: Path, wanted: Any, words: str) -> None:
    ended = worker.run(tmp_path, **JOB, loras=wanted)
    assert ended.outcome is Outcome.FAILED
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert words in ended.failure.error.message


@pytest.mark.parametrize("at", ["unet", "text_encoder_2"])
def test_a_load_that_breaks_off_leaves_nothing(
    worker: Painter, base: np.ndarray, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """However it breaks off, what was loaded before it still works."""
    before = paint(worker, tmp_path / "0", "one-encoder")
    paint(worker, tmp_path / "1", "conv")
    broken = getattr(worker.pipelines.switch.pipe, at)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch (injected)")

    file = folder / f"fresh-{at}.safetensors"
    save_file(load_file(folder / "sub" / "all.safetensors"), file)
    with monkeypatch.context() as patch:
        patch.setattr(broken, "load_lora_adapter" if at == "unet" else "load_adapter", fail)
        ended = worker.run(tmp_path / "2", **JOB, loras=[{"name": file.stem}, {"name": "one-encoder"}])
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert (paint(worker, tmp_path / "3") == base).all()
    assert (paint(worker, tmp_path / "4", "one-encoder") == before).all()
    assert (paint(worker, tmp_path / "5", file.stem) == paint(worker, tmp_path / "6", "sub/all")).all()


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.FP8])
def test_every_memory_mode_takes_them(
    worker: Painter, base: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    expected = paint(worker, tmp_path / "0", "sub/all", "conv")
    monkeypatch.setattr(worker.pipelines.ladder, "modes", (mode,))
    for number, wanted in enumerate((["sub/all", "conv"], [], ["conv", "sub/all"])):
        worker.pipelines.prompts.clear()
        found = paint(worker, tmp_path / f"x{number}", *wanted)
        assert (found == (expected if wanted else base)).all()
    worker.pipelines.ladder.placement.release()


def test_the_prompt_cache_knows_what_a_lora_changes(worker: Painter, tmp_path: Path) -> None:
    """One for the UNet alone leaves the encoded prompts as they are; another weight for the text encoder does not."""
    cache = worker.pipelines.prompts
    cache.clear()
    sizes = []
    for number, wanted in enumerate(
        ([], ["unet"], ["one-encoder"], [{"name": "one-encoder", "weight": 0.5}], ["one-encoder", "unet"])
    ):
        paint(worker, tmp_path / str(number), *wanted)
        sizes.append(cache.bytes)
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] == sizes[4]


def test_a_pinned_lora_is_the_one_that_was_pinned_or_none(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (root / "loras").mkdir()
    file, other = root / "loras" / "a.safetensors", tmp_path / "other.safetensors"
    shutil.copy(folder / "unet.safetensors", file)
    shutil.copy(folder / "conv.safetensors", other)
    worker = Painter(root)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = JOB | {"loras": [{"name": f"a@{sha256[:12]}"}]}
    ended = worker.run(tmp_path / "one", **pinned)
    assert ended.engine["loras"][0]["sha256"] == sha256
    other.replace(file)
    error = worker.run(tmp_path / "two", **pinned).failure.error
    assert (error.code, "The LoRA 'a' is not the one" in error.message) == ("MODEL_REPLACED", True)
    shutil.copy(folder / "unet.safetensors", other)
    worker.hear = lambda message: other.replace(file) if message.type == "progress" and other.exists() else None
    ended = worker.run(tmp_path / "three", **JOB | {"loras": [{"name": "a"}]})
    assert ended.failure.error.code == "MODEL_REPLACED"
