"""Where log lines go: the journal with its fields, a terminal readably, else JSON lines. Prompts never get here."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TextIO, cast

import structlog

from imagend.message_ids import MESSAGE_IDS

JOURNAL = Path("/run/systemd/journal/socket")
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog(3)
_PATIENCE_S = 0.5


class _Lossy:
    """A stream whose reader may be gone or whose disk may be full: a log line must not stop the daemon."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class Journal:
    """journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): a datagram per entry.

    What it does not take goes to `spare` as a line. It is waited for once; until it takes an entry again, no more.
    """

    def __init__(self, spare: Any, path: Path = JOURNAL) -> None:
        self._spare, self._path = spare, path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_PATIENCE_S)

    def msg(self, entry: dict[str, str]) -> None:
        try:
            self._socket.sendto(b"".join(_field(name, value) for name, value in entry.items()), str(self._path))
        except OSError:  # it is restarted, hangs, or the entry is too long
            self._socket.settimeout(0.0)
            self._spare.write(f"{' '.join(entry['MESSAGE'].splitlines())}\n")
            self._spare.flush()
        else:
            self._socket.settimeout(_PATIENCE_S)

    debug = info = warning = error = critical = msg

    def close(self) -> None:
        self._socket.close()


def _field(name: str, value: str) -> bytes:
    """With its length before it: no value can pass for another field."""
    data = value.encode("utf-8", "replace")
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


def entry(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[dict[str, str]], dict[str, Any]]:
    """The fields of the journal for an event: its own as IMAGEND_…, and all of them in MESSAGE for people."""
    name, level = str(event.pop("event")), str(event.pop("level"))
    told = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in event.items()}
    fields = {"MESSAGE": " ".join([name, *(f"{key}={value}" for key, value in told.items())])}
    fields |= {"PRIORITY": str(_PRIORITIES[level]), "SYSLOG_IDENTIFIER": "imagend"}
    if name in MESSAGE_IDS:
        fields["MESSAGE_ID"] = MESSAGE_IDS[name]
    return ((fields | {f"IMAGEND_{key.upper()}": value for key, value in told.items()},), {})


def set_up(journal: bool = False) -> None:
    """`journal`: whether stderr is the journal, so that it can be told more than lines."""
    lines = _Lossy(sys.stderr)
    shared: list[Any] = [structlog.processors.add_log_level]
    if journal:
        shared += [structlog.processors.format_exc_info, entry]
        to_journal = Journal(lines)
        structlog.configure(processors=shared, logger_factory=lambda *_: to_journal)
        return
    shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    if sys.stderr.isatty():
        shared.append(structlog.dev.ConsoleRenderer())
    else:
        shared += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=True)]
    structlog.configure(processors=shared, logger_factory=structlog.PrintLoggerFactory(cast(TextIO, lines)))
