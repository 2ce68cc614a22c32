"""What imagend check and doctor find: how bad it is, what it is, and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from imagend.errors import BadConfig


class Finding(NamedTuple):
    level: str
    """ok, warning or error"""
    what: str
    fix: str = ""


def report(findings: Iterable[Finding], as_json: bool, also_ok: bool = True) -> int:
    """Print findings; the exit status."""
    findings = list(findings)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        shown = [finding for finding in findings if also_ok or finding.level != "ok"]
        for finding in shown:
            print(f"{finding.level:8} {finding.what}" + (f"\n         mend: {finding.fix}" if finding.fix else ""))
        if not also_ok:
            print(f"{len(findings)} things looked at, {len(shown)} to mend")
    return BadConfig.exit_status if any(finding.level == "error" for finding in findings) else 0
