"""The door: whatever strangers put into an inbox, good jobs come in, the rest goes out with a reason, the door lives.

look() gets its `now` from the test, so no test sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, make_home
from structlog.testing import capture_logs

from imagend import files, jobfile, signing
from imagend.daemon import held
from imagend.daemon.discreet import shown
from imagend.daemon.intake import LATER, MAX_BATCH, Arrival, Door, Policy
from imagend.errors import InvalidJob, UnknownJob
from imagend.inbox import identity
from imagend.job import MAX_JOB_BYTES, Ref
from imagend.signers import NAMESPACE, AllowedSigners
from imagend.signing import Key, job_id, seal
from imagend.spool import Spool

GRACE_S = 60.0  # file_grace_s of the configuration in use
NOBODY = 65534


@pytest.fixture(autouse=True)
def never_hang() -> Iterator[None]:
    """A door that waits at a pipe fails the test instead of stopping the run."""

    def give_up(*_: object) -> None:
        raise TimeoutError("the door hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_door(home: Home, inbox: Path | None = None, **settings: Any) -> Door:
    config = home.config.model_copy(update={"file_grace_s": GRACE_S} | settings)
    text = (home.root / "keys" / "allowed_signers").read_text()
    policy = Policy(config, AllowedSigners.parse(text, "allowed_signers"))
    return Door(inbox or config.inboxes[0], policy, Spool(config.spool).attachments)


@pytest.fixture
def door(home: Home) -> Door:
    return make_door(home)


def take(door: Door, now: float = 0.0) -> list[Ref]:
    """Work through one listing and take all that comes."""
    refs = []
    while True:
        for arrival in door.look(now):
            door.settle(arrival, None)
            refs.append(arrival.item.ref)
        if not door.more:
            return refs


def inbox(home: Home) -> list[str]:
    return listing(home.config.inboxes[0])


def rejected(home: Home) -> list[str]:
    """What lies in rejected/, reasons left out."""
    folder = home.config.inboxes[0].parent / "rejected"
    return [name for name in listing(folder) if not name.endswith(".reason.json")]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def still_takes_good_jobs(door: Door, home: Home) -> bool:
    ref = home.drop("zz-next.json", nonce="next")
    return take(door) == [ref]


# Good files


def test_a_good_file_is_taken_and_removed_once_it_is_settled(home: Home, door: Door) -> None:
    ref = home.drop("a.json", seed=7)
    (arrival,) = door.look(0.0)
    assert (arrival.item.ref, arrival.name) == (ref, "a.json")
    assert arrival.raw == (home.config.inboxes[0] / "a.json").read_bytes()
    assert inbox(home) == ["a.json"]  # until the loop has it safe
    door.settle(arrival, None)
    assert inbox(home) == rejected(home) == []


def test_a_job_that_must_wait_is_asked_about_again(home: Home, door: Door) -> None:
    ref = home.drop("a.json")
    (arrival,) = door.look(0.0)
    door.settle(arrival, LATER)
    assert take(door) == [ref]


def test_what_the_loop_refuses_is_rejected_with_its_reason(home: Home, door: Door) -> None:
    home.drop("c.json", kind="cancel", job="0" * 20, prompt=...)
    (arrival,) = door.look(0.0)
    door.settle(arrival, UnknownJob(arrival.item.ref.id, CLIENT))
    assert rejected(home) == ["c.json"]
    assert home.reason("c.json") == UnknownJob("0" * 20, CLIENT).envelope()


def test_files_come_in_order_of_name(home: Home, door: Door) -> None:
    refs = {name: home.drop(name, prompt=name) for name in ("c.json", "a.json", "b.json")}
    assert take(door) == [refs["a.json"], refs["b.json"], refs["c.json"]]


def test_a_client_may_have_a_folder_of_its_own(home: Home, door: Door) -> None:
    ref = home.drop("alice/a.json")
    home.put(b"{}", "alice/b.txt")
    home.put(b"[" * MAX_JOB_BYTES + b"[", "alice/c.json")
    assert take(door) == [ref]
    assert rejected(home) == ["alice/c.json"]
    assert home.reason("alice/c.json")["code"] == "PAYLOAD_TOO_LARGE"
    assert inbox(home) == ["alice/b.txt"]


def test_dotfiles_attachments_and_deeper_folders_are_not_looked_at(home: Home, door: Door) -> None:
    good = home.sealed()
    names = [".a.json", ".hidden/a.json", "files/a.json", "alice/files/a.json", "alice/.a.json"]
    for name in names:
        home.put(good, name)
    assert take(door) == take(door, GRACE_S + 1) == []
    assert inbox(home) == sorted(names)
    assert door.stuck == 0


def test_a_hard_link_is_as_good_as_a_copy(home: Home, door: Door) -> None:
    ref = home.drop("a.json")
    kept = home.root / "mine.json"
    kept.hardlink_to(home.config.inboxes[0] / "a.json")
    assert take(door) == [ref]
    assert kept.exists()


def test_a_thousand_files_come_in_batches_and_all_get_through(home: Home, door: Door) -> None:
    refs = {home.drop(f"{number:04}.json", nonce=str(number)) for number in range(1000)}
    batches = []
    while batch := door.look(0.0):
        batches.append(len(batch))
        refs -= {arrival.item.ref for arrival in batch}
        for arrival in batch:
            door.settle(arrival, None)
    assert max(batches) == MAX_BATCH == 256
    assert (refs, inbox(home)) == (set(), [])


def drop_many(home: Home, count: int, first: int = 0) -> list[str]:
    names = [f"{number:06}.json" for number in range(first, first + count)]
    for name in names:
        home.drop(name, nonce=name)
    return names


def looked_at(door: Door, now: float) -> list[str]:
    """One batch, which is taken."""
    arrivals = door.look(now)
    for arrival in arrivals:
        door.settle(arrival, None)
    return [arrival.name for arrival in arrivals]


def test_an_inbox_is_listed_once_for_all_its_batches(home: Home, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    listings: list[Path] = []
    scandir = os.scandir

    def counted(path: Any) -> Any:
        listings.append(path)
        return scandir(path)

    drop_many(home, 10 * MAX_BATCH)
    monkeypatch.setattr(os, "scandir", counted)
    taken = 0
    while batch := looked_at(door, 0.0):
        taken += len(batch)
    assert taken == 10 * MAX_BATCH
    assert len(listings) == 2  # the second shows that nothing is left


def test_a_newcomer_does_not_wait_for_a_long_listing(home: Home, door: Door) -> None:
    drop_many(home, 4 * MAX_BATCH)
    looked_at(door, 0.0)
    home.drop("z.json", nonce="z")
    assert "z.json" not in looked_at(door, 0.5)
    assert looked_at(door, 0.5 + 2 * door.policy.config.scan_interval_s)[0] == "z.json"


def test_newcomers_by_the_thousand_do_not_keep_out_those_who_wait(home: Home, door: Door) -> None:
    waiting = set(drop_many(home, 3 * MAX_BATCH, first=500_000))
    for now in range(6):
        drop_many(home, 2 * MAX_BATCH, first=now * 1000)
        for _ in range(2):  # as many leave as come
            waiting -= set(looked_at(door, 5.0 * now))
    assert not waiting


def test_a_cancel_is_not_refused_while_files_are_listed_that_nobody_has_read(home: Home, door: Door) -> None:
    job = home.drop("z.json")
    home.drop("0.json", kind="cancel", job=job.id, prompt=...)
    drop_many(home, MAX_BATCH)
    (cancel, *others) = door.look(0.0)
    door.settle(cancel, UnknownJob(job.id, CLIENT))
    for other in others:
        door.settle(other, None)
    assert take(door, 0.0)[-1] == job
    assert [arrival.name for arrival in door.look(0.0)] == ["0.json"]
    door.settle(cancel, UnknownJob(job.id, CLIENT))
    assert (inbox(home), rejected(home)) == ([], ["0.json"])


def test_bad_files_by_the_thousand_do_not_keep_a_look_from_its_end(home: Home, door: Door) -> None:
    for number in range(2 * MAX_BATCH):
        (home.config.inboxes[0] / f"a{number:03}.json").symlink_to("nowhere")
    ref = home.drop("z.json")
    assert door.look(0.0) == ()
    assert len(rejected(home)) == MAX_BATCH
    assert door.more
    assert take(door) == [ref]


def test_unfinished_files_by_the_thousand_are_looked_at_in_turn(
    home: Home, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    lstat = os.lstat

    def counted(path: Any) -> os.stat_result:
        looks.append(os.fspath(path))
        return lstat(path)

    monkeypatch.setattr(held, "LOOKS_PER_S", 100)
    for number in range(300):
        home.put(b"half", f"{number:03}.json")
    take(door)
    monkeypatch.setattr(os, "lstat", counted)
    for now in range(1, 13):
        take(door, float(now))
    assert 900 <= len(looks) <= 1200
    assert {looks.count(place) for place in looks} == {len(looks) / 300}


def test_unfinished_files_do_not_keep_good_ones_out(home: Home, door: Door) -> None:
    for number in range(MAX_BATCH + 50):
        home.put(b"half", f"a{number:03}.json")
    assert still_takes_good_jobs(door, home)


# Files that are still being written


def test_a_half_written_file_has_time_and_is_then_rejected(home: Home, door: Door) -> None:
    home.put(home.sealed()[:-20], "a.json")
    assert take(door, 0.0) == take(door, GRACE_S - 1) == []
    assert inbox(home) == ["a.json"]
    assert take(door, GRACE_S) == []
    assert (inbox(home), rejected(home)) == ([], ["a.json"])
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == ("UNAUTHORIZED", 401)
    for part in ("does not end in a signature", '"signature":"<base64>"}', "imagend submit", "starts with a dot"):
        assert part in error["message"]


def test_an_empty_file_is_a_half_written_one(home: Home, door: Door) -> None:
    home.put(b"", "a.json")
    assert take(door, 0.0) == []
    assert inbox(home) == ["a.json"]
    take(door, GRACE_S)
    assert rejected(home) == ["a.json"]


def test_a_file_that_changes_gets_new_time(home: Home, door: Door) -> None:
    good = home.sealed()
    path = home.put(good[:10], "a.json")
    take(door, 0.0)
    path.write_bytes(good[:20])
    take(door, GRACE_S - 1)
    take(door, 2 * GRACE_S - 2)
    assert inbox(home) == ["a.json"]
    take(door, 2 * GRACE_S - 1)
    assert rejected(home) == ["a.json"]


def test_a_file_completed_in_time_is_taken(home: Home, door: Door) -> None:
    body = home.body()
    path = home.put(home.seal(body)[:50], "a.json")
    assert take(door, 0.0) == []
    path.write_bytes(home.seal(body))
    assert take(door, 1.0) == [Ref(CLIENT, job_id(CLIENT, body))]


def test_a_file_completed_without_a_trace_is_taken_when_its_time_is_over(home: Home, door: Door) -> None:
    """Same inode, size and time, as a writer that fills a preallocated file through NFS may leave it."""
    body = home.body()
    good = home.seal(body)
    path = home.put(b"\0" * len(good), "a.json")
    before = path.stat()
    assert take(door, 0.0) == []
    with path.open("r+b") as file:
        file.write(good)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert take(door, 1.0) == []
    assert take(door, GRACE_S) == [Ref(CLIENT, job_id(CLIENT, body))]


def test_a_name_without_json_may_still_be_renamed(home: Home, door: Door) -> None:
    ref = home.drop("a.json.part")
    assert take(door, 0.0) == []
    path = home.config.inboxes[0] / "a.json.part"
    path.rename(path.with_suffix(""))
    assert take(door, 1.0) == [ref]


def test_a_name_without_json_is_rejected_when_its_time_is_over(home: Home, door: Door) -> None:
    home.drop("job.txt")
    take(door, 0.0)
    take(door, GRACE_S)
    assert rejected(home) == ["job.txt"]
    error = home.reason("job.txt")
    assert error["code"] == "INVALID_PARAMETERS"
    assert "'job.txt'" in error["message"]
    assert "Rename it to NAME.json" in error["message"]


# What is no file, or none that may be read


def _fifo(path: Path, _: Home) -> None:
    os.mkfifo(path)


def _symlink_to_a_good_job(path: Path, home: Home) -> None:
    good = home.root / "good.json"
    good.write_bytes(home.sealed())
    path.symlink_to(good)


def _dangling_symlink(path: Path, _: Home) -> None:
    path.symlink_to("nowhere")


def _symlink_to_itself(path: Path, _: Home) -> None:
    path.symlink_to(path.name)


def _symlink_to_a_folder(path: Path, home: Home) -> None:
    path.symlink_to(home.root / "keys")


def _socket(path: Path, _: Home) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as end:
        end.bind(path.name)
    os.chdir(before)


def _device(path: Path, _: Home) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("only root makes device nodes")


def _endless_device(path: Path, _: Home) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes device nodes")


NO_FILES = [
    _fifo,
    _symlink_to_a_good_job,
    _dangling_symlink,
    _symlink_to_itself,
    _symlink_to_a_folder,
    _socket,
    _device,
    _endless_device,
]


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__.strip("_"))
def test_what_is_no_regular_file_is_rejected_unopened(make: Any, home: Home, door: Door) -> None:
    make(home.config.inboxes[0] / "a.json", home)
    assert take(door) == []
    assert inbox(home) == []
    assert os.path.lexists(home.config.inboxes[0].parent / "rejected" / "a.json")
    error = home.reason("a.json")
    assert error["code"] == "INVALID_PARAMETERS"
    assert error["message"].startswith("a.json is not a regular file.")
    assert "write one elsewhere and rename it" in error["message"]
    assert still_takes_good_jobs(door, home)


def test_the_target_of_a_symlink_is_left_alone(home: Home, door: Door) -> None:
    _symlink_to_a_good_job(home.config.inboxes[0] / "a.json", home)
    take(door)
    assert (home.root / "good.json").read_bytes()


def test_a_folder_named_like_a_job_in_a_clients_folder_is_rejected(home: Home, door: Door) -> None:
    home.drop("alice/x.json/inside.json")
    assert take(door) == []
    assert home.reason("alice/x.json")["message"].startswith("x.json is not a regular file.")
    assert still_takes_good_jobs(door, home)


def test_a_folder_that_takes_a_rejected_files_place_does_not_stop_the_door(home: Home, door: Door) -> None:
    home.put(b"[" * (MAX_JOB_BYTES + 1), "x.json")
    take(door)
    home.put(b"[" * (MAX_JOB_BYTES + 1), "x.json/y.json")  # rejected/x.json is a file: y.json cannot lie under it
    assert take(door) == []
    assert door.stuck == 1
    assert still_takes_good_jobs(door, home)


@pytest.mark.parametrize("size", [MAX_JOB_BYTES + 1, 3_000_000_000])
def test_an_oversize_file_is_rejected_without_being_read(size: int, home: Home, door: Door) -> None:
    os.truncate(home.put(b"", "a.json"), size)
    assert take(door) == []
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == ("PAYLOAD_TOO_LARGE", 413)
    assert f"{size} bytes" in error["message"]
    assert f"at most {MAX_JOB_BYTES}" in error["message"]
    assert still_takes_good_jobs(door, home)


def test_a_prompt_of_10_mb_is_too_large_and_not_repeated(home: Home, door: Door) -> None:
    raw = home.sealed(prompt="canary " * 1_500_000)
    home.put(raw, "a.json")
    assert take(door) == []
    error = home.reason("a.json")
    assert error["code"] == "PAYLOAD_TOO_LARGE"
    for part in (f"{len(raw)} bytes", f"at most {MAX_JOB_BYTES}", "Shorten the prompt"):
        assert part in error["message"]
    assert "canary" not in json.dumps(error)


@pytest.fixture
def shared(key: Key) -> Iterator[Home]:
    """A home where another user can get to: pytest's own folder is closed to all but us."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield make_home(Path(folder) / "home", key)


@contextlib.contextmanager
def as_nobody(owned: Path) -> Iterator[None]:
    """Root may read anything: let another user own this tree, and be that user. Who is no root stays himself."""
    if os.geteuid() != 0:
        yield
        return
    for path in (owned, *owned.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_an_unreadable_file_is_rejected_with_the_command_that_helps(shared: Home) -> None:
    door = make_door(shared)
    shared.drop("a.json")
    (shared.config.inboxes[0] / "a.json").chmod(0)
    with as_nobody(shared.root):
        assert take(door, 0.0) == []
        assert inbox(shared) == ["a.json"]  # a server in trouble says so, too
        assert take(door, GRACE_S) == []
        error = shared.reason("a.json")
        assert (error["code"], error["status"]) == ("FORBIDDEN", 403)
        for part in ("a.json", "Permission denied", "read permission (umask 027)"):
            assert part in error["message"]
        assert inbox(shared) == []
        assert still_takes_good_jobs(door, shared)


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["no listing", "listing, but no entry"])
def test_a_closed_client_folder_keeps_nobody_else_out(shared: Home, mode: int) -> None:
    door = make_door(shared)
    shared.drop("alice/a.json")
    folder = shared.config.inboxes[0] / "alice"
    with as_nobody(shared.root):
        folder.chmod(mode)
        try:
            assert still_takes_good_jobs(door, shared)
        finally:
            folder.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["no listing", "listing, but no entry"])
def test_a_closed_client_folder_is_complained_about_until_it_opens(shared: Home, mode: int) -> None:
    door = make_door(shared)
    ref = shared.drop("alice/a.json")
    folder = shared.config.inboxes[0] / "alice"
    with as_nobody(shared.root):
        folder.chmod(mode)
        try:
            with capture_logs() as logs:
                for now in range(3):
                    take(door, float(now))
            assert len(logs) <= 1  # not once a second for ever
            assert door.trouble
            assert "alice" in door.trouble
        finally:
            folder.chmod(0o755)
        assert take(door, 9.0) == [ref]
        assert door.trouble is None


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE], ids=errno.errorcode.get)
def test_a_fault_of_our_own_side_costs_nobody_a_job(
    number: int, home: Home, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = home.drop("a.json")

    def fail(path: Path, limit: int) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_untrusted", fail)
        assert take(door) == []
    assert inbox(home) == ["a.json"]
    assert door.trouble
    assert take(door) == [ref]
    assert door.trouble is None


# Who may come in


@pytest.fixture(scope="module")
def stranger() -> Key:
    return Key.generate()


def test_an_unknown_key_is_told_whom_to_ask(home: Home, door: Door, stranger: Key) -> None:
    body = home.body()
    home.put(seal(body, stranger.sign(body)), "a.json")
    assert take(door) == []
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == ("UNAUTHORIZED", 401)
    for part in ("The key SHA256:", "is unknown here", "Ask the operator to add it to allowed_signers", "ssh-keygen"):
        assert part in error["message"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ('valid-before="20200102Z"', ("The key SHA256:", "expired at 2020-01-02T00:00:00Z", "change line 1")),
        ('valid-after="20990102Z"', ("The key SHA256:", "not valid before 2099-01-02T00:00:00Z", "change line 1")),
        ('namespaces="git"', ("The key SHA256:", f"not allowed for the namespace '{NAMESPACE}'", "change line 1")),
    ],
    ids=["expired", "not yet valid", "for something else"],
)
def test_a_key_that_does_not_count_now_is_told_why(
    home: Home, door: Door, options: str, parts: tuple[str, ...]
) -> None:
    line = f"{CLIENT} {options} {home.key.public_line('c')}"
    door.policy = Policy(door.policy.config, AllowedSigners.parse(line, "allowed_signers"))
    home.drop("a.json")
    assert take(door) == []
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == ("UNAUTHORIZED", 401)
    for part in (*parts, "Sign with another key"):
        assert part in error["message"]


def test_a_signature_for_another_purpose_is_refused(home: Home, door: Door) -> None:
    body = home.body()
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", str(home.root / "keys" / "id_ed25519")]
    armored = subprocess.run(command, input=body, capture_output=True, check=True).stdout
    home.put(seal(body, b"".join(armored.splitlines()[1:-1])), "a.json")
    assert take(door) == []
    error = home.reason("a.json")
    assert error["code"] == "UNAUTHORIZED"
    for part in ("namespace 'file'", f"'{NAMESPACE}'", "Sign the bytes again with: ssh-keygen"):
        assert part in error["message"]


def test_changed_bytes_are_noticed(home: Home, door: Door) -> None:
    home.put(home.sealed(seed=1).replace(b'"seed": 1', b'"seed": 2'), "a.json")
    assert take(door) == []
    error = home.reason("a.json")
    assert error["code"] == "UNAUTHORIZED"
    for part in ("does not fit the bytes before it", "after they were signed", "Sign the bytes again with"):
        assert part in error["message"]


def test_nothing_is_parsed_before_it_is_verified(home: Home, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(client: str, body: bytes) -> None:
        raise AssertionError("a stranger's bytes were parsed")

    monkeypatch.setattr(jobfile, "parse", parse)
    home.put(home.sealed(seed=1).replace(b'"seed": 1', b'"seed": 2'), "a.json")
    take(door)
    assert home.reason("a.json")["code"] == "UNAUTHORIZED"


@pytest.mark.parametrize(
    ("fields", "code", "status", "parts"),
    [
        (
            {"issued_at": "2026-11-20T15:00:00+00:00"},
            "EXPIRED",
            410,
            ("expired at 2026-11-21T15:00:00+00:00", "here it is 2026-11-22T12:00:00+00:00", "Sign it again"),
        ),
        (
            {"issued_at": "2026-11-22T12:05:01Z"},
            "INVALID_PARAMETERS",
            422,
            ("issued_at", "2026-11-22T12:05:01+00:00", "here it is 2026-11-22T12:00:00+00:00", "clock (NTP)"),
        ),
        (
            {"issued_at": "2026-11-22T12:00:00Z", "audience": "other-spool"},
            "FORBIDDEN",
            403,
            ("audience", "'other-spool'", "this one is 'imagend'", "Send it there"),
        ),
        (
            {"issued_at": "2026-11-22T12:00:00Z", "image_type": "portrait"},
            "INVALID_PARAMETERS",
            422,
            ("image_type", "'portrait'", "known are: character, background"),
        ),
    ],
    ids=["expired", "from the future", "for another spool", "of unknown image type"],
)
def test_a_job_that_may_not_come_in_is_told_why(
    home: Home, fields: dict[str, str], code: str, status: int, parts: tuple[str, ...]
) -> None:
    policy = make_door(home).policy
    door = Door(
        home.config.inboxes[0],
        policy,
        Spool(home.config.spool).attachments,
        wall=lambda: datetime(2026, 11, 22, 12, tzinfo=UTC),
    )
    home.drop("a.json", **fields)
    assert take(door) == []
    assert inbox(home) == []
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == (code, status)
    for part in parts:
        assert part in error["message"]
    assert [problem["field"] for problem in error["detail"]]


def test_a_job_for_this_spool_comes_in(home: Home, door: Door) -> None:
    ref = home.drop("a.json", audience="imagend", image_type="character")
    assert take(door) == [ref]


def test_clocks_may_differ_by_five_minutes(home: Home, door: Door) -> None:
    ref = home.drop("a.json", issued_at=(datetime.now(UTC) + timedelta(minutes=4)).isoformat())
    assert take(door) == [ref]


# rejected/


def test_a_reason_tells_what_why_when_and_whose(home: Home, door: Door) -> None:
    home.drop("a.json", width=1001)
    take(door)
    folder = home.config.inboxes[0].parent / "rejected"
    note = json.loads((folder / "a.json.reason.json").read_text())
    assert note.keys() == {"error", "file", "client", "at"}
    assert note["file"] == "a.json"
    assert datetime.fromisoformat(note["at"]).tzinfo
    assert [problem["field"] for problem in note["error"]["detail"]] == ["width"]


def test_a_reason_names_the_client_who_signed(home: Home, door: Door) -> None:
    home.drop("a.json", width=1001)
    take(door)
    note = json.loads((home.config.inboxes[0].parent / "rejected" / "a.json.reason.json").read_text())
    assert note["client"] == CLIENT


def test_nothing_in_rejected_is_overwritten(home: Home, door: Door) -> None:
    for width in (1001, 1002, 1003):
        home.drop("a.json", width=width)
        take(door)
    names = rejected(home)
    assert len(names) == 3
    assert "a.json" in names
    assert {home.reason(name)["detail"][0]["value"] for name in names} == {"1001", "1002", "1003"}


def test_a_rejected_file_named_like_a_reason_is_not_overwritten(home: Home, door: Door) -> None:
    theirs = home.sealed(width=1001)
    home.put(theirs, "a.json.reason.json")
    take(door)
    home.drop("a.json", width=1002)
    take(door)
    folder = home.config.inboxes[0].parent / "rejected"
    assert theirs in [path.read_bytes() for path in folder.iterdir()]
    assert inbox(home) == []


def test_a_new_file_in_place_of_a_rejected_one_is_taken(home: Home, door: Door) -> None:
    home.drop("a.json", width=1001)
    take(door)
    assert take(door) == []
    ref = home.drop("a.json", width=1000)
    assert take(door) == [ref]


def test_a_file_replaced_while_its_job_was_taken_stays(home: Home, door: Door) -> None:
    home.drop("a.json", seed=1)
    (arrival,) = door.look(0.0)
    second = home.drop("a.json", seed=2)
    door.settle(arrival, None)
    assert take(door) == [second]


def test_a_file_replaced_while_its_job_was_refused_stays(home: Home, door: Door) -> None:
    home.drop("a.json", seed=1)
    (arrival,) = door.look(0.0)
    second = home.drop("a.json", seed=2)
    door.settle(arrival, UnknownJob("0" * 20, CLIENT))
    assert take(door) == [second]


def test_a_file_that_its_sender_takes_back_is_no_trouble(home: Home, door: Door) -> None:
    home.drop("a.json")
    (arrival,) = door.look(0.0)
    (home.config.inboxes[0] / "a.json").unlink()
    door.settle(arrival, None)
    assert (door.stuck, door.trouble, rejected(home)) == (0, None, [])


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "ü" * 125 + ".json", "n" * 255])
def test_the_longest_name_finds_a_place_in_rejected(name: str, home: Home, door: Door) -> None:
    path = home.config.inboxes[0] / name
    path.write_bytes(b"[" * (MAX_JOB_BYTES + 1))
    assert take(door) == []
    assert (inbox(home), door.stuck) == ([], 0)
    assert len(rejected(home)) == 1


@pytest.mark.parametrize("name", [b"a\nb.json", b"\xff.json", b"\x1b[31m.json", b"-rf.json", b"\xe2\x80\xae.json"])
def test_any_name_finds_a_place_in_rejected(name: bytes, home: Home, door: Door) -> None:
    (home.config.inboxes[0] / os.fsdecode(name)).write_bytes(b"[" * (MAX_JOB_BYTES + 1))
    assert take(door) == []
    assert (inbox(home), rejected(home), door.stuck) == ([], [os.fsdecode(name)], 0)


def test_rejected_lies_beside_each_inbox(home: Home) -> None:
    second = home.root / "nfs" / "inbox"
    second.mkdir(parents=True)
    one, other = make_door(home), make_door(home, second)
    refs = [home.drop("a.json", nonce="1")]
    (second / "a.json").write_bytes(home.sealed(nonce="2"))
    (second / "b.json").write_bytes(home.sealed(width=1001))
    assert take(one) == refs
    assert len(take(other)) == 1
    assert listing(second.parent) == ["rejected/b.json", "rejected/b.json.reason.json"]
    assert rejected(home) == []


# When the inbox itself is in trouble


def no_move(source: Path, target: Path) -> None:
    raise PermissionError(1, "Operation not permitted", str(source))


def test_a_file_that_cannot_be_moved_is_stuck_and_tried_again_with_growing_pauses_or_when_it_changes(
    home: Home, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Path] = []

    def refuse(source: Path, target: Path) -> None:
        moves.append(source)
        no_move(source, target)

    path = home.put(home.sealed(width=1001), "a.json")
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(files, "move", refuse)
        for now in range(120):
            take(door, float(now))
        assert 8 < len(moves) < 15
        assert door.stuck == 1
        assert [line["file"] for line in logs if line["log_level"] == "error"] == [shown("a.json", ())]
        assert home.reason("a.json")["code"] == "INVALID_PARAMETERS"  # it can be told why, though
        before = len(moves)
        path.write_bytes(home.sealed(width=1002))
        take(door, 119.1)
        assert (len(moves), door.stuck) == (before + 1, 1)
        assert still_takes_good_jobs(door, home)
    take(door, 121.0)
    assert (door.stuck, inbox(home), rejected(home)) == (0, [], ["a.json"])


def test_a_stuck_file_that_goes_is_forgotten(home: Home, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "move", no_move)
    path = home.put(home.sealed(width=1001), "a.json")
    take(door)
    path.unlink()
    take(door)
    assert door.stuck == 0


def test_a_job_that_was_taken_but_cannot_be_removed_is_stuck_until_it_can(shared: Home) -> None:
    door = make_door(shared)
    shared.drop("alice/a.json")
    folder = shared.config.inboxes[0] / "alice"
    with as_nobody(shared.root):
        folder.chmod(0o555)
        try:
            assert len(take(door, 0.0)) == 1
            assert door.stuck == 1
        finally:
            folder.chmod(0o755)
        assert len(take(door, 1.0)) == 1  # the loop knows it
        assert (take(door, 2.0), door.stuck, inbox(shared)) == ([], 0, [])


def test_an_inbox_that_vanishes_is_reported_until_it_is_back(home: Home, door: Door) -> None:
    ref = home.drop("a.json")
    path = home.config.inboxes[0]
    path.rename(home.root / "away")
    with capture_logs() as logs:
        assert take(door, 1.0) == take(door, 2.0) == []
    assert door.trouble
    assert str(path) in door.trouble
    assert len(logs) == 1
    assert door.looked_at == 2.0
    (home.root / "away").rename(path)
    assert take(door, 3.0) == [ref]
    assert door.trouble is None


def test_the_trouble_of_an_inbox_names_a_remedy(home: Home, door: Door) -> None:
    home.config.inboxes[0].rmdir()
    take(door)
    assert door.trouble
    assert "check" in door.trouble or "mount" in door.trouble


def test_a_bug_in_the_parser_costs_one_file(home: Home, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    parse, secret = jobfile.parse, "canary"

    def fragile(client: str, body: bytes) -> Any:
        if b"trigger" in body:
            raise ZeroDivisionError(secret)
        return parse(client, body)

    monkeypatch.setattr(jobfile, "parse", fragile)
    home.drop("a.json", prompt="trigger")
    ref = home.drop("b.json")
    with capture_logs() as logs:
        assert take(door) == [ref]
    error = home.reason("a.json")
    assert (error["code"], error["status"]) == ("INTERNAL", 500)
    assert "please report it" in error["message"]
    assert "canary" not in json.dumps(error)
    (told,) = (line for line in logs if line["log_level"] == "error")
    assert (told["file"], told["bug"]) == (shown("a.json", ()), "ZeroDivisionError")
    assert "in fragile" in told["traceback"]
    assert "canary" not in json.dumps(logs)


def test_logs_tell_of_fields_and_never_of_what_stands_in_them(home: Home, door: Door) -> None:
    home.drop("a.json", label="canary\n", model="canary/", promt="canary")
    home.drop("b.json", prompt=["canary"])
    home.drop("c.json", prompt="canary " + "(" * 40)
    home.drop("d.json", prompt="canary", seed=2**64)
    with capture_logs() as logs:
        take(door)
    assert len(rejected(home)) == len(logs) == 4
    assert "canary" not in json.dumps(logs)
    assert "label" in json.dumps(logs)


def test_serve_looks_asks_settles_and_looks_again(home: Home, door: Door) -> None:
    class Enough(Exception):
        pass

    asked: list[tuple[Arrival, ...]] = []

    def ask(arrivals: tuple[Arrival, ...]) -> tuple[None, ...]:
        if asked:
            raise Enough
        asked.append(arrivals)
        second = home.drop("b.json", nonce="2")  # while the loop thinks
        assert second
        door.hint.set()
        return (None,) * len(arrivals)

    home.drop("a.json", nonce="1")
    with pytest.raises(Enough):
        door.serve(ask)
    assert inbox(home) == ["b.json"]


def test_a_folder_swapped_for_a_link_does_not_lead_out_of_the_inbox(home: Home, door: Door) -> None:
    """Listed as a client's folder, a link to the queue when its files are touched: nothing there may move."""
    ref = home.drop("zz/a.json")
    treasure = home.root / "treasure"
    treasure.mkdir()
    (home.config.inboxes[0] / "zz" / "a.json").rename(treasure / "a.json")
    (home.config.inboxes[0] / "zz").rmdir()
    (home.config.inboxes[0] / "zz").symlink_to(treasure)
    assert door._examine("zz/a.json", 0.0) is None
    raw = (treasure / "a.json").read_bytes()
    item = jobfile.parse(ref.client, signing.split(raw)[0])
    arrival = Arrival("zz/a.json", identity((treasure / "a.json").stat()), 0.0, raw, item)
    door.settle(arrival, None)
    door.settle(arrival, InvalidJob("no"))
    assert (treasure / "a.json").read_bytes() == raw


@pytest.mark.parametrize("content", ["a pipe", "900,000 brackets"])
def test_what_lies_in_the_place_of_a_reason_holds_nobody_up(home: Home, door: Door, content: str) -> None:
    folder = home.config.inboxes[0].parent / "rejected"
    folder.mkdir()
    if content == "a pipe":
        os.mkfifo(folder / "x.json.reason.json")
    else:
        (folder / "x.json.reason.json").write_bytes(b"[" * 900_000)
    home.put(home.sealed(widht=1), "x.json")
    assert door.look(0.0) == ()
    (name,) = rejected(home)
    assert "width" in home.reason(name)["message"]
