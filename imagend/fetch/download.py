"""One file, streamed and hashed as it comes, resumed after a cut and after a death of ours. It installs nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imagend import files
from imagend.errors import DownloadFailed
from imagend.fetch.patience import patiently
from imagend.fetch.plan import Item
from imagend.fetch.web import Answer, Cut, Refused, Web
from imagend.weights import START_BYTES, check_start

CHUNK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_SMALL_BYTES = 32 << 20


@dataclass(frozen=True)
class Terms:
    """How much may come, and who is told: bytes that are there, and bytes in all where that is known."""

    limit_bytes: int
    reserve_bytes: int
    tell: Callable[[str, int, int | None], None]
    sleep: Callable[[float], None]


def download(web: Web, item: Item, path: Path, terms: Terms) -> str:
    """The file at `path`, whole and of its digest; its SHA-256. Raises DownloadFailed, OSError."""
    host = web.host_of(item.url)
    while True:
        part = _Part(path, item)
        patiently(lambda: part.go_on(web, terms), host, terms.sleep, part.gained)  # noqa: B023  called at once
        wrong = part.wrong()
        part.forget()
        if wrong is None:
            files.sync(path)
            return part.sha256
        path.unlink()
        if not part.resumed:
            raise DownloadFailed(host, wrong)


class _Part:
    """What is there of a file. A note beside it says of what it is a part, and by which ETag."""

    def __init__(self, path: Path, item: Item) -> None:
        self._path, self._item = path, item
        self._note = path.with_name(f"{path.name}.part.json")
        self._etag: str | None = None
        self.resumed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            note = json.loads(files.read_untrusted(self._note, 65_536)[0])
            known = note["of"] == self._identity() and path.exists()
            self._etag = note["etag"] if known and isinstance(note["etag"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        self._start_over()
        kept = path.exists() and not self._note.exists()  # all of it had come when we died
        if known or kept:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self._take(chunk)
            self.resumed = self._size > 0
        self._is_whole = kept and self.resumed and self.wrong() is None
        if not (known or self._is_whole):
            self._empty()
        self._at_last_try = self._size

    def _identity(self) -> list[str | None]:
        return [self._item.url, self._item.sha256, self._item.git_sha1]

    def _start_over(self) -> None:
        self._size, self._sha256, self._start = 0, hashlib.sha256(), b""

    def _take(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self._size += len(chunk)
        if len(self._start) < START_BYTES:
            self._start += chunk[: START_BYTES - len(self._start)]

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def gained(self) -> bool:
        """Whether the last try brought something worth mentioning."""
        before, self._at_last_try = self._at_last_try, self._size
        return self._size - before >= CHUNK_BYTES

    def go_on(self, web: Web, terms: Terms) -> None:
        """What is missing. Raises Cut, Refused, DownloadFailed."""
        if self._is_whole or (self._size and self._size == self._item.size):
            return
        headers = {"Range": f"bytes={self._size}-"} if self._size else {}
        if self._size and self._etag:
            headers["If-Range"] = self._etag
        try:
            with web.get(self._item.url, headers) as answer:
                self._read(answer, terms)
        except Refused as error:
            if error.status == 416 and self._size:  # it has become shorter there
                self._empty()
                raise Cut("the file has changed there") from None
            raise

    def _read(self, answer: Answer, terms: Terms) -> None:
        total = self._place(answer)
        limit = terms.limit_bytes if self._item.is_weights else min(_SMALL_BYTES, terms.limit_bytes)
        if self._item.size is not None and total not in (None, self._item.size):
            raise DownloadFailed(
                answer.host, f"{self._item.path} has {total} bytes there, and should have {self._item.size}"
            )
        if max(total or 0, self._item.size or 0) > limit:
            raise DownloadFailed(answer.host, _too_large(self._item.path, limit))
        room = files.free_bytes(self._path.parent) - terms.reserve_bytes
        if (needed := (total or self._size) - self._size) > room:
            raise DownloadFailed(
                answer.host,
                f"{needed / 1e9:.2f} GB are missing and {max(0, room) / 1e9:.2f} GB of disk are free for it",
            )
        end = limit if total is None else total
        with self._path.open("ab", buffering=0) as file:
            while chunk := answer.read(CHUNK_BYTES):
                if self._size + len(chunk) > end:
                    told = _too_large(self._item.path, limit) if total is None else "more comes than it said"
                    raise DownloadFailed(answer.host, told)
                if file.write(chunk) != len(chunk):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                self._take(chunk)
                self._check_start(answer.host)
                if total is None and files.free_bytes(self._path.parent) < terms.reserve_bytes:
                    raise DownloadFailed(answer.host, "the disk has become full")
                terms.tell(self._item.path, self._size, total)

    def _place(self, answer: Answer) -> int | None:
        """Where in the file the answer begins: behind what is there, or at the beginning. The whole file's size."""
        etag = answer.headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") and len(etag) < 1000 and etag.isprintable() else None
        if answer.status == 206:
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            changed = self._etag is not None and strong is not None and strong != self._etag
            if not self._size or found is None or int(found[1]) != self._size or changed:
                self._empty()
                raise Cut("it answered with another part of the file than was asked for")
            return int(found[3]) if found[3] != "*" else None
        self._empty()
        self._etag = strong
        files.write_unsynced(self._note, json.dumps({"of": self._identity(), "etag": strong}).encode(), 0o600)
        return answer.length

    def _empty(self) -> None:
        self._path.write_bytes(b"")
        self._etag, self.resumed = None, False
        self._start_over()

    def _check_start(self, host: str) -> None:
        """A pickle is left at its first bytes, not after gigabytes."""
        if self._item.is_weights and len(self._start) == START_BYTES:
            try:
                check_start(self._start)
            except ValueError as error:
                raise DownloadFailed(host, f"{self._item.path} is not what was asked for: {error}") from None

    def wrong(self) -> str | None:
        """What is wrong with the file now that it is whole."""
        if self._item.size is not None and self._size != self._item.size:
            return f"{self._item.path} has {self._size} bytes, and should have {self._item.size}"
        if self._item.sha256 is not None and self._item.sha256 != self.sha256:
            return f"{self._item.path} has the SHA-256 {self.sha256}, and should have {self._item.sha256}"
        if self._item.git_sha1 is not None:
            data = self._path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            if blob != self._item.git_sha1:
                return f"{self._item.path} is not the file that the repository has"
        return None

    def forget(self) -> None:
        self._note.unlink(missing_ok=True)


def _too_large(path: str, limit: int) -> str:
    return f"{path} is larger than {limit / 1e9:g} GB (fetch.max_lora_gb and max_model_gb in config.yaml)"
