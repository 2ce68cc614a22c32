"""A PNG of exactly 1,024 bytes per seed, durable in the draft. Its bytes follow from the seed, so a test knows them."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from imagend.manifest import Artifact

SIZE = 1024
SIDE = 8


def run(spec: dict[str, Any], context: Any) -> tuple[Artifact, ...]:
    seeds = spec["seeds"]
    artifacts = []
    for index, seed in enumerate(seeds):
        context.progress("painting", index, len(seeds), 0, spec["num_inference_steps"])
        artifacts.append(paint(context.folder, index, seed))
    return tuple(artifacts)


def paint(folder: Path, index: int, seed: int) -> Artifact:
    """Write the picture of a seed as the real worker does: a temporary name, fsync, rename."""
    data = picture(seed)
    path = folder / f"{index:04d}.png"
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return Artifact(
        index=index,
        file=path.name,
        width=SIDE,
        height=SIDE,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=hashlib.sha256(_pixels(seed)).hexdigest(),
        seed=seed,
        seconds=0.0,
    )


def picture(seed: int) -> bytes:
    """A valid PNG (W3C PNG, third edition) of one colour; a text chunk fills it up to SIZE bytes."""
    row = SIDE * 3
    pixels = _pixels(seed)
    rows = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    tail = _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    text = b"Comment\0" + f"seed {seed} ".encode()
    return head + _chunk(b"tEXt", text.ljust(SIZE - len(head) - len(tail) - 12, b".")) + tail


def _pixels(seed: int) -> bytes:
    """8-bit RGB samples, row by row."""
    return hashlib.sha256(str(seed).encode()).digest()[:3] * SIDE * SIDE


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
