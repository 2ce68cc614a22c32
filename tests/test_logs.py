"""Log lines in the journal: the native protocol on a real datagram socket, read by its own rules."""

from __future__ import annotations

import ast
import io
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import REPOSITORY

from imagend import config as configuration
from imagend import logs
from imagend.message_ids import MESSAGE_IDS


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.bind(str(tmp_path / "socket"))
        own.settimeout(10.0)
        yield own


@pytest.fixture
def spare() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def journal(journald: socket.socket, spare: io.StringIO) -> Iterator[logs.Journal]:
    ours = logs.Journal(spare, Path(journald.getsockname()))
    yield ours
    ours.close()


@pytest.fixture
def log(journal: logs.Journal) -> Any:
    """A logger that writes as `imagend serve` does under systemd."""
    processors = [structlog.processors.add_log_level, logs.entry]
    return structlog.wrap_logger(journal, processors=processors, wrapper_class=structlog.BoundLogger)


def read(datagram: bytes) -> dict[str, str]:
    """The fields of an entry, as systemd.io/JOURNAL_NATIVE_PROTOCOL has them."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
        else:
            name, size = line, int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + size], datagram[8 + size :].removeprefix(b"\n")
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


def test_an_event_has_its_fields_its_priority_and_its_message_id(journald: socket.socket, log: Any) -> None:
    log.info("ended", job="alice/4f2c", outcome="failed", code=None)
    assert read(journald.recv(65536)) == {
        "MESSAGE": "ended job=alice/4f2c outcome=failed code=null",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "imagend",
        "MESSAGE_ID": "73c534f5af70452e82b27af779ef5cd3",
        "IMAGEND_JOB": "alice/4f2c",
        "IMAGEND_OUTCOME": "failed",
        "IMAGEND_CODE": "null",
    }
    log.warning("something else", versions={"torch": "2"}, count=3)
    fields = read(journald.recv(65536))
    assert (fields["PRIORITY"], fields["IMAGEND_VERSIONS"], fields["IMAGEND_COUNT"]) == ("4", '{"torch": "2"}', "3")
    assert "MESSAGE_ID" not in fields
    log.error("degraded", why="no")
    assert read(journald.recv(65536))["PRIORITY"] == "3"


def test_no_value_passes_for_another_field(journald: socket.socket, log: Any) -> None:
    log.error("worker died", why="it said\nPRIORITY=0\nMESSAGE_ID=0\n\udce9")
    fields = read(journald.recv(65536))
    assert fields["IMAGEND_WHY"] == "it said\nPRIORITY=0\nMESSAGE_ID=0\n?"
    assert (fields["PRIORITY"], fields["MESSAGE_ID"]) == ("3", MESSAGE_IDS["worker died"])


def test_what_the_journal_does_not_take_is_a_line(journald: socket.socket, log: Any, spare: io.StringIO) -> None:
    log.info("accepted", job="alice/1", traceback="x\n" * 1_000_000)  # EMSGSIZE
    assert spare.getvalue().startswith("accepted job=alice/1 traceback=x x")
    assert spare.getvalue().count("\n") == 1
    log.info("accepted", job="alice/2")
    assert read(journald.recv(65536))["IMAGEND_JOB"] == "alice/2"


def test_a_journal_that_hangs_is_waited_for_once(
    journald: socket.socket, journal: logs.Journal, log: Any, spare: io.StringIO
) -> None:
    """Until it takes an entry again. Without that, each of these would cost half a second."""
    patience_s = journal._socket.gettimeout()
    assert patience_s
    sent = 0
    while not spare.getvalue():
        log.info("accepted", job=f"alice/{sent}")
        sent += 1
    assert journal._socket.gettimeout() == 0.0
    for number in range(1_000):
        log.info("accepted", job=f"bob/{number}")
    assert spare.getvalue().count("job=bob/") == 1_000
    journald.recv(65536)
    log.info("accepted", job="carol/1")
    assert "carol" not in spare.getvalue()
    assert journal._socket.gettimeout() == patience_s


def test_the_journal_is_told_only_if_stderr_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = os.fstat(2)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not configuration.stderr_is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino + 1}")  # 2> elsewhere
    assert not configuration.stderr_is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    assert configuration.stderr_is_journal()


def test_set_up_for_the_journal_sends_there(tmp_path: Path, journald: socket.socket) -> None:
    program = (
        "import sys, pathlib, functools, structlog\n"
        "from imagend import logs\n"
        "logs.Journal = functools.partial(logs.Journal, path=pathlib.Path(sys.argv[1]))\n"
        "logs.set_up(journal=True)\n"
        "structlog.get_logger().info('stopped')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: structlog.get_logger().exception('a bug')\n"
    )
    command = [sys.executable, "-c", program, journald.getsockname()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert read(journald.recv(65536))["MESSAGE_ID"] == MESSAGE_IDS["stopped"]
    assert "ZeroDivisionError" in read(journald.recv(65536))["IMAGEND_EXCEPTION"]


# The table


def events() -> set[str]:
    """The texts of all events that the code logs."""
    found = set()
    for path in (REPOSITORY / "imagend").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_each_id_is_one_of_its_own_and_of_an_event_that_there_is() -> None:
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)
    assert MESSAGE_IDS.keys() <= events()
    for number in MESSAGE_IDS.values():
        assert uuid.UUID(number).version == 4
        assert number == uuid.UUID(number).hex


def test_the_table_in_the_documents_is_that_of_the_code() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    shown = dict(re.findall(r"(?m)^\| `?([^|`]+?)`? \| `([0-9a-f]{32})` \|", text))
    assert shown == MESSAGE_IDS
