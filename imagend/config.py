"""config.yaml: find it, read it, write it with every key explained. The only module that reads that file or the
environment."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from imagend.config_keys import FIXED, Client, Config
from imagend.edit_settings import Edit
from imagend.errors import BadConfig
from imagend.fetch_settings import Fetch
from imagend.model_settings import ImageType, ModelSettings
from imagend.retention_settings import Retention
from imagend.rights import Limits, Rights
from imagend.safety_settings import Classifier
from imagend.train_settings import Training

__all__ = ["ENVIRONMENT", "FIXED", "Client", "Config", "find", "load", "template"]

ENVIRONMENT = "IMAGEND_CONFIG"
SYSTEM_CONFIG = Path("/etc/imagend/config.yaml")


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


def credentials() -> Path | None:
    """Where systemd keeps the credentials of the unit that we are (LoadCredential=)."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) if folder else None


def supervision() -> tuple[str, float] | None:
    """Where systemd wants to hear of us, and within how many seconds each time (0: it need not); None: nowhere.

    Taken out of the environment: no child of ours is to speak for us (sd_notify(3), sd_watchdog_enabled(3)).
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not address.startswith(("/", "@")):  # vsock: a container's or machine's own affair
        return None
    ours = usec.isdecimal() and pid in ("", str(os.getpid()))
    return address, int(usec) / 1e6 if ours else 0.0


def stderr_is_journal() -> bool:
    """Whether systemd has connected stderr with the journal (systemd.exec(5), $JOURNAL_STREAM), and nobody since."""
    stderr = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def expand(path: str) -> Path:
    """A path in which ~ and $VARIABLES stand for what they mean to the user we run as."""
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111  Path.expanduser() raises for ~stranger


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
    keys = ("spool", "outputs", "models", "reference", "allowed_signers")
    folders = {key: base / getattr(config, key) for key in keys}
    if config.extra_model_paths:
        folders["extra_model_paths"] = base / config.extra_model_paths
    if config.metrics:
        folders["metrics"] = base / config.metrics
    if config.dashboard:
        folders["dashboard"] = base / config.dashboard
    if config.history:
        folders["history"] = base / config.history
    client = config.client.model_copy(update={"key": base / config.client.key})
    fetch = config.fetch.model_copy(update={"tokens": base / config.fetch.tokens})
    inboxes = tuple(base / inbox for inbox in config.inboxes)
    return config.model_copy(update={**folders, "inboxes": inboxes, "client": client, "fetch": fetch})


def _misplaced(config: Config) -> str | None:
    """What is wrong with the inboxes' places: a door takes in, or rejects, whatever lies in its inbox."""
    for inbox in config.inboxes:
        for ours in (config.spool, config.outputs, config.models, config.reference):
            if ours.is_relative_to(inbox):
                return f"{inbox} holds {ours}, whose files are no jobs: use a folder of its own, such as spool/inbox"
        inside = [config.outputs, config.models, config.reference, *(config.spool / name for name in _STATES)]
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
        "model_settings": ModelSettings,
        "client": Client,
        "limits": Limits,
        "fetch": Fetch,
        "edit": Edit,
        "safety_classifier": Classifier,
        "retention": Retention,
        "train": Training,
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
    """One key as YAML, its description above it; those of sections of their own (`limits`, `fetch` …) have theirs."""
    comment = textwrap.fill(
        type(model).model_fields[key].description or "", 116, initial_indent="# ", subsequent_indent="# "
    )
    value = getattr(model, key)
    if isinstance(value, Fetch | Retention | Edit | Classifier | Training) or type(value) is Limits:
        inner = "\n".join(_entry(value, name) for name in type(value).model_fields)
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
