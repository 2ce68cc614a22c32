"""Compose a job, sign it as this host's client, drop it into the inbox. Needs no daemon and no network."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend import files, jobfile
from imagend.config import Config
from imagend.errors import UsageError
from imagend.fields import MAX_PICTURE_BYTES
from imagend.inbox import ATTACHMENTS
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
    with _inbox(config, ref.client) as inbox:
        _put(inbox, f"{ref.id}.json", raw)
    return ref


def read_picture(path: Path) -> tuple[str, bytes]:
    """A picture that is to be sent along: the name by which a job names it, and its bytes. Raises UsageError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the picture {path}: {error.strerror}.") from None
    if len(raw) > MAX_PICTURE_BYTES:
        raise UsageError(
            f"The picture {path} has {len(raw)} bytes; at most {MAX_PICTURE_BYTES} are taken. Make it smaller."
        )
    return f"sha256:{hashlib.sha256(raw).hexdigest()}", raw


def send_along(config: Config, pictures: Mapping[str, bytes]) -> None:
    """Put pictures, by the names of read_picture(), where the job that comes next finds them."""
    with _inbox(config, config.client.name) as inbox:
        for name, raw in pictures.items():
            folder = inbox / ATTACHMENTS
            if not folder.is_dir():
                files.make_folder(folder)
                folder.chmod(inbox.stat().st_mode & 0o7777)  # who may drop jobs may drop pictures
            _put(folder, name.removeprefix("sha256:"), raw)


@contextmanager
def _inbox(config: Config, client: str) -> Iterator[Path]:
    """The folder for a client's files. An OSError within becomes a UsageError."""
    inbox = config.inboxes[0]
    try:
        yield inbox / client if (inbox / client).is_dir() else inbox
    except OSError as error:
        raise UsageError(f"Cannot write to the inbox {inbox}: {error.strerror}. Run: imagend check") from None


def _put(folder: Path, name: str, raw: bytes) -> None:
    """A rename that finds its own source gone was done: by us, but an NFS server restarted and could not say so, or by
    another host that submits the same job. The daemon may have taken it in since."""
    try:
        files.write(folder / name, raw)
    except FileNotFoundError as error:
        if error.filename2 is None:
            raise
        files.sync(folder)


def number(text: str) -> Any:
    """A number from a command line; what is none is left to the check of the job."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
