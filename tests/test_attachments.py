"""Pictures that are sent along with a job: from the inbox to the worker, and gone when nobody needs them any more."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle, step
from fakes import FakeExecutor
from test_door import GRACE_S, inbox, make_door, rejected, take

from imagend.attachments import Attachments
from imagend.daemon.loop import Daemon
from imagend.errors import UsageError
from imagend.job import Ref

PHOTO = b"no picture at all: the daemon does not look"
SHA256 = hashlib.sha256(PHOTO).hexdigest()
NAME = f"sha256:{SHA256}"


def send(home: Home, raw: bytes = PHOTO, folder: str = "", sha256: str = "") -> str:
    """Drop a picture as a careful client does; its name."""
    sha256 = sha256 or hashlib.sha256(raw).hexdigest()
    home.put(raw, f"{folder}files/{sha256}")
    return f"sha256:{sha256}"


def kept(home: Home) -> list[str]:
    root = home.config.spool / "attachments"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def runs(daemon: Daemon) -> list[dict[str, str]]:
    executor = daemon.executor
    assert isinstance(executor, FakeExecutor)
    return [run.pictures for run in executor.runs]


# At the door


def test_a_picture_is_brought_in_with_its_job_and_stays_in_the_inbox_for_others(home: Home) -> None:
    door = make_door(home)
    ref, other = home.drop(image=send(home)), home.drop(image=NAME, nonce="2")
    assert set(take(door)) == {ref, other}
    assert kept(home) == sorted([f"alice/{SHA256}", *(f"alice/{one.id}.{SHA256}" for one in (ref, other))])
    assert (home.config.spool / "attachments" / "alice" / SHA256).read_bytes() == PHOTO
    assert inbox(home) == [f"files/{SHA256}"]
    status = (home.config.spool / "attachments" / "alice" / SHA256).stat()
    assert (status.st_nlink, status.st_mode & 0o777) == (3, 0o600)


def test_a_clients_own_folder_has_files_of_its_own(home: Home) -> None:
    send(home, folder="box/")
    home.drop(name="box/a.json", image=NAME)
    assert len(take(make_door(home))) == 1
    home.drop(name="b.json", image=NAME, nonce="elsewhere")  # alice has it in the spool by now
    assert len(take(make_door(home))) == 1


def test_what_a_client_sent_is_not_anothers(home: Home) -> None:
    send(home, folder="box/")
    home.drop(name="box/a.json", image=NAME)
    door = make_door(home)
    take(door)
    home.neighbour("bob").drop(name="b.json", image=NAME)
    door = make_door(home)
    assert take(door) == []
    take(door, now=GRACE_S + 1)
    assert rejected(home) == ["b.json"]


def test_a_picture_may_come_a_little_late(home: Home) -> None:
    door = make_door(home)
    ref = home.drop("a.json", image=NAME)
    assert take(door) == []
    send(home)
    assert take(door, now=GRACE_S + 1) == [ref]


@pytest.mark.parametrize(
    ("code", "why"),
    [("PICTURE_NOT_FOUND", f"The picture {NAME} is not there: drop it as files/{SHA256} into the inbox")],
)
def test_one_that_never_comes_is_waited_for_and_then_the_job_is_rejected(home: Home, code: str, why: str) -> None:
    door = make_door(home)
    home.drop("a.json", image=NAME)
    assert take(door) == rejected(home) == []
    take(door, now=GRACE_S + 1)
    assert rejected(home) == ["a.json"]
    assert home.reason("a.json")["code"] == code
    assert home.reason("a.json")["message"].startswith(why)
    assert home.reason("a.json")["detail"] == [{"field": "image", "value": NAME}]


def test_other_bytes_than_the_name_says_are_refused(home: Home) -> None:
    door = make_door(home)
    send(home, b"half of it", sha256=SHA256)
    home.drop("a.json", image=NAME)
    assert take(door) == take(door, now=GRACE_S + 1) == []
    assert home.reason("a.json")["code"] == "INVALID_PARAMETERS"
    assert hashlib.sha256(b"half of it").hexdigest() in home.reason("a.json")["message"]
    assert kept(home) == []


def test_one_that_is_too_large_is_refused_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagend.daemon.sent_along.MAX_PICTURE_BYTES", len(PHOTO) - 1)
    send(home)
    home.drop("a.json", image=NAME)
    take(make_door(home))
    assert home.reason("a.json")["code"] == "PAYLOAD_TOO_LARGE"
    assert kept(home) == []


@pytest.mark.parametrize("trick", ["link", "folder", "pipe", "linked folder"])
def test_tricks_are_refused(home: Home, trick: str) -> None:
    secret = home.root / "secret"
    secret.mkdir()
    (secret / SHA256).write_bytes(PHOTO)
    folder = home.config.inboxes[0] / "files"
    if trick == "linked folder":
        folder.symlink_to(secret)
    else:
        folder.mkdir()
        match trick:
            case "link":
                (folder / SHA256).symlink_to(secret / SHA256)
            case "folder":
                (folder / SHA256).mkdir()
            case "pipe":
                os.mkfifo(folder / SHA256)
    door = make_door(home)
    home.drop("a.json", image=NAME)
    assert take(door) == take(door, now=GRACE_S + 1) == []
    assert rejected(home) == ["a.json"]
    assert kept(home) == []


def test_a_full_disk_takes_no_picture_and_the_job_waits(home: Home) -> None:
    send(home)
    home.drop("a.json", image=NAME)
    door = make_door(home, reserve_mb=1 << 40)
    assert take(door) == []
    assert "No space left on device" in str(door.trouble)
    assert rejected(home) == kept(home) == []
    door.policy = make_door(home).policy
    assert len(take(door, now=20.0)) == 1


def test_what_lies_in_files_for_a_day_is_swept(home: Home) -> None:
    send(home)
    send(home, folder="box/")
    home.put(b"an unfinished one", "files/.part")
    (home.config.inboxes[0] / "files" / "folder").mkdir()
    door = make_door(home)
    door.measure(0.0)
    assert len(inbox(home)) == 3
    at = time.time()
    door._inbox.sweep_attachments(at - 3600)
    assert len(inbox(home)) == 3
    door._inbox.sweep_attachments(at + 3600)
    assert inbox(home) == []


# From the queue to the end


def test_the_worker_gets_it_and_with_the_job_it_goes(home: Home) -> None:
    daemon = home.daemon()
    ref, stays = home.drop(image=send(home)), home.drop(image=NAME, prompt="stay", priority=1)
    run_until(daemon, lambda: len(runs(daemon)) == 2)
    place = home.config.spool / "attachments" / "alice"
    assert {run[NAME] for run in runs(daemon)} == {str(place / f"{one.id}.{SHA256}") for one in (ref, stays)}
    run_until(daemon, lambda: kept(home) == sorted([f"alice/{stays.id}.{SHA256}", f"alice/{SHA256}"]))
    home.drop(kind="cancel", job=stays.id, prompt=...)
    run_until_idle(daemon)
    assert kept(home) == []
    assert home.manifest(ref)["spec"]["image"] == NAME


def test_a_job_that_is_known_already_or_refused_leaves_nothing(home: Home) -> None:
    daemon = home.daemon()
    send(home)
    body = home.body(image=NAME)
    home.drop_body(body)
    run_until_idle(daemon)
    home.drop_body(body, "again.json")
    run_until_idle(daemon)
    assert kept(home) == []
    limits = daemon.settings.config.limits.model_copy(update={"max_queued": 0})
    daemon.settings.policy = make_door(home, limits=limits).policy
    home.drop("c.json", image=NAME, nonce="3")
    run_until_idle(daemon)
    assert home.reason("c.json")["code"] == "QUEUE_FULL"
    assert kept(home) == []


def test_after_a_crash_a_queued_job_has_its_picture_and_leftovers_are_gone(home: Home) -> None:
    daemon = home.daemon()
    busy = home.drop(prompt="stay", nonce="busy")
    run_until(daemon, lambda: len(runs(daemon)) == 1)
    ref = home.drop(image=send(home))
    while home.where(ref) is None:
        step(daemon)
    other = Ref("alice", "0" * 20)
    daemon.spool.attachments.keep(other, SHA256, bytes)  # a door had it, the loop never saw the job
    daemon.spool.attachments.keep(other, "1" * 64, lambda: b"x")
    daemon.spool.attachments.keep(Ref("bob", "1" * 20), SHA256, lambda: PHOTO)
    daemon.spool.close()
    del daemon
    daemon = home.daemon()
    assert kept(home) == sorted([f"alice/{ref.id}.{SHA256}", f"alice/{SHA256}"])
    home.drop(kind="cancel", job=busy.id, prompt=...)
    run_until_idle(daemon)
    assert kept(home) == []
    assert home.outcome(ref) == "succeeded"


def test_jobs_without_pictures_touch_nothing(home: Home) -> None:
    daemon = home.daemon()
    home.drop()
    run_until_idle(daemon)
    assert not (home.config.spool / "attachments").exists()


def test_a_release_that_the_disk_refused_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attachments, ref = Attachments(tmp_path), Ref("a", "0" * 20)
    attachments.keep(ref, SHA256, lambda: PHOTO)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            attachments.release(ref)
    attachments.release(ref)
    assert list((tmp_path / "a").iterdir()) == []


# As it is typed


def imagend(home: Home, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "imagend", *map(str, arguments)]
    return subprocess.run(line, cwd=home.root, capture_output=True, text=True, check=False)


def test_submit_sends_the_picture_along(home: Home) -> None:
    (home.root / "photo.png").write_bytes(PHOTO)
    done = imagend(home, "submit", "generate", "--prompt", "p", "--image", "photo.png", "--strength", "0.5")
    assert done.returncode == 0, done.stderr
    daemon = home.daemon()
    run_until_idle(daemon)
    manifest = home.manifest(Ref("alice", done.stdout.strip()))
    assert (manifest["outcome"], manifest["spec"]["image"], manifest["spec"]["strength"]) == ("succeeded", NAME, 0.5)


def test_submit_takes_a_name_of_the_library_as_it_is(home: Home) -> None:
    done = imagend(home, "submit", "generate", "--prompt", "p", "--image", "leona/front")
    (job,) = home.config.inboxes[0].glob("*.json")
    assert done.returncode == 0
    assert json.loads(job.read_text())["image"] == "leona/front"
    done = imagend(home, "submit", "generate", "--prompt", "p", "--image", "photo.png")
    assert done.returncode == 64
    assert "image:" in done.stderr


def test_nothing_is_sent_along_with_a_job_that_is_refused_here(home: Home) -> None:
    (home.root / "photo.png").write_bytes(PHOTO)
    done = imagend(home, "submit", "generate", "--prompt", "p", "--image", "photo.png", "--strength", "1.5")
    assert done.returncode == 64
    assert inbox(home) == []


def test_replay_of_an_edit_wants_its_mask_and_its_references_again(home: Home, tmp_path: Path) -> None:
    from imagend.cli import replay

    paths, names = [], []
    for view in ("photo", "mask", "hat", "where"):
        path = tmp_path / f"{view}.png"
        path.write_bytes(view.encode())
        paths.append(path)
        names.append(f"sha256:{hashlib.sha256(view.encode()).hexdigest()}")
    spec = {
        "prompt": "p",
        "image": names[0],
        "mask": {"image": names[1]},
        "width": None,
        "path": "complex",
        "guide": [],
    }
    spec |= {"references": [{"image": names[2], "mask": names[3]}], "seeds": [7]}
    ref, manifest = Ref("alice", "0" * 20), {"kind": "edit", "spec": spec}
    for number in range(4):
        some = paths[:number] + paths[number + 1 :]
        with pytest.raises(UsageError, match=names[number]):
            replay.send_again(home.config, ref, manifest, some, {})
    daemon = home.daemon()
    again = replay.send_again(home.config, ref, manifest, paths, {})
    run_until_idle(daemon)
    assert home.outcome(again) == "succeeded"


def test_replay_wants_the_picture_again(home: Home) -> None:
    from imagend.cli import replay

    manifest: dict[str, Any] = {"kind": "generate", "spec": {"prompt": "p", "image": NAME}}
    ref, photo = Ref("alice", "0" * 20), home.root / "photo.png"
    with pytest.raises(UsageError, match="give it, --image FILE"):
        replay.send_again(home.config, ref, manifest, [], {})
    photo.write_bytes(b"another one")
    with pytest.raises(UsageError, match="give it, --image FILE"):
        replay.send_again(home.config, ref, manifest, [photo], {})
    with pytest.raises(UsageError, match="Leave it out"):
        replay.send_again(home.config, ref, {"kind": "generate", "spec": {"prompt": "p"}}, [photo], {})
    photo.write_bytes(PHOTO)
    replay.send_again(home.config, ref, manifest, [photo], {})
    assert len(take(make_door(home))) == 1


def test_control_pictures_are_sent_along_too(home: Home) -> None:
    for name in ("a.png", "b.png"):
        (home.root / name).write_bytes(name.encode())
    line = ("--prompt", "p", "--control", "canny=a.png:0.7", "--control", "depth=leona/depth", "--image", "b.png")
    done = imagend(home, "submit", "generate", *line)
    assert done.returncode == 0, done.stderr
    (job,) = home.config.inboxes[0].glob("*.json")
    names = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("a.png", "b.png")}
    assert json.loads(job.read_text())["image"] == names["b.png"]
    assert [one["image"] for one in json.loads(job.read_text())["control"]] == [names["a.png"], "leona/depth"]
    (arrival,) = make_door(home).look(0.0)
    assert arrival.item.spec.pictures  # type: ignore[union-attr]
    assert len([name for name in kept(home) if "." in name]) == 2
