"""status.json: what stands in it is what is, and no more than the schema says."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle
from test_cli import imagend

from imagend.daemon.executor import Heard
from imagend.daemon.gpus import Driver
from imagend.daemon.report import Tempo
from imagend.job import Outcome
from imagend.manifest import Manifest
from imagend.messages import Ended
from imagend.status import Gpu, Gpus, Pipeline, Status


def told(home: Home) -> dict[str, Any]:
    raw = (home.config.spool / "status.json").read_bytes()
    Status.model_validate_json(raw)
    document: dict[str, Any] = json.loads(raw)
    return document


def test_a_daemon_at_work_tells_of_queue_workers_and_rates(home: Home) -> None:
    daemon = home.daemon(max_queued=7)
    home.drop("a.json", count=2)
    home.drop("bad.json", prompt="fail")
    run_until_idle(daemon)
    staying, waiting = home.drop("b.json", prompt="stay"), home.drop("c.json", nonce="c")
    run_until(daemon, lambda: daemon.busy and len(daemon.turn) == 1)
    daemon.health._measured = daemon.health._written = float("-inf")
    daemon.look_around()
    status = told(home)
    queue, worker = status["queue"], status["workers"]["cpu0"]
    assert (queue["pending"], queue["active"], queue["max_size"]) == (1, 1, 7)
    accepted = datetime.fromtimestamp(daemon.spool.accepted(waiting) / 1e9, UTC)
    assert queue["oldest"] == accepted.isoformat(timespec="milliseconds")
    assert (worker["state"], worker["job"], worker["painted"], worker["starts"]) == ("busy", staying.id, 2, 1)
    assert status["rates"] == {"jobs_per_hour": 2, "pictures_per_hour": 2, "failed_per_hour": 1}
    assert status["gpu"] == {"available": False, "why": "not looked at yet"}


def test_it_is_told_in_words_where_nothing_is_known_of_gpus(home: Home) -> None:
    home.daemon(heartbeat_s=60.0).look_around()
    assert "devices" not in told(home)["gpu"]
    done = imagend("status", cwd=home.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "queue    0 pending, 0 active" in done.stdout


def test_the_last_ten_errors_stand_there_the_newest_first(home: Home) -> None:
    daemon = home.daemon()
    for number in range(12):
        daemon.health.trouble("intake", f"trouble {number}: do this")
    daemon.health._written = float("-inf")
    daemon.look_around()
    errors = told(home)["last_errors"]
    assert [error["message"] for error in errors] == [f"trouble {number}: do this" for number in range(11, 1, -1)]


def test_what_a_worker_painted_with_is_told_until_it_dies(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    slot = daemon.slots["cpu0"]
    engine = {"model": {"name": "pony", "sha256": "0"}, "loras": [{"name": "ink", "weight": 1.0}], "device": "cpu"}
    daemon.handle(Heard("cpu0", Ended(job=ref, outcome=Outcome.CANCELLED, engine=engine, memory={"mode": "resident"})))
    assert slot.pipeline == Pipeline(model_loaded="pony", loras_loaded=("ink",), mode="resident")
    slot.died(0.0)
    assert slot.pipeline is None


@pytest.mark.parametrize("engine", [{"model": [1]}, {"model": "x"}, {"loras": {"name": 3}}, {"loras": [{}] * 999}])
def test_nonsense_of_a_worker_is_not_repeated_and_stops_nothing(home: Home, engine: dict[str, Any]) -> None:
    daemon = home.daemon(metrics=home.root / "imagend.prom")
    ref = home.drop(prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    daemon.handle(Heard("cpu0", Ended(job=ref, outcome=Outcome.CANCELLED, engine=engine)))
    run_until_idle(daemon)
    assert home.outcome(ref) == "failed"  # nobody had cancelled it
    assert daemon.slots["cpu0"].pipeline == Pipeline()


def test_the_last_hour_is_counted_and_what_is_older_forgotten(home: Home) -> None:
    ref = home.drop()
    run_until_idle(home.daemon())
    manifest, tempo = Manifest.model_validate_json(json.dumps(home.manifest(ref))), Tempo()
    start = datetime(2026, 11, 26, 12, tzinfo=UTC)
    for minute in range(0, 180, 2):
        tempo.count(manifest.model_copy(update={"ended_at": start + timedelta(minutes=minute)}))
    assert tempo.rates(start + timedelta(minutes=179)).jobs_per_hour == 30
    assert tempo.rates(start + timedelta(minutes=209)).jobs_per_hour == 15
    assert tempo.rates(start + timedelta(days=1)).pictures_per_hour == 0


def test_without_a_gpu_the_driver_is_not_asked(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    assert driver.look() is False
    assert driver.seen.available is False
    assert "no NVIDIA GPU" in str(driver.seen.why)


def test_a_driver_that_is_not_there_is_told_of_and_asked_again(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    driver = Driver(tmp_path)
    for _ in range(2):
        assert driver.look() is True
    if not Path("/dev/nvidia0").exists():
        assert driver.seen == Gpus(available=False, why="NVML: NVML Shared Library Not Found")


def test_gpus_are_told_in_megabytes_and_what_one_does_not_tell_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapping only: the library's real answers are looked at on a machine with a GPU (tests/gpu)."""

    class Silent(Exception):
        pass

    def silent(_: int) -> int:
        raise Silent

    nvml = SimpleNamespace(
        NVMLError=Silent,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=11 << 30, used=3 << 30, free=8 << 30),
        nvmlDeviceGetName=lambda _: "NVIDIA GeForce RTX 2080 Ti",
        nvmlDeviceGetTemperature=lambda *_: 61,
        nvmlDeviceGetUtilizationRates=silent,
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (tmp_path / "nvidia0").touch()
    driver = Driver(tmp_path)
    assert driver.look() is True
    gpu = Gpu(
        index=0,
        name="NVIDIA GeForce RTX 2080 Ti",
        vram_total_mb=11264,
        vram_used_mb=3072,
        vram_free_mb=8192,
        temperature_c=61,
        utilization_percent=None,
    )
    assert driver.seen == Gpus(available=True, driver="580.1", devices=(gpu,))


def test_the_schema_is_exported() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imagend", "schema", "status"], capture_output=True, text=True, check=True
    )
    schema = json.loads(done.stdout)
    assert schema["properties"]["schema"]["const"] == "imagend.status/v1"
    assert set(schema["required"]) >= {"queue", "workers", "gpu", "totals", "rates", "last_errors"}
