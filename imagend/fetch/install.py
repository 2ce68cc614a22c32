"""Where a model that was fetched goes: to a free place, within the limits."""

from __future__ import annotations

import re
from pathlib import Path

from imagend.architecture import ModelKind
from imagend.errors import DownloadFailed, UsageError
from imagend.installing import held_by_loras, taken
from imagend.model_names import MAX_NAME, MODEL_NAME, wanted


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


def room_for_loras(models: Path, size: int, store_gb: float, host: str) -> None:
    """Raises DownloadFailed where all LoRAs together would be too many bytes."""
    held = held_by_loras(models)
    if held + size > store_gb * 1e9:
        raise DownloadFailed(
            host,
            f"models/loras/ holds {held / 1e9:.2f} of {store_gb:g} GB (fetch.lora_store_gb in config.yaml), and this "
            f"has {size / 1e9:.2f}. Remove some: imagend models remove NAME",
        )
