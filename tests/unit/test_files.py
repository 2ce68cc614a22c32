"""files.py: what readers see while it writes, and what it refuses to open. Crashes are tested in test_crash.py."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import files


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# write, replace_hint, move, remove


@pytest.mark.parametrize("write", [files.write, files.write_unsynced, files.replace_hint])
def test_a_reader_sees_the_old_bytes_or_the_new_ones(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / "a"
    versions = [bytes([letter]) * 50_000 * (letter % 5 + 1) for letter in range(65, 85)]
    path.write_bytes(versions[0])
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions * 3:
        write(path, version)
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(versions)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.write(path, b"old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            files.write(path, b"new")
    assert path.read_bytes() == b"old"
    files.write(path, b"newer")  # what the failure left lying is in nobody's way
    assert path.read_bytes() == b"newer"


def test_a_temporary_name_that_someone_made_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / ".a.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        files.write(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"untouched"


def test_a_time_given_is_the_files_time(tmp_path: Path) -> None:
    files.write_unsynced(tmp_path / "a", b"x", mtime_ns=1_234_567_890_123_456_789)
    assert (tmp_path / "a").stat().st_mtime_ns == 1_234_567_890_123_456_789


def test_bytes_and_names_are_synced_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)  # noqa: PTH115
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    files.write(tmp_path / "a", b"x")
    assert synced == [".a.tmp", tmp_path.name]
    synced.clear()
    (tmp_path / "b").mkdir()
    files.move(tmp_path / "a", tmp_path / "b" / "a")
    assert synced == ["b", tmp_path.name]
    synced.clear()
    files.remove(tmp_path / "b" / "a")
    assert synced == ["b"]
    synced.clear()
    files.append(tmp_path / "log", b"line\n")
    assert synced == ["log", tmp_path.name]
    synced.clear()
    files.append(tmp_path / "log", b"line\n")
    files.append(tmp_path / "log", b"line\n", durable=False)
    assert synced == ["log"]
    synced.clear()
    files.make_folder(tmp_path / "c" / "d")
    assert synced == [tmp_path.name, "c"]


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    files.remove(tmp_path / "never")


# make_folder


def test_make_folder_makes_all_parents_and_is_content_with_what_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_make_folder_costs_no_sync_where_the_folder_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "fsync", fail)
    files.make_folder(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_make_folder_does_not_replace_a_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="File exists"):
        files.make_folder(tmp_path / place)
    assert (tmp_path / "file").read_bytes() == b"x"


# append


def test_append_mends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    files.append(path, b'{"n": 1}\n')
    with path.open("ab") as file:
        file.write(b'{"n": 2, "to')  # the machine died here
    files.append(path, b'{"n": 3}\n')
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2, "to\n{"n": 3}\n'


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.integers(0, 200))
@settings(deadline=None, max_examples=50)
def test_every_line_appended_after_a_crash_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    for line in lines:
        files.append(path, line + b"\n", durable=False)
    if lines:
        os.truncate(path, min(cut, path.stat().st_size))
    files.append(path, b"after\n", durable=False)
    assert path.read_bytes().split(b"\n")[-2:] == [b"after", b""]


def test_append_writes_a_line_with_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = os.write

    def record(fd: int, data: bytes) -> int:
        written.append(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", record)
    (tmp_path / "log").write_bytes(b"torn")
    files.append(tmp_path / "log", b"line\n")
    assert written == [b"\nline\n"]


def test_append_tells_of_a_line_that_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"):
        files.append(tmp_path / "log", b"line\n")


@pytest.mark.parametrize("before", [b"", b"first\n"])
def test_append_takes_back_what_an_fsync_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    """Else another try would find the line there and trust it."""
    (tmp_path / "log").write_bytes(before)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            files.append(tmp_path / "log", b"line\n")
    assert (tmp_path / "log").read_bytes() == before


@pytest.mark.parametrize("move", [files.move, files.rename])
def test_a_rename_that_was_done_but_told_as_an_error_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: Callable[[Path, Path], None]
) -> None:
    rename = os.rename

    def lost_answer(source: Path, target: Path) -> None:
        rename(source, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "rename", lost_answer)
    move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_a_rename_that_failed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.rename(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        files.rename(tmp_path / "c", tmp_path / "d")


def test_a_folder_that_could_not_be_synced_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", fail)
        with pytest.raises(OSError, match="Input/output"):
            files.make_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_append_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "log").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"):
        files.append(tmp_path / "log", b"line\n")


# read_untrusted


def test_read_untrusted_returns_the_bytes_and_whose_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    data, status = files.read_untrusted(path, 10)
    assert (data, status.st_ino, status.st_size) == (b"hello", path.stat().st_ino, 5)


@pytest.mark.parametrize(("size", "read"), [(9, 9), (10, 10), (11, 11), (12, 11), (10**12, 11)])
def test_read_untrusted_reads_one_byte_over_the_limit_and_no_more(tmp_path: Path, size: int, read: int) -> None:
    path = tmp_path / "a"
    path.touch()
    os.truncate(path, size)
    data, status = files.read_untrusted(path, 10)
    assert (len(data), status.st_size) == (read, size)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    (path.parent / "target").write_bytes(b"secret")
    path.symlink_to("target")


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes device nodes")


def _absent_device(path: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(250, 250))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(before)


@pytest.mark.parametrize(
    "make",
    [_fifo, _folder, _link, _dangling_link, _link_to_a_device, _device, _absent_device, _socket],
    ids=lambda make: make.__name__.strip("_"),
)
def test_read_untrusted_refuses_all_that_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(files.NotOrdinary):
            files.read_untrusted(tmp_path / "a", 10)
    assert open_descriptors() == before  # a thousand of them must not use up our descriptors


def test_read_untrusted_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_untrusted(tmp_path / "a", 10)
