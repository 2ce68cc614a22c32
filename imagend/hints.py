"""Files of ours that may be lost: JSON with a schema, read at start. Whatever is wrong with one costs what it held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagend import files


def read(path: Path, max_bytes: int, schema: str, take: Callable[[dict[str, Any]], None]) -> str | None:
    """Give the document to `take`, unless there is none or it is of another schema.

    Returns what kind of error the file made, or `take`, which may have taken some of it by then; None if all is well.
    """
    try:
        raw, _ = files.read_untrusted(path, max_bytes)
        document = json.loads(raw)
        if document["schema"] == schema:
            take(document)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return type(error).__name__
    return None
