"""reference/datasets/: the folders that LoRAs are trained on, pictures with captions. It lists them and reads captions;
it opens no picture.

Three layouts, also mixed: a caption in a file beside its picture (`hat.png`, `hat.txt`); `metadata.jsonl` in the folder
(lines `{"file_name": "hat.png", "text": "a hat"}`, as of Hugging Face's datasets); kohya-ss's folders `10_hat`, whose
pictures count ten times an epoch and are called `hat` where they have no caption.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagend import files
from imagend.errors import BadDataset, UnknownDataset
from imagend.fields import NAME

FOLDER = "datasets"
"""In reference/, and so no entity there."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
MAX_PICTURES = 10_000
MAX_REPEATS = 1_000
MAX_CAPTION_BYTES = 16 * 1024
MAX_METADATA_BYTES = 32 * 2**20
_CAPTIONS = (".txt", ".caption")
_REPEATS = re.compile(r"(\d{1,4})_(.+)")


@dataclass(frozen=True)
class Entry:
    """One picture, as it was listed."""

    file: str
    """its path in the dataset's folder, with /"""
    path: Path
    caption: str | None
    repeats: int = 1


@dataclass(frozen=True)
class Dataset:
    name: str
    entries: tuple[Entry, ...]
    mistakes: tuple[str, ...] = ()
    """what is wrong with captions, a line each; no picture is meant"""


def names(reference: Path) -> list[str]:
    """Those that a job may name."""
    return [name for name in _names(reference / FOLDER, os.DirEntry.is_dir) if re.fullmatch(NAME, name)]


def look(reference: Path, name: str) -> Dataset:
    """List a dataset: its folder, and those in it. Raises UnknownDataset, BadDataset. No link is followed."""
    if name not in (known := names(reference)):
        raise UnknownDataset(name, ", ".join(known[:20]) or "none")
    root, mistakes = reference / FOLDER / name, list[str]()
    told = _metadata(root / METADATA, mistakes)
    entries: list[Entry] = []
    for folder in ("", *_names(root, os.DirEntry.is_dir)):
        repeats, words = _repeats(folder, mistakes)
        for file in _names(root / folder, os.DirEntry.is_file):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:  # noqa: PTH122
                entries.append(_entry(root, f"{folder}/{file}" if folder else file, told, repeats, words, mistakes))
            if len(entries) > MAX_PICTURES:
                raise BadDataset(name, f"it has more than {MAX_PICTURES} pictures; divide it", name)
    listed = {entry.file for entry in entries}
    mistakes += [f"{METADATA} names {file}, which is not there" for file in sorted(told.keys() - listed)]
    return Dataset(name, tuple(sorted(entries, key=lambda entry: entry.file)), tuple(mistakes))


def _entry(root: Path, file: str, told: dict[str, str], repeats: int, words: str | None, mistakes: list[str]) -> Entry:
    path = root / file
    caption = told.get(file)
    for extension in _CAPTIONS if caption is None else ():
        beside = path.with_suffix(extension)
        try:
            caption = _caption(files.read_untrusted(beside, MAX_CAPTION_BYTES)[0])
            break
        except FileNotFoundError:
            continue
        except OSError as error:
            mistakes.append(f"{_beside(file, extension)} cannot be read ({error.strerror})")
        except ValueError as error:
            mistakes.append(f"{_beside(file, extension)} {error}")
    return Entry(file, path, caption or words, repeats)


def _beside(file: str, extension: str) -> str:
    return os.path.splitext(file)[0] + extension  # noqa: PTH122


def _caption(raw: bytes) -> str:
    """Its lines as one. Raises ValueError."""
    if len(raw) > MAX_CAPTION_BYTES:
        raise ValueError(f"has more than {MAX_CAPTION_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    return _line(text)


def _line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _repeats(folder: str, mistakes: list[str]) -> tuple[int, str | None]:
    """What kohya-ss reads from a folder's name: how often its pictures count, and what they are called."""
    if (match := _REPEATS.fullmatch(folder)) is None:
        return 1, None
    times = int(match[1])
    if not 1 <= times <= MAX_REPEATS:
        mistakes.append(f"{folder}/ says {times} repeats; possible are 1 to {MAX_REPEATS}, and it counts once")
        times = 1
    return times, _line(match[2].replace("_", " ")) or None


def _metadata(path: Path, mistakes: list[str]) -> dict[str, str]:
    """Captions by file."""
    try:
        raw, _ = files.read_untrusted(path, MAX_METADATA_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        mistakes.append(f"{METADATA} cannot be read ({error.strerror})")
        return {}
    if len(raw) > MAX_METADATA_BYTES:
        mistakes.append(f"{METADATA} has more than {MAX_METADATA_BYTES} bytes")
        return {}
    return dict(_told(raw, mistakes))


def _told(raw: bytes, mistakes: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            file = text = None
        if isinstance(file, str) and isinstance(text, str) and len(text.encode(errors="replace")) <= MAX_CAPTION_BYTES:
            yield file, _line(text)
        else:
            mistakes.append(f'{METADATA}, line {number}: not like {{"file_name": "hat.png", "text": "a hat"}}')
        if len(mistakes) > MAX_PICTURES:
            return


def _names(folder: Path, is_one: object) -> list[str]:
    """In order; hidden ones and links are passed over."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if is_one(entry, follow_symlinks=False)]  # type: ignore[operator]
    except OSError:
        return []
    return sorted(name for name in found if name[0] != "." and name.isprintable())
