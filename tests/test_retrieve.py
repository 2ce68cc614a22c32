"""A result is copied whole, durable and as its manifest says, before anybody is told that it was."""

from __future__ import annotations

import grp
import json
import os
import stat
from pathlib import Path

import pytest
from conftest import CLIENT, Home, run_until_idle
from disk import Op, Recorder, watched
from test_cli import imagend

from imagend import config as configuration
from imagend import results
from imagend.errors import ResultDamaged
from imagend.job import Ref


def painted(home: Home, **fields: object) -> tuple[Ref, Path]:
    ref = home.drop(**fields)
    run_until_idle(home.daemon())
    return ref, home.config.outputs / ref.client / ref.id


def test_a_result_is_copied_with_its_manifest_and_marked(home: Home, tmp_path: Path) -> None:
    ref, source = painted(home, seed=7, count=2)
    (tmp_path / "config.yaml").write_text(f"outputs: {home.config.outputs}\nclient: {{name: {CLIENT}}}\n")
    done = imagend("retrieve", ref.id, "here", cwd=tmp_path)  # a host that sees the outputs only
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"here/{ref.id}/{name}" for name in ("0000.png", "0001.png", "manifest.json")]
    names = {"0000.png", "0001.png", "manifest.json"}
    copies = {path.name: path.read_bytes() for path in (tmp_path / "here" / ref.id).iterdir()}
    assert copies == {name: (source / name).read_bytes() for name in names}
    assert (source / "retrieved").stat().st_mtime_ns > (source / "manifest.json").stat().st_mtime_ns


def test_it_is_marked_only_after_all_is_durable(home: Home, tmp_path: Path) -> None:
    ref, source = painted(home, seed=7)
    recorder = Recorder()
    with watched(recorder):
        results.copy(source, tmp_path / "to", home.manifest(ref))
        results.mark(source)
    steps = [(op.name, Path(op.target or op.path).name) for op in recorder.ops]
    marked = steps.index(("open", "retrieved"))
    for name in ("0000.png", "manifest.json"):
        assert steps.index(("fsync", f".{name}.tmp")) < steps.index(("rename", name)) < marked
    assert Op("fsync", str(tmp_path / "to")) in recorder.ops[:marked]


def test_a_damaged_picture_is_told_and_nothing_is_marked(home: Home, tmp_path: Path) -> None:
    ref, source = painted(home, seed=7)
    picture = source / "0000.png"
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    done = imagend("retrieve", ref.id, tmp_path / "to", "--json", cwd=home.root)
    assert done.returncode == 74
    assert json.loads(done.stdout)["error"]["code"] == "RESULT_DAMAGED"
    assert not (source / "retrieved").exists()
    assert not (tmp_path / "to" / ref.id / "manifest.json").exists()


@pytest.mark.parametrize("name", ["../manifest.json", ".hidden", "a/b", ""])
def test_a_manifest_leads_to_no_other_file(tmp_path: Path, name: str) -> None:
    artifact = {"file": name, "size": 0, "sha256": "0" * 64}
    with pytest.raises(ResultDamaged, match="none of ours"):
        results.copy(tmp_path, tmp_path / "to", {"artifacts": [artifact]})


@pytest.mark.parametrize(("prompt", "status"), [("fail", 1), ("a red circle", 0)])
def test_the_exit_status_tells_how_the_job_ended(home: Home, tmp_path: Path, prompt: str, status: int) -> None:
    ref, _ = painted(home, prompt=prompt)
    done = imagend("retrieve", ref.id, tmp_path / "to", "--json", cwd=home.root)
    assert done.returncode == status
    told = json.loads(done.stdout)
    assert told["marked"] is True
    assert told["files"][-1] == "manifest.json"


def test_what_has_no_result_is_named(home: Home, tmp_path: Path) -> None:
    ref = home.drop()
    done = imagend("retrieve", ref.id, tmp_path / "to", cwd=home.root)
    assert (done.returncode, f"imagend watch {CLIENT}/{ref.id}" in done.stderr) == (64, True)
    done = imagend("retrieve", "0" * 20, tmp_path / "to", cwd=home.root)
    assert (done.returncode, "Write CLIENT/ID" in done.stderr) == (64, True)
    assert not (tmp_path / "to").exists()


def test_the_clients_group_may_mark_and_change_nothing_else(home: Home) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    config = home.root / "config.yaml"
    config.write_text(f"{config.read_text()}clients: {{{CLIENT}: {{group: {group}}}}}\n")
    home.config = configuration.load(config)
    _, folder = painted(home)
    marker, manifest = (folder / "retrieved").stat(), (folder / "manifest.json").stat()
    assert stat.S_IMODE(marker.st_mode) == 0o660
    assert (stat.S_IMODE(manifest.st_mode), stat.S_IMODE(folder.stat().st_mode) & 0o777) == (0o640, 0o750)
    assert marker.st_mtime_ns <= manifest.st_mtime_ns  # nobody has retrieved it
    results.mark(folder)
    assert (folder / "retrieved").stat().st_mtime_ns > manifest.st_mtime_ns
