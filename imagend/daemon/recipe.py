"""A job's spec with every default filled in, so that the manifest says exactly what was painted. Pure."""

from __future__ import annotations

from imagend.config import Config, ImageType
from imagend.job import MAX_SEED, Generate, Ref
from imagend.models import Model

_NATIVE = 1024  # image types are written for SDXL's own size


def complete(spec: Generate, ref: Ref, config: Config, model: Model) -> Generate:
    """`spec` with model, size, seeds and image type's affixes written out. seed, count and image_type become None."""
    preset = config.image_types.get(spec.image_type) if spec.image_type else None
    width, height = _size(preset, model)
    return spec.model_copy(
        update={
            "model": model.name,
            "width": spec.width or width,
            "height": spec.height or height,
            "prompt": f"{preset.prompt_prefix}{spec.prompt}{preset.prompt_suffix}" if preset else spec.prompt,
            "negative_prompt": preset.negative_prompt
            if preset and spec.negative_prompt is None
            else spec.negative_prompt,
            "seeds": seeds(spec, ref),
            "seed": None,
            "count": None,
            "image_type": None,
        }
    )


def seeds(spec: Generate, ref: Ref) -> tuple[int, ...]:
    """One seed per picture. Without any given they follow from the job's id, so that every attempt has the same."""
    if spec.seeds is not None:
        return spec.seeds
    first = spec.seed if spec.seed is not None else int(ref.id[:8], 16)
    return tuple(min(first + i, MAX_SEED) for i in range(spec.count or 1))


def _size(preset: ImageType | None, model: Model) -> tuple[int, int]:
    if preset is None:
        return model.native_size, model.native_size
    scale = model.native_size / _NATIVE
    return _side(preset.width * scale), _side(preset.height * scale)


def _side(pixels: float) -> int:
    return max(64, min(2048, round(pixels / 8) * 8))
