"""The pictures of a job, one per pipeline call, each with a CPU generator of its own: what generate and edit share.

So picture i does not depend on how many were asked for or how often the job was interrupted, and equals a plain
diffusers call with the same arguments, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from imagend.errors import DeviceFailed, JobFailed, OutOfMemory
from imagend.fields import Planned
from imagend.generate_spec import Generate
from imagend.manifest import Artifact, Withheld
from imagend.memory_plan import Stage
from imagend.worker import contact_sheet, controlnets
from imagend.worker.climb import Climb
from imagend.worker.drafts import Drafts
from imagend.worker.encode import encode
from imagend.worker.pictures import Picture
from imagend.worker.preprocessors import Preprocessors
from imagend.worker.safety import Judge, keep
from imagend.worker.vae import decode

if TYPE_CHECKING:
    from imagend.worker.main import Context


class Beginning(Protocol):
    """What pictures are painted from: one that was encoded, for all seeds."""

    def start(self, pipe: Any, spec: Generate, generator: torch.Generator) -> tuple[Any, dict[str, Any]]:
        """The pipeline, on the components that are there, and what its call takes."""


class Task:
    """What is painted, and at which size: text to picture. What begins with a picture is a subclass."""

    is_anew = False
    """whether each picture begins with one of its own"""

    def __init__(self, spec: Generate, pictures: Mapping[str, Picture]) -> None:
        self.spec, self.pictures = spec, pictures

    @property
    def at(self) -> Generate:
        """`spec`, as the job asks for it, with the size and the strength that this is painted with."""
        return self.spec

    def canvas(self, name: str) -> Image.Image:
        """An input picture, as large as what is painted."""
        assert self.at.width is not None
        assert self.at.height is not None
        return self.pictures[name].sized(self.at.width, self.at.height)

    def begins_with(self, index: int) -> Image.Image | None:
        """The picture that another one is painted from; None: from noise."""
        return None

    def encode(self, pipe: Any, image: Image.Image, dtype: torch.dtype) -> Beginning:
        """Of what begins_with() has given. `dtype` is that of the embeddings. Raises NotFinite."""
        raise NotImplementedError

    def finish(self, image: Image.Image, context: Context) -> Image.Image:
        """What is saved, of what was painted."""
        return image

    def describe(self, context: Context) -> None:
        """Say in the manifest what else decides the pixels."""

    def deciding(self) -> list[Any]:
        """What decides the pixels beside the job's fields and the engine. JSON only."""
        return []

    def recipe(self, engine: dict[str, Any]) -> str:
        """A digest of all that decides the pixels: pictures of another recipe in the draft are painted again."""
        deciding = {key: value for key, value in engine.items() if key != "device"}  # cuda:1 paints as cuda:0 does
        what = [self.spec.model_dump(mode="json"), deciding, *self.deciding()]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def paint(task: Task, context: Context) -> tuple[Artifact, ...]:
    """Paint what is missing in the draft; return all pictures in order. Raises JobFailed, TryAgain, Interrupt."""
    judge = context.pipelines.classifiers.judge(context.safety)
    context.judged = judge.told if judge else None
    climb = Climb(task.at, context, context.pipelines.free_caches)
    try:
        return climb.over(lambda: _attempt(task, judge, context, climb))
    except torch.AcceleratorError as error:  # the device's context is lost, and this process with it
        raise DeviceFailed(context.pipelines.device, str(error).splitlines()[0]) from None


def _attempt(task: Task, judge: Judge | None, context: Context, climb: Climb) -> tuple[Artifact, ...]:
    context.failed.clear()
    context.pipelines.models.learn(context.known.digests)
    preprocessors = Preprocessors(context.pipelines.models)
    guidance = controlnets.arguments(task.at, task.canvas, preprocessors)
    with context.timed("model_loading"):
        pipe = context.pipelines.prepare(task.spec, context)
        climb.place(pipe, context.pipelines.identity())
    context.engine.update(context.pipelines.describe())
    if preprocessors.used:
        context.engine["preprocessors"] = preprocessors.used
    task.describe(context)
    return _paint(task, judge, pipe, guidance, context, climb)


def _paint(
    task: Task, judge: Judge | None, pipe: Any, guidance: dict[str, Any], context: Context, climb: Climb
) -> tuple[Artifact, ...]:
    spec = task.spec
    parts, planned = spec.parts, [plan for plan in spec.planned if plan.role is None]
    drafts = Drafts(context.folder, task.recipe(context.engine) + (judge.told.model_dump_json() if judge else ""))
    embeddings: dict[str, torch.Tensor] | None = None
    encoded: str | None = None  # of which item of a set they are
    beginning: Beginning | None = None
    painted: list[Artifact | Withheld | Future[Artifact | Withheld]] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="save") as saver:  # saves while the next one is painted
        for index, plan in enumerate(planned):
            for saved in painted:
                if isinstance(saved, Future) and saved.done():
                    saved.result()  # raises what it met, before more is painted in vain
            if plan.item in context.failed or index in context.withheld:
                continue
            if (withheld := drafts.find_withheld(plan.file)) is not None:
                painted.append(withheld)
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
                            guidance |= context.pipelines.ip_adapter.arguments(
                                task.at, task.pictures, task.canvas, pipe, context
                            )
                    embeddings, encoded = encoding, plan.item
                start = time.perf_counter()
                if beginning is None or task.is_anew:
                    beginning = _begin(task, pipe, index, embeddings, context, climb)
                with context.timed("painting"):
                    image = _call(pipe, task.at, index, plan, embeddings | guidance, beginning, context, climb)
                image = task.finish(image, context)
                seconds = round(time.perf_counter() - start, 6)
                engine = context.engine | {"embeddings": context.pipelines.inversions.describe(plan.item)}
                save = partial(drafts.save, image, index, plan, seconds, part, engine, climb.exact)
                painted.append(saver.submit(keep, judge, drafts, image, index, plan, save))
        with context.timed("saving"):
            kept = [one.result() if isinstance(one, Future) else one for one in painted]
    context.withhold(one for one in kept if isinstance(one, Withheld))
    artifacts = [one for one in kept if isinstance(one, Artifact)]
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
    task: Task, pipe: Any, index: int, embeddings: dict[str, torch.Tensor], context: Context, climb: Climb
) -> Beginning | None:
    image = task.begins_with(index)
    if image is None:
        return None
    dtype = embeddings["prompt_embeds"].dtype
    with context.timed("encoding"):
        beginning: Beginning = climb.decode(pipe, lambda: task.encode(pipe, image, dtype))
    return beginning


def _call(
    pipe: Any,
    spec: Generate,
    index: int,
    plan: Planned,
    conditions: dict[str, Any],
    beginning: Beginning | None,
    context: Context,
    climb: Climb,
) -> Image.Image:
    """`conditions`: what the pictures of a job have in common, prompts' embeddings and ControlNets' pictures."""
    assert plan.seed is not None
    pictures, steps = sum(plan.role is None for plan in spec.planned), spec.denoising_steps
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    call, start = pipe, dict[str, Any](width=spec.width, height=spec.height)
    if beginning is not None:
        call, start = beginning.start(pipe, spec, generator)

    def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        context.progress("painting", index, pictures, step + 1, steps)
        return tensors

    context.progress("painting", index, pictures, 0, steps)
    with climb.during(Stage.PAINTING):
        latents = call(
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
