"""What is tried again, how often and when: connections that are cut, and servers that ask to be left alone a while."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from imagend.errors import ConnectionLost, DownloadFailed
from imagend.fetch.web import Cut, Refused

MAX_TRIES = 5
MAX_PAUSE_S = 120.0
_PASSING = (429, 500, 502, 503, 504)
T = TypeVar("T")


def patiently(
    step: Callable[[], T], host: str, sleep: Callable[[float], None], gained: Callable[[], bool] = lambda: False
) -> T:
    """`step`, until it does, or MAX_TRIES in a row have `gained` nothing. Raises ConnectionLost, DownloadFailed."""
    tries = 0
    while True:
        try:
            return step()
        except Cut as error:
            why, pause = str(error), 0.0
        except Refused as error:
            host, why = error.host, _told(error)
            if error.status not in _PASSING:
                raise DownloadFailed(host, why) from None
            pause = _seconds(error.retry_after)
        tries = 1 if gained() else tries + 1
        if tries >= MAX_TRIES:
            raise ConnectionLost(host, f"{why}, {tries} times in a row. Try again later") from None
        if pause > MAX_PAUSE_S:
            raise DownloadFailed(host, f"{why} and asks to be left alone for {pause:.0f} s. Try again then")
        sleep(max(pause, 2.0 ** (tries - 1)))


def _told(error: Refused) -> str:
    match error.status:
        case 401 | 403:
            return (
                f"it answers {error.status}: it wants a token, or another one (fetch.tokens in config.yaml), whose "
                "owner may have the model"
            )
        case 404 | 410:
            return f"it answers {error.status}: there is nothing"
        case 429:
            return "it answers 429: too many came from here"
    return f"it answers {error.status}"


def _seconds(retry_after: str | None) -> float:
    """Retry-After: seconds or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:9])
    try:
        then = parsedate_to_datetime(retry_after)
        return max(0.0, (then - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
