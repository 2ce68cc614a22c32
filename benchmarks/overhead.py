"""The same pictures by a bare diffusers loop and through imagend, in turns: what more does a job cost, or a picture?"""

from __future__ import annotations

import io
import statistics
import time
from typing import Any

import torch

from benchmarks.place import Place
from imagend.worker.pipelines import StableDiffusionXLPipeline

PROMPT = "a large red circle on a blue background"


def bare_pipeline(here: Place) -> Any:
    path = here.config.models / "diffusers" / "shapes-xl"
    pipe = StableDiffusionXLPipeline.from_pretrained(path, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bare(pipe: Any, seeds: range, size: int, steps: int) -> float:
    """Seconds for a plain loop that ends with the PNG's bytes, as everybody writes it."""
    start = time.perf_counter()
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pipe(PROMPT, width=size, height=size, num_inference_steps=steps, generator=generator).images[0]
        image.save(io.BytesIO(), format="PNG")
    return time.perf_counter() - start


def through(here: Place, seeds: range, size: int, steps: int) -> float:
    """Seconds from dropping a signed job to its published manifest."""
    start = time.perf_counter()
    ref, _ = here.drop(prompt=PROMPT, width=size, height=size, num_inference_steps=steps, seeds=list(seeds))
    here.wait(ref)
    return time.perf_counter() - start


def per_job(here: Place, pipe: Any, rounds: int = 40) -> dict[str, float]:
    """Medians in milliseconds for jobs of one small picture."""
    bare(pipe, range(2), 128, 8)
    pairs = [(bare(pipe, range(i, i + 1), 128, 8), through(here, range(i, i + 1), 128, 8)) for i in range(rounds)]
    plain = statistics.median(a for a, _ in pairs) * 1000
    more = statistics.median(b - a for a, b in pairs) * 1000
    return {"bare_ms": plain, "more_ms": more}


def per_picture(here: Place, pipe: Any, rounds: int = 7, pictures: int = 4) -> dict[str, float]:
    """For pictures of about a second: how much longer one takes within a job of several."""
    size = 256
    bare(pipe, range(1), size, 10)
    steps = max(1, min(150, round(10 / bare(pipe, range(1), size, 10))))
    pairs = []
    for _ in range(rounds):
        plain = bare(pipe, range(pictures), size, steps)
        pairs.append((plain / pictures, through(here, range(pictures), size, steps) / pictures))
    return {
        "bare_s": statistics.median(a for a, _ in pairs),
        "more_percent": statistics.median(b / a - 1 for a, b in pairs) * 100,
    }
