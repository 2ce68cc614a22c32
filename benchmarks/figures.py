"""How figures are shown: medians with their spread, ratios within one run, and on what they were measured."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain

Row = tuple[str, str, str, str, str]
"""what, ours, beside it, ratio, target"""


def spread(values: Sequence[float], digits: int = 0) -> str:
    """412 (398..431): the median, the least and the greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Round by round, because a machine's rounds differ more than its two sides in one round."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)], 2)


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, each row as soon as it is known."""
    for line in chain([columns, ["---"] * len(columns)], rows):
        print("| " + " | ".join(line) + " |", flush=True)
    print()


def circumstances() -> str:
    """Date, versions, and how busy the machine was."""
    found = [f"{datetime.now(UTC):%d %B %Y}", f"Linux {platform.release()}", f"Python {platform.python_version()}"]
    for package in ("celery", "redis", "persist-queue"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    if shutil.which("redis-server"):
        told = subprocess.run(["redis-server", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append("redis-server " + "".join(re.findall(r" v=(\S+)", told)))
    return ", ".join([*found, f"load {os.getloadavg()[0]:.1f} at the start"])
