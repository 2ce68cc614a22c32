"""How a model gets into models/: its record first, then the model, whole and in one step; in place of no other."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from imagend import files, records
from imagend.architecture import ModelKind
from imagend.model_names import EXTENSIONS
from imagend.record import Record


def taken(models: Path, kind: ModelKind, name: str) -> list[Path]:
    """What is there under that name."""
    alike = [models / folder / f"{name}{extension}" for folder in kind.folders for extension in ("", *EXTENSIONS)]
    return [path for path in alike if os.path.lexists(path)]


def held_by_loras(models: Path) -> int:
    """Bytes of all that is in models/loras/."""
    root = models / ModelKind.LORA.folders[-1]
    listed = (path for path in root.rglob("*") if not any(part[0] == "." for part in path.relative_to(root).parts))
    return sum(path.stat().st_size for path in listed if path.is_file())


def install(source: Path, target: Path, record: Record) -> None:
    """The record, then the model, by a rename: from then on it is there. Raises OSError."""
    files.make_folder(target.parent)
    source.chmod(0o755 if source.is_dir() else 0o644)
    records.write(target, record)
    try:
        _move(source, target)
    except OSError:
        records.place(target).unlink(missing_ok=True)
        raise


def _move(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            files.sync_all([path for path in source.rglob("*")])
        files.move(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = target.with_name(f".{target.name}.fetched")  # models may lie on several disks
        if source.is_dir():
            shutil.rmtree(near, ignore_errors=True)
            shutil.copytree(source, near)
            files.sync_all([path for path in near.rglob("*")])
        else:
            shutil.copy2(source, near)
            files.sync(near)
        files.move(near, target)
