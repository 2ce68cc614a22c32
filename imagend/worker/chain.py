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

from PIL import Image

from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.upscaling import STAGE
from imagend.worker import upscale
from imagend.worker.decode import open_picture
from imagend.worker.drafts import Drafts

if TYPE_CHECKING:
    from imagend.worker.main import Context


class Enlarged:
    """The pictures of the first step, made larger when they are asked for, to be painted anew."""

    def __init__(self, painted: tuple[Artifact, ...], upscaler: upscale.Upscaler, context: Context) -> None:
        self._painted = {one.index: one for one in painted}
        self._upscaler, self._context = upscaler, context

    @property
    def digests(self) -> list[str]:
        return [str(one.pixels_sha256) for one in self._painted.values()]

    def __call__(self, index: int) -> Image.Image:
        said = partial(self._context.progress, STAGE, index, len(self._painted))
        said(0, 1)
        with self._context.timed(STAGE):
            small = _open(self._painted[index], self._context)
            return self._upscaler(small, lambda done, of: said(0, of))  # the picture's progress is that of painting it

    def describe(self) -> None:
        """Say in the manifest what enlarges them."""
        _describe(self._upscaler, self._context)


Paint = Callable[[Enlarged | None], tuple[Artifact, ...]]


def run(spec: Generate, context: Context, paint: Paint) -> tuple[Artifact, ...]:
    """The pictures of all steps, those of the first one first. `paint` paints what the job asks for, or anew what was
    enlarged. Raises what `paint` does, NoSpace, Interrupt."""
    assert spec.chain is not None
    first, second = spec.chain_steps
    step = spec.chain.upscale
    upscaler = upscale.choose(step.upscaler, step.scale, context)  # before anything is painted in vain
    with context.chain_step(first, 0, 2):
        painted = _in_folder(first, paint(None))
    context.made(painted)
    with context.chain_step(second, 1, 2):
        if step.strength is None:
            enlarged = _upscale(spec, painted, upscaler, context)
        else:
            enlarged = paint(Enlarged(painted, upscaler, context))
    shown = [one for one in painted + _in_folder(second, enlarged) if one.index not in context.withheld]
    if not shown:
        context.made(())
    return tuple(shown)


def _in_folder(step: str, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    return tuple(one.model_copy(update={"file": f"{step}/{one.file}"}) for one in artifacts)


def _upscale(
    spec: Generate, painted: tuple[Artifact, ...], upscaler: upscale.Upscaler, context: Context
) -> tuple[Artifact, ...]:
    _describe(upscaler, context)
    made = []
    for one in painted:
        plan = spec.planned[one.index]
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
            image = upscaler(_open(one, context), partial(context.progress, STAGE, one.index, len(painted)))
        seconds = round(time.perf_counter() - start, 6)
        with context.timed("saving"):
            made.append(drafts.save(image, one.index, plan, seconds, spec, context.engine, upscaler.exact))
    return tuple(made)


def _open(one: Artifact, context: Context) -> Image.Image:
    return open_picture(context.folder.parent / one.file, one.file)


def _describe(upscaler: upscale.Upscaler, context: Context) -> None:
    context.engine["upscaler"] = upscaler.describe()
    context.engine["versions"] = context.engine["versions"] | upscaler.versions


def _recipe(source: Artifact, upscaler: dict[str, object]) -> str:
    """A digest of all that decides the pixels."""
    return hashlib.sha256(json.dumps([source.pixels_sha256, upscaler], sort_keys=True).encode()).hexdigest()
