"""rejected/ beside an inbox stays bounded, in age and number: on the door's thread, for its disk may hang."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from imagend.inbox import Inbox
from imagend.retention_settings import Retention

log = structlog.get_logger()

FIRST_S = 60.0
"""A start waits for nothing that can come later."""
INTERVAL_S = 3600.0
_DAY_S = 86400.0


class Refused:
    """Swept once an hour, and sooner where many files came: there are never more than twice as many as may stay."""

    def __init__(self, inbox: Inbox, settings: Callable[[], Retention], now: float) -> None:
        self._inbox, self._settings = inbox, settings
        self._sweep_at, self._more = now + FIRST_S, 0

    def add(self) -> None:
        """A file was refused."""
        self._more += 1

    def tend(self, now: float, wall: float) -> None:
        """`wall`: what the inbox's clock says."""
        settings = self._settings()
        if now < self._sweep_at and self._more <= settings.max_rejected:
            return
        self._sweep_at, self._more = now + INTERVAL_S, 0
        try:
            self._inbox.sweep_rejected(wall - settings.rejected_days * _DAY_S, settings.max_rejected)
        except OSError as error:
            log.warning("rejected/ cannot be swept: it grows", why=str(error))
