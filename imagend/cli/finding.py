"""What imagend check finds: how bad it is, what it is, and how to mend it."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    level: str
    """ok, warning or error"""
    what: str
    fix: str = ""
