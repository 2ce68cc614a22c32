"""spool/attachments/: what clients sent along, pictures and tables, as long as a job that waits or is painted needs it.

<client>/<sha256> is a client's file, and <client>/<id>.<sha256> another name of that file: of a job that needs it.
The last job that goes takes the file with it. A door brings files in and the loop lets them go, each on its thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from imagend import files
from imagend.fields import digest_of
from imagend.job import Ref

FOLDER = "attachments"
_NAME = re.compile(r"([0-9a-f]{20})\.([0-9a-f]{64})")


class Attachments:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._needed: defaultdict[Ref, set[str]] = defaultdict(set)
        self._writing, self._naming = Lock(), Lock()

    def keep(self, ref: Ref, sha256: str, read: Callable[[], bytes]) -> None:
        """Have a picture here for a job; durable when it returns. `read` is called if its client has none of these
        bytes here; what it raises goes up."""
        if sha256 in self._needed.get(ref, ()):
            return
        with self._writing:
            if not self._name(ref, sha256):
                data = read()
                files.make_folder(self._root / ref.client, 0o700)
                files.write(self._whole(ref.client, sha256), data, 0o600)
                self._name(ref, sha256)

    def whole(self, client: str, sha256: str, max_bytes: int) -> bytes | None:
        """A client's file, if it is here; cut behind so many bytes and one more."""
        with suppress(FileNotFoundError):
            return files.read_untrusted(self._whole(client, sha256), max_bytes)[0]
        return None

    def places(self, ref: Ref, pictures: Iterable[str]) -> dict[str, str]:
        """Where those of a job's pictures are that were sent along."""
        digests = {name: digest_of(name) for name in pictures}
        return {name: str(self._place(ref, sha256)) for name, sha256 in digests.items() if sha256}

    def release(self, ref: Ref) -> None:
        """A job needs them no more. May be repeated after an OSError."""
        if ref not in self._needed:
            return
        with self._naming:
            for sha256 in self._needed[ref]:
                self._place(ref, sha256).unlink(missing_ok=True)
                self._drop_unnamed(self._whole(ref.client, sha256))
            del self._needed[ref]

    def sweep(self, queued: Collection[Ref]) -> None:
        """At start: what none of the queued jobs needs is a crash's."""
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            for path in folder.iterdir():
                if (parts := _NAME.fullmatch(path.name)) is None:
                    continue
                if (ref := Ref(folder.name, parts[1])) in queued:
                    self._needed[ref].add(parts[2])
                else:
                    path.unlink()
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name) is None:
                    self._drop_unnamed(path)

    def _name(self, ref: Ref, sha256: str) -> bool:
        """Give a picture that is here its name for a job, durably; False if it is not here."""
        whole = self._whole(ref.client, sha256)
        with self._naming:
            if not files.exists(str(whole)):
                return False
            files.link(whole, self._place(ref, sha256))
            files.sync(whole.parent)
            self._needed[ref].add(sha256)
        return True

    def _whole(self, client: str, sha256: str) -> Path:
        return self._root / client / sha256

    def _place(self, ref: Ref, sha256: str) -> Path:
        return self._root / ref.client / f"{ref.id}.{sha256}"

    def _drop_unnamed(self, whole: Path) -> None:
        with suppress(FileNotFoundError):
            if whole.lstat().st_nlink == 1:
                whole.unlink()
