"""What may be told of a stranger's file in the log and in status.json: nothing that its sender wrote.

Whoever may read those is not meant to read prompts, and a client chooses its file names and unknown fields as freely.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container

from imagend.errors import Rejected
from imagend.job import SPECS, Header

_BY_ID = re.compile(r"[0-9a-f]{20}\.json")  # as `imagend submit` names files
_FIELDS = {field.alias or name for name, field in Header.model_fields.items()}
_FIELDS.update(*(spec.model_fields for spec in SPECS.values()), ("file", "namespace"))


def shown(name: str, clients: Container[str]) -> str:
    """A file's name in its inbox. In place of one that its sender made up stand the first digits of its SHA-256: find
    it by `printf %s NAME | sha256sum`."""
    return "/".join(part if part in clients or _BY_ID.fullmatch(part) else _digest(part) for part in name.split("/"))


def _digest(name: str) -> str:
    return f"({hashlib.sha256(os.fsencode(name)).hexdigest()[:12]})"


def why(reason: Rejected) -> str:
    """Why a file was rejected: of fields, only which are wrong."""
    if not isinstance(reason.detail, list):
        return str(reason)
    fields = [str(problem.get("field")) for problem in reason.detail]
    return ", ".join(field if field.partition(".")[0] in _FIELDS else "an unknown field" for field in fields)
