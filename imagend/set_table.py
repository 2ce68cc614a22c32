"""A table of a set's items, as CSV (RFC 4180): from a stranger's bytes to items, or to what is wrong with it. Pure.

UTF-8, the first row names the columns: `name`, perhaps `seed`, and the values. What items must be besides, set_field.py
says.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from imagend.set_field import MAX_ITEMS

MAX_BYTES = 256 * 1024
NAME, SEED = "name", "seed"


def items_of(raw: bytes) -> list[dict[str, Any]]:
    """The items as a job names them. Raises ValueError, which says what to change."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes; make several of it")
    try:
        text = raw.decode("utf-8-sig")  # spreadsheets begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}); save it as CSV UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no CSV: {error}") from None
    (_, head), *body = rows or [(0, [])]
    columns = [cell.strip() for cell in head]
    if NAME not in columns or not body:
        raise ValueError("its first row must name the columns, one of them `name`, and a row for each item must follow")
    if twice := [column for number, column in enumerate(columns) if column in columns[:number]]:
        raise ValueError(f"two of its columns are called {twice[0]!r}; call each otherwise")
    if len(body) > MAX_ITEMS:
        raise ValueError(f"it has {len(body)} rows; at most {MAX_ITEMS} items are possible. Make several of it")
    return [_item(columns, row, line) for line, row in body]


def _item(columns: list[str], row: list[str], line: int) -> dict[str, Any]:
    if len(row) != len(columns):
        cells = f"line {line} has {len(row)} cells, and there are {len(columns)} columns"
        raise ValueError(f"{cells}; put a cell that holds commas in quotes")
    values = dict(zip(columns, row, strict=True))
    item: dict[str, Any] = {"name": values.pop(NAME).strip()}
    if seed := values.pop(SEED, "").strip():
        if not (seed.isascii() and seed.isdigit() and len(seed) <= 17):
            raise ValueError(f"line {line} has a seed that is no whole number; give one such as 7, or none")
        item["seed"] = int(seed)
    return item | {"values": values}
