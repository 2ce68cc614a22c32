"""The records of models: a JSON file beside each, `hat.safetensors.record.json`. Models without one are well, too."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from imagend import files
from imagend.record import Record

SUFFIX = ".record.json"
_MAX_BYTES = 2**20


def place(model: Path) -> Path:
    """Where the record of a weight file, or of a folder in diffusers' format, is kept."""
    return model.with_name(model.name + SUFFIX)


def read(model: Path) -> Record | None:
    """None where there is none. Raises ValueError: "{file} …" says what is wrong with it."""
    path = place(model)
    try:
        text, _ = files.read_untrusted(path, _MAX_BYTES)
        return Record.model_validate_json(text)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path.name} is no record: {where + ': ' if where else ''}{first['msg']}") from None


def write(model: Path, record: Record) -> None:
    """Durably, in one step. Raises OSError."""
    files.write(place(model), record.model_dump_json(indent=1).encode() + b"\n")


class Records:
    """Those that were read, for as long as their files are unchanged: a survey asks for each at each look."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], Record | ValueError | None]] = {}

    def of(self, model: Path) -> Record | None:
        """Raises ValueError as read() does."""
        try:
            status = place(model).lstat()
        except OSError:
            self._known.pop(model, None)
            return None
        version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known, record = self._known.get(model, ((), None))
        if known != version:
            try:
                record = read(model)
            except ValueError as error:
                record = error
            self._known[model] = (version, record)
        if isinstance(record, ValueError):
            raise record.with_traceback(None)
        return record
