"""The ControlNets of a job, in one pipeline with the base's own components: no second copy, and the base unchanged.

Those of the last job that had any stay loaded, in main memory while a job does without them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from imagend.architecture import ModelKind
from imagend.control import Control, choose
from imagend.generate_spec import Generate
from imagend.memory_plan import Stage
from imagend.models import Model, Models
from imagend.worker.bases import load_controlnet
from imagend.worker.loras import Context
from imagend.worker.preprocessors import Preprocessors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import MultiControlNetModel, StableDiffusionXLControlNetPipeline


class Controlnets:
    """`used` are the ControlNets that guide the current job, in its order."""

    def __init__(self, models: Models, dtype: torch.dtype) -> None:
        self._models, self._dtype = models, dtype
        self._loaded: dict[Model, Any] = {}
        self._base: Any = None
        self._pipe: Any = None
        self.used: tuple[Model, ...] = ()

    def apply(self, base: Any, spec: Generate, release: Callable[[], None], context: Context) -> Any:
        """The pipeline for a completed spec: `base` itself, or its components with ControlNets. `release` takes a
        memory mode off what was painted with. Raises UnknownModel and its like, NoControlNet, UnsupportedSetting,
        Interrupt.
        """
        wanted = tuple(self.find(control) for control in acting(spec))
        if wanted == self.used and (not wanted or base is self._base):
            if not wanted:
                return base
            self._pipe.scheduler = base.scheduler
            return self._pipe
        release()
        self._rest()
        if not wanted:
            return base
        self._loaded = {model: net for model, net in self._loaded.items() if model in wanted}
        for model in wanted:
            if model not in self._loaded:
                self._loaded[model] = self._load(model, base, context)
        nets = [self._loaded[model] for model in wanted]
        self._pipe = StableDiffusionXLControlNetPipeline(
            **base.components,
            controlnet=nets[0] if len(nets) == 1 else MultiControlNetModel(nets),
            force_zeros_for_empty_prompt=base.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        self._pipe.set_progress_bar_config(disable=True)
        self._base, self.used = base, wanted
        return self._pipe

    def find(self, control: Control) -> Model:
        """The ControlNet that a job means. Raises UnknownModel and its like, NoControlNet, UnsupportedSetting."""
        name = control.model
        if name is None:
            assert control.type is not None
            name = choose(control.type, self._models.list(ModelKind.CONTROLNET))
        return self._models.find(name, ModelKind.CONTROLNET)

    def shed(self) -> None:
        """Let go of those that do not guide the current job."""
        self._loaded = {model: net for model, net in self._loaded.items() if model in self.used}

    def _rest(self) -> None:
        """Off the device. No memory mode may be on them."""
        for net in self._loaded.values():
            net.to("cpu")
        self._base, self._pipe, self.used = None, None, ()

    def _load(self, model: Model, base: Any, context: Context) -> Any:
        context.progress(Stage.LOADING)
        start = time.perf_counter()
        net = load_controlnet(model, base.unet, self._models, self._dtype)
        seconds = round(time.perf_counter() - start, 6)
        told = {"name": model.name, "seconds": seconds, "bytes": model.size}
        context.loading.setdefault("controlnets", []).append(told)
        return net


def acting(spec: Generate) -> tuple[Control, ...]:
    """Those of a job's controls that do anything."""
    return tuple(control for control in spec.control if control.control_strength > 0)


def arguments(spec: Generate, canvas: Callable[[str], Image.Image], preprocessors: Preprocessors) -> dict[str, Any]:
    """What the pipeline's call takes for them; nothing without any. `canvas` gives a picture at the size that is
    painted. Raises what Preprocessors.make() does."""
    controls = acting(spec)
    if not controls:
        return {}
    sized = [canvas(control.image) for control in controls]
    lists: dict[str, list[Any]] = {
        "control_image" if spec.is_img2img else "image": [
            preprocessors.make(control.type, image) if control.preprocess and control.type else image
            for control, image in zip(controls, sized, strict=True)
        ],
        "controlnet_conditioning_scale": [control.control_strength for control in controls],
        "control_guidance_start": [control.control_guidance_start for control in controls],
        "control_guidance_end": [control.control_guidance_end for control in controls],
    }
    return lists if len(controls) > 1 else {name: values[0] for name, values in lists.items()}
