"""Results on disk: a draft is anything, an output is whole. Crashes in between are tests/test_crash.py's."""

from __future__ import annotations

import errno
import grp
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imagend import feed, files
from imagend.errors import DiskLost, MissingOutput
from imagend.fields import numbered
from imagend.job import Outcome, Ref
from imagend.manifest import Artifact, Manifest
from imagend.outputs import RESULTS, Outputs

REF = Ref("alice", "a" * 20)
OTHER = Ref("bob", "b" * 20)
MOMENT = datetime(2026, 11, 20, 15, tzinfo=UTC)


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    outputs = Outputs(tmp_path / "outputs")
    outputs.open()
    return outputs


def artifact(file: str, data: bytes = b"picture") -> Artifact:
    digest = hashlib.sha256(data).hexdigest()
    return Artifact(
        index=0,
        file=file,
        width=8,
        height=8,
        size=len(data),
        sha256=digest,
        pixels_sha256=digest,
        seed=7,
        seconds=0.5,
    )


def manifest(ref: Ref = REF, *artifacts: Artifact, **fields: Any) -> Manifest:
    base: dict[str, Any] = {
        "schema": "imagend.manifest/v1",
        "id": ref.id,
        "client": ref.client,
        "kind": "generate",
        "outcome": Outcome.SUCCEEDED,
        "issued_at": MOMENT,
        "accepted_at": MOMENT,
        "ended_at": MOMENT,
        "attempts": 1,
        "spec": {"prompt": "a red circle"},
        "artifacts": artifacts,
    }
    return Manifest(**(base | fields))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def told(outputs: Outputs) -> list[str]:
    """The ids in the feed, as a careful reader finds them."""
    ids = []
    for line in (outputs.root / RESULTS).read_bytes().splitlines():
        try:
            ids.append(json.loads(line)["id"])
        except ValueError:
            continue
    return ids


# Drafts


def test_a_draft_is_kept_between_attempts_and_daemons(outputs: Outputs) -> None:
    (outputs.draft(REF) / "0000.png").write_bytes(b"picture")
    again = Outputs(outputs.root)
    again.open()
    again.sweep({REF})
    assert names(again.draft(REF)) == ["0000.png"]
    assert not again.ended(REF)


def test_what_a_worker_put_in_a_drafts_place_makes_room_for_one(outputs: Outputs, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    folder = outputs.draft(REF)
    for put in (lambda: folder.symlink_to(elsewhere), lambda: os.mkfifo(folder), folder.touch):
        folder.rmdir()
        put()
        assert outputs.draft(REF) == folder
        assert folder.is_dir()
        assert not folder.is_symlink()


def test_only_drafts_of_the_dead_are_swept(outputs: Outputs) -> None:
    mate = Ref(REF.client, "c" * 20)
    for ref in (REF, mate, OTHER):
        (outputs.draft(ref) / "0000.png").write_bytes(b"picture")
    outputs.publish(OTHER, manifest(OTHER, artifact("0000.png")))
    outputs.sweep({mate})
    assert names(outputs.root / ".drafts" / REF.client) == [mate.id]
    assert names(outputs.draft(mate)) == ["0000.png"]
    assert outputs.ended(OTHER)


def test_an_emptied_draft_is_empty(outputs: Outputs) -> None:
    folder = outputs.draft(REF)
    (folder / "0000.png").write_bytes(b"picture")
    (folder / "deep" / "er").mkdir(parents=True)
    outputs.empty_draft(REF)
    assert names(folder) == []


# Sealing


def test_seal_keeps_what_was_told_of_and_nothing_else(outputs: Outputs, tmp_path: Path) -> None:
    folder = outputs.draft(REF)
    for name in ("0000.png", "0001.png", "0002.png", ".0000.json", ".0003.png.tmp", "manifest.json"):
        (folder / name).write_bytes(b"picture")
    (folder / "folder").mkdir()
    (folder / "folder" / "file").touch()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (folder / "link").symlink_to(precious)
    outputs.seal(REF, [artifact("0000.png"), artifact("0001.png")], numbered([7, 7]))
    assert names(folder) == ["0000.png", "0001.png"]
    assert names(precious) == ["file"]


def test_seal_refuses_what_is_missing(outputs: Outputs) -> None:
    with pytest.raises(MissingOutput, match=r"0000\.png"):
        outputs.seal(REF, [artifact("0000.png")], numbered([7]))


def test_seal_refuses_changed_bytes(outputs: Outputs) -> None:
    (outputs.draft(REF) / "0000.png").write_bytes(b"PICTURE")
    with pytest.raises(MissingOutput):
        outputs.seal(REF, [artifact("0000.png")], numbered([7]))


@pytest.mark.parametrize("shown", [["0000.png"], ["0000.png"] * 2, ["0000.png", "0001.png", "0002.png"]])
def test_seal_refuses_another_number_than_was_asked_for(outputs: Outputs, shown: list[str]) -> None:
    for name in shown:
        (outputs.draft(REF) / name).write_bytes(b"picture")
    with pytest.raises(MissingOutput):
        outputs.seal(REF, [artifact(name) for name in shown], numbered([7, 7]))


@pytest.mark.parametrize("kind", ["symlink", "folder", "pipe"])
def test_seal_refuses_what_is_no_regular_file(outputs: Outputs, tmp_path: Path, kind: str) -> None:
    path, elsewhere = outputs.draft(REF) / "0000.png", tmp_path / "elsewhere.png"
    elsewhere.write_bytes(b"picture")
    match kind:
        case "symlink":
            path.symlink_to(elsewhere)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    with pytest.raises(MissingOutput):
        outputs.seal(REF, [artifact("0000.png")], numbered([7]))


@pytest.mark.parametrize("name", ["../0000.png", "manifest.json", "0000.PNG", "0000.png\n", "00000.png", "", "."])
def test_seal_refuses_names_that_no_worker_may_choose(outputs: Outputs, name: str) -> None:
    path = outputs.draft(REF) / name
    if not path.is_dir():
        path.write_bytes(b"picture")  # the name alone must not pass
    with pytest.raises(MissingOutput):
        outputs.seal(REF, [artifact(name)], numbered([7]))


def test_seal_refuses_an_absolute_name(outputs: Outputs, tmp_path: Path) -> None:
    path = tmp_path / "0000.png"
    path.write_bytes(b"picture")
    with pytest.raises(MissingOutput):
        outputs.seal(REF, [artifact(str(path))], numbered([7]))


def chained(outputs: Outputs) -> tuple[Path, list[Artifact]]:
    """The draft of a chain of one picture, and what is told of it."""
    folder = outputs.draft(REF)
    for step in ("generate", "upscale"):
        (folder / step).mkdir()
        for name in ("0000.png", ".0000.json", "0001.png"):
            (folder / step / name).write_bytes(b"picture")
        (folder / step / "deep").mkdir()
    (folder / "0000.png").write_bytes(b"picture")
    return folder, [artifact("generate/0000.png"), artifact("upscale/0000.png")]


@pytest.mark.parametrize("steps", [("generate", "upscale"), ("generate",)])
def test_seal_keeps_of_a_chain_the_folders_of_its_steps(outputs: Outputs, steps: tuple[str, ...]) -> None:
    folder, shown = chained(outputs)
    outputs.seal(REF, shown[: len(steps)], numbered([7]), steps)
    assert names(folder) == list(steps)
    assert {name for step in steps for name in names(folder / step)} == {"0000.png"}


@pytest.mark.parametrize("harm", ["a link", "a file", "none", "too few", "the other order"])
def test_seal_refuses_a_step_whose_folder_is_none(outputs: Outputs, tmp_path: Path, harm: str) -> None:
    folder, shown = chained(outputs)
    (folder / "upscale").rename(tmp_path / "elsewhere")
    match harm:
        case "a link":
            (folder / "upscale").symlink_to(tmp_path / "elsewhere")
        case "a file":
            (folder / "upscale").write_bytes(b"picture")
        case "too few":
            shown = shown[:1]
        case "the other order":
            (tmp_path / "elsewhere").rename(folder / "upscale")
            shown = shown[::-1]
    with pytest.raises(MissingOutput):
        outputs.seal(REF, shown, numbered([7]), ("generate", "upscale"))


# Publishing


def test_publish_moves_the_draft_out_with_its_manifest(outputs: Outputs) -> None:
    (outputs.draft(REF) / "0000.png").write_bytes(b"picture")
    assert not outputs.ended(REF)
    outputs.publish(REF, manifest(REF, artifact("0000.png"), label="shot 12"))
    assert outputs.ended(REF)
    assert not outputs.ended(OTHER)
    assert names(outputs.root / REF.client / REF.id) == ["0000.png", "manifest.json"]
    assert names(outputs.root / ".drafts" / REF.client) == []
    written = (outputs.root / REF.client / REF.id / "manifest.json").read_bytes()
    assert Manifest.model_validate_json(written) == manifest(REF, artifact("0000.png"), label="shot 12")
    assert outputs.manifest(REF) == json.loads(written)
    assert outputs.manifest(REF)["schema"] == "imagend.manifest/v1"
    assert b"null" not in written


def test_publish_twice_is_once(outputs: Outputs) -> None:
    outputs.publish(REF, manifest(REF, label="first"))
    (outputs.draft(REF) / "0000.png").write_bytes(b"late")
    outputs.publish(REF, manifest(REF, label="second"))
    assert outputs.manifest(REF)["label"] == "first"
    assert names(outputs.root / REF.client / REF.id) == ["manifest.json"]


def test_what_is_not_ours_in_the_place_of_a_result_neither_stops_us_nor_is_lost(outputs: Outputs) -> None:
    place = outputs.root / REF.client / REF.id
    place.mkdir(parents=True)
    (place / "precious").touch()
    outputs.publish(REF, manifest())
    assert names(place) == ["manifest.json"]
    assert [path.parent.parent for path in outputs.root.rglob("precious")] == [place.parent]


# When the disk refuses


def refusing(name: str) -> Callable[[Path], None]:
    real = files.sync

    def sync(path: Path) -> None:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path)

    return sync


def test_what_an_fsync_refused_is_written_anew_before_it_is_published(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = outputs.draft(REF) / "0000.png"
    picture.write_bytes(b"picture")
    refused = picture.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", refusing("0000.png"))
        outputs.seal(REF, [artifact("0000.png")], numbered([7]))
        with pytest.raises(OSError, match="Input/output"):
            outputs.publish(REF, manifest(REF, artifact("0000.png")))
    assert not outputs.ended(REF)
    assert picture.stat().st_ino == refused
    outputs.seal(REF, [artifact("0000.png")], numbered([7]))
    assert picture.stat().st_ino != refused
    outputs.publish(REF, manifest(REF, artifact("0000.png")))
    assert (outputs.root / "alice" / REF.id / "0000.png").read_bytes() == b"picture"


def test_a_picture_that_the_disk_refused_and_lost_is_painted_again(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = outputs.draft(REF) / "0000.png"
    picture.write_bytes(b"picture")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", refusing("0000.png"))
        with pytest.raises(OSError, match="Input/output"):
            outputs.publish(REF, manifest(REF, artifact("0000.png")))
    picture.write_bytes(b"garbage")  # what the disk really holds
    with pytest.raises(DiskLost, match=r"0000\.png"):
        outputs.seal(REF, [artifact("0000.png")], numbered([7]))


def test_that_a_result_is_there_is_synced_until_it_has_worked(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (outputs.root / "alice").mkdir()
    outputs.publish(REF, manifest())
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", refusing("alice"))
        with pytest.raises(OSError, match="Input/output"):
            outputs.confirm()
    assert outputs.ended(REF)
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    outputs.confirm()
    outputs.confirm()
    assert synced == [outputs.root / "alice"]
    outputs.publish(REF, manifest())  # by one who died before it was confirmed
    outputs.confirm()
    assert synced == [outputs.root / "alice"] * 2


def test_what_was_synced_with_others_is_not_synced_again_and_not_trusted_if_that_failed(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs.begin(REF, manifest())
    folder = outputs.draft(REF)
    assert outputs.unsynced() == [folder / "manifest.json", folder]
    outputs.synced(well=False)
    with pytest.raises(OSError, match="a sync for several failed"):
        outputs.complete(REF)
    assert not outputs.ended(REF)
    outputs.begin(REF, manifest())
    outputs.synced(well=True)
    assert outputs.unsynced() == []
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", refusing("manifest.json"))  # it would be told
        outputs.complete(REF)
    assert outputs.ended(REF)


# The feed


def end(outputs: Outputs, ref: Ref, *artifacts: Artifact, **fields: Any) -> None:
    outputs.publish(ref, manifest(ref, *artifacts, **fields))


def test_the_feed_has_a_line_per_ended_job(outputs: Outputs) -> None:
    end(outputs, REF, artifact("0000.png"), label="shot 12")
    assert not outputs.announced(REF)
    end(outputs, OTHER, outcome=Outcome.FAILED, error={"code": "TIMEOUT", "message": "late"})
    outputs.announce([REF])
    outputs.announce([OTHER])
    first, second = map(json.loads, (outputs.root / RESULTS).read_text().splitlines())
    assert datetime.fromisoformat(first.pop("ended_at")) == MOMENT
    assert first == {
        "id": REF.id,
        "client": "alice",
        "kind": "generate",
        "outcome": "succeeded",
        "manifest": f"alice/{REF.id}/manifest.json",
        "files": ["0000.png"],
        "code": None,
    }
    assert (second["outcome"], second["code"], second["files"]) == ("failed", "TIMEOUT", [])
    assert outputs.announced(REF)
    assert outputs.announced(OTHER)
    outputs.withdraw(OTHER)
    end(outputs, OTHER, outcome=Outcome.CANCELLED)
    assert not outputs.announced(OTHER)  # it was requeued: that line told of its first end


def test_a_feed_cut_anywhere_is_mended_and_tells_of_each_job_once(outputs: Outputs) -> None:
    feed = outputs.root / RESULTS
    end(outputs, OTHER)
    end(outputs, REF, label='a "quoted" {braced} label')
    outputs.announce([OTHER])
    first = feed.read_bytes()
    outputs.announce([REF])
    whole = feed.read_bytes()
    for length in range(len(first), len(whole) + 1):
        feed.write_bytes(whole[:length])
        if not outputs.announced(REF):
            outputs.announce([REF])
        assert outputs.announced(REF)
        assert told(outputs) == [OTHER.id, REF.id], f"after {whole[len(first) : length]!r}"


# Who may read


GROUP = grp.getgrgid(os.getgid()).gr_name


def modes(outputs: Outputs, ref: Ref) -> dict[str, str]:
    folder = outputs.root / ref.client / ref.id
    paths = (folder.parent, folder, *sorted(folder.iterdir()))
    return {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in paths}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_results_are_ours_and_their_clients_groups_to_read_whatever_the_umask(outputs: Outputs, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert outputs.share({"bob": GROUP}) == []
        for ref in (REF, OTHER):
            (outputs.draft(ref) / "0000.png").write_bytes(b"picture")
            end(outputs, ref, artifact("0000.png"))
        outputs.announce([REF])
    finally:
        os.umask(before)
    files = {"0000.png": "640", "manifest.json": "640"}
    assert modes(outputs, REF) == {"alice": f"{0o750 & ~umask:o}", REF.id: "750"} | files
    assert modes(outputs, OTHER) == {"bob": "2750", OTHER.id: "2750", "retrieved": "660"} | files
    assert stat.S_IMODE((outputs.root / ".drafts").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to any group")
def test_a_clients_folders_belong_to_its_group_those_made_later_too(outputs: Outputs) -> None:
    gid = next(entry.gr_gid for entry in grp.getgrall() if entry.gr_gid != os.getgid())
    group = grp.getgrgid(gid).gr_name
    end(outputs, Ref("bob", "c" * 20))  # before it had a group
    assert outputs.share({"bob": group}) == []
    end(outputs, OTHER)
    end(outputs, REF)
    folder = outputs.root / "bob" / OTHER.id
    assert {path.stat().st_gid for path in (folder.parent, folder, folder / "manifest.json")} == {gid}
    assert (outputs.root / "alice" / REF.id / "manifest.json").stat().st_gid == os.getgid()
    shutil.rmtree(outputs.root / "bob")
    end(outputs, OTHER)
    assert ((outputs.root / "bob").stat().st_gid, modes(outputs, OTHER)["bob"]) == (gid, "2750")


def test_a_group_that_does_not_exist_is_told_and_stops_nothing(outputs: Outputs) -> None:
    (wrong,) = outputs.share({"bob": "no-such-group"})
    assert all(word in wrong for word in ("clients.bob.group", "'no-such-group'", "groupadd"))
    end(outputs, OTHER)
    assert outputs.ended(OTHER)


def test_a_group_that_we_may_not_give_to_is_told_and_stops_nothing(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chown(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", os.getgid() + 1, [])))
    (wrong,) = outputs.share({"bob": "web"})
    assert all(word in wrong for word in (str(outputs.root / "bob"), "group web", "a member of web"))
    end(outputs, OTHER)
    assert modes(outputs, OTHER)["bob"] == "750"


def test_the_end_of_a_long_feed_is_found(outputs: Outputs) -> None:
    end(outputs, REF)
    end(outputs, OTHER)
    outputs.announce([OTHER])
    line = (outputs.root / RESULTS).read_bytes()
    (outputs.root / RESULTS).write_bytes(line * (3_000_000 // len(line)))
    assert not outputs.announced(REF)
    outputs.announce([REF])
    assert outputs.announced(REF)


def test_a_long_feed_gives_way_to_a_new_one(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagend.outputs._MAX_RESULTS_BYTES", 1)
    refs = [Ref("alice", f"{number:020}") for number in range(8)]
    for ref in refs:
        end(outputs, ref)
        assert not outputs.announced(ref)
        outputs.announce([ref])
        assert outputs.announced(ref)
    assert told(outputs) == [refs[-1].id]
    assert outputs.announced(refs[-2])  # a crash came, and then a rotation
    assert sorted(path.name for path in outputs.root.glob("results.jsonl*")) == [
        RESULTS,
        *(f"{RESULTS}.{number}" for number in range(1, 5)),
    ]
    kept = [json.loads(line)["id"] for line, _ in feed.lines(outputs.root / RESULTS, None)]
    assert kept == [ref.id for ref in refs[-5:]]
    (outputs.root / RESULTS).rename(outputs.root / f"{RESULTS}.1")  # a rotation without the line it was for
    assert outputs.announced(refs[-1])


def test_at_start_only_that_goes_from_the_trash_which_was_there_before(outputs: Outputs) -> None:
    """What is retired meanwhile may not be durable yet: a power cut could show it again, half gone."""
    for ref in (REF, OTHER):
        end(outputs, ref, artifact("0000.png"))
    before = outputs.retire(REF)
    outputs.settle()
    since = outputs.retire(OTHER)
    assert before
    assert since
    outputs.discard_the_rest()
    assert (before.exists(), since.exists()) == (False, True)
    outputs.discard([(OTHER, since)])
    assert not since.exists()
