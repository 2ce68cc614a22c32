"""Metrics: what is written is what happened, promtool accepts it, and dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Home, run_until, run_until_idle
from prometheus_client.parser import text_string_to_metric_families

from imagend.daemon.loop import Daemon
from imagend.job import Outcome
from imagend.manifest import Manifest
from imagend.status import Gpu, Gpus

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")
ALERTS = REPOSITORY / "examples" / "prometheus-alerts.yaml"
DASHBOARD = REPOSITORY / "examples" / "grafana-dashboard.json"
DOCS = REPOSITORY / "docs" / "metrics.md"
GPU = Gpu(
    index=1, name="x", vram_total_mb=100, vram_used_mb=40, vram_free_mb=60, temperature_c=50, utilization_percent=1
)
GPUS = Gpus(available=True, driver="1", devices=(GPU,))


def measured(home: Home, daemon: Daemon) -> dict[tuple[str, ...], float]:
    """All samples, by name and the labels' values, in the order of the labels' names."""
    assert daemon.health.metrics
    daemon.health._measured = float("-inf")
    daemon.health.observe(daemon.clock(), daemon.doors, daemon.slots.values(), daemon.librarian)
    families = text_string_to_metric_families((home.root / "imagend.prom").read_text())
    samples = [sample for family in families for sample in family.samples]
    return {(each.name, *(each.labels[label] for label in sorted(each.labels))): each.value for each in samples}


@pytest.fixture
def daemon(home: Home) -> Daemon:
    return home.daemon(metrics=home.root / "imagend.prom")


def manifest(**fields: Any) -> Manifest:
    at = datetime(2026, 11, 26, 12, tzinfo=UTC)
    base = {"id": "0" * 20, "client": "alice", "kind": "generate", "outcome": Outcome.SUCCEEDED, "issued_at": at}
    times = {"accepted_at": at, "started_at": at.replace(second=5), "ended_at": at.replace(second=8)}
    spec = {"model": "shapes-xl", "width": 64, "height": 64, "num_inference_steps": 2, "seeds": (1,)}
    return Manifest(**{**base, **times, "attempts": 1, "spec": spec, **fields})


def test_jobs_are_counted_by_client_kind_and_outcome(home: Home) -> None:
    bob = home.neighbour("bob")
    daemon = home.daemon(metrics=home.root / "imagend.prom")
    for number in range(3):
        home.drop(f"{number}.json", nonce=str(number), count=2)
    bob.drop("bob.json", prompt="fail")
    home.drop("old.json", issued_at="2020-01-01T00:00:00Z")
    run_until_idle(daemon)
    found = measured(home, daemon)
    assert found["imagend_jobs_ended_total", "alice", "generate", "succeeded"] == 3
    assert found["imagend_jobs_ended_total", "bob", "generate", "failed"] == 1
    assert found["imagend_pictures_total", "alice", ""] == 6
    assert found["imagend_files_rejected_total", home.reason("old.json")["code"]] == 1
    assert found["imagend_wait_seconds_count", "alice"] == 3
    assert found["imagend_job_seconds_count", "generate", ""] == 4
    assert found["imagend_worker_starts_total", "cpu0"] == 1
    assert found["imagend_worker_up", "cpu", "cpu0"] == 1
    assert found["imagend_oldest_pending_seconds",] == 0


def test_the_queue_its_age_and_who_waits(home: Home, daemon: Daemon) -> None:
    home.drop("a.json", prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    waiting = [home.drop(f"{number}.json", nonce=str(number)) for number in range(2)]
    run_until(daemon, lambda: len(daemon.turn) == 2)
    accepted = min(daemon.spool.accepted(ref) for ref in waiting) / 1e9
    found = measured(home, daemon)
    assert found["imagend_jobs_pending", "alice"] == 2
    assert found["imagend_worker_busy", "cpu0"] == 1
    assert found["imagend_attempts_started_total", "generate"] == 1
    age = found["imagend_heartbeat_timestamp_seconds",] - accepted
    assert found["imagend_oldest_pending_seconds",] == pytest.approx(age, abs=1.0)


def test_upscaling_as_a_job_and_as_a_step(home: Home, daemon: Daemon) -> None:
    picture = home.root / "reference" / "leona" / "front.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    daemon.librarian.look()
    home.drop("a.json", kind="upscale", prompt=..., image="leona/front")
    chain = {"upscale": {}}
    for number, prompt in enumerate(("paint", "fail", "upscaling fails")):
        home.drop(f"{number}.json", prompt=prompt, chain=chain)
    home.drop("b.json")
    run_until_idle(daemon)
    found = measured(home, daemon)
    assert found["imagend_upscales_started_total",] == 3
    assert found["imagend_upscales_ended_total", "succeeded"] == 2
    assert found["imagend_upscales_ended_total", "failed"] == 1


def test_what_a_manifest_says_of_stages_memory_and_models(home: Home, daemon: Daemon) -> None:
    retries = [{"stage": "decoding", "rung": "resident", "said": "CUDA out of memory"}] * 2
    told = {
        "timings": {"painting": 2.0, "model_loading": 0.3},
        "memory": {"retries": retries},
        "loading": {"to": "pony"},
    }
    daemon.health.ended(manifest(**told, engine={"model": {"name": "pony"}}))
    daemon.health.ended(manifest(outcome=Outcome.FAILED, started_at=None))
    found = measured(home, daemon)
    assert found["imagend_stage_seconds_sum", "pony", "painting"] == 2.0
    assert found["imagend_stage_seconds_bucket", "2.5", "pony", "painting"] == 1
    assert found["imagend_stage_seconds_bucket", "1.0", "pony", "painting"] == 0
    assert found["imagend_memory_retries_total", "resident", "decoding"] == 2
    assert found["imagend_model_switches_total", "pony"] == 1
    assert found["imagend_job_seconds_sum", "generate", "pony"] == 3.0
    assert found["imagend_wait_seconds_sum", "alice"] == 5.0
    assert found["imagend_jobs_ended_total", "alice", "generate", "failed"] == 1
    assert found["imagend_degraded",] == 0
    daemon.health.trouble("disk", "it is full")
    assert measured(home, daemon)["imagend_degraded",] == 1


def test_nothing_that_a_client_wrote_is_in_them(home: Home, daemon: Daemon) -> None:
    for number, field in enumerate(("prompt", "label", "nonce", "model")):
        home.drop(f"canary-{number}.json", **{field: f"canary-{number}"})
    run_until_idle(daemon)
    measured(home, daemon)
    assert "canary" not in (home.root / "imagend.prom").read_text()


def test_they_are_written_once_a_heartbeat_and_a_refusal_is_told(home: Home) -> None:
    daemon = home.daemon(metrics=home.root / "there" / "imagend.prom", heartbeat_s=1000.0)
    daemon.look_around()
    assert any("imagend.prom cannot be written" in reason for reason in daemon.health.reasons.values())
    (home.root / "there").mkdir()
    daemon.look_around()
    assert not (home.root / "there" / "imagend.prom").exists()  # not before the next heartbeat
    daemon.clock = lambda: 1e9
    daemon.look_around()
    assert (home.root / "there" / "imagend.prom").exists()
    assert "metrics" not in daemon.health.reasons


def test_none_are_written_unless_asked_for(home: Home) -> None:
    daemon = home.daemon()
    home.drop("a.json")
    run_until_idle(daemon)
    assert daemon.health.metrics is None
    assert list(home.root.rglob("*.prom")) == []


@needs_promtool
def test_promtool_finds_nothing_wrong(home: Home, daemon: Daemon) -> None:
    home.drop("a.json")
    run_until_idle(daemon)
    measured(home, daemon)
    promtool("check", "metrics", stdin=(home.root / "imagend.prom").read_bytes())
    promtool("check", "rules", str(ALERTS))


def promtool(*arguments: str, stdin: bytes = b"") -> None:
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""


@needs_promtool
@pytest.mark.parametrize("alert", [rule["alert"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]])
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path, alert: str) -> None:
    """promtool's unit tests of rules: series in, alerts out. https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/"""
    ills = {
        "ImagendSilent": ("imagend_heartbeat_timestamp_seconds", "0x60", "0+60x60"),
        "ImagendDegraded": ("imagend_degraded", "1x60", "0x60"),
        "ImagendQueueStands": ("imagend_oldest_pending_seconds", "0+60x60", "30x60"),
        "ImagendWorkerDown": ('imagend_worker_up{worker="gpu0",device="cuda:0"}', "0x60", "1x60"),
        "ImagendWorkerRestarts": ('imagend_worker_starts_total{worker="gpu0"}', "0+1x60", "1x60"),
        "ImagendJobsFail": ('imagend_jobs_ended_total{client="a",kind="generate",outcome="failed"}', "0+5x60", "0x60"),
        "ImagendMemoryShort": ('imagend_memory_retries_total{stage="painting",rung="resident"}', "0+1x60", "3x60"),
        "ImagendInboxSilent": ('imagend_inbox_scan_age_seconds{inbox="/in"}', "0+60x60", "1x60"),
    }
    series, ill, well = ills[alert]
    for values, count in ((ill, 1), (well, 0)):
        test = {
            "rule_files": [str(ALERTS)],
            "evaluation_interval": "1m",
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values}],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                            "eval_time": "59m",
                            "exp_samples": [{"value": count}],
                        }
                    ],
                }
            ],
        }
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
        done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_vram_is_told_in_bytes(home: Home, daemon: Daemon) -> None:
    daemon.health.driver.seen = GPUS
    found = measured(home, daemon)
    assert found["imagend_gpu_memory_used_bytes", "1"] == 40 << 20
    assert found["imagend_gpu_memory_total_bytes", "1"] == 100 << 20
    assert found["imagend_gpu_temperature_celsius", "1"] == 50


def test_dashboard_alerts_and_documents_name_what_there_is(home: Home, daemon: Daemon) -> None:
    told = {"timings": {"painting": 1.0}, "memory": {"retries": [{"stage": "painting", "rung": "resident"}]}}
    daemon.health.ended(manifest(**told, loading={"to": "x"}, engine={"model": {"name": "x"}}))
    daemon.doors[0].rejected["BAD_JOB"] += 1
    daemon.turn.add(home.drop("a.json"), 5)
    daemon.slots["cpu0"].taken["generate"] += 1
    daemon.health.driver.seen = GPUS
    names = {name for name, *_ in measured(home, daemon)}
    names |= {"imagend_pictures_total", "imagend_upscales_ended_total"}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked += [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert asked
    for expression in asked:
        assert set(re.findall(r"\bimagend_\w+", expression)) <= names, expression
    told_of = set(re.findall(r"`(imagend_\w+)`", DOCS.read_text()))
    assert told_of == {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
