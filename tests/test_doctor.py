"""imagend doctor: each ill that it knows, made on purpose, is named with its remedy; it changes nothing itself."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from conftest import Home
from test_cli import imagend

from imagend import files
from imagend.cli import doctor
from imagend.cli.finding import Finding
from imagend.spool import Spool, State


@pytest.fixture
def spool(home: Home) -> Spool:
    """One that no daemon owns, with a job queued."""
    spool = Spool(home.config.spool)
    spool.open()
    home.config.outputs.mkdir(exist_ok=True)
    ref = home.drop("a.json")
    spool.accept(ref, b"{}")
    spool.commit()
    spool.close()
    return spool


def found(home: Home, **changes: Any) -> list[Finding]:
    return list(doctor._place(home.config.model_copy(update=changes)))


def told(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{finding.what} | {finding.fix}" for finding in findings if finding.level == level)


def test_a_place_that_is_well(home: Home, spool: Spool) -> None:
    before = {path for path in home.root.rglob("*")}
    done = imagend("doctor", cwd=home.root)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith("to mend")
    assert "ok " not in done.stdout
    every = imagend("doctor", "--all", cwd=home.root).stdout
    for words in ("MB are free", "is durable after", "Python 3.", "torch 2."):
        assert words in every
    levels = [finding["level"] for finding in json.loads(imagend("doctor", "--json", cwd=home.root).stdout)]
    assert "error" not in levels
    assert {path for path in home.root.rglob("*")} == before


def test_a_disk_that_is_nearly_full(home: Home, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 700 << 20)
    assert "700 MB are free" in told(found(home, reserve_mb=512), "warning")
    assert "make room, or lower reserve_mb" in told(found(home, reserve_mb=1000), "error")
    assert "free" not in told(found(home, reserve_mb=300), "warning")


def test_a_slow_disk(home: Home, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_MS", 0.0)
    said = told(found(home), "warning")
    assert "is durable after" in said
    assert "SSD" in said


def test_a_job_in_two_states(home: Home, spool: Spool) -> None:
    (ticket,) = spool.tickets(State.PENDING)
    name = f"{ticket.ref.client}/{ticket.ref.id}.json"
    target = home.config.spool / "active" / name
    target.parent.mkdir()
    os.link(home.config.spool / "pending" / name, target)
    said = told(found(home), "warning")
    assert f"1 jobs lie in two states: {ticket.ref.client}/{ticket.ref.id}" in said
    assert "start imagend: it then takes the later one" in said
    spool.open()
    spool.sweep()
    assert "two states" not in told(found(home), "warning")


def test_what_the_dead_left_behind(home: Home, spool: Spool) -> None:
    (ticket,) = spool.tickets(State.PENDING)
    half = home.config.inboxes[0] / ".half.json.tmp"
    torn = home.config.spool / "pending" / ticket.ref.client / ".0123.json.tmp"
    draft = home.config.outputs / ".drafts" / ticket.ref.client / ticket.ref.id
    draft.mkdir(parents=True)
    for path in (half, torn):
        path.write_bytes(b"{")
    assert "leftovers" not in told(found(home), "warning")  # somebody may be at it
    for path in (half, torn, draft):
        os.utime(path, (1, 1))
    said = told(found(home), "warning")
    for path in (half, torn, draft):
        assert path.name in said
    assert said.count("1 leftovers, older than an hour") == 3


def test_damaged_jobs(home: Home, spool: Spool) -> None:
    (ticket,) = spool.tickets(State.PENDING)
    spool.set_aside(ticket.ref)
    said = told(found(home), "warning")
    assert f"1 jobs were found with other bytes than those signed: {ticket.ref}" in said
    assert str(home.config.spool / "damaged") in said


def test_a_gpu_that_is_not_there(home: Home, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DEVICES", "print('[\"NVIDIA H100\"]')")
    findings = found(home, workers={"gpu0": "cuda:0", "gpu1": "cuda:1"})
    assert "worker gpu0: cuda:0 is NVIDIA H100" in told(findings, "ok")
    assert "worker gpu1: there is no cuda:1; PyTorch sees 1 CUDA devices" in told(findings, "error")
    monkeypatch.setattr(doctor, "_DEVICES", "raise SystemExit(1)")
    assert "cannot say which GPUs there are" in told(found(home, workers={"gpu0": "cuda:0"}), "error")


def test_other_versions_than_those_tested(home: Home, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "diffusers" else installed(name))
    said = told(found(home), "warning")
    assert "imagend was not tested with diffusers 0.1" in said
    assert "constraints.txt" in said


def test_a_broken_config_is_told_as_check_tells_it(home: Home) -> None:
    (home.root / "config.yaml").write_text("spol: x\n")
    done = imagend("doctor", cwd=home.root)
    assert done.returncode == 78
    assert "spol is not a key" in done.stdout
