"""Where log lines go: readable on a terminal, one JSON object a line otherwise. Prompts never get here."""

from __future__ import annotations

import sys
from typing import Any

import structlog


def set_up() -> None:
    shared: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if sys.stderr.isatty():
        shared.append(structlog.dev.ConsoleRenderer())
    else:
        shared += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=True)]
    structlog.configure(processors=shared, logger_factory=structlog.PrintLoggerFactory(sys.stderr))
