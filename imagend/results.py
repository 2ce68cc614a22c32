"""outputs/<client>/<id>/ as its readers see it: copied whole and checked, then marked as retrieved."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from imagend import files
from imagend.errors import ResultDamaged
from imagend.outputs import MANIFEST, MAX_PICTURE_BYTES, RETRIEVED

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def copy(source: Path, target: Path, manifest: dict[str, Any]) -> list[Path]:
    """Copy a result's files, the manifest last; each durable and as the manifest says. Raises ResultDamaged, OSError.

    Copied again, it is what it was: each file is replaced whole.
    """
    told = {str(one["file"]): one for one in manifest.get("artifacts", ())}
    target.mkdir(parents=True, exist_ok=True)
    for name, artifact in told.items():
        files.write(target / name, _checked(source / name, name, artifact))
    files.write(target / MANIFEST, files.read_untrusted(source / MANIFEST, MAX_PICTURE_BYTES)[0])
    return [*(target / name for name in told), target / MANIFEST]


def mark(folder: Path) -> None:
    """From now on it counts as retrieved, and goes the sooner. Raises OSError."""
    files.touch(folder / RETRIEVED, 0o660, now=True)


def _checked(path: Path, name: str, artifact: dict[str, Any]) -> bytes:
    if not _NAME.fullmatch(name):  # a manifest leads nowhere else
        raise ResultDamaged(path, "its name is none of ours")
    data, _ = files.read_untrusted(path, MAX_PICTURE_BYTES)
    if len(data) != artifact["size"] or hashlib.sha256(data).hexdigest() != artifact["sha256"]:
        raise ResultDamaged(path, f"its SHA-256 is not {artifact['sha256']}, as its manifest says")
    return data
