"""Pictures that come with a job: from files/ in an inbox into the spool, checked by size and digest, never decoded."""

from __future__ import annotations

import errno
import hashlib
import os
from functools import partial

from imagend import files
from imagend.attachments import Attachments
from imagend.config import Config
from imagend.errors import InvalidJob, Rejected
from imagend.fields import MAX_PICTURE_BYTES, digest_of
from imagend.inbox import GONE, Inbox
from imagend.job import CancelRequest, Job

LIFETIME_S = 24 * 3600.0
"""Files in files/ live so long in the inbox: jobs that name them may come at any time, and more than one."""


class NotSentAlong(Rejected):
    """The picture {} is not there: drop it as files/{} into the inbox, before the job that names it. `imagend submit
    --image FILE` does that."""

    code, status = "PICTURE_NOT_FOUND", 404


class OtherBytes(InvalidJob):
    """The file files/{} is not what its name says: its SHA-256 is {}. Write to a name that starts with a dot, then
    rename it to its SHA-256."""


class TooManyBytes(Rejected):
    """The picture files/{} has more than {} bytes. Send a smaller one."""

    code, status = "PAYLOAD_TOO_LARGE", 413


class NotReadable(Rejected):
    """imagend may not read files/{}: {}. It must be an ordinary file that its group or user may read (umask 027)."""

    code, status = "FORBIDDEN", 403


LATE = (NotSentAlong, OtherBytes, NotReadable)
"""What may be well in a moment."""


def take(item: Job | CancelRequest, name: str, inbox: Inbox, attachments: Attachments, config: Config) -> None:
    """Bring what the job in the inbox's file `name` names into the spool. Raises Rejected, or OSError if it is ours."""
    for picture in item.spec.pictures if isinstance(item, Job) else ():
        if (sha256 := digest_of(picture)) is not None:
            attachments.keep(item.ref, sha256, partial(_read, sha256, name, inbox, config))


def _read(sha256: str, name: str, inbox: Inbox, config: Config) -> bytes:
    detail = [{"field": "image", "value": f"sha256:{sha256}"}]
    try:
        raw = inbox.attachment(name, sha256, MAX_PICTURE_BYTES)
    except GONE:
        raise NotSentAlong(f"sha256:{sha256}", sha256, detail=detail) from None
    except (files.NotOrdinary, PermissionError) as error:
        raise NotReadable(sha256, error.strerror, detail=detail) from None
    if len(raw) > MAX_PICTURE_BYTES:
        raise TooManyBytes(sha256, MAX_PICTURE_BYTES, detail=detail)
    if (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise OtherBytes(sha256, found, detail=detail)
    if files.free_bytes(config.spool) < config.reserve_mb * 2**20 + len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(config.spool))
    return raw
