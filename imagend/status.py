"""What spool/status.json says: its fields. `imagend schema status` exports them as JSON Schema. Pure data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imagend.fields import Frozen

MAX_ERRORS = 10
MB = 1 << 20
_MAX_NAMES = 20

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""RFC 3339, with milliseconds"""


class Waiting(Frozen):
    """A job that waits."""

    client: str
    id: str
    lane: Literal["paint", "cpu", "fetch", "train"] = Field(
        description="Each has an order of its own, and workers; training those that paint, when they have time."
    )
    queue_position: int = Field(description="In its lane; 1 is next.")
    queue_length: int = Field(description="Jobs that wait in this lane.")
    estimated_wait_seconds: float | None = Field(description="Until its turn; null while nothing is known.")


class PassedOver(Frozen):
    """A job that waits for an operator's word."""

    client: str
    id: str
    waits_for: Literal["release", "resume"] = Field(description="It is held, or its client is paused.")


class Paused(Frozen):
    """What an operator has paused."""

    at: str = Field(description="Since when.")
    reason: str


class Queue(Frozen):
    """The queue."""

    pending: int = Field(description="Jobs that wait.")
    active: int = Field(description="Jobs in workers' hands.")
    max_size: int = Field(description="How many may wait: `max_queued` of config.yaml.")
    oldest: Time | None = Field(description="When the oldest of those that wait was accepted; once a heartbeat.")
    per_client: dict[str, int] = Field(description="Jobs that wait, per client.")
    paused: Paused | None = Field(None, description="Nothing is handed out (`imagend pause`).")
    paused_clients: dict[str, Paused] = Field(description="No job of theirs is handed out.")
    held: int = Field(description="Jobs that are passed over (`imagend hold`).")
    head: tuple[Waiting, ...] = Field(
        description="The next 100 of each lane, in the order in which they will be served; none of paused clients, "
        "none held."
    )
    passed_over: tuple[PassedOver, ...] = Field(description="Some of these, 100 at most.")


class Pipeline(Frozen):
    """What a worker's last job left in its pipeline."""

    model_loaded: str | None = Field(None, description="The base model.")
    loras_loaded: tuple[str, ...] = Field((), description="LoRAs of the last job.")
    controlnets_loaded: tuple[str, ...] = Field((), description="ControlNets of the last job.")
    ip_adapter_loaded: str | None = Field(None, description="The last job's IP-Adapter.")
    mode: str | None = Field(None, description="The memory mode that it was painted in (docs/memory.md).")

    @classmethod
    def of(cls, engine: dict[str, Any] | None, memory: dict[str, Any] | None) -> Pipeline:
        """From a worker's words, which may be nonsense."""
        try:
            told = _Engine.model_validate((engine or {}) | {"mode": (memory or {}).get("mode")})
        except ValidationError:
            return cls()
        return cls(
            model_loaded=told.model.name if told.model else None,
            loras_loaded=tuple(one.name for one in told.loras),
            controlnets_loaded=tuple(one.name for one in told.controlnets),
            ip_adapter_loaded=told.ip_adapter.name if told.ip_adapter else None,
            mode=told.mode,
        )


class _Named(BaseModel):
    name: str = Field(max_length=200)


class _Engine(BaseModel):
    model: _Named | None = None
    loras: tuple[_Named, ...] = Field((), max_length=_MAX_NAMES)
    controlnets: tuple[_Named, ...] = Field((), max_length=_MAX_NAMES)
    ip_adapter: _Named | None = None
    mode: str | None = Field(None, max_length=64)


class Worker(Frozen):
    """A worker, by its name in config.yaml. From `job` on: only while it has one."""

    state: Literal["down", "resting", "booting", "idle", "busy"] = Field(
        description="`resting`: of the lane `fetch`; its process is started when a job comes."
    )
    lane: Literal["paint", "cpu", "fetch"] = Field(
        description="Which jobs it takes: to paint, to work on pictures without a GPU, or to fetch."
    )
    device: str = Field(description="As PyTorch names it; `host` of the lane `cpu`, `network` of the lane `fetch`.")
    starts: int = Field(description="How often its process was started.")
    deaths: int = Field(description="How often in a row it died.")
    painted: int = Field(description="Jobs since its process was started.")
    pipeline: Pipeline | None = Field(description="null until its process has painted something.")
    job: str | None = Field(None, description="The job's id.")
    client: str | None = Field(None, description="Whose job it is.")
    attempt: int | None = Field(None, description="1 is the first.")
    since: Time | None = Field(None, description="When this attempt began.")
    stage: str | None = Field(None, description="`model_loading`, `painting`, …: as in a manifest's `timings`.")
    picture: int | None = Field(None, description="0 is the first.")
    pictures: int | None = Field(None, description="Of how many.")
    step: int | None = Field(None, description="Denoising steps done in this picture; steps of a training.")
    steps: int | None = Field(None, description="Of how many.")
    bytes_done: int | None = Field(None, description="Of what is fetched: so many have come.")
    bytes_total: int | None = Field(None, description="Of how many, where that is known.")
    loss: float | None = Field(None, description="Of a training: an average of its last steps.")
    eta_s: float | None = Field(None, description="Of a training: about how many seconds are left.")
    chain_step: str | None = Field(None, description="Of a job with a chain: `generate` or `upscale`.")
    progress: float | None = Field(None, description="Of a job with a chain: the part of this attempt that is done.")


class Gpu(Frozen):
    """A GPU, as the driver sees it: whoever uses it."""

    index: int = Field(description="As nvidia-smi counts.")
    name: str
    vram_total_mb: int = Field(description="In units of 2^20 bytes, as nvidia-smi.")
    vram_used_mb: int
    vram_free_mb: int
    temperature_c: int | None = Field(description="Degrees Celsius; null where the GPU does not tell.")
    utilization_percent: int | None = Field(description="Of the last moment's time; null where the GPU does not tell.")


class Gpus(Frozen):
    """NVIDIA's GPUs, looked at once in two seconds."""

    available: bool
    why: str | None = Field(None, description="Why nothing is known.")
    driver: str | None = Field(None, description="The driver's version.")
    devices: tuple[Gpu, ...] = ()


class Inbox(Frozen):
    """An inbox."""

    path: str
    scan_age_s: float = Field(description="Since it was last looked at.")
    stuck: int = Field(description="Files that cannot be moved out of it.")
    trouble: str | None
    skew_s: float | None = Field(description="How far its clock is ahead of ours (docs/nfs.md).")
    delay_s: float | None = Field(description="The longest of the last 100 files' delays from writing to being seen.")


class Removal(Frozen):
    """The next result that goes."""

    client: str
    id: str
    at: Time
    why: str


class Removed(Frozen):
    """What retention has removed since the start."""

    results: int
    jobs: int = Field(description="Files and stories of ended jobs.")


class Storage(Frozen):
    """What has ended and is still there, as retention last saw it (docs/spool.md)."""

    at: Time | None = Field(description="When that was; null before the first look.")
    outputs_count: int = Field(description="Results.")
    outputs_size_mb: float
    retrieved_count: int = Field(description="Results that were retrieved.")
    done_count: int = Field(description="Ended jobs in done/.")
    free_mb: int | None = Field(description="Under outputs, now; null while that is not known.")
    next_removal: Removal | None
    removed: Removed


class Rates(Frozen):
    """What ended in the last hour."""

    jobs_per_hour: int
    pictures_per_hour: int
    failed_per_hour: int


class ErrorReport(Frozen):
    """Something went wrong. The message names the remedy, and holds nothing that a client wrote."""

    at: Time
    code: str = Field(description="As in docs/errors.md.")
    message: str
    job: str | None = Field(description="CLIENT/ID, if it was a job's.")


class Status(Frozen):
    """The whole file."""

    schema_: Literal["imagend.status/v1"] = Field("imagend.status/v1", alias="schema")
    name: str = Field(description="The spool's, from config.yaml.")
    version: str = Field(description="imagend's.")
    pid: int
    state: Literal["starting", "ready", "busy", "degraded", "draining", "stopped"]
    reasons: tuple[str, ...] = Field(description="Why it is degraded, each with a remedy.")
    heartbeat: Time = Field(description="When this was written.")
    interval_s: float = Field(description="It is written at least so often.")
    stale: str = Field(description="How to see that the daemon is dead, in words.")
    started_at: Time
    queue: Queue
    workers: dict[str, Worker]
    gpu: Gpus
    inboxes: tuple[Inbox, ...]
    storage: Storage | None = Field(description="null where nothing is ever removed.")
    totals: dict[str, int] = Field(description="Jobs that ended since the start, by outcome.")
    rates: Rates
    last_errors: tuple[ErrorReport, ...] = Field(description="The last 10, the newest first.")

    model_config = ConfigDict(serialize_by_alias=True)


def schema_of_status() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of status.json, as this imagend writes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Status.model_json_schema(mode="serialization")}
