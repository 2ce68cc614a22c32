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


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Paint what is missing in the draft, and go through its chain; return all pictures in order.

    Raises JobFailed, TryAgain, Interrupt.
    """
    spec = Generate.model_validate_json(json.dumps(spec_fields))
    if spec.chain is not None:
        return chain.run(spec, context, lambda: _paint_all(spec, context))
    return _paint_all(spec, context)


def _paint_all(spec: Generate, context: Context) -> tuple[Artifact, ...]:
    pictures = open_pictures(spec.pictures, context.pictures)
    if pictures:
        context.engine["pictures"] = describe(pictures)
    climb = Climb(spec, context, context.pipelines.free_caches)
    try:
        return climb.over(lambda: _attempt(spec, pictures, context, climb))
    except torch.AcceleratorError as error:  # the device's context is lost, and this process with it
        raise DeviceFailed(context.pipelines.device, str(error).splitlines()[0]) from None


def _attempt(spec: Generate, pictures: dict[str, Picture], context: Context, climb: Climb) -> tuple[Artifact, ...]:
    context.failed.clear()
    context.pipelines.models.learn(context.known.digests)
    preprocessors = Preprocessors(context.pipelines.models)
    guidance = controlnets.arguments(spec, pictures, preprocessors)
    with context.timed("model_loading"):
        pipe = context.pipelines.prepare(spec, context)
        climb.place(pipe, context.pipelines.identity())
    context.engine.update(context.pipelines.describe())
    if preprocessors.used:
        context.engine["preprocessors"] = preprocessors.used
    return _paint(spec, pipe, pictures, guidance, context, climb)


def _paint(
    spec: Generate,
    pipe: Any,
    pictures: dict[str, Picture],
    guidance: dict[str, Any],
    context: Context,
    climb: Climb,
) -> tuple[Artifact, ...]:
    parts, planned = spec.parts, [plan for plan in spec.planned if plan.role is None]
    drafts = Drafts(context.folder, _recipe(spec, context.engine))
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
                            guidance |= context.pipelines.ip_adapter.arguments(spec, pictures, pipe, context)
                    embeddings, encoded = encoding, plan.item
                if spec.image is not None and beginning is None:
                    beginning = _begin(pipe, spec, pictures[spec.image], embeddings, context, climb)
                start = time.perf_counter()
                with context.timed("painting"):
                    image = _call(pipe, spec, index, plan, embeddings | guidance, beginning, context, climb)
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
    pipe: Any,
    spec: Generate,
    picture: Picture,
    embeddings: dict[str, torch.Tensor],
    context: Context,
    climb: Climb,
) -> img2img.Beginning:
    assert spec.width is not None
    assert spec.height is not None
    image, dtype = picture.sized(spec.width, spec.height), embeddings["prompt_embeds"].dtype
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


def _recipe(spec: Generate, engine: dict[str, Any]) -> str:
    """A digest of all that decides the pixels: pictures of another recipe in the draft are painted again."""
    deciding = {key: value for key, value in engine.items() if key != "device"}  # cuda:1 paints as cuda:0 does
    return hashlib.sha256(json.dumps([spec.model_dump(mode="json"), deciding], sort_keys=True).encode()).hexdigest()
