"""How long what has ended stays, as config.yaml says it under `retention`. Pure."""

from __future__ import annotations

from pydantic import Field

from imagend.fields import Frozen


class Retention(Frozen):
    """The keys under `retention`; a description here is the comment in config.yaml."""

    unretrieved_h: float | None = Field(
        24.0, gt=0, description="A result goes so many hours after its job ended. null: not for its age."
    )
    retrieved_h: float | None = Field(
        1.0,
        ge=0,
        description="It goes so many hours after it was retrieved (imagend retrieve). null: no sooner.",
    )
    outputs_gb: float | None = Field(
        100.0,
        gt=0,
        description="All results together have at most so many GB: retrieved ones go first, then those of clients that "
        "have more than their share, the oldest first. null: no limit.",
    )
    done_days: float = Field(
        30.0,
        ge=8,
        description="The files and stories of ended jobs (done/, journal/) stay so many days. At least 8: a job file "
        "is valid for up to 7, and until it has expired a copy of it must be known, or it would be painted again.",
    )
    max_done: int = Field(
        100_000, ge=0, description="So many of them at most, the oldest go first; none before its job file expires."
    )
    rejected_days: float = Field(
        30.0, gt=0, description="What was refused stays in rejected/ so many days, each file with its reason."
    )
    max_rejected: int = Field(
        10_000, ge=1, description="So many of them at most in each of its folders; now and then the oldest go."
    )
