"""Dropping into an inbox on NFS, whose answers may be lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import Home

from imagend.cli import drop
from imagend.errors import UsageError


def test_a_rename_that_was_done_and_says_that_its_source_is_gone_is_no_error(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon has even taken the job in before the sender heard anything."""
    taken = []

    def rename(source: Path, target: Path) -> Path:
        taken.append(source.read_bytes())
        source.unlink()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source), None, str(target))

    monkeypatch.setattr(Path, "rename", rename)
    body = home.body(seed=7)
    ref = drop.drop(home.config, body)
    assert taken == [home.seal(body)]
    assert ref.client == home.config.client.name


def test_an_inbox_that_is_gone_is_an_error(home: Home) -> None:
    home.config.inboxes[0].rmdir()
    with pytest.raises(UsageError, match="Cannot write to the inbox"):
        drop.drop(home.config, home.body())
