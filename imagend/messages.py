"""What daemon and worker say to each other: JSON lines on a socket, after the settings a worker is started with.

Daemon → worker: Run, Cancel, Stop. Worker → daemon: Ready, Progress, MemoryShort, Made, Ended. Each names its job, so
that a late word cannot hit the next one. Never pickle, never an exception: a worker runs strangers' models and must not
reach in here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from imagend.errors import ImagendError, TryAgain
from imagend.fetch_settings import Fetch
from imagend.job import Frozen, Outcome, Ref
from imagend.manifest import Artifact, Installed, Safety
from imagend.router import Route
from imagend.safety_settings import Filter
from imagend.set_field import MAX_ITEMS

MAX_LINE_BYTES = 1 << 20


class WorkerSettings(Frozen):
    """What a worker is started with beside its device and its models; the keys of config.yaml of the same names."""

    extra_model_paths: str | None = None
    vram_limit_gb: float | None = None
    base_cache_gb: float = 16.0
    lora_cache_mb: int = 2048
    prompt_cache_mb: int = 256
    embedding_cache_mb: int = 256
    embeddings: str | None = None
    """the folder of the cache of pictures' embeddings; not a key of config.yaml"""


class FetchSettings(Frozen):
    """What a process that fetches is started with; the keys of config.yaml of the same names."""

    extra_model_paths: str | None = None
    reserve_mb: int
    fetch: Fetch


class Known(Frozen):
    """What the daemon knows that spares a worker work: it may be of no use, but what it says is true."""

    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of weight files by imagend.hashes.stamp(): of a file that has changed it says nothing"""
    memory: dict[str, Any] = Field(default_factory=dict)
    """what earlier attempts told of memory (Ended.memory)"""


class Run(Frozen):
    """Make one attempt at a job. `folder` is the only place on disk where the worker may write, but for its caches."""

    type: Literal["run"] = "run"
    job: Ref
    kind: str
    spec: dict[str, Any]
    folder: str
    pictures: dict[str, str] = Field(default_factory=dict)
    """where the input pictures are that the spec names; nothing about them is known but that they were there"""
    known: Known = Known()
    otherwise: dict[str, Any] | None = None
    """of an edit of whose way the rules say nothing: its spec for the complex way, if a CLIP takes it for that"""
    safety: Filter | None = None
    """what is to be done with pictures that are unsafe"""
    last: bool = False
    """whether no other attempt will follow, so that nothing need be kept for one"""


class Cancel(Frozen):
    type: Literal["cancel"] = "cancel"
    job: Ref


class Stop(Frozen):
    """Leave at the next step; what is painted stays in the draft."""

    type: Literal["stop"] = "stop"


class Ready(Frozen):
    type: Literal["ready"] = "ready"
    device: str
    versions: dict[str, str]
    memory: dict[str, int] = Field(default_factory=dict, max_length=8)
    """of the device: total_bytes (or vram_limit_gb, if that is less) and available_bytes; for the log"""


class Progress(Frozen):
    """Heartbeat and progress in one. `step` counts from 0 to `steps` within picture `picture` of `pictures`; of what is
    fetched, `bytes_done` of `bytes_total`.

    Of a training: the loss of late, and about how many seconds are left.
    Of a chain: which of its steps it is, and what part of the whole attempt is done, which never falls.
    """

    type: Literal["progress"] = "progress"
    job: Ref
    stage: str = Field(max_length=64)  # it stands in status.json
    picture: int = 0
    pictures: int = 0
    step: int = 0
    steps: int = 0
    bytes_done: int | None = None
    bytes_total: int | None = None
    loss: float | None = None
    eta_s: float | None = None
    chain_step: str | None = Field(default=None, max_length=64)
    progress: float | None = Field(default=None, ge=0.0, le=1.0)

    def told(self) -> dict[str, Any]:
        """As it stands in status.json and in a job's state file."""
        return self.model_dump(exclude={"type", "job"}, exclude_none=True)


class MemoryShort(Frozen):
    """The device ran out of memory at a stage, on a rung of the memory ladder; the worker tries `then`, or gives up."""

    type: Literal["memory_short"] = "memory_short"
    job: Ref
    stage: str = Field(max_length=64)
    rung: str = Field(max_length=64)
    then: str | None = Field(max_length=64)


class Made(Frozen):
    """A step of a chain is done: what it made is published even if a later step fails, or kills the worker."""

    type: Literal["made"] = "made"
    job: Ref
    artifacts: tuple[Artifact, ...]
    withheld: tuple[int, ...] = ()
    """which pictures are not among them because they are unsafe"""


class Envelope(Frozen):
    """ImagendError.envelope(), checked on its way through the pipe."""

    code: str
    message: str
    detail: Any = None
    status: int


class Failure(Frozen):
    """An error as data, fit for a pipe and for a manifest."""

    error: Envelope
    try_again: bool = False
    traceback: str = ""

    @classmethod
    def of(cls, error: ImagendError) -> Failure:
        return cls(error=Envelope(**error.envelope()), try_again=isinstance(error, TryAgain))


class Ended(Frozen):
    """How an attempt ended. `failed`: what went wrong, by item of a set. `timings` in seconds by stage; `engine`,
    `loading`, `memory`, `installed`, `not_installed` and `safety` as in the manifest; `worn` says why the worker wants
    to be replaced before its next job."""

    type: Literal["ended"] = "ended"
    job: Ref
    outcome: Outcome
    artifacts: tuple[Artifact, ...] = ()
    failed: dict[str, Envelope] = Field(default_factory=dict, max_length=MAX_ITEMS)
    timings: dict[str, float] = Field(default_factory=dict)
    engine: dict[str, Any] | None = None
    loading: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    installed: Installed | None = None
    not_installed: str | None = Field(default=None, max_length=2000)
    safety: Safety | None = None
    route: Route | None = None
    """where it was asked, which way the worker went"""
    worn: str = Field(default="", max_length=200)
    failure: Failure | None = None

    @model_validator(mode="after")
    def _told(self) -> Ended:
        if (self.outcome is Outcome.FAILED) != (self.failure is not None):
            raise ValueError("a failed attempt has a failure, and no other has")
        if self.outcome is not Outcome.FAILED and (self.outcome is Outcome.PARTIAL) != self.lacks_some:
            raise ValueError("where some items failed or pictures are withheld, and only there, it succeeds in part")
        return self

    @property
    def lacks_some(self) -> bool:
        """Whether pictures are missing that were asked for."""
        return bool(self.failed or (self.safety and self.safety.withheld))


Order = Run | Cancel | Stop
Word = Ready | Progress | MemoryShort | Made | Ended
Message = Order | Word
_adapter: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return message.model_dump_json().encode() + b"\n"


def decode(line: bytes) -> Message:
    """Raises ValueError on anything that is not one of the eight messages."""
    return _adapter.validate_json(line)


def decode_word(line: bytes) -> Word:
    """What a worker may say. Raises ValueError on anything else, orders included."""
    message = decode(line)
    if isinstance(message, Order):
        raise ValueError(f"a worker does not say {message.type}")
    return message
