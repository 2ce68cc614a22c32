"""What may be fetched, as config.yaml says it under `fetch`: from which hosts, how much. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from imagend.fields import Frozen

_HOST = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,62}")


def _host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError("must be a host's name in small letters, such as civitai.com or *.hf.co")
    return text


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of hosts, such as [civitai.com, huggingface.co]")
    return tuple(value)


def _path(value: Any) -> Any:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("must be a path, such as keys/fetch_tokens")
    return Path(value) if isinstance(value, str) else value


class Fetch(Frozen):
    """The keys under `fetch`; a description here is the comment in config.yaml."""

    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_list)] = Field(
        (
            "civitai.com",
            "b2.civitai.com",
            "civitai-delivery-worker-prod.5ac0637cfd0766c97916cefa3764fbdf.r2.cloudflarestorage.com",
            "huggingface.co",
            "cdn-lfs.huggingface.co",
            "*.hf.co",
        ),
        description="From where; where a download is redirected to must be named, too. *.hf.co are all hosts below it.",
    )
    tokens: Annotated[Path, BeforeValidator(_path)] = Field(
        Path("keys/fetch_tokens"),
        description="Tokens, a line each: HOST TOKEN. Only its owner may read it (chmod 600). systemd credentials of "
        "the name token.HOST come before it.",
    )
    max_lora_gb: float = Field(2.0, gt=0, description="The largest LoRA (GB).")
    max_model_gb: float = Field(20.0, gt=0, description="The largest of anything else (GB).")
    lora_store_gb: float = Field(50.0, gt=0, description="The most that models/loras/ may hold (GB).")

    at_once: int = Field(1, ge=1, le=8, description="Jobs of kind fetch at the same time. A change needs a restart.")
    time_limit_s: float = Field(
        43_200.0,
        gt=0,
        description="An attempt at such a job that takes longer fails it. What came is kept a while.",
    )

    def allows(self, host: str) -> bool:
        """`*.` stands for one or more labels, and for no dot-less tail of another name."""
        return any(
            host.endswith(one[1:]) and len(host) > len(one) - 1 if one.startswith("*.") else host == one
            for one in self.hosts
        )
