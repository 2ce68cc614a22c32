"""What a training leaves in the draft: the LoRA in two formats, its loss as lines and drawn, sample pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from imagend import files
from imagend.errors import NoSpace
from imagend.manifest import Artifact
from imagend.train_spec import CURVE, KOHYA, LORA, LOSSES, Train
from imagend.worker import images, lora_export, loss_curve
from imagend.worker.checkpoint import Checkpoint
from imagend.worker.train_cache import encode
from imagend.worker.train_step import Steps
from imagend.worker.vae import decode

if TYPE_CHECKING:
    from imagend.worker.main import Context

STEPS, GUIDANCE = 30, 5.0
"""Of sample pictures: what imagend paints with if a job says nothing."""


class Results:
    def __init__(self, spec: Train, pipe: Any, steps: Steps, context: Context) -> None:
        self._spec, self._pipe, self._steps, self._context = spec, pipe, steps, context

    def paint(self, step: int) -> None:
        """The sample pictures of a step, if it has any. Raises NoSpace, Interrupt."""
        for file, (at, prompt) in self._spec.samples.items():
            if at == step:
                with self._context.timed("sampling"):
                    self._paint(file, step, prompt)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _paint(self, file: str, step: int, prompt: str) -> None:
        spec, context, pipe = self._spec, self._context, self._pipe
        assert spec.seed is not None

        def each(_: Any, number: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            context.progress("sampling", step=number + 1, steps=STEPS)
            return values

        with self._steps.autocast():
            (embeds, pooled), (no_embeds, no_pooled) = encode(pipe, [prompt]), encode(pipe, [""])
            if pipe.config.force_zeros_for_empty_prompt:
                no_embeds, no_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            latents = pipe(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=no_embeds,
                negative_pooled_prompt_embeds=no_pooled,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                width=spec.resolution,
                height=spec.resolution,
                generator=torch.Generator().manual_seed(spec.seed),
                output_type="latent",
                callback_on_step_end=each,
            ).images
        image = decode(pipe, latents)
        item = {"spec": spec.model_dump(mode="json"), "step": step, "prompt": prompt, "engine": context.engine}
        try:
            images.save_png(image, context.folder / file, images.mark(True, item))
        except OSError as error:
            raise NoSpace(error.strerror) from None

    def save(self, tensors: lora_export.Parts, done: Checkpoint) -> tuple[Artifact, ...]:
        """All that the job was to make, in order. Raises NoSpace."""
        spec, folder, engine = self._spec, self._context.folder, self._context.engine
        engine["training"]["loss"] = round(loss_curve.smooth(done.losses)[-1], 6)
        model = {key: engine["model"][key] for key in ("name", "sha256")}
        told = lora_export.metadata(spec, engine["dataset"], model)
        dtype = self._context.pipelines.dtype
        curve = loss_curve.draw(done.losses, f"{spec.name}: loss of each step, and its average")
        try:
            with self._context.timed("saving"):
                files.write(folder / LORA, lora_export.diffusers_file(tensors, spec, dtype, told))
                files.write(folder / KOHYA, lora_export.kohya_file(tensors, spec, dtype, told))
                files.write(folder / LOSSES, loss_curve.lines(done.losses, spec))
                images.save_png(curve, folder / CURVE, images.mark(False, None))
                return tuple(self._artifact(index, done.seconds) for index in range(len(spec.planned)))
        except OSError as error:
            raise NoSpace(error.strerror) from None

    def _artifact(self, index: int, seconds: float) -> Artifact:
        plan = self._spec.planned[index]
        path = self._context.folder / plan.file
        if plan.file.endswith(".png"):
            with Image.open(path) as image:
                pixels = images.pixels_sha256(image)
                found = images.describe(image, plan.file, path.read_bytes(), pixels, index, plan.seed, 0.0)
        else:
            media = "application/jsonl" if plan.file == LOSSES else "application/octet-stream"
            size, sha256 = path.stat().st_size, digest_of(path.read_bytes())
            found = Artifact(
                index=index, file=plan.file, media_type=media, size=size, sha256=sha256, seed=plan.seed, seconds=seconds
            )
        return found.model_copy(update={"role": plan.role})


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return digest_of(path.read_bytes())
    except OSError:
        return None
