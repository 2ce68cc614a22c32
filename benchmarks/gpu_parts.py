"""What the GPU benchmark measures, a function a part: each yields rows as soon as they are known."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.place import daemon, place
from benchmarks.stock import Stock
from benchmarks.studio import Painted, Studio
from imagend.memory_plan import Experience, Mode, Rung, Stage, label, tiles
from imagend.messages import Known, WorkerSettings
from imagend.worker.pipelines import StableDiffusionXLPipeline

GB = 1 << 30
CAPS_GB = (24, 16, 11, 8, 6)
NEVER = 1 << 50
PROMPT = "a lighthouse at dusk, volumetric light, oil on canvas"

Row = dict[str, Any]
"""column → value; the first column says what was measured"""


@dataclass(frozen=True)
class Bench:
    device: str
    stock: Stock
    size: int
    steps: int
    guidance_scale: float = 5.0
    command: Sequence[str] = ()
    """of the worker, if it is not imagend's own"""

    def studio(self, **settings: Any) -> Studio:
        return Studio(self.device, self.stock.root, WorkerSettings(**settings), self.command)

    def job(self, model: str, seed: int = 1, **fields: Any) -> dict[str, Any]:
        shape = {"width": self.size, "height": self.size, "num_inference_steps": self.steps}
        return {
            "model": model,
            "prompt": PROMPT,
            "guidance_scale": self.guidance_scale,
            "seed": seed,
            **shape,
            **fields,
        }

    def rungs(self) -> list[Rung]:
        """Those that are measured: each mode, and the largest tile; on the CPU weights are moved nowhere."""
        modes = tuple(Mode) if self.device != "cpu" else (Mode.RESIDENT,)
        return [Rung(mode) for mode in modes] + [Rung(Mode.RESIDENT, tiles(self.size, self.size)[0])]


def load(bench: Bench) -> Iterator[Row]:
    """From nothing to the first picture, as a diffusers folder and as a single file."""
    pictures: list[Painted] = []
    names = {"diffusers folder": bench.stock.folder()}
    if bench.stock.model != "slim":  # no checkpoint has its UNet: it would be refused
        names["single file"] = bench.stock.single_file()
    for what, name in names.items():
        with bench.studio() as studio:
            first, second = (studio.paint(**bench.job(name)) for _ in range(2))
        pictures.append(first)
        yield {
            "loaded from": what,
            "worker ready, s": round(studio.start_s, 1),
            "model loaded, s": round(first.ended.timings["model_loading"], 1),
            "first job, s": round(first.seconds, 2),
            "the same again, s": round(second.seconds, 2),
            "same bits": first.pixels == second.pixels == pictures[0].pixels,
            **memory(first),
        }


def modes(bench: Bench) -> Iterator[Row]:
    """Seconds and memory on each rung of the ladder, every rung in a fresh worker that is told that others failed."""
    name = bench.stock.folder()
    pictures: dict[Rung, Painted] = {}
    key = ""
    for rung in bench.rungs():
        known = Known(memory={key: failed_before(rung, bench.size, name)} if key else {})
        with bench.studio() as studio:
            first, second = (studio.paint(known, **bench.job(name, seed)) for seed in (1, 2))
        told = first.ended.memory or {}
        assert (told["mode"], told["vae_tile"]) == (rung.mode, rung.vae_tile), told
        key = key or told["seen"]["key"]
        pictures[rung] = first
        yield {
            "memory mode": str(rung),
            "first picture, s": first.per_picture[0],
            "next picture, s": second.per_picture[0],
            "times resident": round(second.per_picture[0] / pictures[Rung()].ended.artifacts[0].seconds, 2),
            "bits as resident": first.pixels == pictures[Rung()].pixels,
            "promised": rung.exact,
            **memory(second),
        }


def failed_before(rung: Rung, size: int, name: str) -> dict[str, Any]:
    """As if memory had run out on all rungs before this one."""
    every = [Rung(mode, tile) for tile in (None, *tiles(size, size)) for mode in Mode]
    before = takewhile(lambda other: other != rung, every)
    failed = {label(Stage.DECODING if other.mode is rung.mode else Stage.PAINTING, other): NEVER for other in before}
    return Experience(model=name, failed=failed).model_dump()


def caps(bench: Bench, caps_gb: Sequence[float] = CAPS_GB) -> Iterator[Row]:
    """A large card as a small one: what is planned, what happens, and what the next job makes of it."""
    if bench.device == "cpu":
        yield {"card, GB": "not measured: a limit needs CUDA"}
        return
    name = bench.stock.folder()
    for cap in caps_gb:
        with bench.studio(vram_limit_gb=float(cap)) as studio:
            first = studio.attempt(**bench.job(name))
            second = studio.attempt(**bench.job(name))
        told = [painted.ended.memory or {} for painted in (first, second)]
        failures = [painted.ended.failure for painted in (first, second)]
        yield {
            "card, GB": cap,
            "mode": _rung(told[0]),
            "retries": len(told[0].get("retries", ())),
            "then mode": _rung(told[1]),
            "then retries": len(told[1].get("retries", ())),
            "first job, s": round(first.seconds, 2),
            "next job, s": round(second.seconds, 2),
            "same bits": first.pixels == second.pixels,
            "exact": told[0].get("exact"),
            "then exact": told[1].get("exact"),
            "failed": next((failure.error.message for failure in failures if failure), ""),
            **memory(second),
        }


def switch(bench: Bench) -> Iterator[Row]:
    """From one base to another and back, with the bases' cache in main memory and without it."""
    names = [bench.stock.folder(number) for number in (0, 1)]
    for cache_gb in (WorkerSettings().base_cache_gb, 0.0):
        with bench.studio(base_cache_gb=cache_gb) as studio:
            for number, name in enumerate([*names, *names]):
                painted = studio.paint(**bench.job(name))
                yield {
                    "switch": f"{number + 1}. to {name}",
                    "cache, GB": cache_gb,
                    "model loading, s": round(painted.ended.timings["model_loading"], 3),
                    "job, s": round(painted.seconds, 2),
                    "VRAM held after, GB": studio.device_gb(),
                    "told": painted.ended.loading,
                    **memory(painted),
                }


def lora(bench: Bench) -> Iterator[Row]:
    """What a LoRA of rank 16 costs at its first job, at its next, and whether it leaves the base as it was."""
    name, loras = bench.stock.folder(), [{"name": bench.stock.lora(), "weight": 1.0}]
    with bench.studio() as studio:
        studio.paint(**bench.job(name))  # warm
        before = studio.paint(**bench.job(name))
        for what, fields in (
            ("without", {}),
            ("with, first", {"loras": loras}),
            ("with, next", {"loras": loras}),
            ("without again", {}),
            ("with again", {"loras": loras}),
        ):
            painted = studio.paint(**bench.job(name, **fields))
            yield {
                "LoRA": what,
                "model loading, s": round(painted.ended.timings["model_loading"], 3),
                "picture, s": painted.per_picture[0],
                "times without": round(painted.per_picture[0] / before.per_picture[0], 2),
                "bits as without": painted.pixels == before.pixels,
                **memory(painted),
            }


def references(bench: Bench) -> Iterator[Row]:
    """What reference pictures cost: at the first job, when their embeddings are known, and several of them."""
    name, adapter, pictures = bench.stock.folder(), bench.stock.ip_adapter(), bench.stock.pictures(4)
    fields = {number: [{"image": one} for one in list(pictures)[:number]] for number in (0, 1, 4)}
    with tempfile.TemporaryDirectory() as folder, bench.studio(embeddings=folder) as studio:
        studio.paint(**bench.job(name))  # warm
        before = studio.paint(**bench.job(name))
        for what, number in (
            ("none", 0),
            ("one, first", 1),
            ("one, next", 1),
            ("four, first", 4),
            ("four, next", 4),
            ("none again", 0),
            ("one again", 1),
        ):
            own = {"references": fields[number], "ip_adapter": adapter} if number else {}
            painted = studio.paint(pictures=pictures, **bench.job(name, **own))
            timings = painted.ended.timings
            yield {
                "references": what,
                "model loading, s": round(timings["model_loading"], 3),
                "encoding, s": round(timings["encoding"], 3),
                "picture, s": painted.per_picture[0],
                "times without": round(painted.per_picture[0] / before.per_picture[0], 2),
                "bits as without": painted.pixels == before.pixels,
                **memory(painted),
            }


def edit(bench: Bench) -> Iterator[Row]:
    """What each stage of an edit costs, beside the same from nothing; of pictures of the painted size and larger."""
    name, large = bench.stock.folder(), 2 * bench.size
    box = {"boxes": [[bench.size // 4, bench.size // 4, bench.size // 2, bench.size // 2]]}
    with tempfile.TemporaryDirectory() as folder, bench.studio() as studio:
        pictures = {f"edit/{side}": _noise(Path(folder, f"{side}.png"), side) for side in (bench.size, large)}
        job = {key: value for key, value in bench.job(name).items() if key not in ("width", "height")}
        studio.paint(**bench.job(name))  # warm
        before = studio.paint(**bench.job(name))
        for what, side, own in (
            ("all of it", bench.size, {"mask": {"whole": True}}),
            ("a box", bench.size, {"mask": box}),
            ("a box, four pictures", bench.size, {"mask": box, "count": 4}),
            ("a mask picture", bench.size, {"mask": {"image": f"edit/{bench.size}", "expand": 8}}),
            ("a box, twice as large", large, {"mask": box}),
            ("its surroundings alone", large, {"mask": box, "padding_mask_crop": 64}),
        ):
            asked = {"kind": "edit", "image": f"edit/{side}", **job, **own}
            painted = studio.paint(pictures=pictures, **asked)
            timings, count = painted.ended.timings, len(painted.pixels)
            yield {
                "edited": what,
                "picture": f"{side}x{side}",
                "masking, s": round(timings["masking"], 3),
                "encoding, s": round(timings["encoding"], 3),
                "denoising and decoding, s": round(timings["painting"] / count, 3),
                "compositing, s": round(timings["compositing"] / count, 3),
                "times without": round(timings["painting"] / count / before.ended.timings["painting"], 2),
                "bits as before": None,
                **memory(painted),
            }
        again = studio.paint(**bench.job(name))
    yield {
        "edited": "none again",
        "encoding, s": round(again.ended.timings["encoding"], 3),
        "denoising and decoding, s": round(again.ended.timings["painting"], 3),
        "times without": round(again.ended.timings["painting"] / before.ended.timings["painting"], 2),
        "bits as before": again.pixels == before.pixels,
    }


def _noise(path: Path, side: int) -> str:
    """A picture whose every pixel counts."""
    bits = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    Image.fromarray(bits.numpy()).save(path)
    return str(path)


def overhead(bench: Bench, rounds: int = 3) -> Iterator[Row]:
    """The same picture by bare diffusers and from drop to manifest through a daemon, in turns on one device."""
    name = bench.stock.folder()
    keys = {"models": str(bench.stock.root.absolute()), "workers": {"it": bench.device}, "default_model": name}
    with place(**keys) as here, daemon(here):
        bare, pairs = _bare(bench, name), []
        for seed in range(-1, rounds):  # the first warms both
            alone = bare(max(0, seed))
            start = time.perf_counter()
            ref, _ = here.drop(**{**bench.job(name), "seed": max(0, seed)})
            here.wait(ref)
            pairs.append((alone, time.perf_counter() - start))
    more = statistics.median(through - alone for alone, through in pairs[1:])
    alone = statistics.median(alone for alone, _ in pairs[1:])
    yield {
        "a job of one picture": "more than bare diffusers, median",
        "bare diffusers, s": round(alone, 3),
        "more, ms": round(more * 1000, 1),
        "more, %": round(more / alone * 100, 1),
    }


def _bare(bench: Bench, name: str) -> Callable[[int], float]:
    """Seconds for a plain call that ends with the PNG's bytes, as everybody writes it."""
    dtype = torch.float32 if bench.device == "cpu" else torch.float16
    path = bench.stock.root / "diffusers" / name
    pipe = StableDiffusionXLPipeline.from_pretrained(path, dtype=dtype, add_watermarker=False, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(bench.device)

    def paint(seed: int) -> float:
        start = time.perf_counter()
        image = pipe(
            PROMPT,
            width=bench.size,
            height=bench.size,
            num_inference_steps=bench.steps,
            guidance_scale=bench.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        image.save(io.BytesIO(), format="PNG")
        return time.perf_counter() - start

    return paint


def memory(painted: Painted) -> Row:
    """What it needed: by PyTorch's allocator as the worker tells, of the whole device and of main memory as we saw."""
    told = (painted.ended.memory or {}).get("peak_bytes")
    return {
        "peak, GB": told and round(told / GB, 2),
        "peak of the device, GB": painted.peak.device and round(painted.peak.device, 2),
        "main memory, GB": round(painted.peak.process, 2),
    }


def _rung(told: dict[str, Any]) -> str:
    return str(Rung(Mode(told["mode"]), told.get("vae_tile"))) if "mode" in told else "none"


def train(bench: Bench) -> Iterator[Row]:
    """A training step, plainly and with gradient checkpointing, of one picture and of several, and text encoders."""
    name = bench.stock.folder()
    with tempfile.TemporaryDirectory() as folder, bench.studio() as studio:
        dataset = Path(folder, "datasets", "noise")
        dataset.mkdir(parents=True)
        for number in range(4):
            _noise(dataset / f"{number}.png", bench.size + 8 * number)
            (dataset / f"{number}.txt").write_text(PROMPT)
        studio.paint(**bench.job(name))  # warm
        before = studio.paint(**bench.job(name))
        for what, own in (
            ("1 picture", {}),
            ("1 picture, gradient checkpointing", {"gradient_checkpointing": True}),
            ("4 pictures, gradient checkpointing", {"gradient_checkpointing": True, "train_batch_size": 4}),
            ("1 picture, text encoders too", {"train_text_encoder": True}),
        ):
            asked = {"kind": "train", "name": "noise", "dataset": "noise", "model": name, "resolution": bench.size}
            steps = {"max_train_steps": bench.steps, "seed": 1}
            trained = studio.paint(pictures={"dataset:noise": str(dataset)}, **asked, **steps, **own)
            timings, told = trained.ended.timings, (trained.ended.engine or {})["training"]
            again = studio.paint(**bench.job(name))
            yield {
                "trained": what,
                "precision": told["mixed_precision"],
                "caching, s": round(timings["caching"], 2),
                "step, s": round(timings["training"] / bench.steps, 3),
                "climbed": told.get("gradient_checkpointing", False) and "gradient_checkpointing" not in own,
                "parameters": told["parameters"],
                "LoRA, MB": round(trained.ended.artifacts[0].size / 1e6, 1),
                "bits as before": again.pixels == before.pixels,
                "VRAM held after, GB": studio.device_gb(),
                **memory(trained),
            }


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "load": load,
    "modes": modes,
    "caps": caps,
    "switch": switch,
    "lora": lora,
    "references": references,
    "edit": edit,
    "train": train,
    "overhead": overhead,
}
