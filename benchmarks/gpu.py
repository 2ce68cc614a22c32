"""SDXL at full size on a GPU, with random weights and no download: python -m benchmarks.gpu --help. See docs/gpu.md.

What it says holds for real weights, too: speed and memory depend on the shapes. Only the pictures are noise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from benchmarks.figures import circumstances
from benchmarks.gpu_parts import PARTS, Bench, Row
from benchmarks.stock import MODELS, Stock

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            f"{options.device}: PyTorch {torch.__version__} sees no CUDA device. Say --device cpu, or see docs/gpu.md"
        )
    failed: list[str] = []
    half = options.device == "cpu" and options.dtype == "bfloat16"
    with tempfile.TemporaryDirectory(prefix="imagend-gpu-") as temporary:
        stock = Stock(options.models or Path(temporary), options.model, DTYPES[options.dtype])
        command = (sys.executable, "-m", "benchmarks.half_worker") if half else ()
        bench = Bench(options.device, stock, options.size, options.steps, options.guidance_scale, command)
        print(heading(options), end="\n\n", flush=True)
        with Report(options.out) as report:
            for part in options.parts:
                start = time.perf_counter()
                print(f"{part}: {PARTS[part].__doc__}\n", flush=True)
                try:
                    report.table(part, PARTS[part](bench))
                except Exception as error:  # what is measured is what counts: the other parts go on
                    traceback.print_exc()
                    failed.append(f"{part}: {error}")
                print(f"({part}: {time.perf_counter() - start:.0f} s)\n", flush=True)
            report.table("made", ({"made": name, "s": round(seconds, 1)} for name, seconds in stock.made.items()))
    if failed:
        sys.exit("\n".join(["Not measured:", *failed]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {' '.join(PARTS)}; all if left out")
    add("--device", default="cuda:0", help="cuda:N or cpu")
    add("--model", choices=MODELS, default="full", help="full: SDXL; slim: its widths, few layers; shapes-xl: tiny")
    add(
        "--dtype", choices=DTYPES, default="float16", help="of the weights on disk; bfloat16 on a CPU: of painting, too"
    )
    add("--size", type=int, default=1024, help="width and height in pixels")
    add("--steps", type=int, default=30)
    add("--guidance-scale", type=float, default=5.0)
    add("--models", type=Path, help="a folder for the models, kept and used again (full: 7 GB each); else temporary")
    add("--out", type=Path, help="a file that gets a line of JSON per row")
    return parser


def heading(options: argparse.Namespace) -> str:
    found = [circumstances(), f"PyTorch {torch.__version__}"]
    if options.device != "cpu":
        properties = torch.cuda.get_device_properties(options.device)
        found.append(f"{properties.name} with {properties.total_memory / 2**30:.1f} GB, CUDA {torch.version.cuda}")
    found.append(f"{options.model}, {options.dtype}, {options.size}x{options.size}, {options.steps} steps")
    return ", ".join(found)


class Report:
    """Tables for people, as rows come; a line of JSON per row for programs."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Report:
        self._file = self._path.open("a") if self._path else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def table(self, part: str, rows: Iterable[Row]) -> None:
        columns: list[str] = []
        for row in rows:
            if not columns:
                columns = list(row)
                for line in (columns, ["---"] * len(columns)):
                    print("| " + " | ".join(line) + " |", flush=True)
            print("| " + " | ".join(_shown(row.get(column)) for column in columns) + " |", flush=True)
            if self._file:
                print(json.dumps({"part": part, **row}), file=self._file, flush=True)
        if columns:
            print(flush=True)


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case None | "":
            return "-"
        case dict():
            return json.dumps(value)
    return str(value)


if __name__ == "__main__":
    main()
