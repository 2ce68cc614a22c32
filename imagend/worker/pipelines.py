"""What a device paints with: the face over base models, VAE, textual inversions and scheduler. It paints nothing."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Hashable
from importlib.metadata import version
from typing import Any, Protocol

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    import compel  # noqa: F401  imported now, so that the first job does not wait for it
    import diffusers
    import transformers
    from diffusers import StableDiffusionXLPipeline
    from safetensors import SafetensorError

from imagend import __version__, schedulers
from imagend.errors import BrokenModel
from imagend.job import Generate
from imagend.messages import WorkerSettings
from imagend.models import Model, Models, digest
from imagend.worker.inversions import Inversions
from imagend.worker.ladder import Ladder
from imagend.worker.prompt_cache import PromptCache
from imagend.worker.shortage import is_out_of_memory
from imagend.worker.vae import upcast

transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()


_DECIDING = ("torch", "diffusers", "transformers", "compel")  # what can change a picture's bits


# what the libraries raise on files that are missing, cut, of another shape or for another library
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


class Context(Protocol):
    """Of a job (worker.main.Context), what is needed here."""

    loading: dict[str, Any]

    def progress(self, stage: str) -> None: ...


class Pipelines:
    """One device and the model that is loaded on it."""

    def __init__(self, device: str, models: Models, settings: WorkerSettings | None = None) -> None:
        self.device, self.models, self.settings = device, models, settings or WorkerSettings()
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.versions = {name: version(name) for name in _DECIDING} | {"python": platform.python_version()}
        self.ladder = Ladder(device, self.settings.vram_limit_gb)
        self.model: Model | None = None
        self.files: dict[str, str] = {}
        self.inversions = Inversions(models)
        self.prompts = PromptCache(self.settings.prompt_cache_mb * 2**20)
        self._pipe: Any = None
        self._scheduler_config: dict[str, Any] = {}

    def prepare(self, spec: Generate, context: Context) -> Any:
        """The pipeline for a completed spec: its base, its scheduler and what its prompts name. Where its weights are,
        the memory ladder says afterwards. Raises JobFailed, Interrupt.
        """
        assert spec.model is not None
        pipe = self.get(spec.model, lambda: context.progress("model_loading"))
        self.set_scheduler(spec.scheduler)
        self.inversions.apply(pipe, spec)
        return pipe

    def get(self, name: str, loading: Callable[[], None]) -> Any:
        """The pipeline of a model; `loading` is called before a load, which takes seconds to minutes.

        Raises UnknownModel, BrokenModel, BrokenWeights.
        """
        model = self.models.find(name)
        if self._pipe is None or self.model != model:
            loading()
            self._load(model)
        return self._pipe

    def _load(self, model: Model) -> None:
        self.ladder.placement.release()
        self._pipe, self.model = None, None
        if self.device != "cpu":
            torch.cuda.empty_cache()
        self.models.check(model)
        try:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                model.path, local_files_only=True, use_safetensors=True, dtype=self.dtype, add_watermarker=False
            )
        except torch.AcceleratorError:  # the device's trouble, not the files'
            raise
        except _BROKEN as error:
            if is_out_of_memory(error):
                raise
            raise BrokenModel(model.name, " ".join(str(error).split())[:300]) from None
        pipe.set_progress_bar_config(disable=True)
        upcast(pipe.vae)
        self._pipe, self.model = pipe, model
        self.files = self.models.digests(model)
        self._scheduler_config = dict(pipe.scheduler.config)

    def set_scheduler(self, name: str | None) -> None:
        """Give the pipeline a fresh scheduler: the model's own, or `name` on the model's settings."""
        if name is None:
            cls, overrides = getattr(diffusers, str(self._scheduler_config["_class_name"])), {}
        else:
            choice = schedulers.choose(name)
            cls, overrides = getattr(diffusers, choice.class_name), dict(choice.overrides)
        self._pipe.scheduler = cls.from_config(self._scheduler_config, **overrides)

    def memory(self) -> dict[str, int]:
        """The device's, in bytes, for Ready."""
        return {"total_bytes": self.ladder.gauge.total_bytes, "available_bytes": self.ladder.gauge.available()}

    def free_caches(self) -> None:
        """Let go of what only spares work and lies where memory is short."""
        if self.device == "cpu":
            self.prompts.clear()

    def identity(self) -> str:
        """Which weights are loaded."""
        return digest(self.files)

    def encoders(self) -> Hashable:
        """All that decides what the text encoders make of a text."""
        assert self.model is not None
        return self.model.path, self.model.version, str(self.dtype)

    def describe(self) -> dict[str, Any]:
        """What painted, for the manifest. JSON only."""
        assert self.model is not None
        config = {key: value for key, value in self._pipe.scheduler.config.items() if not key.startswith("_")}
        return {
            "device": self.device,
            "device_name": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {"imagend": __version__, **self.versions},
            "model": {"name": self.model.name, "sha256": digest(self.files), "files": self.files},
            "embeddings": self.inversions.describe(),
            "scheduler": {"class": type(self._pipe.scheduler).__name__, "config": _plain(config)},
        }


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
