"""What jobs of kind train may take, as config.yaml says it under `train`. Pure."""

from __future__ import annotations

from pydantic import Field

from imagend.fields import Frozen


class Training(Frozen):
    """The keys under `train`; a description here is the comment in config.yaml."""

    time_limit_s: float = Field(
        43_200.0, gt=0, description="An attempt at such a job that takes longer fails it; one that goes on counts anew."
    )
    max_presented: int = Field(
        200_000,
        ge=1,
        description="The most one job may ask for: max_train_steps x train_batch_size x gradient_accumulation_steps.",
    )
    lora_store_gb: float = Field(
        50.0, gt=0, description="Where models/loras/ holds more (GB), a LoRA is published, but not installed."
    )
