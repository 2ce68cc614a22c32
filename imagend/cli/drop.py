"""Compose a job, sign it as this host's client, drop it into the inbox. Needs no daemon and no network."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend import files, jobfile
from imagend.config import Config
from imagend.errors import UsageError
from imagend.job import JOB_SCHEMA, Ref
from imagend.signing import job_id, seal, sign


def compose(fields: dict[str, Any]) -> bytes:
    """The bytes to sign: `fields` with what every job needs added, checked as the daemon will. Raises Rejected."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    full = {"schema": JOB_SCHEMA, "issued_at": now, "nonce": secrets.token_hex(4)} | fields
    body = json.dumps(full, ensure_ascii=False).encode()
    jobfile.parse("check", body)
    return body


def drop(config: Config, body: bytes) -> Ref:
    """Sign as this host's client and put the job into the inbox, in one rename."""
    key = config.client.key
    try:
        raw = seal(body, sign(body, key, key.read_bytes()))
    except OSError as error:
        why = f"{key} cannot be read: {error.strerror}"
        raise UsageError(f"{why}. Make a key with `imagend init`, or set client.key in config.yaml.") from None
    ref = Ref(config.client.name, job_id(config.client.name, body))
    return put(config, raw, ref)


def put(config: Config, raw: bytes, ref: Ref) -> Ref:
    inbox = config.inboxes[0]
    own = inbox / ref.client
    try:
        _put(own if own.is_dir() else inbox, f"{ref.id}.json", raw)
    except OSError as error:
        raise UsageError(f"Cannot write to the inbox {inbox}: {error.strerror}. Run: imagend check") from None
    return ref


def _put(folder: Path, name: str, raw: bytes) -> None:
    """A rename that finds its own source gone was done: by us, but an NFS server restarted and could not say so, or by
    another host that submits the same job. The daemon may have taken it in since."""
    try:
        files.write(folder / name, raw)
    except FileNotFoundError as error:
        if error.filename2 is None:
            raise
        files.sync(folder)
