"""What the fields of jobs, manifests and messages are made of. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from imagend import schedulers
from imagend.model_names import MAX_NAME, MODEL_NAME

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
CLIENT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$"  # as imagend.signers has it
MAX_SEED = 2**53 - 1  # the largest whole number that every JSON reader keeps exact (RFC 8259, section 6)
_RFC3339 = re.compile(r"2\d\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


class Frozen(BaseModel):
    """Never changes, refuses fields it does not know, converts nothing silently, holds no NaN and no infinity."""

    # Built when first used: `imagend status` needs few of them, and it must be quick.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line without control characters")
    return text


def _moment(text: object) -> object:
    """Stricter than pydantic, which takes "1763000000" too, and the year 9999, to which no lifetime can be added."""
    try:
        if isinstance(text, str) and _RFC3339.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:  # the 30th of February
        pass
    raise ValueError("must be a time with time zone, such as 2026-11-20T15:00:00Z")


Moment = Annotated[datetime, BeforeValidator(_moment)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
ModelName = Annotated[str, Field(max_length=MAX_NAME, pattern=MODEL_NAME), AfterValidator(printable)]
"""As imagend.model_names has it: a key into the listing of a kind of models, never a path."""

MAX_PAINTED = 2048
Side = Annotated[int, Field(ge=64, le=MAX_PAINTED, multiple_of=8)]
"""Of a picture that is made, in pixels."""


def _scheduler(name: str) -> str:
    try:
        schedulers.choose(name)
    except KeyError:
        raise ValueError(f"is not a known scheduler; known are: {', '.join(schedulers.NAMES)}") from None
    return name


def _schedule_type(name: str) -> str:
    if name.lower() not in (known.lower() for known in schedulers.SCHEDULE_TYPES):
        raise ValueError(f"is not a known schedule type; known are: {', '.join(schedulers.SCHEDULE_TYPES)}")
    return name


SchedulerName = Annotated[str, AfterValidator(_scheduler)]
ScheduleType = Annotated[str, AfterValidator(_schedule_type)]

PICTURE = r"^(sha256:[0-9a-f]{64}|[^/.:][^/:]*/[^/.:][^/:]*)$"
MAX_PICTURE_BYTES = 32 * 2**20
MAX_SIDE = 4096
"""Of a picture that is read, and of one that is made larger."""
PictureName = Annotated[str, Field(max_length=MAX_NAME, pattern=PICTURE), AfterValidator(printable)]
"""An input picture: ENTITY/VIEW, a key into the listing of reference/, never a path; or the digest of one that was sent
along."""


Role = Literal["contact_sheet", "overlay", "lora", "lora_kohya", "loss", "sample"]
"""What a published file is that is none of the pictures that were asked for."""


class Planned(NamedTuple):
    """A file that a job is to publish. `item` is whose picture it is in a set."""

    file: str
    seed: int | None
    item: str | None = None
    role: Role | None = None


def numbered(seeds: Sequence[int | None]) -> tuple[Planned, ...]:
    return tuple(Planned(f"{index:04d}.png", seed) for index, seed in enumerate(seeds))


class OfOnePicture(Frozen):
    """A job that makes one picture from another one, and draws nothing."""

    image: PictureName = Field(
        description="The picture: ENTITY/VIEW in reference/, or sha256:… of one that was sent along."
    )

    @property
    def pictures(self) -> tuple[str, ...]:
        return (self.image,)

    @property
    def planned(self) -> tuple[Planned, ...]:
        return numbered([None])

    @property
    def chain_steps(self) -> tuple[str, ...]:
        """It is no chain."""
        return ()


def digest_of(picture: str) -> str | None:
    """The SHA-256 by which a picture that was sent along is named; None of one in reference/."""
    return picture.removeprefix("sha256:") if picture.startswith("sha256:") else None
