"""imagend.service as systemd reads it: hardened, without a mistake, each hole explained. Under systemd: tests/lab."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from imagend import errors
from imagend.config import Config

UNIT = REPOSITORY / "imagend.service"
OPERATIONS = REPOSITORY / "docs" / "operations.md"
THRESHOLD = 15  # tenths: 1.5 of 10

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd (Debian package systemd)")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", "--no-pager", *map(str, arguments)], capture_output=True, text=True)


def comments() -> str:
    return " ".join(re.findall(r"(?m)^#(.*)$", UNIT.read_text()))


def setting(name: str) -> str:
    """The last value of a setting."""
    return re.findall(rf"(?m)^{name}=(.*)$", UNIT.read_text())[-1]


@needs_systemd
def test_it_is_hardened_as_far_as_cuda_allows() -> None:
    done = analyze("security", "--offline=yes", f"--threshold={THRESHOLD}", UNIT)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_systemd
def test_each_line_that_is_not_taken_has_its_reason() -> None:
    findings = json.loads(analyze("security", "--offline=yes", "--json=short", UNIT).stdout)
    assert len(findings) > 50
    open_doors = [finding["name"] for finding in findings if not finding["set"] and finding["exposure"]]
    assert "MemoryDenyWriteExecute=" in open_doors
    for name in open_doors:
        setting, _, value = name.partition("=")
        word = value if value.startswith("~") else setting
        assert re.search(rf"{re.escape(word)}\b", comments()), f"{name}: say in imagend.service why not"


@needs_systemd
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """It answers 0 even to unknown keys: what it says counts."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/imagend/bin/imagend", "/bin/true"))
    assert "Unknown key" in analyze("verify", "--man=no", _spoilt(tmp_path)).stderr
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@needs_systemd
def test_the_drop_in_for_jobs_that_fetch_opens_the_network_and_nothing_else(tmp_path: Path) -> None:
    block = re.search(r"```\n( *\[Service\]\n *PrivateNetwork=no\n.*?)```", OPERATIONS.read_text(), re.DOTALL)
    assert block
    opened = tmp_path / UNIT.name
    opened.write_text(f"{UNIT.read_text()}\n{re.sub('(?m)^ +', '', block[1])}")
    assert "Unknown key" not in analyze("verify", "--man=no", opened).stderr
    findings = [
        json.loads(analyze("security", "--offline=yes", "--json=short", unit).stdout) for unit in (UNIT, opened)
    ]
    before, after = ({one["name"] for one in found if not one["set"]} for found in findings)
    network = {"PrivateNetwork=", "IPAddressDeny=", "RestrictAddressFamilies=~AF_(INET|INET6)"}
    assert after - before == network


def _spoilt(folder: Path) -> Path:
    path = folder / "spoilt.service"
    path.write_text("[Service]\nExecStart=/bin/true\nProtectEverything=yes\n")
    return path


def test_it_fits_what_the_daemon_does() -> None:
    prevented = {int(status) for status in setting("RestartPreventExitStatus").split()}
    mistakes = {errors.BadConfig.exit_status, errors.BadKeys.exit_status, errors.UsageError.exit_status}
    assert prevented == mistakes
    assert errors.SpoolUnusable.exit_status not in prevented
    assert int(setting("TimeoutStopSec")) > Config().stop_grace_s
    assert (setting("Type"), setting("StartLimitIntervalSec")) == ("notify", "0")
