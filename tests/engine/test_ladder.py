"""The memory ladder on the real pipeline, on the CPU. Shortages are injected here; test_shortage has real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import siblings
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402

from imagend.job import Outcome  # noqa: E402
from imagend.memory_plan import Mode, Rung, Stage, Work, label, need  # noqa: E402
from imagend.messages import Known, MemoryShort, Progress  # noqa: E402
from imagend.worker.ladder import Ladder  # noqa: E402
from imagend.worker.memory import tiled  # noqa: E402

QUICK = {"prompt": "a red circle", "width": 128, "height": 128, "num_inference_steps": 2, "seed": 7}
RESIDENT, OFFLOAD, GROUP, FP8, SEQUENTIAL = Mode


@pytest.fixture
def ladder(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ladder]:
    """As on a GPU: with all modes. It has seen nothing."""
    ladder = painter.pipelines.ladder
    monkeypatch.setattr(ladder, "modes", tuple(Mode))
    monkeypatch.setattr(ladder, "seen", {})
    monkeypatch.setattr(ladder.gauge, "available", lambda held=0: 8 << 30)  # whatever else this machine does
    yield ladder
    ladder.placement.release()


@pytest.fixture(scope="module")
def picture(painter: Painter, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a job paints when memory suffices."""
    folder = tmp_path_factory.mktemp("picture")
    painter.run(folder, **QUICK)
    return pixels(folder)


def pixels(folder: Path, index: int = 0) -> Any:
    return np.asarray(Image.open(folder / f"{index:04d}.png").convert("RGB"))


def plainly(plain: Any) -> Any:
    """The same job as a plain diffusers call."""
    fields = {name: value for name, value in QUICK.items() if name != "seed"}
    return np.asarray(plain(**fields, guidance_scale=5.0, generator=torch.Generator("cpu").manual_seed(7)).images[0])


@contextmanager
def shortage(painter: Painter, part: str, while_: Callable[[], bool]) -> Iterator[list[str]]:
    """Memory runs out whenever a part is to run while a condition holds. Yields the modes in which it was to."""
    pipe = painter.pipelines.get("shapes-xl", lambda: None)
    module = {"encoder": pipe.text_encoder_2, "unet": pipe.unet.mid_block, "vae": pipe.vae.decoder}[part]
    placement, ran = painter.pipelines.ladder.placement, list[str]()

    def before(*_: Any) -> None:
        ran.append(str(placement.mode))
        if while_():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    hook = module.register_forward_pre_hook(before)
    try:
        yield ran
    finally:
        hook.remove()


def words(painter: Painter) -> list[tuple[str, str, str | None]]:
    return [(word.stage, word.rung, word.then) for word in painter.said if isinstance(word, MemoryShort)]


@pytest.mark.parametrize(("part", "stage"), [("encoder", "encoding"), ("unet", "painting")])
@pytest.mark.parametrize("last", [OFFLOAD, GROUP])
def test_rungs_that_only_move_weights_paint_the_same_picture(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path, part: str, stage: str, last: Mode
) -> None:
    painter.pipelines.prompts.clear()
    with shortage(painter, part, lambda: ladder.placement.mode is not last):
        ended = painter.run(tmp_path, **QUICK)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert (pixels(tmp_path) == picture).all()
    path = [mode.value for mode in Mode][: list(Mode).index(last) + 1]
    assert words(painter) == [(stage, *pair) for pair in pairwise(path)]
    memory = ended.memory
    assert (memory["mode"], memory["vae_tile"], memory["exact"]) == (last.value, None, True)
    assert [retry["rung"] for retry in memory["retries"]] == path[:-1]
    assert all(retry["stage"] == stage and "injected" in retry["said"] for retry in memory["retries"])
    assert memory["peak_bytes"] > 0


def test_the_third_retry_stores_the_unet_in_fp8_and_the_manifest_says_so(
    painter: Painter, ladder: Ladder, tmp_path: Path
) -> None:
    with shortage(painter, "unet", lambda: ladder.placement.mode is not FP8):
        ended = painter.run(tmp_path, **QUICK)
    assert (ended.memory["mode"], ended.memory["exact"]) == ("fp8", False)
    plain = load_plain()
    plain.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (pixels(tmp_path) == plainly(plain)).all()


def test_a_shortage_that_a_library_swallowed_is_told_and_the_next_worker_plans_for_it(
    painter: Painter, ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cuDNN does on a GPU where it finds no room to work in: the picture is painted, but not with the usual bits."""
    told = ladder.gauge.told
    with shortage(painter, "unet", lambda: False) as ran:
        monkeypatch.setattr(ladder.gauge, "swallowed", lambda: int(bool(ran)))
        tight = painter.run(tmp_path / "tight", **QUICK)
    assert tight.outcome is Outcome.SUCCEEDED
    assert (tight.memory["mode"], tight.memory["retries"], tight.memory["exact"]) == ("resident", [], False)
    assert list(tight.memory["seen"]["failed"]) == ["resident/painting"]
    assert "cuDNN" in tight.worn
    monkeypatch.setattr(ladder.gauge, "swallowed", lambda: 0)  # another process finds the picture in the draft
    assert painter.run(tmp_path / "tight", **QUICK).memory["exact"] is False
    monkeypatch.setattr(ladder.gauge, "swallowed", lambda: 1)
    following = painter.run(tmp_path / "following", **QUICK)  # in the same process: it still paints with other bits
    assert (following.memory["mode"], following.memory["exact"], following.worn) == ("model_offload", False, "")
    monkeypatch.setattr(ladder.gauge, "swallowed", lambda: 0)
    fresh = painter.run(tmp_path / "fresh", **QUICK)
    assert (fresh.memory["mode"], fresh.memory["exact"], fresh.worn) == ("model_offload", True, "")
    assert ladder.gauge.told == told


def test_a_rung_that_is_known_to_be_tight_costs_no_other_worker(
    painter: Painter, ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a card on which every rung is would get a new worker for each job."""
    monkeypatch.setattr(ladder, "modes", (RESIDENT,))
    counts = iter(range(1000))
    monkeypatch.setattr(ladder.gauge, "swallowed", lambda: next(counts))
    jobs = [painter.run(tmp_path / str(number), **QUICK | {"num_inference_steps": 1}) for number in range(6)]
    assert all(job.outcome is Outcome.SUCCEEDED and not job.memory["exact"] for job in jobs)
    assert jobs[0].worn
    assert jobs[-1].worn == ""  # whole and both tiles are known by then


def test_a_shortage_in_the_middle_of_a_job_keeps_what_is_painted(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path
) -> None:
    steps = iter(range(100))
    with shortage(painter, "unet", lambda: next(steps) == 3) as ran:  # at the second step of the second picture
        ended = painter.run(tmp_path, **QUICK | {"count": 3})
    assert ended.outcome is Outcome.SUCCEEDED
    assert ran == ["resident"] * 4 + ["model_offload"] * 4
    assert (pixels(tmp_path) == picture).all()
    painter.run(tmp_path / "alone", **QUICK | {"seed": 8})
    assert (pixels(tmp_path / "alone") == pixels(tmp_path, 1)).all()


def test_weights_that_do_not_fit_on_the_device_are_offloaded_now_and_next_time(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = ladder.placement.apply

    def full(pipe: Any, mode: Mode) -> None:
        if mode is RESIDENT:
            raise torch.OutOfMemoryError("no room for the weights")
        apply(pipe, mode)

    monkeypatch.setattr(ladder.placement, "apply", full)
    ended = painter.run(tmp_path / "a", **QUICK)
    assert words(painter) == [("model_loading", "resident", "model_offload")]
    assert (pixels(tmp_path / "a") == picture).all()
    assert ended.memory["seen"]["failed"].keys() == {label(Stage.LOADING, Rung())}
    ended = painter.run(tmp_path / "b", **QUICK)
    assert (ended.memory["mode"], ended.memory["retries"]) == ("model_offload", [])


def test_a_shortage_while_a_model_is_read_is_climbed_from_and_what_follows_is_learned(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, left = painter.pipelines.prepare, iter([True])

    def fail(*arguments: Any) -> Any:
        if next(left, False):
            raise MemoryError
        return prepare(*arguments)

    monkeypatch.setattr(painter.pipelines, "prepare", fail)
    ended = painter.run(tmp_path, **QUICK)
    assert words(painter) == [("model_loading", "resident", "model_offload")]
    assert (pixels(tmp_path) == picture).all()
    assert label(Stage.PAINTING, Rung(OFFLOAD)) in ended.memory["seen"]["peaks"]


# Decoding


@pytest.mark.parametrize(("failures", "tile"), [(1, None), (2, 64), (3, 32)])
def test_a_shortage_in_decoding_does_not_paint_again(
    painter: Painter, ladder: Ladder, plain: Any, tmp_path: Path, failures: int, tile: int | None
) -> None:
    left = iter([True] * failures)
    with shortage(painter, "unet", lambda: False) as painted, shortage(painter, "vae", lambda: next(left, False)):
        ended = painter.run(tmp_path, **QUICK)
    assert ended.outcome is Outcome.SUCCEEDED
    assert painted == ["resident"] * 2
    assert (ended.memory["mode"], ended.memory["vae_tile"]) == ("model_offload", tile)
    assert ended.memory["exact"] is (tile is None)
    assert [retry["stage"] for retry in ended.memory["retries"]] == ["decoding"] * failures
    with tiled(plain.vae, tile):
        assert (pixels(tmp_path) == plainly(plain)).all()
    assert (pixels(tmp_path) == plainly(plain)).all() == (tile is None)
    vae = painter.pipelines.get("shapes-xl", lambda: None).vae
    assert (vae.use_tiling, vae.tile_sample_min_size) == (False, vae.config.sample_size)


def test_on_the_cpu_decoding_takes_tiles_at_once(
    painter: Painter, ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "modes", Ladder("cpu").modes)
    left = iter([True])
    with shortage(painter, "vae", lambda: next(left, False)):
        ended = painter.run(tmp_path, **QUICK)
    assert (ended.memory["mode"], ended.memory["vae_tile"], ended.memory["exact"]) == ("resident", 64, False)


def test_where_it_is_known_that_it_does_not_fit_nothing_has_to_fail(
    painter: Painter, ladder: Ladder, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "modes", (RESIDENT,))
    painter.run(tmp_path / "a", **QUICK)
    anatomy = ladder.placement.anatomy(painter.pipelines.get("shapes-xl", lambda: None))
    work = Work(width=128, height=128, batch=2, **anatomy)
    whole, tile = (need(Rung(vae_tile=side), work) for side in (None, 64))
    assert tile < whole
    monkeypatch.setattr(ladder, "seen", {})
    monkeypatch.setattr(ladder.gauge, "available", lambda held=0: (tile + whole) // 2)
    memory = painter.run(tmp_path / "b", **QUICK).memory
    assert (memory["vae_tile"], memory["exact"], memory["retries"]) == (64, False, [])
    with tiled(plain.vae, 64):
        assert (pixels(tmp_path / "b") == plainly(plain)).all()


# The end of the ladder


@pytest.mark.parametrize(("part", "stage"), [("unet", "painting"), ("vae", "decoding")])
def test_after_three_retries_the_job_fails_and_says_what_was_tried(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path, part: str, stage: str
) -> None:
    with shortage(painter, part, lambda: True) as ran:
        ended = painter.run(tmp_path, **QUICK)
    assert len(ran) == 4
    error = ended.failure.error
    assert (error.code, ended.failure.try_again) == ("OUT_OF_MEMORY", False)
    said = words(painter)
    assert [word[0] for word in said] == [stage] * 4
    assert said[-1][2] is None
    assert all(word[1] in error.message for word in said)
    assert "128x128" in error.message
    assert "should fit is 64x64" in error.message
    assert [retry["rung"] for retry in ended.memory["retries"]] == [word[1] for word in said]
    assert list(tmp_path.glob("*.png")) == []
    ladder.seen.clear()
    after = painter.run(tmp_path / "after", **QUICK)
    assert (after.memory["mode"], after.memory["retries"]) == ("resident", [])
    assert (pixels(tmp_path / "after") == picture).all()


def test_where_no_rung_is_left_the_caches_go_and_it_is_tried_once_more(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "modes", (RESIDENT,))
    painter.run(tmp_path / "warm", **QUICK)
    prompts = painter.pipelines.prompts
    assert prompts.bytes > 0
    kept: list[int] = []
    painter.hear = lambda word: kept.append(prompts.bytes) if isinstance(word, MemoryShort) else None
    left = iter([True])
    with shortage(painter, "unet", lambda: next(left, False)):
        ended = painter.run(tmp_path, **QUICK)
    assert kept == [0]
    assert ended.outcome is Outcome.SUCCEEDED
    assert words(painter) == [("painting", "resident", "resident")]
    assert (pixels(tmp_path) == picture).all()
    with shortage(painter, "unet", lambda: True) as ran:
        assert painter.run(tmp_path / "b", **QUICK).failure.error.code == "OUT_OF_MEMORY"
    assert len(ran) == 2


# What is learned


def test_the_next_job_of_that_kind_starts_where_the_last_one_got_to(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path
) -> None:
    with shortage(painter, "unet", lambda: ladder.placement.mode is RESIDENT):
        painter.run(tmp_path / "a", **QUICK)
        ended = painter.run(tmp_path / "b", **QUICK)
        assert (ended.memory["mode"], ended.memory["retries"]) == ("model_offload", [])
        assert (pixels(tmp_path / "b") == picture).all()
    smaller = painter.run(tmp_path / "c", **QUICK | {"width": 64})
    assert smaller.memory["mode"] == "resident"


def test_another_worker_is_told(painter: Painter, ladder: Ladder, tmp_path: Path) -> None:
    with shortage(painter, "unet", lambda: ladder.placement.mode in (RESIDENT, OFFLOAD)):
        seen = painter.run(tmp_path / "a", **QUICK).memory["seen"]
    assert seen["model"] == "shapes-xl"
    assert seen["failed"].keys() == {label(Stage.PAINTING, Rung(mode)) for mode in (RESIDENT, OFFLOAD)}
    assert label(Stage.PAINTING, Rung(GROUP)) in seen["peaks"]
    assert seen["peaks"].keys() == seen["estimates"].keys()
    key = seen.pop("key")
    ladder.seen.clear()
    ladder.placement.release()
    painter.known = Known(memory={key: seen})
    try:
        ended = painter.run(tmp_path / "b", **QUICK)
    finally:
        painter.known = Known()
    assert (ended.memory["mode"], ended.memory["retries"]) == ("group_offload", [])


def test_a_job_cancelled_on_a_rung_leaves_the_next_one_unharmed(
    painter: Painter, ladder: Ladder, picture: Any, tmp_path: Path
) -> None:
    def cancel(word: Any) -> None:
        if isinstance(word, Progress) and word.stage == "painting" and ladder.placement.mode is GROUP:
            painter.worker.stop()

    painter.hear = cancel
    with shortage(painter, "unet", lambda: ladder.placement.mode in (RESIDENT, OFFLOAD)):
        assert painter.run(tmp_path / "a", **QUICK).outcome is Outcome.CANCELLED
    painter.hear = None
    ladder.seen.clear()
    ended = painter.run(tmp_path / "b", **QUICK)
    assert ended.memory["mode"] == "resident"
    assert (pixels(tmp_path / "b") == picture).all()


def test_what_an_earlier_attempt_painted_in_fp8_is_still_told_of(
    painter: Painter, ladder: Ladder, tmp_path: Path
) -> None:
    steps = iter(range(100))
    with shortage(painter, "unet", lambda: ladder.placement.mode is not FP8 or next(steps) == 2):
        assert painter.run(tmp_path, **QUICK | {"count": 2}).outcome is Outcome.FAILED  # after the first picture
    ladder.seen.clear()
    ended = painter.run(tmp_path, **QUICK | {"count": 2})
    assert (ended.memory["mode"], ended.memory["exact"]) == ("resident", False)


# What else is in the pipeline


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    """A worker with two bases and a LoRA, which has all modes."""
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    siblings.folder(root / "diffusers" / "sibling", 1)
    pipe = load_plain()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, adapter_name="x")
    weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet, adapter_name="x"))
    type(pipe).save_lora_weights(root / "loras", unet_lora_layers=weights, weight_name="x.safetensors")
    studio = Painter(root)
    studio.pipelines.ladder.modes = tuple(Mode)
    return studio


@pytest.mark.parametrize("last", [OFFLOAD, GROUP, SEQUENTIAL])
def test_loras_and_bases_come_and_go_on_every_rung(
    studio: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Mode
) -> None:
    ladder = studio.pipelines.ladder
    monkeypatch.setattr(ladder, "seen", {})
    jobs: list[dict[str, Any]] = [
        {},
        {"loras": [{"name": "x", "weight": 0.7}]},
        {"loras": [{"name": "x", "weight": -1.0}]},
        {"model": "sibling"},
        {"model": "sibling", "loras": [{"name": "x"}]},
        {},
    ]

    def paint(where: str) -> list[Any]:
        found = []
        for number, fields in enumerate(jobs):
            folder = tmp_path / where / str(number)
            ended = studio.run(folder, **QUICK | {"width": 64, "height": 64} | fields)
            assert ended.outcome is Outcome.SUCCEEDED, ended.failure
            assert (ended.memory["mode"], ended.memory["exact"]) == (ladder.placement.mode, True)
            found.append(pixels(folder))
        return found

    plenty = paint("plenty")
    assert ladder.placement.mode is RESIDENT
    assert len({picture.tobytes() for picture in plenty}) == len(jobs) - 1
    monkeypatch.setattr(ladder, "modes", (last,))
    short = paint("short")
    assert ladder.placement.mode is last
    assert all((one == other).all() for one, other in zip(plenty, short, strict=True))
    ladder.placement.release()
