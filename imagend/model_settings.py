"""What config.yaml says of models and sizes, for jobs that leave it out. Pure."""

from __future__ import annotations

from typing import Literal

from imagend import presets
from imagend.fields import Frozen, ModelName, Side


class ImageType(Frozen):
    """A preset a job may name in `image_type`. What the job says itself wins over it."""

    width: Side = 1024
    height: Side = 1024
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    negative_prompt: str | None = None


class ModelSettings(Frozen):
    """What a model's files do not say. What a job says itself wins over it."""

    vae: ModelName | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    preset: presets.Name | None = None


IMAGE_TYPES = {
    "character": ImageType(width=832, height=1216, prompt_suffix=", full body, simple background"),
    "background": ImageType(width=1216, height=832, prompt_suffix=", scenery, no humans"),
}
