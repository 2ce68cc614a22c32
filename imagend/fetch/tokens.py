"""Tokens for hosts, from systemd credentials or a file that only its owner may read. They reach no log and no error."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from imagend import files
from imagend.errors import UsageError

PREFIX = "token."
_MAX_BYTES = 65_536
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")


class Tokens:
    """By host. Its representation tells none of them."""

    def __init__(self, by_host: dict[str, str]) -> None:
        self._by_host = by_host

    def __repr__(self) -> str:
        return f"Tokens({', '.join(sorted(self._by_host))})"

    def of(self, host: str) -> str | None:
        return self._by_host.get(host)


def load(path: Path, credentials: Path | None) -> Tokens:
    """Those of the file, then the credentials. Raises UsageError; where there are none, none is sent."""
    by_host: dict[str, str] = {}
    try:
        raw, status = files.read_untrusted(path, _MAX_BYTES)
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid not in (os.geteuid(), 0):
            raise UsageError(f"{path} holds tokens and others may read it. Run: chmod 600 {path}")
        for number, line in enumerate(raw.decode("ascii", "replace").splitlines(), 1):
            words = line.split("#", 1)[0].split()
            if words and (len(words) != 2 or not _TOKEN.fullmatch(words[1])):
                raise UsageError(f"{path}: line {number} is not HOST TOKEN, such as: civitai.com 0123456789abcdef")
            by_host |= {words[0].lower(): words[1]} if words else {}
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Correct it, or fetch.tokens in config.yaml.") from None
    for one in sorted(credentials.glob(f"{PREFIX}*")) if credentials else ():
        token = one.read_text(encoding="ascii", errors="replace").strip()
        if not _TOKEN.fullmatch(token):
            raise UsageError(f"The credential {one.name} is no token: one line of printable characters.")
        by_host[one.name.removeprefix(PREFIX).lower()] = token
    return Tokens(by_host)
