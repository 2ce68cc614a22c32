"""The service under a real systemd, installed by `imagend install`: what docs/operations.md promises."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.nspawn import ENVIRONMENT, PROGRAM, Machine, missing

from imagend.job import Ref
from imagend.message_ids import MESSAGE_IDS
from imagend.signers import NAMESPACE
from imagend.signing import Key, job_id, seal

pytestmark = [pytest.mark.lab, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

HOME = Path("/srv/imagend")
CONFIG = Path("/etc/imagend/config.yaml")
KEYS = Path("/etc/imagend/allowed_signers")
GO = HOME / "go"
SLOW = {"prompt": "wait for a file", "negative_prompt": str(GO), "num_inference_steps": 30}
"""A job that is painted for as long as GO is not there."""


class Service:
    """imagend on a machine, and a client of it."""

    def __init__(self, machine: Machine, key: Key) -> None:
        self.machine, self.key, self._count = machine, key, 0

    def install(self, *options: str) -> str:
        return self.machine.run(PROGRAM, "install", "--client", "alice", *options).stdout

    def configure(self, settings: dict[str, Any], **drop_in: str) -> None:
        """Keys of config.yaml, and lines of a drop-in."""
        path = self.machine.path(CONFIG)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
        folder = self.machine.path("/etc/systemd/system/imagend.service.d")
        folder.mkdir(parents=True, exist_ok=True)
        ours = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        lines = {"Environment": f"{ours} {drop_in.pop('Environment', '')}", **drop_in}
        (folder / "test.conf").write_text("[Service]\n" + "".join(f"{key}={value}\n" for key, value in lines.items()))
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, verb: str, *options: str, check: bool = True) -> int:
        return self.machine.run("systemctl", verb, "imagend", *options, check=check).returncode

    def show(self, *names: str) -> dict[str, str]:
        return self.machine.show(*names)

    def state(self) -> tuple[str, str]:
        shown = self.show("ActiveState", "SubState")
        return shown["ActiveState"], shown["SubState"]

    def says(self, pattern: str) -> Any:
        """Wait for the line in `systemctl status`."""
        return self.machine.wait_for(lambda: re.search(pattern, self.show("StatusText")["StatusText"]), pattern)

    def drop(self, **fields: Any) -> Ref:
        """Alice, who may write to her box and nowhere else, drops a job."""
        self._count += 1
        now = self.machine.run("date", "--utc", "+%FT%TZ").stdout.strip()
        job = {"schema": "imagend.job/v1", "kind": "generate", "issued_at": now, "nonce": str(self._count)}
        body = json.dumps(job | {"prompt": "a hat", "seed": 7} | fields).encode()
        ref = Ref("alice", job_id("alice", body))
        letter = self.machine.path(f"/var/tmp/{ref.id}.json")
        letter.write_bytes(seal(body, self.key.sign(body)))
        box = HOME / "drop" / "inbox" / "alice"
        drop = f"cp /var/tmp/{ref.id}.json {box}/.{ref.id} && mv {box}/.{ref.id} {box}/{ref.id}.json"
        self.machine.run("sh", "-c", drop, user="alice")
        return ref

    def let_go(self) -> None:
        """Of jobs that wait for a file."""
        self.machine.path(GO).write_text("")

    def manifest(self, ref: Ref) -> dict[str, Any]:
        """Wait for a job's end; what alice reads of it."""
        path = HOME / "outputs" / ref.client / ref.id / "manifest.json"
        self.machine.wait_for(lambda: self.machine.path(path).exists(), f"the end of {ref}")
        found: dict[str, Any] = json.loads(self.machine.run("cat", path, user="alice").stdout)
        return found

    def where(self, ref: Ref) -> list[str]:
        places = {state: HOME / "spool" / state / "alice" / f"{ref.id}.json" for state in ("pending", "active", "done")}
        return [state for state, place in places.items() if self.machine.path(place).exists()]

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """What the journal holds."""
        return [json.loads(line) for line in self.machine.journal("--output=json", *matches).splitlines()]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        for name in ("alice", "bob"):
            machine.run("useradd", "--user-group", name)
        yield machine


@pytest.fixture
def service(machine: Machine, key: Key) -> Iterator[Service]:
    """Installed, configured and not running; nothing of an earlier test is left."""
    service = Service(machine, key)
    machine.run("rm", "-rf", HOME, "/etc/imagend", "/etc/systemd/system/imagend.service.d")
    service.install()
    machine.path(KEYS).write_text(f'alice namespaces="{NAMESPACE}" {key.public_line("alice")}\n')
    service.configure({})
    yield service
    service.systemctl("kill", "--signal=KILL", check=False)
    service.systemctl("stop", check=False)
    service.systemctl("reset-failed", check=False)


def test_it_starts_paints_and_gives_the_result_to_its_client_only(service: Service) -> None:
    service.systemctl("start")
    assert service.state() == ("active", "running")
    assert service.entries(f"MESSAGE_ID={MESSAGE_IDS['worker ready']}"), "start returns when it is ready"
    service.says("^ready, 0 queued$")
    ref = service.drop()
    assert service.manifest(ref)["outcome"] == "succeeded"
    result = HOME / "outputs" / "alice" / ref.id
    assert service.machine.run("cat", result / "manifest.json", user="bob", check=False).returncode == 1
    assert service.machine.run("ls", HOME / "drop/inbox/alice", user="bob", check=False).returncode == 2
    asked = ("/usr/local/bin/imagend", "status")
    service.machine.wait_for(
        lambda: "1 succeeded" in service.machine.run(*asked, user="bob").stdout, "what bob may ask"
    )
    assert service.machine.path(HOME / "outputs/alice").stat().st_mode & 0o7777 == 0o2750


def test_its_log_is_in_the_journal_with_fields_and_ids(service: Service) -> None:
    service.systemctl("start")
    ref = service.drop()
    service.manifest(ref)
    (entry,) = service.machine.wait_for(
        lambda: service.entries(f"MESSAGE_ID={MESSAGE_IDS['ended']}", f"IMAGEND_JOB={ref}"), "the journal"
    )
    assert (entry["_SYSTEMD_UNIT"], entry["PRIORITY"], entry["IMAGEND_OUTCOME"]) == (
        "imagend.service",
        "6",
        "succeeded",
    )
    assert entry["SYSLOG_IDENTIFIER"] == "imagend"
    assert entry["MESSAGE"].startswith(f"ended job={ref} outcome=succeeded")
    told = [entry["MESSAGE"].split()[0] for entry in service.entries("--unit=imagend", f"IMAGEND_JOB={ref}")]
    assert told == ["accepted", "started", "ended"]


def test_it_may_do_little_else(service: Service) -> None:
    service.systemctl("start")
    pid = service.show("MainPID")["MainPID"]
    fields = dict(
        line.split(":\t", 1) for line in service.machine.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    )
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    networks = {service.machine.run("readlink", f"/proc/{process}/ns/net").stdout for process in (1, pid)}
    assert len(networks) == 2, "a network of its own"
    inside = ("nsenter", f"--target={pid}", "--mount", "--")
    for path in (HOME / "models/x", "/etc/x", "/usr/x"):
        assert "Read-only" in service.machine.run(*inside, "touch", path, check=False).stderr, path
    assert service.machine.run(*inside, "ls", "/root", check=False).stdout == ""
    for path in (HOME / "spool/x", HOME / "outputs/x", HOME / "drop/x"):
        service.machine.run(*inside, "touch", path)


def test_a_job_that_runs_at_stop_goes_back_and_on(service: Service) -> None:
    service.systemctl("start")
    ref = service.drop(**SLOW)
    service.says(rf"^busy alice {ref.id[:4]}… step [1-9]\d*/30, 0 queued$")
    service.systemctl("stop")
    assert service.show("ActiveState", "Result", "ExecMainStatus") == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainStatus": "0",
    }
    assert service.where(ref) == ["pending"]
    service.systemctl("start")
    service.let_go()
    manifest = service.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 1)


def test_reload_takes_over_what_is_right_and_shows_what_is_wrong(service: Service) -> None:
    service.systemctl("start")
    before = service.show("MainPID", "NRestarts")
    service.configure({"max_attempts": "none"})
    service.systemctl("reload")
    service.says("^degraded, 0 queued.*max_attempts")
    service.configure({"max_attempts": 2})
    service.systemctl("reload")
    service.says("^ready, 0 queued$")
    assert service.state() == ("active", "running")
    assert service.show("MainPID", "NRestarts") == before
    assert service.manifest(service.drop())["outcome"] == "succeeded"


def test_killed_it_is_started_again_and_the_job_tried_again(service: Service) -> None:
    service.systemctl("start")
    ref = service.drop(**SLOW)
    service.says(rf"^busy alice {ref.id[:4]}… step [1-9]")
    service.systemctl("kill", "--signal=KILL", "--kill-who=main")
    service.machine.wait_for(lambda: service.show("NRestarts")["NRestarts"] == "1", "the restart")
    service.let_go()
    manifest = service.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 2)
    assert service.state() == ("active", "running")


def test_a_loop_that_hangs_is_killed_by_the_watchdog_and_says_where_it_stood(service: Service) -> None:
    service.configure({}, WatchdogSec="5", TimeoutAbortSec="30")
    service.systemctl("start")
    keys = service.machine.path(KEYS)
    text = keys.read_text()
    keys.unlink()
    os.mkfifo(keys)
    with keys.open("w"):  # opened: the loop stands before it; nobody writes
        keys.unlink()
        keys.write_text(text)
        service.machine.wait_for(lambda: service.show("NRestarts")["NRestarts"] == "1", "the restart")
    service.machine.wait_for(lambda: service.state() == ("active", "running"), "the service")
    log = service.machine.journal("--unit=imagend", "--output=cat")
    assert "Watchdog timeout (limit 5s)!" in log
    assert re.search(r"Fatal Python error: Aborted(?s:.*)settings\.py", log)
    assert service.manifest(service.drop())["outcome"] == "succeeded"


@pytest.mark.parametrize("mistake", ["config", "keys"])
def test_a_mistake_is_no_restart_loop(service: Service, mistake: str) -> None:
    if mistake == "config":
        service.configure({"max_attempts": "none"})
    else:
        service.machine.path(KEYS).write_text("alice no key\n")
    assert service.systemctl("start", check=False) != 0
    assert service.state() == ("failed", "failed"), "not activating (auto-restart)"
    assert service.show("ExecMainStatus", "NRestarts") == {"ExecMainStatus": "78", "NRestarts": "0"}
    assert ("max_attempts" if mistake == "config" else "line 1") in service.machine.journal("--unit=imagend")
    service.configure({"max_attempts": 2})
    service.machine.path(KEYS).write_text(f'alice namespaces="{NAMESPACE}" {service.key.public_line("alice")}\n')
    service.systemctl("start")


def test_workers_that_take_long_are_given_time_and_those_that_die_do_not_end_the_service(service: Service) -> None:
    """They never get ready: the worker is killed twice for it, far beyond TimeoutStartSec, and jobs are taken in."""
    service.configure({"boot_limit_s": 6}, TimeoutStartSec="5", Environment="KINDS=asleep")
    service.systemctl("start")
    assert service.show("NRestarts") == {"NRestarts": "0"}
    service.says("^degraded, 0 queued. worker cpu0 died")
    ref = service.drop()
    service.machine.wait_for(lambda: service.where(ref) == ["pending"], "the job to be taken in")


def test_a_long_stop_is_given_the_time_that_config_yaml_allows(service: Service) -> None:
    """The worker does not let go; stop_grace_s is longer than the unit's TimeoutStopSec."""
    service.configure({"stop_grace_s": 6}, TimeoutStopSec="2")
    service.systemctl("start")
    ref = service.drop(prompt="hang")
    service.says("^busy alice")
    service.systemctl("stop")
    assert service.show("Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
    assert service.where(ref) == ["pending"]


def test_an_upgrade_with_jobs_queued_loses_and_repeats_none(service: Service) -> None:
    service.systemctl("start")
    refs = [service.drop(**SLOW), service.drop(), service.drop()]
    service.says(r"^busy alice .* 2 queued$")
    unit = service.machine.path("/usr/local/lib/systemd/system/imagend.service")
    unit.write_text("# an older one\n" + unit.read_text())
    told = service.install()
    assert [line.split()[0] for line in told.splitlines() if line[:4] in ("made", "repl")] == ["replaced"]
    service.systemctl("restart")
    service.let_go()
    assert [service.manifest(ref)["attempts"] for ref in refs] == [1, 1, 1]
    feed = service.machine.path(HOME / "outputs/results.jsonl")
    service.machine.wait_for(lambda: len(feed.read_text().splitlines()) == 3, "the feed")
    assert sorted(json.loads(line)["id"] for line in feed.read_text().splitlines()) == sorted(ref.id for ref in refs)


def test_real_workers_paint_under_the_hardened_unit(service: Service) -> None:
    """torch on the CPU; of CUDA this says nothing."""
    pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
    service.machine.path("/etc/imagend/real").write_text("")
    service.systemctl("start")
    ref = service.drop(prompt="a large red circle on a blue background", num_inference_steps=8)
    manifest = service.manifest(ref)
    assert manifest["outcome"] == "succeeded", manifest
    (picture,) = manifest["artifacts"]
    data = service.machine.path(HOME / "outputs/alice" / ref.id / picture["file"]).read_bytes()
    assert data.startswith(b"\x89PNG")
