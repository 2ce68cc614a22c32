"""A job's spec with every default filled in, so that the manifest says exactly what was painted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from imagend import presets, schedulers
from imagend.architecture import ModelKind
from imagend.config import Config
from imagend.control import ControlType
from imagend.daemon.routing import guided, routed
from imagend.edit_spec import Edit
from imagend.errors import UnsupportedSetting
from imagend.generate_spec import Generate
from imagend.job import Job, Ref, Spec
from imagend.lora_field import with_tags
from imagend.model_names import wanted
from imagend.model_settings import ImageType, ModelSettings
from imagend.models import Model
from imagend.router import VAGUE, Route
from imagend.set_field import escaped
from imagend.train_spec import Train
from imagend.upscaling import Upscale

_NATIVE = 1024  # image types are written for SDXL's own size


class Shelf(Protocol):
    """What is asked of the librarian."""

    def find(self, name: str) -> Model: ...
    def guides(self, base: Model) -> Mapping[ControlType, str]: ...
    def has(self, kind: ModelKind) -> bool: ...


class Filled(NamedTuple):
    """A job's spec as complete() has it, the name of its base model, and which way it goes if it is an edit."""

    spec: Spec
    model: str | None = None
    route: Route | None = None
    otherwise: Spec | None = None
    """of an edit of whose way the rules say nothing, and a CLIP may: that for the complex way"""


def fill(job: Job, config: Config, shelf: Shelf) -> Filled:
    """Raises what find() and complete() do."""
    if isinstance(job.spec, Upscale):
        return Filled(job.spec.model_copy(update={"upscaler": job.spec.upscaler or config.default_upscaler}))
    if isinstance(job.spec, Train):
        model = shelf.find(job.spec.model or config.default_model)
        return Filled(complete_training(job.spec, job.ref, config, model), model.name)
    if not isinstance(job.spec, Generate):
        return Filled(job.spec)
    model = shelf.find(job.spec.model or config.default_model)
    if not isinstance(job.spec, Edit):
        return Filled(complete(job.spec, job.ref, config, model), model.name)
    able = shelf.guides(model)
    spec, route = routed(job.spec, config, able)
    other = guided(job.spec, able) if route.confidence <= VAGUE and shelf.has(ModelKind.CLIP) else None
    otherwise = complete(other, job.ref, config, model) if other else None
    return Filled(complete(spec, job.ref, config, model), model.name, route, otherwise)


def complete(spec: Generate, ref: Ref, config: Config, model: Model) -> Generate:
    """`spec` with model, VAE, LoRAs, strength, size, steps, scheduler's settings, seeds and the image type's affixes
    written out, seeds for each item of a set. seed, image_type and (but of a set) count become None; what stays None is
    as the model's own files say.

    Raises UnsupportedSetting where the affixes break the prompt's syntax, or a setting does not go with the others.
    """
    preset = config.image_types.get(spec.image_type) if spec.image_type else None
    width, height = _size(preset, model)
    prompt, negative_prompt = spec.prompt, spec.negative_prompt
    if preset:
        as_text = escaped if spec.items else str  # of a set, the job's own prompts are templates
        prompt = f"{as_text(preset.prompt_prefix)}{prompt}{as_text(preset.prompt_suffix)}"
        if negative_prompt is None and preset.negative_prompt is not None:
            negative_prompt = as_text(preset.negative_prompt)
    try:
        prompt, loras = with_tags(prompt, spec.prompt_syntax, spec.loras)
    except ValueError as error:
        raise UnsupportedSetting(f"image_type: {spec.image_type!r} does not go with this job: {error}") from None
    filled = _sampling(spec, config.model_settings.get(model.name, ModelSettings()), model) | {
        "model": wanted(spec.model or config.default_model).of(model.name),
        "loras": loras,
        "strength": spec.default_strength if spec.strength is None and spec.image is not None else spec.strength,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        **_seeds(spec, ref),
        "seed": None,
        "table": None,
        "image_type": None,
    }
    if not isinstance(spec, Edit):  # it has the size of its picture, and is painted at one that only the worker knows
        filled |= {"width": spec.width or width, "height": spec.height or height}
    if spec.chain is not None:
        step = spec.chain.upscale
        filled["chain"] = {"upscale": step.model_dump() | {"upscaler": step.upscaler or config.default_upscaler}}
    try:
        return type(spec).model_validate(spec.model_dump() | filled)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}" for one in error.errors(include_input=False))
        culprit = f"image_type: {spec.image_type!r}" if spec.image_type else f"model: {model.name!r}, as it is set,"
        raise UnsupportedSetting(f"{culprit} does not go with this job: {why}") from None


def complete_training(spec: Train, ref: Ref, config: Config, model: Model) -> Train:
    """`spec` with model, VAE, alpha, resolution and seed written out."""
    settings = config.model_settings.get(model.name, ModelSettings())
    rescale = settings.rescale_betas_zero_snr if spec.rescale_betas_zero_snr is None else spec.rescale_betas_zero_snr
    filled = {
        "model": wanted(spec.model or config.default_model).of(model.name),
        "vae": spec.vae or settings.vae,
        "prediction_type": spec.prediction_type or settings.prediction_type,
        "rescale_betas_zero_snr": rescale,
        "alpha": spec.alpha or float(spec.rank),
        "resolution": spec.resolution or _side(model.native_size),
        "seed": spec.seed if spec.seed is not None else int(ref.id[:8], 16),
    }
    return spec.model_copy(update=filled)


def _sampling(spec: Generate, settings: ModelSettings, model: Model) -> dict[str, Any]:
    """What the model's settings and preset decide, where the job does not."""
    preset = presets.of(model.name, settings.preset)
    scheduler, schedule_type = spec.scheduler or preset.scheduler, spec.schedule_type
    if schedule_type is None and scheduler is not None and preset.schedule_type in schedulers.schedule_types(scheduler):
        schedule_type = preset.schedule_type
    rescale = settings.rescale_betas_zero_snr if spec.rescale_betas_zero_snr is None else spec.rescale_betas_zero_snr
    return {
        "vae": spec.vae or settings.vae,
        "num_inference_steps": spec.num_inference_steps or preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
        "scheduler": scheduler,
        "schedule_type": schedule_type,
        "eta": preset.eta if spec.eta is None and spec.scheduler is None else spec.eta,
        "prediction_type": spec.prediction_type or settings.prediction_type,
        "rescale_betas_zero_snr": rescale,
    }


def _seeds(spec: Generate, ref: Ref) -> dict[str, Any]:
    first, *others = seeds(spec, ref)
    if not spec.items:
        return {"seeds": (first, *others), "count": None}
    items = (item if item.seed is not None else item.model_copy(update={"seed": first}) for item in spec.items)
    return {"items": tuple(items), "count": spec.count or 1}


def seeds(spec: Generate, ref: Ref) -> tuple[int, ...]:
    """One seed per picture. Without any given they follow from the job's id, so that every attempt has the same."""
    if spec.seeds is not None:
        return spec.seeds
    first = spec.seed if spec.seed is not None else int(ref.id[:8], 16)
    return tuple(first + i for i in range(spec.count or 1))


def _size(preset: ImageType | None, model: Model) -> tuple[int, int]:
    if preset is None:
        return _side(model.native_size), _side(model.native_size)
    scale = model.native_size / _NATIVE
    return _side(preset.width * scale), _side(preset.height * scale)


def _side(pixels: float) -> int:
    return max(64, min(2048, round(pixels / 8) * 8))
