"""Numbers for Prometheus, as a file for node_exporter's textfile collector: counts what it is told, shows what is.

Labels are names that the operator gave (clients, models that were loaded, workers) or imagend's own words, never a
client's text: their number is bounded. https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from imagend import __version__, files
from imagend.daemon.intake import Door
from imagend.daemon.slots import Slot
from imagend.daemon.turn import Turn
from imagend.job import Kind
from imagend.manifest import Manifest
from imagend.status import MB, Gpus, Pipeline

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody asks for

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600)
"""Buckets, from a tiny model's picture to config.yaml's time_limit_s."""
WAITED = (0.1, 1, 10, 60, 300, 1800, 7200, 43200)


class Metrics:
    """Tell it of each job that ended; it looks at the rest when it writes."""

    def __init__(self, path: Path, turn: Turn, slots: Iterable[Slot], doors: Iterable[Door]) -> None:
        self.path = path
        self._registry = registry = CollectorRegistry()
        self._turn, self._slots, self._doors = turn, tuple(slots), tuple(doors)
        self._degraded, self._gpus = False, Gpus(available=False)
        self._oldest: datetime | None = None
        self.storage: Callable[[], dict[str, Any]] | None = None
        self._ended = Counter("imagend_jobs_ended", "Jobs that ended", ("client", "kind", "outcome"), registry=registry)
        self._pictures = Counter("imagend_pictures", "Pictures published", ("client", "model"), registry=registry)
        words = "From the start of a job's last attempt to its end"
        self._seconds = Histogram("imagend_job_seconds", words, ("kind", "model"), buckets=SECONDS, registry=registry)
        words = "The stages of a job: model_loading, encoding, painting, …"
        self._stages = Histogram("imagend_stage_seconds", words, ("stage", "model"), buckets=SECONDS, registry=registry)
        words = "From a job's acceptance to the start of its last attempt"
        self._waited = Histogram("imagend_wait_seconds", words, ("client",), buckets=WAITED, registry=registry)
        words = "Shortages of memory, by stage and rung of the memory ladder"
        self._retries = Counter("imagend_memory_retries", words, ("stage", "rung"), registry=registry)
        self._switches = Counter("imagend_model_switches", "Base models loaded", ("model",), registry=registry)
        words = "Upscaling that ended: jobs of that kind, and steps of chains"
        self._upscales = Counter("imagend_upscales_ended", words, ("outcome",), registry=registry)
        registry.register(self)

    def ended(self, manifest: Manifest) -> None:
        """A job has ended: count it."""
        model = Pipeline.of(manifest.engine, None).model_loaded or ""  # "": none was loaded
        self._ended.labels(manifest.client, manifest.kind, manifest.outcome.value).inc()
        if manifest.kind == Kind.UPSCALE or (manifest.artifacts and manifest.spec.get("chain")):
            self._upscales.labels(manifest.outcome.value).inc()
        if manifest.pictures:
            self._pictures.labels(manifest.client, model).inc(manifest.pictures)
        if manifest.started_at is not None:
            spent = (manifest.ended_at - manifest.started_at).total_seconds()
            self._seconds.labels(manifest.kind, model).observe(spent)
            waited = (manifest.started_at - manifest.accepted_at).total_seconds()
            self._waited.labels(manifest.client).observe(waited)
        for stage, seconds in manifest.timings.items():
            self._stages.labels(stage, model).observe(seconds)
        for retry in (manifest.memory or {}).get("retries", ()):
            self._retries.labels(retry["stage"], retry["rung"]).inc()
        if manifest.loading:
            self._switches.labels(model).inc()

    def write(self, degraded: bool, oldest: datetime | None, gpus: Gpus) -> None:
        """Replace the file. `oldest`: when the oldest waiting job was accepted. Raises OSError."""
        self._degraded, self._oldest, self._gpus = degraded, oldest, gpus
        files.replace_hint(self.path, generate_latest(self._registry))

    def collect(self) -> Iterator[Metric]:
        """What is, for the registry."""
        about = GaugeMetricFamily("imagend_info", "1; which imagend this is", labels=("version",))
        about.add_metric((__version__,), 1)
        yield about
        yield GaugeMetricFamily("imagend_heartbeat_timestamp_seconds", "When this was written", value=time.time())
        yield GaugeMetricFamily("imagend_degraded", "1 while status.json says degraded", value=float(self._degraded))
        yield from self._queue()
        yield from self._workers()
        yield from self._vram()
        yield from self._inboxes()
        if self.storage:
            yield from _storage(self.storage())

    def describe(self) -> Sequence[Metric]:
        return ()

    def _queue(self) -> Iterator[Metric]:
        pending = GaugeMetricFamily("imagend_jobs_pending", "Jobs that wait", labels=("client",))
        for client, count in self._turn.per_client().items():
            pending.add_metric((client,), count)
        yield pending
        oldest_s = max(0.0, time.time() - self._oldest.timestamp()) if self._oldest else 0.0
        yield GaugeMetricFamily(
            "imagend_oldest_pending_seconds", "For how long the oldest job has waited", value=oldest_s
        )

    def _workers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("imagend_worker_up", "1 when it can take a job, or has one", labels=("worker", "device"))
        busy = GaugeMetricFamily("imagend_worker_busy", "1 while it has a job", labels=("worker",))
        starts = CounterMetricFamily("imagend_worker_starts", "How often its process was started", labels=("worker",))
        for slot in self._slots:
            up.add_metric((slot.name, slot.device), float(slot.state in ("resting", "idle", "busy")))
            busy.add_metric((slot.name,), float(slot.running is not None))
            starts.add_metric((slot.name,), slot.starts)
        yield from (up, busy, starts)
        attempts = CounterMetricFamily("imagend_attempts_started", "Attempts at jobs that were begun", labels=("kind",))
        for kind, count in sum((slot.taken for slot in self._slots), Tally[str]()).items():
            attempts.add_metric((kind,), count)
        yield attempts
        words = "Upscaling that was begun, attempt by attempt: jobs of that kind, and steps of chains"
        yield CounterMetricFamily("imagend_upscales_started", words, sum(slot.upscales for slot in self._slots))

    def _vram(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("imagend_gpu_memory_used_bytes", "VRAM in use, by whomever", labels=("gpu",))
        total = GaugeMetricFamily("imagend_gpu_memory_total_bytes", "VRAM there is", labels=("gpu",))
        warm = GaugeMetricFamily("imagend_gpu_temperature_celsius", "As the GPU tells", labels=("gpu",))
        for gpu in self._gpus.devices:
            used.add_metric((str(gpu.index),), gpu.vram_used_mb * MB)
            total.add_metric((str(gpu.index),), gpu.vram_total_mb * MB)
            if gpu.temperature_c is not None:
                warm.add_metric((str(gpu.index),), gpu.temperature_c)
        yield from (used, total, warm)

    def _inboxes(self) -> Iterator[Metric]:
        age = GaugeMetricFamily("imagend_inbox_scan_age_seconds", "Since it was last looked at", labels=("inbox",))
        stuck = GaugeMetricFamily("imagend_inbox_stuck_files", "Files that cannot be moved out", labels=("inbox",))
        rejected = CounterMetricFamily("imagend_files_rejected", "Files put into rejected/", labels=("code",))
        now = time.monotonic()
        codes: Tally[str] = sum((door.rejected.copy() for door in self._doors), Tally())
        for door in self._doors:
            age.add_metric((str(door.inbox),), max(0.0, now - door.looked_at))
            stuck.add_metric((str(door.inbox),), door.stuck)
        for code, count in codes.items():
            rejected.add_metric((code,), count)
        yield from (age, stuck, rejected)


def _storage(storage: dict[str, Any]) -> Iterator[Metric]:
    yield GaugeMetricFamily("imagend_results", "Results under outputs", value=storage["outputs_count"])
    size = storage["outputs_size_mb"] * 2**20
    yield GaugeMetricFamily("imagend_results_bytes", "What they hold", value=size)
    yield GaugeMetricFamily("imagend_jobs_known", "Ended jobs in done/", value=storage["done_count"])
    if storage["free_mb"] is not None:
        yield GaugeMetricFamily("imagend_free_bytes", "Free under outputs", value=storage["free_mb"] * 2**20)
    removed = CounterMetricFamily("imagend_removed", "What retention has removed", labels=("what",))
    for what, count in storage["removed"].items():
        removed.add_metric((what,), count)
    yield removed
