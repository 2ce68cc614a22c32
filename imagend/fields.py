"""What the fields of jobs, manifests and messages are made of. Pure."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from imagend import schedulers
from imagend.model_names import MAX_NAME, MODEL_NAME


class Frozen(BaseModel):
    """Never changes, refuses fields it does not know, converts nothing silently, holds no NaN and no infinity."""

    # Built when first used: `imagend status` needs few of them, and it must be quick.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line without control characters")
    return text


ModelName = Annotated[str, Field(max_length=MAX_NAME, pattern=MODEL_NAME), AfterValidator(printable)]
"""As imagend.model_names has it: a key into the listing of a kind of models, never a path."""

Side = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
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


class OfOnePicture(Frozen):
    """A job that makes one picture from another one, and draws nothing."""

    image: PictureName = Field(
        description="The picture: ENTITY/VIEW in reference/, or sha256:… of one that was sent along."
    )

    @property
    def pictures(self) -> tuple[str, ...]:
        return (self.image,)

    @property
    def seeds(self) -> tuple[None]:
        """One picture, of no seed."""
        return (None,)

    @property
    def chain_steps(self) -> tuple[str, ...]:
        """It is no chain."""
        return ()


def digest_of(picture: str) -> str | None:
    """The SHA-256 by which a picture that was sent along is named; None of one in reference/."""
    return picture.removeprefix("sha256:") if picture.startswith("sha256:") else None
