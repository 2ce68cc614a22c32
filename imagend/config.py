"""config.yaml as one frozen Config. The only module that reads that file or the environment."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from imagend.errors import BadConfig
from imagend.job import CLIENT_NAME, NAME, Frozen, Side
from imagend.rights import Limits, Rights

ENVIRONMENT = "IMAGEND_CONFIG"
SYSTEM_CONFIG = Path("/etc/imagend/config.yaml")


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


class ImageType(Frozen):
    """A preset a job may name in `image_type`. What the job says itself wins over it."""

    width: Side = 1024
    height: Side = 1024
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    negative_prompt: str | None = None


class Client(Frozen):
    """Who `imagend submit` signs as on this host."""

    name: str = Field("me", pattern=CLIENT_NAME)
    key: Folder = Path("keys/id_ed25519")


_IMAGE_TYPES = {
    "character": ImageType(width=832, height=1216, prompt_suffix=", full body, simple background"),
    "background": ImageType(width=1216, height=832, prompt_suffix=", scenery, no humans"),
}


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
        Path("models"), description="Weights, in ComfyUI's folder names: diffusers/<name>/. A change needs a restart."
    )
    allowed_signers: Folder = Field(
        Path("keys/allowed_signers"),
        description="Who may ask: OpenSSH's allowed_signers format (man ssh-keygen). Re-read whenever it changes.",
    )
    default_model: str = Field("shapes-xl", pattern=NAME, description="The model of jobs that name none.")
    image_types: dict[Name, ImageType] = Field(
        _IMAGE_TYPES,
        description="Presets for a job's `image_type`. Sizes are for SDXL's native 1024x1024 and scale with the "
        "model's native size. What the job says itself wins; prefix and suffix are put around its prompt.",
    )
    workers: dict[Name, Device] = Field(
        {},
        description="A worker process per entry, `gpu0: cuda:0` or `cpu0: cpu`. Empty: one per NVIDIA GPU, or one on "
        "the CPU where there is none. A change needs a restart.",
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
    max_queued: int = Field(
        100, ge=0, description="Jobs that may wait, of all clients together. More are refused with QUEUE_FULL."
    )
    limits: Limits = Field(
        Limits(), description="What each client may ask for; what is beyond is refused, and says why. SIGHUP reloads."
    )
    clients: dict[ClientName, Rights] = Field(
        {},
        description="What some clients may that others may not: any of the keys of `limits`, and `operator: true` (may "
        "cancel everybody's jobs), and `group`, the Unix group that may read this client's results (without one, only "
        "imagend's own user and group). As in `ops: {operator: true, max_queued: 50}`.",
    )
    client: Client = Field(Client(), description="For `imagend submit` on this host: who signs, and with which key.")

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

    def slots(self) -> dict[str, str]:
        """Slot name → torch device."""
        gpus = range(len(list(Path("/dev").glob("nvidia[0-9]*"))))  # torch counts those it sees from 0
        return self.workers or {f"gpu{n}": f"cuda:{n}" for n in gpus} or {"cpu0": "cpu"}


# Keys that a running daemon cannot change: what it holds open, or where its workers stand.
FIXED = ("name", "spool", "inboxes", "outputs", "models", "workers", "heartbeat_s")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where yaml would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[object] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value} stands twice: remove one")
            keys.append(key.value)
        return super().construct_mapping(node, deep)


def find(explicit: Path | None) -> Path:
    """The config file to use: the one named, $IMAGEND_CONFIG, ./config.yaml, /etc/imagend/config.yaml."""
    if explicit is not None:
        return explicit
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    here = Path("config.yaml")
    return here if here.exists() or not SYSTEM_CONFIG.exists() else SYSTEM_CONFIG


def load(path: Path) -> Config:
    """Read config.yaml; paths in the result are absolute. Raises BadConfig, naming key, value and remedy."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise BadConfig(path, "there is no such file; `imagend init` writes one, with every key explained") from None
    except RecursionError:
        raise BadConfig(path, "its values are nested too deep") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or the 45th of a month
        raise BadConfig(path, " ".join(str(error).split())) from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise BadConfig(path, "the file must hold keys and values, `name: imagend`")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise BadConfig(path, "; ".join(_problems(error))) from None
    config = _absolute(config, path.absolute().parent)
    if wrong := _misplaced(config):
        raise BadConfig(path, f"inboxes: {wrong}")
    return config


def _absolute(config: Config, base: Path) -> Config:
    folders = {key: base / getattr(config, key) for key in ("spool", "outputs", "models", "allowed_signers")}
    client = config.client.model_copy(update={"key": base / config.client.key})
    inboxes = tuple(base / inbox for inbox in config.inboxes)
    return config.model_copy(update={**folders, "inboxes": inboxes, "client": client})


def _misplaced(config: Config) -> str | None:
    """What is wrong with the inboxes' places: a door takes in, or rejects, whatever lies in its inbox."""
    for inbox in config.inboxes:
        for ours in (config.spool, config.outputs, config.models):
            if ours.is_relative_to(inbox):
                return f"{inbox} holds {ours}, whose files are no jobs: use a folder of its own, such as spool/inbox"
        inside = [config.outputs, config.models, *(config.spool / name for name in _STATES)]
        if any(inbox.is_relative_to(ours) for ours in inside):
            return f"{inbox} lies among imagend's own files: use a folder of its own, such as spool/inbox"
        if sum(inbox.parent == other.parent for other in config.inboxes) > 1:
            return f"{inbox} shares {inbox.parent} and its rejected/ with another inbox: give each a parent of its own"
        if any(inbox != other and inbox.is_relative_to(other) for other in config.inboxes):
            return f"{inbox} lies in another inbox: put them side by side"
    return None


_STATES = ("pending", "active", "done", "journal", "damaged", "rejected")
_WORDS = {  # pydantic speaks Python
    "dict_type": "must be keys and values, such as {gpu0: cuda:0}",
    "model_type": "must be keys and values, such as {name: me}",
    "string_type": "must be a text, such as imagend",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number, such as 3",
    "float_type": "must be a number, such as 60",
}


def _problems(error: ValidationError) -> Iterator[str]:
    for details in error.errors(include_url=False):
        key = ".".join(str(part) for part in details["loc"] if part != "[key]") or "the file"
        if details["type"] == "extra_forbidden":
            yield f"{key} is not a key; known keys are {', '.join(_known(details['loc'][:-1]))}"
        else:
            said = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
            yield f"{key}: {details['input']!r}: {_WORDS.get(details['type'], said)}"


def _known(at: tuple[int | str, ...]) -> Iterable[str]:
    models: dict[object, type[BaseModel]] = {
        "image_types": ImageType,
        "client": Client,
        "limits": Limits,
        "clients": Rights,
    }
    return models.get(at[0], Config).model_fields if at else Config.model_fields


def template(config: Config | None = None) -> str:
    """config.yaml as `imagend init` writes it: every key with its value and what it means."""
    config = config or Config()
    head = (
        "# imagend's settings. Every key may be left out; what stands here is then its value. Check with: imagend check"
    )
    return "\n\n".join([head, *(_entry(config, key) for key in Config.model_fields)]) + "\n"


def _entry(model: BaseModel, key: str) -> str:
    """One key as YAML, its description above it; the keys of `limits` have their own."""
    comment = textwrap.fill(
        type(model).model_fields[key].description or "", 116, initial_indent="# ", subsequent_indent="# "
    )
    value = getattr(model, key)
    if type(value) is Limits:
        inner = "\n".join(_entry(value, name) for name in Limits.model_fields)
        return f"{comment}\n{key}:\n{textwrap.indent(inner, '  ')}"
    return f"{comment}\n{yaml.safe_dump({key: _plain(value)}, sort_keys=False, width=116).rstrip()}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        given = (
            value.model_fields_set if isinstance(value, Rights) else {key for key, item in value if item is not None}
        )
        return {key: _plain(item) for key, item in value if key in given}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
