"""A model's record: where it is from, what may be done with it, whether it is in use. Pure; records.py keeps it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field

from imagend.architecture import ModelKind
from imagend.fields import Frozen

MAX_TEXT = 2_000
MAX_LICENSE = 100_000
SHA256 = r"^[0-9a-f]{64}$"
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Retired(Frozen):
    """Jobs that are taken in from `at` on may not name the model."""

    at: AwareDatetime
    by: Text
    reason: Text = Field(min_length=1)


class Trained(Frozen):
    """Where a model is from that was made here."""

    job: Text
    dataset: Text
    dataset_sha256: str = Field(pattern=SHA256)
    model: Text
    """its base"""
    model_sha256: str = Field(pattern=SHA256)


class Record(Frozen):
    """What a source said of a model when it was fetched, and what the operator noted since."""

    schema_: Literal["imagend.model/v1"] = Field("imagend.model/v1", alias="schema")
    kind: ModelKind
    sha256: str | None = Field(None, pattern=SHA256)
    """of a folder, imagend.models.digest()"""
    size: int | None = Field(None, ge=0)
    source: Text | None = None
    """a page or a URL that people can open; without tokens"""
    version: Text | None = None
    base: Text | None = None
    """the base it is for, as its source says"""
    license: str | None = Field(None, max_length=MAX_LICENSE)
    trigger_words: tuple[Text, ...] = Field((), max_length=100)
    fetched_by: Text | None = None
    fetched_at: AwareDatetime | None = None
    trained: Trained | None = None
    """of a LoRA that a job has made"""
    notes: Text | None = None
    retired: Retired | None = None
    """None: active"""

    model_config = ConfigDict(serialize_by_alias=True)

    def retire(self, by: str, at: datetime, reason: str) -> Record:
        return self.model_copy(update={"retired": Retired(at=at, by=by, reason=reason)})

    def public(self) -> dict[str, Any]:
        """What all may read of it, in the catalogue."""
        return {
            "source": self.source,
            "version": self.version,
            "base": self.base,
            "license": self.license[:MAX_TEXT] if self.license else None,
            "retired": self.retired.reason if self.retired else None,
        }
