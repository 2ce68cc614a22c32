"""The keys of config.yaml as one frozen Config, in the order of the file. What reads the file is config.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from imagend.edit_settings import Edit
from imagend.fetch_settings import Fetch
from imagend.fields import CLIENT_NAME, NAME, Frozen, ModelName
from imagend.lanes import HOST
from imagend.messages import FetchSettings, WorkerSettings
from imagend.model_settings import IMAGE_TYPES, ImageType, ModelSettings
from imagend.retention_settings import Retention
from imagend.rights import Limits, Rights
from imagend.safety_settings import Classifier, Filter, Mode, filter_of
from imagend.train_settings import Training


def _path(value: Any) -> Any:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a path, such as /srv/imagend or spool")
    return Path(value)


Folder = Annotated[Path, BeforeValidator(_path)]
Seconds = Annotated[float, Field(gt=0)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")]
Name = Annotated[str, Field(pattern=NAME)]
ClientName = Annotated[str, Field(pattern=CLIENT_NAME)]


class Client(Frozen):
    """Who `imagend submit` signs as on this host."""

    name: str = Field("me", pattern=CLIENT_NAME)
    key: Folder = Path("keys/id_ed25519")


class Config(Frozen):
    """Every key of config.yaml, in the order of the file; a description here is the comment there."""

    name: str = Field(
        "imagend", pattern=NAME, description="This spool's name. A job whose `audience` is another name is refused."
    )
    spool: Folder = Field(
        Path("spool"),
        description="The queue: pending/, active/, done/, journal/ and status.json. A local disk, not NFS. "
        "Relative paths start at this file's folder. A change needs a restart.",
    )
    inboxes: tuple[Folder, ...] = Field(
        (Path("spool/inbox"),),
        min_length=1,
        description="Where job files are dropped, also one folder deeper (a folder per client). May lie on NFS. What "
        "is refused goes to rejected/ beside the inbox, on the same file system: where a mount is involved, the inbox "
        "is a folder in it. A change needs a restart.",
    )
    outputs: Folder = Field(
        Path("outputs"),
        description="Results: <client>/<id>/ with PNGs and manifest.json, and results.jsonl with a line per ended job. "
        "A change needs a restart.",
    )
    models: Folder = Field(
        Path("models"),
        description="Weights, in ComfyUI's folder names: checkpoints/, loras/, vae/, diffusers/<name>/ and so on. What "
        "is put there or removed is noticed. A change of the folder needs a restart.",
    )
    extra_model_paths: Folder | None = Field(
        None,
        description="A ComfyUI extra_model_paths.yaml, whose folders are read beside `models`. null: none. A change "
        "needs a restart.",
    )
    reference: Folder = Field(
        Path("reference"),
        description="Pictures that jobs may begin with, <entity>/<view>.png (or .jpg, .jpeg, .webp): a job names them "
        "`<entity>/<view>`. What is put there is noticed. A change of the folder needs a restart.",
    )
    allowed_signers: Folder = Field(
        Path("keys/allowed_signers"),
        description="Who may ask: OpenSSH's allowed_signers format (man ssh-keygen). Re-read whenever it changes.",
    )
    default_model: ModelName = Field("shapes-xl", description="The model of jobs that name none.")
    default_upscaler: ModelName = Field(
        "Lanczos", description="The upscaler of jobs and chains that name none; Lanczos: no network."
    )
    model_settings: dict[ModelName, ModelSettings] = Field(
        {},
        description="What some models need that their files do not say, by the names that `imagend models` lists: "
        "`vae`, `prediction_type`, `rescale_betas_zero_snr`, and `preset`: lightning, hyper, lcm, turbo, tcd or none, "
        "where the name tells it wrongly. As in `pony v6: {vae: sdxl-vae-fp16-fix}`. What a job says itself wins.",
    )
    image_types: dict[Name, ImageType] = Field(
        IMAGE_TYPES,
        description="Presets for a job's `image_type`. Sizes are for SDXL's native 1024x1024 and scale with the "
        "model's native size. What the job says itself wins; prefix and suffix are put around its prompt.",
    )
    workers: dict[Name, Device] = Field(
        {},
        description="A worker process per entry, `gpu0: cuda:0` or `cpu0: cpu`. Empty: one per NVIDIA GPU, or one on "
        "the CPU where there is none. A change needs a restart.",
    )
    cpu_workers: int | None = Field(
        None,
        ge=0,
        le=8,
        description="Workers beside these that take only what needs no GPU (upscale by Lanczos, preprocess), so that "
        "neither waits for the other. null: one where all of the others have GPUs, else none; where there is none, the "
        "others do it. A change needs a restart.",
    )
    vram_limit_gb: float | None = Field(
        None,
        gt=0,
        description="A worker uses no more of its GPU's memory (GiB) than this, beside what CUDA itself needs. null: "
        "all. A change needs a restart.",
    )
    base_cache_gb: float = Field(
        16.0,
        ge=0,
        description="Main memory (GiB) per worker for base models that were painted with lately, so that switching "
        "back does not read the disk. 0: none. A change needs a restart.",
    )
    lora_cache_mb: int = Field(
        2048,
        ge=0,
        description="LoRAs that stay loaded between jobs, in MiB per worker. 0: none. A change needs a restart.",
    )
    prompt_cache_mb: int = Field(
        256,
        ge=0,
        description="Encoded prompts that are kept between jobs, in MiB per worker. 0: none. A change needs a restart.",
    )
    embedding_cache_mb: int = Field(
        256,
        ge=0,
        description="What image encoders made of reference pictures, kept in spool/embeddings/ over restarts, in MiB. "
        "0: none. A change needs a restart.",
    )
    max_attempts: int = Field(3, ge=1, le=10, description="How often a job may take its worker or the machine down.")
    time_limit_s: Seconds = Field(600.0, description="An attempt that runs longer fails the job.")
    silence_limit_s: Seconds = Field(
        600.0, description="A worker that reports no step for so long is killed and replaced."
    )
    boot_limit_s: Seconds = Field(
        600.0, description="A worker that is not ready after so long is killed and started anew."
    )
    cancel_grace_s: Seconds = Field(
        30.0, description="A worker that has not let go of a cancelled job by then is killed."
    )
    stop_grace_s: Seconds = Field(30.0, description="The same when the daemon stops; the job goes back to the queue.")
    scan_interval_s: Seconds = Field(
        1.0, description="Inboxes are looked at this often even when nothing tells of a change (NFS tells nothing)."
    )
    file_grace_s: Seconds = Field(
        60.0, description="An unfinished file in an inbox is left alone until it has not changed for so long."
    )
    heartbeat_s: Seconds = Field(
        5.0,
        description="status.json is rewritten at least this often; readers take us for dead after three times that.",
    )
    metrics: Folder | None = Field(
        None,
        description="A file that is rewritten each heartbeat with numbers for Prometheus: a name ending in .prom in "
        "the folder of node_exporter's textfile collector. null: none. A change needs a restart.",
    )
    history: Folder | None = Field(
        None,
        description="The database that `imagend history` keeps, on a local disk. null: history.db in the spool.",
    )
    dashboard: Folder | None = Field(
        None,
        description="The page for browsers that is rewritten every few seconds, in a folder that is there. null: "
        "dashboard.html in the spool. A change needs a restart.",
    )
    max_jobs_per_worker: int = Field(
        0, ge=0, description="A worker is replaced after so many jobs, against what libraries leak. 0: never."
    )
    worker_memory_mb: int = Field(
        0, ge=0, description="A worker that holds more memory (MiB) than this after a job is replaced. 0: never."
    )
    reserve_mb: int = Field(
        512,
        ge=0,
        description="Below this much free disk (MiB) under spool or outputs, no job is taken in or handed out; status "
        "says degraded. 0: never.",
    )
    retention: Retention = Field(
        Retention(), description="How long what has ended stays. `imagend retention` shows what goes, when and why."
    )
    safety: Mode = Field(
        "off",
        description="What is done with pictures that a classifier in models/safety/ finds unsafe, of those that are "
        "painted: flag (the manifest says so), block (they are withheld, and the manifest says so), or off (nobody "
        "looks). A client's own `safety` counts where it is stricter.",
    )
    safety_classifier: Classifier = Field(Classifier(), description="By which classifier, and what it calls unsafe.")
    max_queued: int = Field(
        100, ge=0, description="Jobs that may wait, of all clients together. More are refused with QUEUE_FULL."
    )
    limits: Limits = Field(
        Limits(), description="What each client may ask for; what is beyond is refused, and says why. SIGHUP reloads."
    )
    clients: dict[ClientName, Rights] = Field(
        {},
        description="What some clients may that others may not: any of the keys of `limits`, and `operator: true` (may "
        "cancel everybody's jobs), `fetch: true` (may have models fetched), `train: true` (may train LoRAs), `safety` "
        "(flag or block, as above), `group`, the Unix group that may read this client's results (without one, only "
        "imagend's own user and group), and `unretrieved_h` and `retrieved_h` as in `retention`. As in `ops: "
        "{operator: true, max_queued: 50}`.",
    )
    edit: Edit = Field(Edit(), description="Which edits need more than inpainting. `imagend route` tries it out.")
    fetch: Fetch = Field(
        Fetch(),
        description="What `imagend fetch` may do, which runs beside the daemon, and what jobs of kind fetch may, of "
        "clients with `fetch: true`.",
    )
    train: Training = Field(Training(), description="What jobs of kind train may take, of clients with `train: true`.")
    client: Client = Field(Client(), description="For `imagend submit` on this host: who signs, and with which key.")

    @field_validator("workers")
    @classmethod
    def _named(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in value if re.fullmatch(r"(fetch|host)\d+", name)]:
            raise ValueError(f"{taken[0]} is the name of a worker that imagend adds: take another, such as gpu0")
        return value

    @field_validator("inboxes", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not value or len({str(item) for item in value}) < len(value):
            raise ValueError("must be a list of different paths, such as [spool/inbox]")
        return tuple(value)

    def rights(self, client: str) -> Rights:
        """What a client may: its own keys, each other key as for all."""
        own = self.clients.get(client, Rights())
        shared = {key: value for key, value in self.limits if key not in own.model_fields_set}
        return own.model_copy(update=shared)

    def filter_for(self, client: str) -> Filter | None:
        """What is to be done with a client's pictures that are unsafe."""
        return filter_of(self.safety_classifier, self.safety, self.rights(client).safety)

    def for_workers(self) -> WorkerSettings:
        """The keys that a worker is started with."""
        extra = str(self.extra_model_paths) if self.extra_model_paths else None
        shared = {key: getattr(self, key) for key in WorkerSettings.model_fields if key != "embeddings"}
        return WorkerSettings(**shared | {"extra_model_paths": extra, "embeddings": str(self.spool / "embeddings")})

    def for_fetching(self) -> FetchSettings:
        """The keys that a process that fetches is started with."""
        extra = str(self.extra_model_paths) if self.extra_model_paths else None
        return FetchSettings(extra_model_paths=extra, reserve_mb=self.reserve_mb, fetch=self.fetch)

    def slots(self) -> dict[str, str]:
        """Slot name → torch device, or that of the lane CPU (imagend.lanes)."""
        gpus = range(len(list(Path("/dev").glob("nvidia[0-9]*"))))  # torch counts those it sees from 0
        workers = self.workers or {f"gpu{n}": f"cuda:{n}" for n in gpus} or {"cpu0": "cpu"}
        more = all(on.startswith("cuda") for on in workers.values()) if self.cpu_workers is None else self.cpu_workers
        return workers | {f"host{n}": HOST for n in range(more)}


# Keys that a running daemon cannot change: what it holds open, or where its workers stand.
FIXED = (
    "name",
    "spool",
    "inboxes",
    "outputs",
    "models",
    "reference",
    "workers",
    "cpu_workers",
    "heartbeat_s",
    "metrics",
    *(key for key in WorkerSettings.model_fields if key != "embeddings"),
)
