"""A job's spec with every default filled in, so that the manifest says exactly what was painted. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from imagend.config import Config, ImageType
from imagend.errors import UnsupportedSetting
from imagend.job import Generate, Ref
from imagend.models import Model

_NATIVE = 1024  # image types are written for SDXL's own size


def complete(spec: Generate, ref: Ref, config: Config, model: Model) -> Generate:
    """`spec` with model, size, seeds and image type's affixes written out. seed, count and image_type become None.

    Raises UnsupportedSetting where the affixes break the prompt's syntax.
    """
    preset = config.image_types.get(spec.image_type) if spec.image_type else None
    width, height = _size(preset, model)
    prompt, negative_prompt = spec.prompt, spec.negative_prompt
    if preset:
        prompt = f"{preset.prompt_prefix}{prompt}{preset.prompt_suffix}"
        negative_prompt = preset.negative_prompt if negative_prompt is None else negative_prompt
    filled = {
        "model": model.name,
        "width": spec.width or width,
        "height": spec.height or height,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seeds": seeds(spec, ref),
        "seed": None,
        "count": None,
        "image_type": None,
    }
    try:
        return Generate.model_validate(spec.model_dump() | filled)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}" for one in error.errors(include_input=False))
        raise UnsupportedSetting(f"image_type: {spec.image_type!r} does not go with this job: {why}") from None


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
