"""What jobs of kind train may take, as config.yaml says it under `train`. Pure."""

from __future__ import annotations

import re
from datetime import datetime, time, tzinfo
from typing import Annotated

from pydantic import AfterValidator, Field

from imagend.fields import Frozen

LOCAL: tzinfo | None = None
"""The time zone of quiet hours; None: the host's."""
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


def _hours(text: str) -> str:
    if not _HOURS.fullmatch(text):
        raise ValueError("must be two times of a day, such as 22:00-06:00")
    return text


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
    rest_s: float = Field(
        10.0,
        ge=0,
        description="Training begins, and goes on after it gave way, on a worker that has done nothing else for so "
        "long: to go on costs it some seconds.",
    )
    share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="The part of a worker's time that training has while other jobs wait. 0: none, it gives way at "
        "once; 1: it gives way to nothing.",
    )
    turn_s: float = Field(
        300.0, gt=0, description="With a share above 0, training that has begun keeps its worker for at least so long."
    )
    quiet_hours: Annotated[str, AfterValidator(_hours)] | None = Field(
        None, description="In these hours (local time, such as 22:00-06:00) training gives way to nothing. null: none."
    )

    def is_quiet(self, at: datetime) -> bool:
        """Whether these are quiet hours; `at` with its time zone."""
        if self.quiet_hours is None:
            return False
        begin, end = (time.fromisoformat(text) for text in self.quiet_hours.split("-"))
        now = at.astimezone(LOCAL).time()
        return begin <= now < end if begin <= end else now >= begin or now < end
