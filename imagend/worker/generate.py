"""Text, or text and a picture, to picture. One picture per pipeline call, each with a CPU generator of its own.

So picture i does not depend on how many were asked for or how often the job was interrupted, and equals a plain
diffusers call with the same arguments, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from imagend.errors import DeviceFailed, JobFailed, OutOfMemory
from imagend.fields import Planned
from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.memory_plan import Stage
from imagend.worker import chain, contact_sheet, controlnets, img2img
from imagend.worker.climb import Climb
from imagend.worker.drafts import Drafts
from imagend.worker.encode import encode
from imagend.worker.pictures import Picture, describe, open_pictures
from imagend.worker.preprocessors import Preprocessors
from imagend.worker.vae import decode

if TYPE_CHECKING:
    from imagend.worker.main import Context


@dataclass(frozen=True)
class _Pass:
    """What is painted: what the job asks for, or anew the pictures that its chain has enlarged."""

    spec: Generate
    """as the job asks for it"""
    pictures: dict[str, Picture]
    enlarged: chain.Enlarged | None

    @property
    def at(self) -> Generate:
        """`spec` with the size and the strength of this pass."""
        return self.spec if self.enlarged is None or self.spec.enlarged is None else self.spec.enlarged

    def begins_with(self, index: int) -> Image.Image | None:
        """The picture that another one is painted from."""
        if self.enlarged is not None:
            return self.enlarged(index)
        if self.spec.image is None:
            return None
        assert self.spec.width is not None
        assert self.spec.height is not None
        return self.pictures[self.spec.image].sized(self.spec.width, self.spec.height)

    def recipe(self, engine: dict[str, Any]) -> str:
        """A digest of all that decides the pixels: pictures of another recipe in the draft are painted again."""
        deciding = {key: value for key, value in engine.items() if key != "device"}  # cuda:1 paints as cuda:0 does
        what: list[Any] = [self.spec.model_dump(mode="json"), deciding]
        if self.enlarged is not None:
            what.append(self.enlarged.digests)
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Paint what is missing in the draft, and go through its chain; return all pictures in order.

    Raises JobFailed, TryAgain, Interrupt.
    """
    spec = Generate.model_validate_json(json.dumps(spec_fields))
    if spec.chain is not None:
        return chain.run(spec, context, partial(_paint_all, spec, context))
    return _paint_all(spec, context)


def _paint_all(spec: Generate, context: Context, enlarged: chain.Enlarged | None = None) -> tuple[Artifact, ...]:
    pictures = open_pictures(spec.pictures, context.pictures)
    if pictures:
        context.engine["pictures"] = describe(pictures)
    now = _Pass(spec, pictures, enlarged)
    climb = Climb(now.at, context, context.pipelines.free_caches)
    try:
        return climb.over(lambda: _attempt(now, context, climb))
    except torch.AcceleratorError as error:  # the device's context is lost, and this process with it
        raise DeviceFailed(context.pipelines.device, str(error).splitlines()[0]) from None


def _attempt(now: _Pass, context: Context, climb: Climb) -> tuple[Artifact, ...]:
    context.failed.clear()
    context.pipelines.models.learn(context.known.digests)
    preprocessors = Preprocessors(context.pipelines.models)
    guidance = controlnets.arguments(now.at, now.pictures, preprocessors)
    with context.timed("model_loading"):
        pipe = context.pipelines.prepare(now.spec, context)
        climb.place(pipe, context.pipelines.identity())
    context.engine.update(context.pipelines.describe())
    if preprocessors.used:
        context.engine["preprocessors"] = preprocessors.used
    if now.enlarged is not None:
        now.enlarged.describe()
    return _paint(now, pipe, guidance, context, climb)


def _paint(now: _Pass, pipe: Any, guidance: dict[str, Any], context: Context, climb: Climb) -> tuple[Artifact, ...]:
    spec = now.spec
    parts, planned = spec.parts, [plan for plan in spec.planned if plan.role is None]
    drafts = Drafts(context.folder, now.recipe(context.engine))
    embeddings: dict[str, torch.Tensor] | None = None
    encoded: str | None = None  # of which item of a set they are
    beginning: img2img.Beginning | None = None
    painted: list[Artifact | Future[Artifact]] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="save") as saver:  # saves while the next one is painted
        for index, plan in enumerate(planned):
            for saved in painted:
                if isinstance(saved, Future) and saved.done():
                    saved.result()  # raises what it met, before more is painted in vain
            if plan.item in context.failed:
                continue
            if (known := drafts.find(plan.file)) is not None:
                artifact, exact = known
                climb.found(exact)
                painted.append(artifact)
                continue
            part = parts[plan.item]
            with _of_an_item(plan.item, context):
                if embeddings is None or encoded != plan.item:
                    context.progress("encoding", index, len(planned))
                    with context.timed("encoding"), climb.during(Stage.ENCODING):
                        encoding = _encode(pipe, part, context)
                    if embeddings is None:
                        with context.timed("encoding"):
                            guidance |= context.pipelines.ip_adapter.arguments(now.at, now.pictures, pipe, context)
                    embeddings, encoded = encoding, plan.item
                start = time.perf_counter()
                if beginning is None or now.enlarged is not None:
                    beginning = _begin(pipe, now.begins_with(index), embeddings, context, climb)
                with context.timed("painting"):
                    image = _call(pipe, now.at, index, plan, embeddings | guidance, beginning, context, climb)
                seconds = round(time.perf_counter() - start, 6)
                engine = context.engine | {"embeddings": context.pipelines.inversions.describe(plan.item)}
                painted.append(saver.submit(drafts.save, image, index, plan, seconds, part, engine, climb.exact))
        with context.timed("saving"):
            artifacts = [one.result() if isinstance(one, Future) else one for one in painted]
    if not spec.items:
        return tuple(artifacts)
    if len(context.failed) == len(spec.items):
        raise next(iter(context.failed.values()))
    whole = [artifact for artifact in artifacts if artifact.item not in context.failed]
    return (*whole, contact_sheet.save(spec, whole, context))


@contextmanager
def _of_an_item(item: str | None, context: Context) -> Iterator[None]:
    """What fails here fails an item of a set only, unless memory is too short for any."""
    try:
        yield
    except JobFailed as error:
        if item is None or isinstance(error, OutOfMemory):
            raise
        context.failed[item] = error


def _encode(pipe: Any, spec: Generate, context: Context) -> dict[str, torch.Tensor]:
    pipelines = context.pipelines
    return encode(
        pipe,
        spec.prompt,
        spec.negative_prompt,
        spec.prompt_syntax,
        spec.clip_skip,
        split=pipelines.inversions.split,
        cache=pipelines.prompts,
        encoders=pipelines.encoders(),
    )


def _begin(
    pipe: Any, image: Image.Image | None, embeddings: dict[str, torch.Tensor], context: Context, climb: Climb
) -> img2img.Beginning | None:
    if image is None:
        return None
    dtype = embeddings["prompt_embeds"].dtype
    with context.timed("encoding"):
        beginning: img2img.Beginning = climb.decode(pipe, lambda: img2img.encode(pipe, image, dtype))
    return beginning


def _call(
    pipe: Any,
    spec: Generate,
    index: int,
    plan: Planned,
    conditions: dict[str, Any],
    beginning: img2img.Beginning | None,
    context: Context,
    climb: Climb,
) -> Image.Image:
    """`conditions`: what the pictures of a job have in common, prompts' embeddings and ControlNets' pictures."""
    assert plan.seed is not None
    pictures, steps = sum(plan.role is None for plan in spec.planned), spec.denoising_steps
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    paint, start = pipe, dict[str, Any](width=spec.width, height=spec.height)
    if beginning is not None:
        paint, start = img2img.pipeline(pipe), {"image": beginning.latents(generator), "strength": spec.strength}

    def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        context.progress("painting", index, pictures, step + 1, steps)
        return tensors

    context.progress("painting", index, pictures, 0, steps)
    with climb.during(Stage.PAINTING):
        latents = paint(
            **conditions,
            **start,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            eta=spec.eta or 0.0,
            generator=generator,
            callback_on_step_end=on_step_end,
            output_type="latent",
        ).images
    image: Image.Image = climb.decode(pipe, lambda: decode(pipe, latents))
    return image
