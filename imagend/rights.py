"""What a client may ask for, as config.yaml says it: the same for all under `limits`, by name under `clients`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from imagend.fields import ModelName
from imagend.job import Frozen, Kind
from imagend.safety_settings import Mode

UNIX_GROUP = r"^[a-z_][a-z0-9_-]{0,31}$"


def _kind(text: str) -> str:
    if text not in list(Kind):
        raise ValueError(f"is not a kind; kinds are {', '.join(Kind)}")
    return text


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list, such as [generate], or null for all")
    return tuple(value)


Kinds = Annotated[tuple[Annotated[str, AfterValidator(_kind)], ...], BeforeValidator(_list)]
Models = Annotated[tuple[ModelName, ...], BeforeValidator(_list)]


class Limits(Frozen):
    """What each client may ask for. A description here is the comment in config.yaml."""

    max_queued: int = Field(10, ge=0, description="Jobs of one client that may wait; those being painted do not count.")
    max_work: float = Field(
        4000.0,
        gt=0,
        description="The most one job may ask for, in megapixel-steps: pictures x width x height x steps / 1,000,000. "
        "64 pictures of 1024x1024 with 50 steps are 3,355.",
    )
    jobs_per_minute: int = Field(
        60, ge=1, description="Jobs a minute, on average; so many may also come at once. Cancels are counted apart."
    )
    kinds: Kinds | None = Field(None, description="The kinds of job allowed, such as [generate]; null: all.")
    models: Models | None = Field(None, description="The models allowed, such as [shapes-xl]; null: all.")
    max_priority: int = Field(9, ge=0, le=9, description="The highest priority a job may ask for; 5 is the usual one.")


class Rights(Limits):
    """One client's own limits (those that are not given are those of all), and what only some clients may."""

    operator: bool = False
    fetch: bool = False
    safety: Mode | None = None
    train: bool = False
    group: str | None = Field(None, pattern=UNIX_GROUP)
    unretrieved_h: float | None = Field(None, gt=0)
    retrieved_h: float | None = Field(None, ge=0)
