"""What a device paints with: the face over base, VAE, LoRAs, textual inversions and scheduler. It paints nothing."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    import compel  # noqa: F401  imported now, so that the first job does not wait for it
    import diffusers
    import transformers

from imagend import __version__, schedulers
from imagend.architecture import ModelKind
from imagend.edit_spec import Edit
from imagend.errors import UnsupportedSetting, UnusableModel
from imagend.generate_spec import Generate
from imagend.memory_plan import Stage
from imagend.messages import WorkerSettings
from imagend.models import Model, Models, digest
from imagend.worker.bases import StableDiffusionXLPipeline as StableDiffusionXLPipeline
from imagend.worker.controlnets import Controlnets
from imagend.worker.detect import Detectors
from imagend.worker.embedding_cache import EmbeddingCache
from imagend.worker.inversions import Inversions
from imagend.worker.ip_adapter import IpAdapter
from imagend.worker.ladder import Ladder
from imagend.worker.loras import Context, Loras
from imagend.worker.prompt_cache import PromptCache
from imagend.worker.safety import Classifiers
from imagend.worker.switch import Switch
from imagend.worker.zero_shot import ZeroShot

transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()


_DECIDING = ("torch", "diffusers", "transformers", "compel", "peft")  # what can change a picture's bits


class Pipelines:
    """One device and what is loaded on it."""

    def __init__(self, device: str, models: Models, settings: WorkerSettings | None = None) -> None:
        self.device, self.models, self.settings = device, models, settings or WorkerSettings()
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.versions = {name: version(name) for name in _DECIDING} | {"python": platform.python_version()}
        self.ladder = Ladder(device, self.settings.vram_limit_gb)
        self.loras = Loras(models, self.settings.lora_cache_mb * 2**20)
        self.inversions = Inversions(models)
        self.controlnets = Controlnets(models, self.dtype)
        self.ip_adapter = IpAdapter(models, self._embeddings())
        self.detectors = Detectors(models, device, self.make_room)
        self.classifiers, self.zero_shot = Classifiers(models), ZeroShot(models)
        self.prompts = PromptCache(self.settings.prompt_cache_mb * 2**20)
        limit_bytes = int(self.settings.base_cache_gb * 2**30)
        self.switch = Switch(models, self.ladder.placement, limit_bytes, self.loras.forget)
        self._loading: dict[str, Any] = {}
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._hashing: dict[Model, Future[dict[str, str]]] = {}

    def prepare(self, spec: Generate, context: Context) -> Any:
        """The pipeline for a completed spec: its base, its VAE, its scheduler and what its prompts name. Where its
        weights are, the memory ladder says afterwards. Raises JobFailed, Interrupt.
        """
        assert spec.model is not None
        self._loading = context.loading
        self._check(spec)
        pipe = self.get(spec.model, lambda: context.progress(Stage.LOADING), spec.vae)
        pipe.scheduler = self._scheduler(spec)
        self.loras.apply(pipe, spec, self.ladder.placement.release, context)
        self.inversions.apply(pipe, spec, context.failed)
        self.ip_adapter.apply(pipe, spec, self.ladder.placement.release, context)
        pipe = self.controlnets.apply(pipe, spec, self.ladder.placement.release, context)
        self._hash((*self.controlnets.used, *self.ip_adapter.used))
        return pipe

    def _check(self, spec: Generate) -> None:
        model = self.models.find(str(spec.model))
        if model.architecture.inpainting and not isinstance(spec, Edit):
            raise UnusableModel("model", model.name, "for inpainting: it only repaints pictures, by jobs of kind edit")

    def _embeddings(self) -> EmbeddingCache | None:
        folder, size = self.settings.embeddings, self.settings.embedding_cache_mb * 2**20
        return EmbeddingCache(Path(folder), size) if folder and size else None

    def get(self, name: str, loading: Callable[[], None], vae: str | None = None) -> Any:
        """The pipeline of a model with a VAE (None: its own); `loading` is called before a load, which takes seconds to
        minutes. Raises UnknownModel and its like, UnsupportedSetting.
        """
        model = self.models.find(name)
        other = self.models.find(vae, ModelKind.VAE) if vae is not None else None
        self._hashing = {one: done for one, done in self._hashing.items() if one in (model, other)}
        self._hash([one for one in (model, other) if one is not None])  # while they are loaded
        self._loading |= self.switch.to(model, other, self.dtype, loading)
        return self.switch.pipe

    def _hash(self, used: Iterable[Model]) -> None:
        for model in used:
            if model not in self._hashing:
                self._hashing[model] = self._hasher.submit(self.models.digests, model)

    def _scheduler(self, spec: Generate) -> Any:
        """A fresh one: of the model's own class or the one asked for, on the model's settings, changed as asked."""
        assert self.switch.base is not None
        own = self.switch.base.rest["scheduler"]
        name = spec.scheduler or type(own).__name__
        if name not in schedulers.CLASSES and not spec.scheduler:
            return type(own).from_config(own.config)
        try:
            choice = schedulers.configure(
                name, spec.schedule_type, spec.prediction_type, spec.rescale_betas_zero_snr, spec.eta
            )
        except ValueError as error:
            raise UnsupportedSetting(str(error)) from None
        return getattr(diffusers, choice.class_name).from_config(own.config, **choice.overrides)

    def memory(self) -> dict[str, int]:
        """The device's, in bytes, for Ready."""
        return {"total_bytes": self.ladder.gauge.total_bytes, "available_bytes": self.ladder.gauge.available()}

    def free_caches(self) -> None:
        """Let go of what only spares work and lies where memory is short."""
        if self.device == "cpu" or self.switch.pipe is None:  # without one it was a load, in main memory, that failed
            self.prompts.clear()
            self.switch.shed()
            self.controlnets.shed()
            self.ip_adapter.shed()
            self.detectors.forget()

    def make_room(self) -> None:
        """For what works beside the pipeline: it leaves the device, and is brought back by the next job that paints."""
        self.free_caches()
        self.ladder.placement.leave()

    def identity(self) -> str:
        """Which weights are loaded."""
        return digest(
            {
                f"{model.kind}/{name}": sha256
                for model in (*self._used(), *self.controlnets.used, *self.ip_adapter.used)
                for name, sha256 in self._files(model)
            }
        )

    def encoders(self) -> Hashable:
        """All that decides what the text encoders make of a text."""
        model = self._used()[0]
        return model.path, model.version, str(self.dtype), self.loras.fingerprint()

    def describe(self) -> dict[str, Any]:
        """What painted, for the manifest. JSON only."""
        model, *vae = (_described(model, dict(self._files(model))) for model in self._used())
        scheduler = self.switch.pipe.scheduler
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return {
            "device": self.device,
            "device_name": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {"imagend": __version__, **self.versions},
            "model": model,
            "vae": vae[0] if vae else None,
            "loras": self.loras.describe(),
            "embeddings": self.inversions.describe(),
            "controlnets": [_described(one, dict(self._files(one))) for one in self.controlnets.used],
            **self._describe_ip_adapter(),
            "scheduler": {"class": type(scheduler).__name__, "config": _plain(config)},
        }

    def _describe_ip_adapter(self) -> dict[str, Any]:
        if not self.ip_adapter.used:
            return {}
        adapter, encoder = (_described(model, dict(self._files(model))) for model in self.ip_adapter.used)
        return {"ip_adapter": adapter | {"encoder": encoder}}

    def _used(self) -> list[Model]:
        """The base's and, if it is not the base's own, the VAE's."""
        return [loaded.model for loaded in (self.switch.base, self.switch.vae) if loaded is not None]

    def _files(self, model: Model) -> list[tuple[str, str]]:
        return list(self._hashing[model].result().items())


def _described(model: Model, files: dict[str, str]) -> dict[str, Any]:
    return {"name": model.name, "sha256": digest(files), "files": files}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
