"""What a training has made gets into models/loras/: copied, looked at, recorded; by a thread, for it may be large.

The worker writes only in its draft, and what it wrote there is a stranger's file. Whatever happens when, there is no
half of a LoRA, and none twice: it appears by a rename, and a job that is tried again after a crash finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from imagend import files, weights
from imagend.architecture import ModelKind
from imagend.config import Config
from imagend.daemon.slots import Running
from imagend.errors import JobFailed
from imagend.hashes import hash_file
from imagend.installing import held_by_loras, install, taken
from imagend.job import Ref
from imagend.manifest import Installed
from imagend.messages import Ended
from imagend.outputs import Outputs
from imagend.recognise import identify
from imagend.record import Record, Trained
from imagend.train_spec import LORA, Train


class Installer:
    def __init__(self, outputs: Outputs, config: Callable[[], Config]) -> None:
        self._outputs, self._config = outputs, config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="install")

    def install(self, running: Running, ended: Ended) -> Future[Ended]:
        """How it ended, with `installed`, or with `not_installed`, which says why."""
        config = self._config()
        source = self._outputs.draft(running.job.ref) / LORA
        return self._thread.submit(_installed, running, ended, source, config.models, config.train.lora_store_gb)


def _installed(running: Running, ended: Ended, source: Path, models: Path, store_gb: float) -> Ended:
    assert isinstance(running.spec, Train)
    try:
        found = _install(running.job.ref, running.spec, ended, source, models, store_gb)
        return ended.model_copy(update={"installed": found, "not_installed": None})
    except OSError as error:
        why = f"{error.filename or models}: {error.strerror}"
    except (JobFailed, ValueError, KeyError, TypeError) as error:
        why = str(error)
    return ended.model_copy(update={"installed": None, "not_installed": why})


def _install(ref: Ref, spec: Train, ended: Ended, source: Path, models: Path, store_gb: float) -> Installed:
    """Raises OSError, JobFailed, ValueError; KeyError and TypeError where the worker's words are nonsense."""
    sha256 = next(artifact.sha256 for artifact in ended.artifacts if artifact.file == LORA)
    size = source.stat().st_size
    engine = ended.engine or {}
    told = Trained(
        job=str(ref),
        dataset=spec.dataset,
        dataset_sha256=engine["dataset"]["sha256"],
        model=engine["model"]["name"],
        model_sha256=engine["model"]["sha256"],
    )
    record = Record(
        schema="imagend.model/v1",
        kind=ModelKind.LORA,
        sha256=sha256,
        size=size,
        base=told.model,
        trigger_words=spec.trigger_words,
        notes=spec.notes,
        trained=told,
    )
    name = _put(ref, spec.name, source, models, record, store_gb)
    files_told = {f"{name.rpartition('/')[2]}.safetensors": sha256}
    return Installed(
        kind=ModelKind.LORA,
        name=name,
        sha256=sha256,
        files=files_told,
        size=size,
        source=None,
        version=None,
        base=told.model,
        license=None,
    )


def _put(ref: Ref, wanted: str, source: Path, models: Path, record: Record, store_gb: float) -> str:
    """Under the name that is wanted, or, where that was taken meanwhile, with the job's id after it."""
    folder = models / ModelKind.LORA.folders[-1]
    for name in (wanted, f"{wanted}-{ref.id[:8]}"):
        target = folder / f"{name}.safetensors"
        if not (there := taken(models, ModelKind.LORA, name)):
            if held_by_loras(models) + (record.size or 0) > store_gb * 1e9:
                raise ValueError(f"models/loras/ would hold more than {store_gb:g} GB (train.lora_store_gb)")
            files.make_folder(target.parent)
            copied = target.with_name(f".{target.name}.trained")
            try:
                if files.copy(source, copied) != record.sha256:
                    raise ValueError("it is not what the worker told of")
                found = identify(weights.read_header(copied, LORA))
                if found is None or found.kind is not ModelKind.LORA:
                    raise ValueError("it is no LoRA")
                install(copied, target, record)
            finally:
                copied.unlink(missing_ok=True)
            return name
        if target in there and (known := hash_file(target, lambda: None)) and known[1].sha256 == record.sha256:
            return name  # an attempt before this one has done it
    raise ValueError(f"there is a LoRA {wanted} already")
