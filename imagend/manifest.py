"""What a job ends with: its manifest, and the files that are published with it. Pure data."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field

from imagend.architecture import ModelKind
from imagend.fields import Frozen, Planned, Role
from imagend.job import Outcome
from imagend.router import Route


class Verdict(Frozen):
    """What the safety filter says of a picture."""

    label: str
    """the likeliest of the labels that are unsafe"""
    score: float
    """the probability of all of them, 0 to 1"""
    unsafe: bool


class Artifact(Frozen):
    """One published file."""

    index: int
    file: str
    media_type: str = "image/png"
    width: int | None = None
    """of pictures only"""
    height: int | None = None
    size: int
    """bytes"""
    sha256: str
    pixels_sha256: str | None = None
    """SHA-256 of the 8-bit RGB samples, row by row: the picture without its metadata."""
    seed: int | None
    """None of a file for which nothing was drawn"""
    seconds: float
    item: str | None = None
    """whose picture it is, of a set"""
    role: Role | None = None
    """what it is if it is none of the pictures that were asked for"""
    safety: Verdict | None = None
    """where a filter looked at it"""

    @property
    def plan(self) -> Planned:
        """What it was to be."""
        return Planned(self.file, self.seed, self.item, self.role)


class Withheld(Verdict):
    """A picture that was painted and is not shown, because it is unsafe."""

    index: int
    seed: int | None
    item: str | None = None


class Safety(Frozen):
    """The filter that looked at the pictures of a job."""

    mode: Literal["flag", "block"]
    classifier: str
    sha256: str
    """of the classifier, as imagend.models.digest() has it"""
    labels: tuple[str, ...]
    threshold: float
    withheld: tuple[Withheld, ...] = ()


class ItemEnd(Frozen):
    """How one of a set ended."""

    name: str
    outcome: Literal["succeeded", "failed"]
    error: dict[str, Any] | None = None


class Installed(Frozen):
    """A model that was fetched or trained, as it lies in models/."""

    kind: ModelKind
    name: str = Field(max_length=500)
    """as `imagend models` lists it, and as other jobs name it"""
    sha256: str
    """by which it is pinned: of the file, or, of a folder, as imagend.models.digest() has it"""
    files: dict[str, str] = Field(max_length=1000)
    """SHA-256 of each file with weights, by its path in the model's folder"""
    size: int
    """bytes, of these files"""
    source: str | None = Field(max_length=2000)
    version: str | None = Field(max_length=2000)
    base: str | None = Field(max_length=2000)
    license: str | None = Field(max_length=100_000)


class Manifest(Frozen):
    """The one file that says how a job ended. Its presence is the commit point."""

    schema_: Literal["imagend.manifest/v1"] = Field("imagend.manifest/v1", alias="schema")
    id: str
    client: str
    kind: str
    outcome: Outcome
    label: str | None = None
    issued_at: datetime
    accepted_at: datetime
    started_at: datetime | None = None
    ended_at: datetime
    attempts: int
    spec: dict[str, Any]
    route: Route | None = None
    """which way an edit went, and why"""
    artifacts: tuple[Artifact, ...] = ()
    items: tuple[ItemEnd, ...] | None = None
    """of a set"""
    timings: dict[str, float] = Field(default_factory=dict)
    """seconds per stage of the attempt that ended the job"""
    engine: dict[str, Any] | None = None
    """what painted: imagend and library versions, device, model files and their SHA-256, scheduler configuration"""
    loading: dict[str, Any] | None = None
    """what had to be loaded for this job, in seconds and bytes; decides no pixel"""
    memory: dict[str, Any] | None = None
    """in which memory mode it was painted, after which retries, and whether that may have changed the last bits"""
    installed: Installed | None = None
    """of a job that fetches or trains: the model that it installed"""
    not_installed: str | None = None
    """of a job that trained: why its LoRA was published, but not installed"""
    safety: Safety | None = None
    """by which filter its pictures were looked at, and which of them are withheld"""
    error: dict[str, Any] | None = None

    model_config = ConfigDict(serialize_by_alias=True)

    @property
    def pictures(self) -> int:
        """How many there are of those that were asked for."""
        return sum(artifact.role is None for artifact in self.artifacts)
