"""A chain: what is done with the pictures of a job once they are painted. Each step has a folder of its own.

What a step has made is told before the next one begins, and stays if that one fails.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.upscaling import STAGE
from imagend.worker import upscale
from imagend.worker.decode import open_picture
from imagend.worker.drafts import Drafts

if TYPE_CHECKING:
    from imagend.worker.main import Context


def run(spec: Generate, context: Context, paint: Callable[[], tuple[Artifact, ...]]) -> tuple[Artifact, ...]:
    """The pictures of all steps, those of the first one first. Raises what `paint` does, NoSpace, Interrupt."""
    assert spec.chain is not None
    first, second = spec.chain_steps
    step = spec.chain.upscale
    upscaler = upscale.choose(step.upscaler, step.scale, context)  # before anything is painted in vain
    with context.chain_step(first, 0, 2):
        painted = _in_folder(first, paint())
    context.made(painted)
    with context.chain_step(second, 1, 2):
        return painted + _in_folder(second, _upscale(spec, painted, upscaler, context))


def _in_folder(step: str, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    return tuple(one.model_copy(update={"file": f"{step}/{one.file}"}) for one in artifacts)


def _upscale(
    spec: Generate, painted: tuple[Artifact, ...], upscaler: upscale.Upscaler, context: Context
) -> tuple[Artifact, ...]:
    context.engine["upscaler"] = upscaler.describe()
    context.engine["versions"] = context.engine["versions"] | upscaler.versions
    made = []
    for one, plan in zip(painted, spec.planned, strict=True):
        context.progress(STAGE, one.index, len(painted), 0, 1)
        drafts = Drafts(context.folder, _recipe(one, context.engine["upscaler"] | upscaler.versions))
        if (known := drafts.find(plan.file)) is not None:
            artifact, exact = known
            context.memory["exact"] = context.memory.get("exact", True) and exact
            context.progress(STAGE, one.index, len(painted), 1, 1)
            made.append(artifact)
            continue
        start = time.perf_counter()
        with context.timed(STAGE):
            small = open_picture(context.folder.parent / one.file, one.file)
            image = upscaler(small, partial(context.progress, STAGE, one.index, len(painted)))
        seconds = round(time.perf_counter() - start, 6)
        with context.timed("saving"):
            made.append(drafts.save(image, one.index, plan, seconds, spec, context.engine, upscaler.exact))
    return tuple(made)


def _recipe(source: Artifact, upscaler: dict[str, object]) -> str:
    """A digest of all that decides the pixels."""
    return hashlib.sha256(json.dumps([source.pixels_sha256, upscaler], sort_keys=True).encode()).hexdigest()
