"""Where a model that was fetched goes, and how it gets there: whole and in one step, and in place of no other."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from imagend import files, records
from imagend.architecture import ModelKind
from imagend.errors import DownloadFailed, UsageError
from imagend.model_names import EXTENSIONS, MAX_NAME, MODEL_NAME, wanted
from imagend.record import Record


def free_place(models: Path, kind: ModelKind, name: str, is_file: bool) -> Path:
    """Where a model of that name belongs. Raises UsageError where one is, or where the name is none."""
    if not re.fullmatch(MODEL_NAME, name) or not name.isprintable() or len(name) > MAX_NAME or wanted(name).pin:
        raise UsageError(f"--name: {name!r} is no model's name: no . at the beginning, no .., no @ with a digest.")
    if not is_file and kind is ModelKind.LORA:
        raise UsageError("A LoRA is one file: give its URL.")
    folder = models / (kind.folders[-1] if is_file else kind.folders[0])
    target = folder / (f"{name}.safetensors" if is_file else name)
    if there := next(iter(taken(models, kind, name)), None):
        raise UsageError(
            f"There is a {kind.noun} {name} already: {there}. Give this one another name (--name), or remove that one "
            f"first: imagend models remove {name}"
        )
    return target


def taken(models: Path, kind: ModelKind, name: str) -> list[Path]:
    """What is there under that name."""
    alike = [models / folder / f"{name}{extension}" for folder in kind.folders for extension in ("", *EXTENSIONS)]
    return [path for path in alike if os.path.lexists(path)]


def room_for_loras(models: Path, size: int, store_gb: float, host: str) -> None:
    """Raises DownloadFailed where all LoRAs together would be too many bytes."""
    root = models / ModelKind.LORA.folders[-1]
    listed = (path for path in root.rglob("*") if not any(part[0] == "." for part in path.relative_to(root).parts))
    held = sum(path.stat().st_size for path in listed if path.is_file())
    if held + size > store_gb * 1e9:
        raise DownloadFailed(
            host,
            f"models/loras/ holds {held / 1e9:.2f} of {store_gb:g} GB (fetch.lora_store_gb in config.yaml), and this "
            f"has {size / 1e9:.2f}. Remove some: imagend models remove NAME",
        )


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
