"""A LoRA from a dataset: the adapter of one base, trained on a device, noted so that it can go on anywhere.

Killed and gone on, or told to give way between two steps and gone on: on the CPU the LoRA has the bits that it has
uninterrupted. The base is left as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imagend.architecture import ModelKind
from imagend.errors import (
    BadDataset,
    DeviceFailed,
    Interrupt,
    NameTaken,
    NoSpace,
    TrainingFailed,
    TrainingTooLarge,
)
from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from imagend.memory_plan import Mode
from imagend.models import digest
from imagend.train_spec import LORA, Train
from imagend.worker import checkpoint, train_cache, train_results
from imagend.worker.batches import Batches
from imagend.worker.checkpoint import Checkpoint
from imagend.worker.dataset import Example, look
from imagend.worker.shortage import Catch, clean_up
from imagend.worker.train_step import Steps
from imagend.worker.trainee import Trainee, learning

if TYPE_CHECKING:
    from imagend.dataset_report import Report
    from imagend.worker.main import Context

STAGE = "training"
_OF_LATE = 20
"""Steps by which the time that is left is told."""


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Train it into the draft. Raises JobFailed, TryAgain, Interrupt."""
    spec = Train.model_validate_json(json.dumps(spec_fields))
    pipelines = context.pipelines
    pipelines.models.learn(context.known.digests)
    _check_name(spec, context)
    try:
        with context.timed("checking"):
            report, examples = _look(spec, context)
        with Catch() as caught:
            return _train(spec, report, examples, context)
        pipelines.free_caches()
        raise _too_large(spec, context, [f"outside of its steps: {caught.said}"])
    except torch.AcceleratorError as error:  # the device's context is lost, and this process with it
        raise DeviceFailed(pipelines.device, str(error).splitlines()[0]) from None
    finally:
        clean_up(pipelines.ladder.gauge.device)


def _check_name(spec: Train, context: Context) -> None:
    """None is replaced; what this very job has made is installed already if its daemon died thereafter."""
    models = context.pipelines.models
    if spec.name in models.list(ModelKind.LORA):
        digests = models.digests(models.find(spec.name, ModelKind.LORA))
        if digest(digests) != train_results.sha256(context.folder / LORA):
            raise NameTaken(spec.name, spec.name)


def _look(spec: Train, context: Context) -> tuple[Report, list[Example]]:
    assert spec.resolution is not None
    folder = Path(context.pictures[spec.pictures[0]])

    def each(done: int, of: int) -> None:
        context.progress("checking", done, of)

    report, examples = look(folder.parents[1], folder.name, spec.resolution, each)
    if not report.is_fit:
        what = len(report.unreadable) + len(report.mistakes)
        raise BadDataset(
            spec.dataset, f"{what} things are wrong with it" if what else "it has no pictures", spec.dataset
        )
    if report.missing_captions and not spec.trigger_words:
        why = f"{len(report.missing_captions)} of its pictures have no caption; write some, or name trigger_words"
        raise BadDataset(spec.dataset, why, spec.dataset)
    return report, examples


def _train(spec: Train, report: Report, examples: list[Example], context: Context) -> tuple[Artifact, ...]:
    pipelines, device = context.pipelines, context.pipelines.ladder.gauge.device
    with context.timed("model_loading"):
        pipe = pipelines.prepare(_as_painted(spec), context)
        pipelines.ladder.placement.apply(pipe, Mode.RESIDENT)
        pipelines.ladder.placement.release()  # the weights stay on the device, with no hooks
    pipelines.ladder.gauge.start()
    context.engine |= pipelines.describe() | {"dataset": report.summary(), "training": {}}
    results = train_results.Results(spec, pipe, context, _recipe(spec, report, context))
    if (done_before := results.find()) is not None:
        return done_before
    with context.timed(train_cache.STAGE):
        cache = train_cache.build(pipe, spec, examples, context, device)
    with learning(pipe, spec) as trainee:
        assert spec.seed is not None
        batches = Batches(examples, spec.train_batch_size, spec.seed)
        steps = Steps(pipe, spec, trainee, cache, batches, device)
        context.engine["training"] |= {
            "parameters": sum(weight.numel() for weight in trainee.weights.values()),
            "mixed_precision": steps.precision,
            "batches_per_epoch": batches.per_epoch,
            "truncated_captions": train_cache.truncated(pipe, cache.captions),
        }
        done = _Course(spec, trainee, steps, context, results.recipe).run(results)
        context.memory["peak_bytes"] = pipelines.ladder.gauge.peak()
        return results.save(trainee.tensors(), done)


def _as_painted(spec: Train) -> Generate:
    """The job that would paint with the plain base."""
    chosen = spec.model_dump(include={"model", "vae", "prediction_type", "rescale_betas_zero_snr"})
    return Generate(prompt="", **chosen)


def _recipe(spec: Train, report: Report, context: Context) -> str:
    """All that decides the bits, but for the number of threads and the device's own."""
    pipelines = context.pipelines
    decisive = spec.model_dump(mode="json", exclude={"notes", "checkpointing_steps"})
    versions = {name: version for name, version in pipelines.versions.items() if name != "python"}
    whole = [decisive, report.sha256, pipelines.identity(), versions, pipelines.device.partition(":")[0]]
    return train_results.digest_of(json.dumps(whole, sort_keys=True).encode())


class _Course:
    """The steps from where an earlier attempt came to up to the last."""

    def __init__(self, spec: Train, trainee: Trainee, steps: Steps, context: Context, recipe: str) -> None:
        self._spec, self._trainee, self._steps, self._context, self._recipe = spec, trainee, steps, context, recipe
        self._losses: list[float] = []
        self._seconds = 0.0
        self._of_late: deque[float] = deque(maxlen=_OF_LATE)
        self._tried = ["plainly"]
        self._checkpoints_gradients = False
        if spec.gradient_checkpointing:
            self._checkpoint_gradients()

    def run(self, results: train_results.Results) -> Checkpoint:
        """Raises Interrupt, having noted how far it is; TrainingTooLarge, TrainingFailed, NoSpace."""
        spec = self._spec
        self._go_on()
        try:
            results.paint(len(self._losses), self._steps)  # an earlier attempt may have been interrupted just there
            while (done := len(self._losses)) < spec.max_train_steps:
                self._tell()
                self._step(done)
                results.paint(done + 1, self._steps)
                if (done + 1) % spec.checkpointing_steps == 0 or done + 1 == spec.max_train_steps:
                    self._note()
        except Interrupt:
            with contextlib.suppress(NoSpace):  # what was noted before will do
                self._note()
            raise
        return self._noted()

    def _go_on(self) -> None:
        found = checkpoint.find(self._context.folder, self._recipe)
        if found is None:
            return
        with contextlib.suppress(KeyError, RuntimeError):  # of other weights: from the beginning
            self._steps.go_on(found)
            self._losses, self._seconds = found.losses[: found.step], found.seconds

    def _tell(self) -> None:
        done, total = len(self._losses), self._spec.max_train_steps
        told: dict[str, float] = {}
        if self._of_late:
            told["eta_s"] = round((total - done) * sum(self._of_late) / len(self._of_late), 1)
            told["loss"] = round(sum(recent := self._losses[-_OF_LATE:]) / len(recent), 6)
        self._context.progress(STAGE, 0, 0, done, total, **told)

    def _step(self, number: int) -> None:
        start = time.perf_counter()
        with self._context.timed(STAGE):
            loss = self._whole_step(number)
        if not math.isfinite(loss):
            raise TrainingFailed(number + 1)
        seconds = time.perf_counter() - start
        self._losses.append(loss)
        self._of_late.append(seconds)
        self._seconds += seconds

    def _whole_step(self, number: int) -> float:
        while True:
            with Catch() as caught:
                return self._steps(number)
            clean_up(self._context.pipelines.ladder.gauge.device)
            then = None if self._checkpoints_gradients else "gradient checkpointing"
            self._context.short_of_memory(STAGE, self._tried[-1], then)
            if then is None:
                raise _too_large(self._spec, self._context, self._tried)
            assert caught.said is not None
            self._checkpoint_gradients()

    def _checkpoint_gradients(self) -> None:
        self._trainee.checkpoint_gradients()
        self._checkpoints_gradients = True
        self._tried.append("with gradient checkpointing")
        self._context.engine["training"]["gradient_checkpointing"] = True

    def _noted(self) -> Checkpoint:
        return self._steps.note(len(self._losses), self._losses, self._seconds)

    def _note(self) -> None:
        with self._context.timed("saving"):
            self._noted().write(self._context.folder, self._recipe)


def _too_large(spec: Train, context: Context, tried: list[str]) -> TrainingTooLarge:
    device = context.pipelines.device
    return TrainingTooLarge(device, spec.resolution, spec.resolution, spec.train_batch_size, ", ".join(tried))
