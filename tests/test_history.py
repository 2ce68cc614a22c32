"""imagend history: every job that ended is in it once, whatever becomes of feed and outputs; its figures are right."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until_idle
from test_cli import imagend

from imagend import feed, history
from imagend.errors import HistoryUnusable, SpoolUnusable
from imagend.job import Outcome, Ref
from imagend.manifest import Manifest
from imagend.outputs import RESULTS, Outputs

START = datetime(2026, 11, 20, 15, tzinfo=UTC)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another")


class Past:
    """Jobs that ended, as the daemon leaves them."""

    def __init__(self, root: Path) -> None:
        self.outputs, self.path = Outputs(root / "outputs"), root / "spool" / history.FILE
        self.outputs.open()
        self.path.parent.mkdir(exist_ok=True)
        self.feed = self.outputs.root / RESULTS
        self.count = 0

    def end(self, client: str = CLIENT, announce: bool = True, seconds: float | None = 1.0, **fields: Any) -> Ref:
        ref = Ref(client, f"{self.count:020x}")
        ended = START + timedelta(minutes=self.count)
        self.count += 1
        started = None if seconds is None else ended - timedelta(seconds=seconds)
        told: dict[str, Any] = {"kind": "generate", "outcome": "succeeded", "attempts": 1}
        told |= {"spec": {"model": "shapes-xl", "prompt": "a secret"}, "label": "a secret"}
        told |= {"accepted_at": ended - timedelta(seconds=10), "started_at": started, "ended_at": ended} | fields
        told |= {"id": ref.id, "client": client, "issued_at": START, "outcome": Outcome(told["outcome"])}
        self.outputs.publish(ref, Manifest(schema="imagend.manifest/v1", **told))
        self.outputs.confirm()
        if announce:
            self.outputs.announce([ref])
        return ref

    def look(self, rebuild: bool = False) -> list[dict[str, Any]]:
        with contextlib.closing(history.look(self.path, self.outputs.root, rebuild)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute("SELECT * FROM jobs ORDER BY id")]

    def ids(self) -> list[str]:
        return [row["id"] for row in self.look()]

    def remove(self, ref: Ref) -> None:
        """As retention does."""
        shutil.rmtree(self.outputs.root / ref.client / ref.id)

    def rotate(self, name: str) -> None:
        self.feed.rename(self.feed.with_name(f"{RESULTS}{name}"))

    def lines(self) -> list[bytes]:
        return self.feed.read_bytes().splitlines(keepends=True)


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(tmp_path)


def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs whose manifests are read from now on."""
    read: list[str] = []
    read_bytes = Path.read_bytes

    def watched(path: Path) -> bytes:
        read.append(path.parent.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    return read


# What it holds


def test_a_row_is_what_the_manifest_says_without_what_the_client_wrote(past: Past) -> None:
    past.end(seconds=4.0, spec={"model": "pony@67ab2fd8ec", "prompt": "a secret"}, attempts=2)
    past.end("bob", outcome="failed", seconds=None, error={"code": "TIMEOUT", "message": "a secret"})
    first, second = past.look()
    ended = START.timestamp()
    assert first == {
        "client": CLIENT,
        "id": "0" * 20,
        "kind": "generate",
        "model": "pony",
        "outcome": "succeeded",
        "code": None,
        "accepted_at": ended - 10,
        "started_at": ended - 4,
        "ended_at": ended,
        "attempts": 2,
        "pictures": 0,
        "from_manifest": 1,
    }
    assert [second[key] for key in ("client", "outcome", "code", "started_at")] == ["bob", "failed", "TIMEOUT", None]
    assert b"secret" not in past.path.read_bytes()


@pytest.mark.parametrize("told", [True, False])
def test_rows_survive_their_outputs_and_a_rebuild(past: Past, told: bool) -> None:
    refs = [past.end(client) for client in ("alice", "bob", "carol")]
    before = past.look()
    past.remove(refs[0])
    assert past.look() == before
    if not told:
        past.feed.unlink()
    rebuilt = past.look(rebuild=True)
    assert [row["from_manifest"] for row in rebuilt] == [0, 1, 1]
    assert [row | {"from_manifest": 1} for row in rebuilt] == before


def test_a_rebuild_takes_what_the_manifests_say_now(past: Past) -> None:
    ref = past.end()
    past.look()
    path = past.outputs.root / ref.client / ref.id / "manifest.json"
    path.write_text(path.read_text().replace("shapes-xl", "pony"))
    assert past.look()[0]["model"] == "shapes-xl"
    assert past.look(rebuild=True)[0]["model"] == "pony"


def test_a_job_whose_outputs_went_before_anybody_looked_is_known_from_the_feed(past: Past) -> None:
    past.remove(past.end(outcome="failed", error={"code": "TIMEOUT", "message": "late"}))
    (row,) = past.look()
    assert (row["outcome"], row["code"], row["model"], row["from_manifest"]) == ("failed", "TIMEOUT", None, 0)


def test_a_job_that_ended_again_after_a_power_cut_is_the_later_one(past: Past) -> None:
    ref = past.end(seconds=1.0)
    past.look()
    past.remove(ref)
    past.count = 0
    past.end(ended_at=START + timedelta(seconds=2), started_at=START, attempts=2)
    (row,) = past.look()
    assert (row["attempts"], row["ended_at"]) == (2, START.timestamp() + 2)


def test_only_what_is_new_is_read(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        past.end()
    past.look()
    new = past.end()
    read = reading(monkeypatch)
    past.look()
    past.look()
    assert read == [new.id]


def test_a_long_past_is_taken_in_by_batches(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BATCH", 3)
    for count in range(11):
        past.end(announce=count % 2 == 0)
    assert len(past.ids()) == 11
    for _ in range(6):
        past.end()
    assert len(past.ids()) == 17


# What may happen to the feed


def test_without_a_feed_there_is_what_lies_in_outputs(past: Past) -> None:
    assert past.ids() == []
    ref = past.end(announce=False)
    (past.outputs.root / ref.client / f".{ref.id}.17").mkdir()
    (past.outputs.root / ref.client / f"{ref.id}.state.json").write_text("{}")
    assert past.ids() == [ref.id]


def test_a_line_that_is_half_written_is_read_when_it_is_whole(past: Past) -> None:
    past.end()
    past.look()
    past.end()
    first, second = past.lines()
    for length in range(len(second)):
        past.feed.write_bytes(first + second[:length])
        assert len(past.ids()) == 1, length
    past.feed.write_bytes(first + second)
    assert len(past.ids()) == 2


def test_a_line_that_a_crash_cut_is_passed_over_and_its_second_writing_taken(past: Past) -> None:
    past.end()
    past.look()
    ref = past.end(announce=False)
    with past.feed.open("ab") as file:
        file.write(b'{"id": "000000000')
    assert len(past.ids()) == 1
    past.outputs.announce([ref])  # mends it first
    assert len(past.ids()) == 2
    assert len(past.lines()) == 3


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"17\n", b'{"id": 1}\n', b'{"id":"../../x","client":"..","ended_at":"x"}\n', b"\xff\n"]
)
def test_a_line_that_is_none_of_ours_stops_nothing(past: Past, line: bytes) -> None:
    past.end()
    with past.feed.open("ab") as file:
        file.write(line)
    past.end()
    assert len(past.ids()) == 2
    past.end()
    assert len(past.ids()) == 3


@pytest.mark.parametrize("names", [(".2", ".1"), ("-20261126", "-20261127")])
def test_what_was_told_before_rotations_is_read_from_the_rotated_files(past: Past, names: tuple[str, str]) -> None:
    past.end()
    past.look()
    gone = []
    for name in names:
        gone.append(past.end())
        past.rotate(name)
    past.end()
    for ref in gone:
        past.remove(ref)  # so that the feed alone can tell
    assert len(past.ids()) == 4
    past.end()
    assert len(past.ids()) == 5


def test_a_feed_that_was_copied_and_truncated_goes_on(past: Past) -> None:
    past.end()
    past.look()
    gone = past.end()
    shutil.copy2(past.feed, past.feed.with_name(f"{RESULTS}.1"))
    past.feed.write_bytes(b"")
    past.remove(gone)
    assert len(past.ids()) == 2
    past.end()
    assert len(past.ids()) == 3


def test_a_feed_that_was_written_anew_costs_a_look_through_all_and_loses_nothing(past: Past) -> None:
    first = past.end()
    past.look()
    past.remove(first)
    second = past.end(announce=False)  # told by a line that nobody can read any more
    past.feed.write_bytes(b"")
    third = past.end()
    assert past.ids() == [first.id, second.id, third.id]


def read_all(past: Past, place: feed.Place | None = None) -> list[tuple[bytes, feed.Place]]:
    return list(feed.lines(past.feed, place))


def test_a_feed_whose_beginning_was_trimmed_is_read_on_where_it_was(
    past: Past, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        past.end()
    lines = past.lines()
    place = read_all(past)[4][1]
    past.feed.write_bytes(b"".join(lines[2:]))
    for chunk in (1 << 20, 100, 7):  # the place lies in one piece of what is read, or across several
        monkeypatch.setattr(feed, "_CHUNK", chunk)
        assert [line for line, _ in read_all(past, place)] == lines[5:]


def test_a_place_after_a_line_that_is_like_others_is_told_apart(past: Past) -> None:
    past.end()
    with past.feed.open("ab") as file:
        file.write(b"\n")
    place = read_all(past)[-1][1]
    past.end()
    assert [line for line, _ in read_all(past, place)] == past.lines()[2:]
    past.feed.write_bytes(b"\n" * place.offset)
    with pytest.raises(feed.Lost):
        read_all(past, place)


def test_a_feed_that_is_rotated_by_a_link_at_this_moment_is_read_once(past: Past) -> None:
    past.end()
    past.feed.with_name(f"{RESULTS}.1").hardlink_to(past.feed)
    assert [line for line, _ in read_all(past)] == past.lines()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_every_job_is_in_it(past: Past, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BATCH", 4)
    chance, lying, known = random.Random(seed), set[Ref](), set[str]()
    for number in range(60):
        what = chance.choice(["end", "end", "end", "silent", "remove", "rotate", "trim", "cut", "tear", "gone", "look"])
        if what in ("end", "silent"):
            ref = past.end(chance.choice(["alice", "bob"]), announce=what == "end")
            lying.add(ref)
            known.add(ref.id)
        elif what == "remove":
            seen = set(past.ids())  # of what was neither seen nor told nobody can know
            if gone := sorted(ref for ref in lying if ref.id in seen):
                ref = chance.choice(gone)
                lying.remove(ref)
                past.remove(ref)
        elif not past.feed.exists():
            continue
        elif what == "rotate":
            past.rotate(f".{number}")
        elif what == "trim":
            past.look()
            past.feed.write_bytes(b"".join(past.lines()[1:]))
        elif what == "cut":
            os.truncate(past.feed, chance.randrange(past.feed.stat().st_size + 1))
        elif what == "tear":
            with past.feed.open("ab") as file:
                file.write(b'{"id": "00')
        elif what == "gone":
            past.feed.unlink()
        else:
            past.look()
    assert {row["id"] for row in past.look(rebuild=True)} == known


# Who asks


def test_two_at_once_take_in_each_job_once(home: Home) -> None:
    past = Past(home.root)
    for _ in range(200):
        past.end()
    command = [sys.executable, "-m", "imagend", "history", "--json"]
    asking = [subprocess.Popen(command, cwd=home.root, stdout=subprocess.PIPE) for _ in range(4)]
    told = [json.loads(process.communicate()[0]) for process in asking]
    assert [process.returncode for process in asking] == [0] * 4
    assert [document["total"]["jobs"] for document in told] == [200] * 4
    assert len(past.ids()) == 200


def test_it_is_readable_for_imagends_group_and_nobody_else(past: Past) -> None:
    past.end()
    past.look()
    assert stat.S_IMODE(past.path.stat().st_mode) & ~0o640 == 0


@as_root
def test_root_leaves_it_to_whom_the_spool_belongs(past: Past) -> None:
    os.chown(past.path.parent, 12345, 12345)
    past.end()
    with contextlib.closing(history.look(past.path, past.outputs.root)):
        owners = {path.name: path.stat().st_uid for path in past.path.parent.glob(f"{history.FILE}*")}
    assert owners == {history.FILE: 12345, f"{history.FILE}-wal": 12345, f"{history.FILE}-shm": 12345}


@contextlib.contextmanager
def as_reader(*readable: Path) -> Iterator[None]:
    """As one in imagend's group, who may write nothing here and read these only."""
    for path in readable:
        os.chown(path, -1, 12346)
        path.chmod(0o750 if path.is_dir() else 0o640)
    os.setegid(12346)
    os.seteuid(12346)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def open_to_all(past: Past) -> None:
    """pytest's own folders are closed to others."""
    for folder in (past.path.parent, *past.path.parent.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)


@as_root
def test_who_may_only_read_sees_all_and_changes_nothing(past: Past) -> None:
    first = past.end("alice")
    past.end("bob")
    past.look()
    past.remove(first)
    past.end("alice")
    past.end("bob")
    open_to_all(past)
    before = past.path.read_bytes()
    alice = past.outputs.root / "alice"
    with as_reader(past.path, past.outputs.root, alice, *alice.rglob("*")):
        rows = past.look()
        with pytest.raises(SpoolUnusable, match="only who may write it"):
            past.look(rebuild=True)
    seen = [(row["client"], row["from_manifest"]) for row in rows]
    assert seen == [("alice", 1), ("bob", 1), ("alice", 1), ("bob", 0)]  # bob's results are not for this reader
    assert past.path.read_bytes() == before
    assert [path.name for path in past.path.parent.iterdir()] == [history.FILE]


@as_root
def test_who_may_only_read_sees_nothing_half_that_another_writes(past: Past) -> None:
    past.end()
    open_to_all(past)
    with contextlib.closing(history.look(past.path, past.outputs.root)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE jobs SET model = 'half'")
        with as_reader(*past.path.parent.glob(f"{history.FILE}*"), past.outputs.root):
            (row,) = past.look()
        assert row["model"] == "shapes-xl"
        database.execute("ROLLBACK")


@as_root
def test_who_may_not_read_it_is_told(past: Past) -> None:
    past.end()
    past.look()
    open_to_all(past)
    with as_reader(past.outputs.root), pytest.raises(SpoolUnusable, match="own user and group"):
        past.look()


# What is no history, and disks that refuse


def test_a_damaged_one_is_told_with_the_remedy_which_keeps_it(past: Past) -> None:
    past.end()
    past.look()
    past.path.write_bytes(b"no database" * 1000)
    with pytest.raises(HistoryUnusable, match="imagend history --rebuild"):
        past.look()
    aside = history.set_aside(past.path)
    assert aside is not None
    assert aside.read_bytes() == b"no database" * 1000
    assert [row["model"] for row in past.look(rebuild=True)] == ["shapes-xl"]
    assert history.set_aside(past.path) is None


@pytest.mark.parametrize("sql", ["PRAGMA user_version = 2", "DROP TABLE jobs"])
def test_one_of_another_version_is_not_touched_before_a_rebuild(past: Past, sql: str) -> None:
    past.end()
    past.look()
    with contextlib.closing(sqlite3.connect(past.path)) as database:
        database.execute(sql)
        database.commit()
    with pytest.raises(HistoryUnusable):
        past.look()
    assert history.set_aside(past.path) is not None
    assert len(past.look(rebuild=True)) == 1


def test_a_batch_that_the_disk_refuses_is_taken_in_whole_later(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    past.end()
    past.look()
    past.end()
    last = past.end()
    tell = history._told_by_manifest

    def refusing(ref: Ref, manifest: dict[str, Any]) -> dict[str, Any]:
        if ref == last:
            raise sqlite3.OperationalError("database or disk is full")
        return tell(ref, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(history, "_told_by_manifest", refusing)
        with pytest.raises(SpoolUnusable, match=r"disk is full.*imagend check"):
            past.look()
    with contextlib.closing(sqlite3.connect(past.path)) as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    assert len(past.ids()) == 3


# The command


@pytest.fixture
def busy(home: Home) -> Past:
    """20 jobs of alice's that took 1, 2, … 20 s, and two that failed; and three of bob's."""
    past = Past(home.root)
    error = {"code": "OUT_OF_MEMORY", "message": "too large"}
    for seconds in range(1, 21):
        past.end(seconds=float(seconds), accepted_at=START - timedelta(hours=1))
    for _ in range(2):
        past.end(outcome="failed", error=error, seconds=100.0)
    past.end("bob", outcome="cancelled", seconds=None)
    past.end("bob", seconds=0.5, spec={"model": "pony"})
    past.end("bob", kind="upscale", spec={}, seconds=0.25)
    return past


def asked(home: Home, *options: object) -> dict[str, Any]:
    done = imagend("history", "--json", *options, cwd=home.root)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.usefixtures("busy")
def test_the_figures(home: Home) -> None:
    document = asked(home)
    assert document["total"]["jobs"] == 25
    alice, bob = document["clients"]
    assert (alice["name"], alice["jobs"], alice["succeeded"], alice["failed"]) == ("alice", 22, 20, 2)
    assert alice["success_ratio"] == pytest.approx(20 / 22, abs=1e-4)
    assert (alice["seconds_p50"], alice["seconds_p95"]) == (10.0, 19.0)  # the failed ones took 100 s
    assert (bob["name"], bob["jobs"], bob["cancelled"], bob["success_ratio"]) == ("bob", 3, 1, 1.0)
    assert (bob["seconds_p50"], bob["seconds_p95"]) == (0.25, 0.5)
    assert (bob["waited_seconds_p50"], bob["waited_seconds_p95"]) == (9.5, 9.75)
    models = [(model["name"], model["jobs"]) for model in document["models"]]
    assert models == [("shapes-xl", 23), (None, 1), ("pony", 1)]


@pytest.mark.usefixtures("busy")
def test_what_is_asked_for_is_shown_and_counted(home: Home) -> None:
    assert {job["client"] for job in asked(home, "--client", "bob")["jobs"]} == {"bob"}
    assert asked(home, "--client", "bob", "--model", "pony")["total"]["jobs"] == 1
    failed = asked(home, "--failed")
    assert {job["code"] for job in failed["jobs"]} == {"OUT_OF_MEMORY"}
    assert (len(failed["jobs"]), failed["total"]["jobs"]) == (2, 25)
    since = (START + timedelta(minutes=20)).isoformat()
    assert [asked(home, "--since", text)["total"]["jobs"] for text in (since, since[:19], since[:10])] == [5, 5, 25]
    recently = asked(home, "--since", "1m")
    assert (recently["jobs"], recently["total"], recently["clients"]) == ([], None, [])
    assert len(asked(home)["jobs"]) == 20
    assert len(asked(home, "--limit", 0)["jobs"]) == 25
    (last,) = asked(home, "--limit", 1)["jobs"]
    assert (last["kind"], last["ended_at"], last["seconds"]) == ("upscale", "2026-11-20T15:24:00.000+00:00", 0.25)


@pytest.mark.usefixtures("busy")
def test_the_table(home: Home) -> None:
    lines = imagend("history", "--limit", 2, cwd=home.root).stdout.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["2026-11-20", "15:23:00", f"bob/{23:020x}", "generate", "succeeded", "0.5", "s", "9.5", "s", "pony"],
        ["2026-11-20", "15:24:00", f"bob/{24:020x}", "upscale", "succeeded", "0.2", "s", "9.8", "s", "-"],
    ]
    assert [line.split()[:7] for line in lines[4:7]] == [
        ["client", "jobs", "succeeded", "partial", "failed", "cancelled", "success"],
        ["alice", "22", "20", "0", "2", "0", "90.9%"],
        ["bob", "3", "2", "0", "0", "1", "100.0%"],
    ]
    assert lines[-1].split()[:7] == ["all", "25", "22", "0", "2", "1", "91.7%"]
    assert imagend("history", "--failed", cwd=home.root).stdout.count("OUT_OF_MEMORY") == 2


def test_before_the_first_job_and_with_wrong_words(home: Home) -> None:
    assert imagend("history", cwd=home.root).stdout == "no job has ended\n"
    for options, word in [(("--since", "soon"), "write 24h, 7d"), (("--limit", -1), "0 (all) or more")]:
        done = imagend("history", *options, cwd=home.root)
        assert (done.returncode, word in done.stderr) == (64, True)


def test_a_damaged_one_is_mended_by_the_command_that_the_error_names(home: Home, busy: Past) -> None:
    busy.path.write_bytes(b"no database" * 1000)
    done = imagend("history", cwd=home.root)
    assert (done.returncode, "imagend history --rebuild" in done.stderr) == (74, True)
    done = imagend("history", "--rebuild", "--json", cwd=home.root)
    assert done.returncode == 0
    assert "history.db.damaged" in done.stderr
    assert json.loads(done.stdout)["total"]["jobs"] == 25


def test_it_lies_where_config_yaml_says(home: Home) -> None:
    with (home.root / "config.yaml").open("a") as config:
        config.write("history: elsewhere/jobs.db\n")
    (home.root / "elsewhere").mkdir()
    asked(home)
    assert (home.root / "elsewhere" / "jobs.db").exists()
    assert not (home.config.spool / history.FILE).exists()


def test_the_jobs_of_a_daemon_are_in_it(home: Home) -> None:
    well, failed = home.drop(prompt="a red circle", count=2), home.drop(prompt="fail")
    daemon = home.daemon()
    run_until_idle(daemon)
    jobs = {job["id"]: job for job in asked(home)["jobs"]}
    assert jobs.keys() == {well.id, failed.id}
    assert [jobs[well.id][key] for key in ("outcome", "pictures", "model")] == ["succeeded", 2, "shapes-xl"]
    assert jobs[failed.id]["code"] == home.manifest(failed)["error"]["code"]
    assert jobs[well.id]["seconds"] >= 0
    home.drop(nonce="another")
    run_until_idle(daemon)
    assert len(asked(home)["jobs"]) == 3
