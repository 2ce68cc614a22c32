"""imagend check on inboxes: mounts as the kernel lists them, one that hangs, one that lies; each with its mending."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Home

from imagend.cli import check_inbox
from imagend.cli.check_inbox import inboxes, mount_of, shelves
from imagend.cli.finding import Finding
from imagend.inbox import Inbox

ROOT = "27 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
NFS = "50 27 0:40 / {} rw,relatime shared:1 - nfs4 server:/export rw,vers=4.2,{},timeo=600\n"


def told(findings: Iterator[Finding], level: str) -> str:
    return "\n".join(f"{finding.what} | {finding.fix}" for finding in findings if finding.level == level)


def test_the_mount_of_a_path_is_the_innermost_and_the_latest() -> None:
    table = ROOT + NFS.format("/srv/with\\040blank", "hard") + NFS.format("/srv/with\\040blank", "soft")
    mount = mount_of(Path("/srv/with blank/inbox"), table)
    assert mount is not None
    assert (mount.point, mount.type, "soft" in mount.options) == ("/srv/with blank", "nfs4", True)
    assert "relatime" in mount.options
    other = mount_of(Path("/srv/with blanks"), table)
    assert other is not None
    assert (other.point, other.type) == ("/", "ext4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("soft", ["without `hard`", "with the option hard", "60 s late", "lookupcache=positive or actimeo=1"]),
        ("hard", ["60 s late"]),
        ("hard,acregmax=90,acdirmax=30", ["30 s late"]),
        ("hard,actimeo=1", []),
        ("hard,lookupcache=pos", []),
        ("hard,noac", []),
    ],
)
def test_what_an_nfs_mount_costs_is_said(home: Home, options: str, words: list[str]) -> None:
    table = ROOT + NFS.format(home.config.inboxes[0].parent, options)
    said = told(inboxes(home.config, table, {}), "warning")
    for word in words:
        assert word in said
    assert bool(said) == bool(words)
    assert ("hard" in said) == (options == "soft")


def test_spool_and_outputs_may_not_lie_on_nfs(home: Home) -> None:
    assert told(shelves(home.config, ROOT), "error") == ""
    said = told(shelves(home.config, ROOT + NFS.format(home.root, "hard")), "error")
    assert said.count("lies on NFS") == 2
    assert "local disk" in said


def test_a_good_inbox_is_measured_and_left_as_it_was(home: Home) -> None:
    findings = list(inboxes(home.config, ROOT, {}))
    assert {finding.level for finding in findings} == {"ok"}
    assert "lies on ext4, mounted at /" in told(iter(findings), "ok")
    assert "made, renamed and removed in" in told(iter(findings), "ok")
    assert list(home.config.inboxes[0].iterdir()) == []


def test_an_inbox_that_hangs_does_not_hang_check(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two; what its mount's options are is said all the same."""
    hangs, answers = home.root / "nfs" / "inbox", home.config.inboxes[0]
    config = home.config.model_copy(update={"inboxes": (hangs, answers)})
    server = threading.Event()
    is_dir = Path.is_dir

    def hang(path: Path) -> bool:
        return server.wait() if path == hangs else is_dir(path)

    monkeypatch.setattr(Path, "is_dir", hang)
    monkeypatch.setattr(check_inbox, "LIMIT_S", 1.0)
    try:
        findings = list(inboxes(config, ROOT + NFS.format(home.root / "nfs", "soft"), {}))
    finally:
        server.set()
    assert told(iter(findings), "error").startswith(f"{hangs} does not answer within 1 s")
    assert "without `hard`" in told(iter(findings), "warning")
    assert f"{answers}: a file is made" in told(iter(findings), "ok")


def test_a_server_of_another_time_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inbox, "skew_s", lambda self: -7200.0)
    said = told(inboxes(home.config, ROOT, {}), "warning")
    assert "-7200 s from ours" in said
    assert "NTP" in said


def test_a_listing_that_lags_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_inbox, "DELAY_S", 0.2)
    monkeypatch.setattr(os, "scandir", lambda path: [])
    assert "shows a new file only after" in told(inboxes(home.config, ROOT, {}), "warning")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda inbox: inbox.rmdir(), ["is no folder", "imagend init"]),
        (lambda inbox: (inbox.parent / "rejected").symlink_to("/tmp"), ["rejected is a link", "rm "]),
        (lambda inbox: (inbox.parent / "rejected").write_text(""), ["rejected is a link or a file", "rm "]),
    ],
    ids=["no inbox", "rejected is a link", "rejected is a file"],
)
def test_a_place_that_cannot_work_is_told(home: Home, harm: Any, words: list[str]) -> None:
    harm(home.config.inboxes[0])
    said = told(inboxes(home.config, ROOT, {}), "error")
    for word in words:
        assert word in said


def test_a_closed_inbox_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Inbox) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Inbox, "skew_s", refuse)
    said = told(inboxes(home.config, ROOT, {}), "error")
    assert "cannot be read or written: Permission denied" in said
    assert "chown" in said


def test_what_the_daemon_measured_is_repeated(home: Home) -> None:
    status = {"inboxes": [{"path": "/a", "delay_s": 2.5}, {"path": "/b", "delay_s": None}]}
    said = told(inboxes(home.config, ROOT, status), "ok")
    assert "/a: of the last 100 files none waited longer than 2.5 s" in said
    assert "/b" not in said
