"""What a training leaves in the draft: the LoRA in two formats, its loss as lines and drawn, sample pictures.

The LoRA is written last: where it is, all is, and another attempt has nothing to do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from imagend import files
from imagend.errors import NoSpace
from imagend.fields import Planned
from imagend.manifest import Artifact
from imagend.train_spec import CURVE, KOHYA, LORA, LOSSES, Train
from imagend.worker import images, lora_export, loss_curve
from imagend.worker.checkpoint import Checkpoint
from imagend.worker.drafts import Drafts
from imagend.worker.train_cache import encode
from imagend.worker.train_step import Steps
from imagend.worker.vae import decode

if TYPE_CHECKING:
    from imagend.worker.main import Context

STEPS, GUIDANCE = 30, 5.0
"""Of sample pictures: what imagend paints with if a job says nothing."""


class Results:
    def __init__(self, spec: Train, pipe: Any, context: Context, recipe: str) -> None:
        self._spec, self._pipe, self._context, self.recipe = spec, pipe, context, recipe
        self._drafts = Drafts(context.folder, recipe)
        self._judge = context.pipelines.classifiers.judge(context.safety) if spec.samples else None
        context.judged = self._judge.told if self._judge else None

    def find(self) -> tuple[Artifact, ...] | None:
        """What an earlier attempt has finished, by this recipe."""
        try:
            with safe_open(self._context.folder / LORA, framework="pt") as file:
                own = json.loads((file.metadata() or {})["imagend"])
            if own["recipe"] != self.recipe:
                return None
            self._context.engine["training"] |= own["training"]
            return self._artifacts(0.0)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def paint(self, step: int, steps: Steps) -> None:
        """The sample pictures of a step, if it has any. Raises NoSpace, Interrupt."""
        for index, plan in enumerate(self._spec.planned):
            at, prompt = self._spec.samples.get(plan.file, (-1, ""))
            if at == step:
                with self._context.timed("sampling"), steps.autocast():
                    latents = self._latents(prompt)
                self._save(decode(self._pipe, latents), index, plan, step)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _latents(self, prompt: str) -> torch.Tensor:
        spec, pipe = self._spec, self._pipe
        assert spec.seed is not None

        def each(_: Any, number: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            self._context.progress("sampling", step=number + 1, steps=STEPS)
            return values

        (embeds, pooled), (no_embeds, no_pooled) = encode(pipe, [prompt]), encode(pipe, [""])
        if pipe.config.force_zeros_for_empty_prompt:
            no_embeds, no_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        latents: torch.Tensor = pipe(
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
        return latents

    def _save(self, image: Image.Image, index: int, plan: Planned, step: int) -> None:
        """Or withhold it, where the filter says so."""
        context = self._context
        if self._judge and (verdict := self._judge(image)).unsafe and self._judge.told.mode == "block":
            self._drafts.withhold(index, plan, verdict)
            return
        item = {"spec": self._spec.model_dump(mode="json"), "step": step, "engine": context.engine}
        try:
            images.save_png(image, context.folder / plan.file, images.mark(True, item))
        except OSError as error:
            raise NoSpace(error.strerror) from None

    def save(self, tensors: lora_export.Parts, done: Checkpoint) -> tuple[Artifact, ...]:
        """All that the job was to make, in order. Raises NoSpace."""
        spec, folder, engine = self._spec, self._context.folder, self._context.engine
        engine["training"]["loss"] = round(loss_curve.smooth(done.losses)[-1], 6)
        run = {key: value for key, value in engine["training"].items() if key != "gradient_checkpointing"}
        model = {key: engine["model"][key] for key in ("name", "sha256")}
        own = {"recipe": self.recipe, "dataset": engine["dataset"], "model": model, "training": run}
        told = lora_export.metadata(spec, own)
        dtype = self._context.pipelines.dtype
        curve = loss_curve.draw(done.losses, f"{spec.name}: loss of each step, and its average")
        try:
            with self._context.timed("saving"):
                files.write(folder / LOSSES, loss_curve.lines(done.losses, spec))
                images.save_png(curve, folder / CURVE, images.mark(False, None))
                files.write(folder / KOHYA, lora_export.kohya_file(tensors, spec, dtype, told))
                files.write(folder / LORA, lora_export.diffusers_file(tensors, spec, dtype, told))
                return self._artifacts(done.seconds)
        except OSError as error:
            raise NoSpace(error.strerror) from None

    def _artifacts(self, seconds: float) -> tuple[Artifact, ...]:
        """Of the files in the draft, but for those that are withheld. Raises OSError."""
        found = []
        for index, plan in enumerate(self._spec.planned):
            if withheld := self._drafts.find_withheld(plan.file):
                self._context.withhold([withheld])
            else:
                found.append(self._artifact(index, plan, seconds))
        return tuple(found)

    def _artifact(self, index: int, plan: Planned, seconds: float) -> Artifact:
        data = (self._context.folder / plan.file).read_bytes()
        if plan.file.endswith(".png"):
            with Image.open(self._context.folder / plan.file) as image:
                pixels = images.pixels_sha256(image)
                found = images.describe(image, plan.file, data, pixels, index, plan.seed, 0.0)
                verdict = self._judge(image) if self._judge and plan.role == "sample" else None
            return found.model_copy(update={"role": plan.role, "safety": verdict})
        return Artifact(
            index=index,
            file=plan.file,
            media_type="application/jsonl" if plan.file == LOSSES else "application/octet-stream",
            size=len(data),
            sha256=digest_of(data),
            seed=plan.seed,
            seconds=round(seconds, 6),
            role=plan.role,
        )


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return digest_of(path.read_bytes())
    except OSError:
        return None
