"""imagend install, in a root of its own: what it makes, that it does so once, and who may do what in a drop box."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Home
from test_cli import imagend
from test_unit import THRESHOLD, analyze, needs_systemd

from imagend import cli
from imagend import config as configuration
from imagend.cli import doctor, drop, install
from imagend.inbox import Inbox
from imagend.job import Ref
from imagend.signing import job_id

pytestmark = pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="needs systemd (Debian package systemd)")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to others")

UNIT = Path("usr/local/lib/systemd/system/imagend.service")
GROUPS = {"alice": 4001, "bob": 4002}


@pytest.fixture
def root() -> Iterator[Path]:
    """A file system's root with the groups alice and bob, which all may enter."""
    with tempfile.TemporaryDirectory(prefix="imagend-root-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        (path / "etc").mkdir()
        (path / "etc" / "group").write_text("".join(f"{name}:x:{gid}:\n" for name, gid in GROUPS.items()))
        (path / "etc" / "passwd").write_text("")
        yield path


def run(root: Path, *options: str) -> Any:
    return imagend("install", "--root", root, "--client", "alice", "--client", "robert:bob", *options, cwd=root)


def lines(done: Any) -> list[tuple[str, str]]:
    """What it did, and to what."""
    assert done.returncode == 0, done.stderr
    pairs = [line.removeprefix("would ").split(maxsplit=1) for line in done.stdout.splitlines() if line[:1] != " "]
    return [(word, what) for word, what in pairs if word in ("make", "made", "replace", "replaced", "kept", "differs")]


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_mtime_ns)
    return found


def ids(root: Path, name: str) -> tuple[int, int]:
    (line,) = (line.split(":") for line in (root / "etc" / "passwd").read_text().splitlines() if line.startswith(name))
    return int(line[2]), int(line[3])


def test_a_dry_run_tells_all_and_does_nothing(root: Path) -> None:
    before = tree(root)
    told = lines(run(root, "--dry-run"))
    assert tree(root) == before
    assert {word for word, _ in told} == {"make"}
    assert [what for _, what in told] == [what for _, what in lines(run(root))]


@needs_root
def test_what_it_makes_belongs_to_whom_it_should(root: Path) -> None:
    run(root)
    assert configuration.load(root / "etc/imagend/config.yaml").clients["robert"].group == "bob"
    imagend_user, imagend_group = ids(root, "imagend")
    wanted = {
        "etc/imagend": (0, 0, 0o755),
        "etc/imagend/config.yaml": (0, 0, 0o644),
        "etc/imagend/allowed_signers": (0, 0, 0o644),
        "srv/imagend": (0, 0, 0o755),
        "srv/imagend/spool": (imagend_user, imagend_group, 0o755),
        "srv/imagend/outputs": (imagend_user, imagend_group, 0o755),
        "srv/imagend/models/checkpoints": (imagend_user, imagend_group, 0o755),
        "srv/imagend/drop": (imagend_user, imagend_group, 0o755),
        "srv/imagend/drop/inbox": (imagend_user, imagend_group, 0o3771),
        "srv/imagend/drop/inbox/alice": (imagend_user, GROUPS["alice"], 0o3770),
        "srv/imagend/drop/inbox/alice/files": (imagend_user, GROUPS["alice"], 0o3770),
        "srv/imagend/drop/inbox/robert": (imagend_user, GROUPS["bob"], 0o3770),
        "srv/imagend/drop/rejected/alice": (imagend_user, GROUPS["alice"], 0o2750),
        str(UNIT): (0, 0, 0o644),
    }
    for name, (uid, gid, mode) in wanted.items():
        status = (root / name).stat()
        assert (name, status.st_uid, status.st_gid, oct(stat.S_IMODE(status.st_mode))) == (name, uid, gid, oct(mode))
    members = {line.split(":")[0]: line.split(":")[3] for line in (root / "etc/group").read_text().splitlines()}
    assert members == {"alice": "imagend", "bob": "imagend", "imagend": ""}
    assert (root / "srv/imagend/models/diffusers/shapes-xl/model_index.json").exists()
    assert (root / "usr/local/bin/imagend").readlink() == Path("/opt/imagend/bin/imagend")


def test_the_umask_of_root_does_not_matter(root: Path) -> None:
    former = os.umask(0o077)
    try:
        run(root)
    finally:
        os.umask(former)
    for path in (root / UNIT, root / "etc/imagend/config.yaml", *(root / "srv/imagend/models").rglob("*")):
        assert path.stat().st_mode & stat.S_IROTH, path


def test_again_it_changes_nothing(root: Path) -> None:
    run(root)
    before = tree(root)
    assert {word for word, _ in lines(run(root))} == {"kept"}
    assert tree(root) == before


def test_what_the_operator_changed_stays_and_what_it_takes_to_have_it_back_is_said(root: Path) -> None:
    run(root)
    config = root / "etc/imagend/config.yaml"
    config.write_text("spool: /srv/imagend/spool\ninboxes: [/srv/imagend/drop/inbox]\nname: mine\n")
    (root / "srv/imagend/outputs").chmod(0o711)
    hiding = root / "etc/systemd/system/imagend.service"
    hiding.parent.mkdir(parents=True)
    hiding.write_text("[Service]\n")
    config.write_text(config.read_text() + "outputs: /srv/imagend/outputs\n")
    command = root / "usr/local/bin/imagend"
    command.unlink()
    command.write_text("#!/bin/sh\n")
    done = run(root)
    assert f"ln -sfn /opt/imagend/bin/imagend {command}" in done.stdout
    assert not command.is_symlink()
    assert ("differs", "/srv/imagend/outputs  imagend:imagend 0755") in lines(done)
    assert f"chmod 0755 {root}/srv/imagend/outputs" in done.stdout
    assert stat.S_IMODE((root / "srv/imagend/outputs").stat().st_mode) == 0o711
    assert "name: mine" in config.read_text()
    assert "under clients: alice: {group: alice}" in done.stdout
    assert "rm /etc/systemd/system/imagend.service" in done.stdout
    assert hiding.exists()


@needs_systemd
def test_the_unit_has_the_paths_of_the_configuration_and_is_renewed(root: Path, tmp_path: Path) -> None:
    config = root / "etc/imagend/config.yaml"
    config.parent.mkdir()
    config.write_text(
        "spool: /data/spool\noutputs: /data/outputs\nmodels: /models\ninboxes: [/mnt/drop/inbox, /data/spool/inbox]\n"
        "metrics: /var/lib/node/imagend.prom\ndashboard: /srv/www/index.html\n"
    )
    run(root, "--program", "/bin/true")
    unit = (root / UNIT).read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] not in "#")
    assert settings["ExecStart"] == "/bin/true serve --config /etc/imagend/config.yaml"
    assert settings["RequiresMountsFor"] == "/data/outputs /data/spool /models"
    assert settings["ReadWritePaths"] == "/data/outputs /data/spool /srv/www /var/lib/node -/mnt/drop"
    assert not (root / "mnt").exists(), "what lies on a file server is not ours to make"
    copy = tmp_path / UNIT.name
    copy.write_text(unit)
    assert analyze("security", "--offline=yes", f"--threshold={THRESHOLD}", copy).returncode == 0
    assert analyze("verify", "--man=no", copy).stderr == ""
    (root / UNIT).write_text("[Service]\n# an older one\n")
    assert ("replaced", f"/{UNIT}") in lines(run(root, "--program", "/bin/true"))
    assert (root / UNIT).read_text() == unit


def test_again_it_keeps_the_home_that_was_chosen(root: Path) -> None:
    run(root, "--home", "/data/imagend")
    before = tree(root)
    assert {word for word, _ in lines(run(root))} == {"kept"}
    assert tree(root) == before


def test_doctor_names_a_unit_that_is_not_as_config_yaml_wants_it(
    root: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, path = root / UNIT, home.root / "config.yaml"
    monkeypatch.setattr(install, "UNIT", unit)
    assert list(doctor._service(path, home.config)) == []
    unit.parent.mkdir(parents=True)
    unit.write_text(install.Wanted(Path("/srv/x"), path, {}, Path("/opt/x")).unit(home.config))
    assert list(doctor._service(path, home.config)) == []
    assert list(doctor._service(root / "another.yaml", home.config)) == []
    (finding,) = doctor._service(path, home.config.model_copy(update={"outputs": Path("/data/outputs")}))
    assert "imagend install" in finding.fix
    unit.write_text(unit.read_text() + "# an older one\n")
    assert len(list(doctor._service(path, home.config))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--client", "carol"], "groupadd carol"),
        (["--client", "../x"], "it becomes a folder's name"),
        (["--home", "/srv/my imagend"], "'/srv/my imagend"),
        (["--home", "/srv/%h"], "'/srv/%h"),
        (["--home", "srv"], "'srv"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(root: Path, options: list[str], words: str) -> None:
    before = tree(root)
    done = run(root, *options)
    assert done.returncode == 64
    assert words in done.stderr
    assert tree(root) == before


def test_only_root_installs_on_the_host_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(install.Wanted, "steps", never)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.run(["install"]) == 64
    assert "sudo imagend install" in capsys.readouterr().err


def test_a_python_that_the_service_cannot_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/home/me/.venv/bin")
    with pytest.raises(install.UsageError, match="ProtectHome"):
        install._this_program()


def as_user(uid: int, gid: int, groups: list[int], action: Callable[[], object]) -> str:
    """What comes of an action in a process of that user: "" or the name of an error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)
        os.umask(0o027)
        try:
            action()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told


@needs_root
def test_a_drop_box_is_its_clients_and_imagends_and_nobody_elses(root: Path, home: Home) -> None:
    run(root)
    uid, gid = ids(root, "imagend")
    box = root / "srv/imagend/drop/inbox"
    config = home.config.model_copy(update={"inboxes": (box,)})
    body = home.body()
    raw, ref = home.seal(body), Ref("alice", job_id("alice", body))
    name = f"alice/{ref.id}.json"
    inbox = Inbox(box)

    def alice(action: Callable[[], object]) -> str:
        return as_user(5001, GROUPS["alice"], [], action)

    def bob(action: Callable[[], object]) -> str:
        return as_user(5002, GROUPS["bob"], [], action)

    def daemon(action: Callable[[], object]) -> str:
        return as_user(uid, gid, list(GROUPS.values()), action)

    assert alice(lambda: drop.put(config, raw, ref)) == ""
    assert bob(lambda: list((box / "alice").iterdir())).startswith("PermissionError")
    assert bob(lambda: (box / name).read_bytes()).startswith("PermissionError")
    assert bob(lambda: (box / name).unlink()).startswith("PermissionError")
    assert bob(lambda: (box / "alice" / "x.json").write_bytes(raw)).startswith("PermissionError")
    assert bob(lambda: (box / "x.json").write_bytes(raw)).startswith("PermissionError"), "the box of the group imagend"
    assert alice(lambda: list(box.iterdir())).startswith("PermissionError"), "who else is a client?"

    def take() -> None:
        assert inbox.listing().names == [name]
        assert inbox.read(name)[0] == raw
        inbox.remove(name, inbox.identity(name))
        assert inbox.listing() == ([], ())

    assert daemon(take) == ""
    assert alice(lambda: drop.put(config, raw, ref)) == ""
    assert daemon(lambda: inbox.reject(name, inbox.identity(name), {"error": "no"})) == ""
    reason = root / "srv/imagend/drop/rejected" / f"{name}.reason.json"
    assert alice(reason.read_bytes) == ""
    assert bob(reason.read_bytes).startswith("PermissionError")

    pictures = config.model_copy(update={"client": config.client.model_copy(update={"name": "alice"})})
    assert alice(lambda: drop.send_along(pictures, {"sha256:" + "a" * 64: b"picture"})) == ""
    assert [path.name for path in (box / "alice/files").iterdir()] == ["a" * 64]
    assert daemon(lambda: inbox.sweep_attachments(float("inf"))) == ""
    assert list((box / "alice/files").iterdir()) == []


def test_make_install_makes_a_venv_and_calls_it(root: Path) -> None:
    command = ["make", "-n", "install", f"PREFIX={root}", "OPTIONS=--client alice"]
    done = subprocess.run(command, cwd=Path(install.__file__).parents[2], capture_output=True, text=True, check=True)
    assert f"{root}/bin/imagend install --client alice" in done.stdout
