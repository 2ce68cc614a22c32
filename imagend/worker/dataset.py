"""A dataset, looked at: each picture decoded as a stranger's, its bucket, doubles. As a program it looks for
`imagend datasets`, in a process of its own: strangers' pictures are decoded nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imagend import datasets
from imagend.buckets import Size, nearest
from imagend.dataset_report import Report, Unreadable
from imagend.datasets import Entry
from imagend.errors import BadPicture
from imagend.worker.images import pixels_sha256
from imagend.worker.pictures import Picture, open_pictures


@dataclass(frozen=True)
class Example:
    """A picture that can be trained on."""

    entry: Entry
    sha256: str
    size: Size
    """its own"""
    bucket: Size


def open_entry(entry: Entry) -> Picture:
    """Raises BadPicture."""
    return open_pictures((entry.file,), {entry.file: str(entry.path)})[entry.file]


def look(
    reference: Path, name: str, resolution: int, each: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Report, list[Example]]:
    """Decode all of it, one by one; `each` is told how many are done. Raises UnknownDataset, BadDataset."""
    dataset = datasets.look(reference, name)
    examples, unreadable, alike = list[Example](), list[Unreadable](), defaultdict[str, list[str]](list)
    for number, entry in enumerate(dataset.entries):
        each(number, len(dataset.entries))
        try:
            picture = open_entry(entry)
        except BadPicture as error:
            unreadable.append(Unreadable(file=entry.file, why=str(error.args[1])))
            continue
        size = Size(*picture.image.size)
        examples.append(Example(entry, picture.sha256, size, nearest(*size, resolution)))
        alike[pixels_sha256(picture.image)].append(entry.file)
    by_area = sorted((one.size for one in examples), key=lambda size: size.width * size.height)
    buckets = Counter(one.bucket for one in examples)
    report = Report(
        name=name,
        sha256=_digest(examples),
        pictures=len(examples),
        per_epoch=sum(one.entry.repeats for one in examples),
        resolution=resolution,
        buckets={str(size): count for size, count in sorted(buckets.items())},
        smallest=str(by_area[0]) if by_area else None,
        largest=str(by_area[-1]) if by_area else None,
        enlarged=tuple(one.entry.file for one in examples if _is_small(one)),
        missing_captions=tuple(one.entry.file for one in examples if not one.entry.caption),
        duplicates=tuple(tuple(group) for group in alike.values() if len(group) > 1),
        unreadable=tuple(unreadable),
        mistakes=dataset.mistakes,
        captions=len({one.entry.caption for one in examples if one.entry.caption}),
    )
    return report, examples


def _is_small(one: Example) -> bool:
    return one.size.width < one.bucket.width or one.size.height < one.bucket.height


def _digest(examples: list[Example]) -> str:
    rows = [[one.entry.file, one.sha256, one.entry.caption, one.entry.repeats] for one in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


if __name__ == "__main__":
    sys.stdout.write(look(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))[0].model_dump_json())
