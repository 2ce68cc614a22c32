"""Where log lines go: readable on a terminal, one JSON object a line otherwise. Prompts never get here."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast

import structlog


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


def set_up() -> None:
    shared: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if sys.stderr.isatty():
        shared.append(structlog.dev.ConsoleRenderer())
    else:
        shared += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=True)]
    structlog.configure(
        processors=shared, logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(sys.stderr)))
    )
