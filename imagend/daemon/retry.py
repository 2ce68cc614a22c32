"""When to try again. Pure policy: change it here, test it as a table."""

from __future__ import annotations

from imagend.messages import Failure

MAX_DELAY_S = 60.0


def worth_another_attempt(failure: Failure, attempt: int, max_attempts: int) -> bool:
    return failure.try_again and attempt < max_attempts


def restart_delay_s(deaths: int) -> float:
    """Seconds to wait before starting a worker again, after `deaths` in a row without an ended job between them."""
    return 0.0 if deaths <= 1 else min(MAX_DELAY_S, 2.0 ** min(deaths - 1, 10))  # 2.0 ** 1024 is an OverflowError
