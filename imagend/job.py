"""What a job is: its file, its fields and their ranges. Pure data: no disk, no clock.

A job file is one flat JSON object: the fields of `Header` and those of its kind's spec class side by side.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from imagend.control import Preprocess
from imagend.edit_spec import Edit
from imagend.fetch_spec import Fetch
from imagend.fields import CLIENT_NAME as CLIENT_NAME
from imagend.fields import MAX_SEED as MAX_SEED
from imagend.fields import NAME as NAME
from imagend.fields import Frozen as Frozen
from imagend.fields import Moment, printable
from imagend.generate_spec import Generate
from imagend.mask_spec import MakeMask
from imagend.train_spec import Train
from imagend.upscaling import Upscale

JOB_SCHEMA = "imagend.job/v1"
MAX_JOB_BYTES = 64 * 1024
DEFAULT_LIFETIME = timedelta(hours=24)
MAX_LIFETIME = timedelta(days=7)
JOB_ID = r"^[0-9a-f]{20}$"


class Ref(NamedTuple):
    """Which job: its client (the principal who signed it) and its id. Also its folder and file name in every shelf."""

    client: str
    id: str

    def __str__(self) -> str:
        return f"{self.client}/{self.id}"


class Kind(enum.StrEnum):
    """One kind = one spec class = one module in imagend/worker/ of the same name; fetch has a process of its own,
    imagend/fetch/."""

    GENERATE = "generate"
    EDIT = "edit"
    UPSCALE = "upscale"
    PREPROCESS = "preprocess"
    MASK = "mask"
    FETCH = "fetch"
    TRAIN = "train"


class Outcome(enum.StrEnum):
    SUCCEEDED = "succeeded"
    PARTIAL = "partial"
    """A set of which some items failed."""
    FAILED = "failed"
    CANCELLED = "cancelled"


JobId = Annotated[str, Field(pattern=JOB_ID)]


class Header(Frozen):
    """What every job file says about itself."""

    schema_: Literal["imagend.job/v1"] = Field(alias="schema", description="The format of this file.")
    kind: Literal["generate", "edit", "upscale", "preprocess", "mask", "fetch", "train", "cancel"] = Field(
        description="What to do; each kind has fields of its own, below."
    )
    issued_at: Moment = Field(description="When the job was made (RFC 3339, with time zone). Part of its identity.")
    expires_at: Moment | None = Field(
        None, description="Accepted until then; 24 hours after issued_at if left out, at most 7 days after it."
    )
    audience: str | None = Field(
        None, pattern=NAME, description="The name of the one spool that may accept the job (`name` in its config.yaml)."
    )
    nonce: str | None = Field(
        None, max_length=128, description="Any text; makes two jobs that are otherwise alike two jobs."
    )
    priority: int = Field(
        5,
        ge=0,
        le=9,
        description="Higher goes first. Within a priority the clients take turns, each one's jobs in order of arrival; "
        "every fourth turn goes by no priority, to who was served longest ago.",
    )
    label: Annotated[str, AfterValidator(printable)] | None = Field(
        None, max_length=200, description="Your own name for the job, repeated in its manifest."
    )

    @property
    def deadline(self) -> datetime:
        return self.expires_at or self.issued_at + DEFAULT_LIFETIME

    @model_validator(mode="after")
    def _lifetime(self) -> Header:
        if not timedelta(0) < self.deadline - self.issued_at <= MAX_LIFETIME:
            raise ValueError("expires_at: must be later than issued_at and at most 7 days after it")
        return self


class Cancel(Frozen):
    """A wish that a job stop: one of the client's own, or anybody's for an operator. Never queued."""

    job: JobId = Field(description="The id of the job to cancel.")
    client: str | None = Field(
        None, pattern=CLIENT_NAME, description="Whose job it is; your own if left out. Another's: operators only."
    )


SPECS: Mapping[str, type[Frozen]] = {
    **{"generate": Generate, "edit": Edit, "upscale": Upscale, "preprocess": Preprocess},
    **{"mask": MakeMask, "fetch": Fetch, "train": Train, "cancel": Cancel},
}
Spec = Generate | Edit | Upscale | Preprocess | MakeMask | Fetch | Train


class Job(Frozen):
    """A verified job: who, which, and what."""

    ref: Ref
    header: Header
    spec: Spec

    @property
    def signer(self) -> str:
        return self.ref.client

    @property
    def kind(self) -> Kind:
        return Kind(self.header.kind)


class CancelRequest(Frozen):
    """A verified wish to cancel. Whether `signer` may cancel the job of another, the door decides."""

    ref: Ref
    header: Header
    signer: str
