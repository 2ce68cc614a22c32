"""Pictures that come with a job: from files/ in an inbox into the spool, checked by size and digest, never decoded.

And tables of sets, which are read here: they are small, and what is wrong with one is wrong with its job.
"""

from __future__ import annotations

import errno
import hashlib
import os
from functools import partial

from imagend import files, jobfile, set_table
from imagend.attachments import Attachments
from imagend.config import Config
from imagend.daemon import limits
from imagend.errors import InvalidJob, JobFailed, Rejected
from imagend.fields import MAX_PICTURE_BYTES, digest_of
from imagend.generate_spec import Generate
from imagend.inbox import GONE, Inbox
from imagend.job import CancelRequest, Job

LIFETIME_S = 24 * 3600.0
"""Files in files/ live so long in the inbox: jobs that name them may come at any time, and more than one."""


class NotSentAlong(Rejected):
    """The {} {} is not there: drop it as files/{} into the inbox, before the job that names it. `imagend submit --image
    FILE` does that with a picture."""

    code, status = "PICTURE_NOT_FOUND", 404


class OtherBytes(InvalidJob):
    """The file files/{} is not what its name says: its SHA-256 is {}. Write to a name that starts with a dot, then
    rename it to its SHA-256."""


class TooManyBytes(Rejected):
    """The {} files/{} has more than {} bytes. Send a smaller one."""

    code, status = "PAYLOAD_TOO_LARGE", 413


class NotReadable(Rejected):
    """imagend may not read files/{}: {}. It must be an ordinary file that its group or user may read (umask 027)."""

    code, status = "FORBIDDEN", 403


class TableGone(JobFailed):
    """The table {} that had been sent along is gone: it stays until the job has ended. Submit the set again."""

    code, status = "PICTURE_NOT_FOUND", 404


LATE = (NotSentAlong, OtherBytes, NotReadable)
"""What may be well in a moment."""


def take(
    item: Job | CancelRequest, name: str, inbox: Inbox, attachments: Attachments, config: Config
) -> Job | CancelRequest:
    """Bring what the job in the inbox's file `name` names into the spool; the job, with the items of its table. Raises
    Rejected, or OSError if it is ours."""
    if not isinstance(item, Job):
        return item
    if isinstance(item.spec, Generate) and item.spec.table is not None:
        item = _with_table(item, item.spec.table, name, inbox, attachments, config)
    for picture in item.spec.pictures:
        if (sha256 := digest_of(picture)) is not None:
            attachments.keep(
                item.ref, sha256, partial(_read, "picture", sha256, name, inbox, config, MAX_PICTURE_BYTES)
            )
    return item


def _with_table(item: Job, table: str, name: str, inbox: Inbox, attachments: Attachments, config: Config) -> Job:
    """Read it first: one that is of no use is not kept."""
    sha256 = table.removeprefix("sha256:")
    raw = attachments.whole(item.signer, sha256, set_table.MAX_BYTES)
    if raw is None:
        raw = _read("table", sha256, name, inbox, config, set_table.MAX_BYTES)
    whole = with_items(item, raw)
    limits.check(whole, config)
    attachments.keep(item.ref, sha256, lambda: raw)
    return whole


def with_items(job: Job, raw: bytes) -> Job:
    """With the items of its table, whose bytes are given. Raises InvalidJob."""
    assert isinstance(job.spec, Generate)
    return job.model_copy(update={"spec": jobfile.with_items(job.spec, raw)})


def whole(job: Job, attachments: Attachments) -> Job:
    """A job that was taken in, with the items of its table if it names one. Raises TableGone, InvalidJob."""
    if not isinstance(job.spec, Generate) or job.spec.table is None:
        return job
    sha256 = job.spec.table.removeprefix("sha256:")
    raw = attachments.whole(job.signer, sha256, set_table.MAX_BYTES)
    if raw is None:
        raise TableGone(sha256)
    return with_items(job, raw)


def _read(what: str, sha256: str, name: str, inbox: Inbox, config: Config, max_bytes: int) -> bytes:
    detail = [{"field": "table" if what == "table" else "image", "value": f"sha256:{sha256}"}]
    try:
        raw = inbox.attachment(name, sha256, max_bytes)
    except GONE:
        raise NotSentAlong(what, f"sha256:{sha256}", sha256, detail=detail) from None
    except (files.NotOrdinary, PermissionError) as error:
        raise NotReadable(sha256, error.strerror, detail=detail) from None
    if len(raw) > max_bytes:
        raise TooManyBytes(what, sha256, max_bytes, detail=detail)
    if (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise OtherBytes(sha256, found, detail=detail)
    if files.free_bytes(config.spool) < config.reserve_mb * 2**20 + len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(config.spool))
    return raw
