"""Models of few steps: how those who distilled them want them sampled, by their names. Only a table.

Their files do not say what they are, but their names do. Steps, scheduler and guidance: the model cards of
ByteDance/SDXL-Lightning, ByteDance/Hyper-SD, latent-consistency/lcm-lora-sdxl, stabilityai/sdxl-turbo and
h1t/TCD-SDXL-LoRA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

NUM_INFERENCE_STEPS = 30
GUIDANCE_SCALE = 5.0

Name = Literal["none", "lightning", "hyper", "lcm", "turbo", "tcd"]


@dataclass(frozen=True)
class Preset:
    """What a job has that does not say it; names and meanings as in imagend.job. None is the model's own."""

    num_inference_steps: int = NUM_INFERENCE_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    scheduler: str | None = None
    schedule_type: str | None = None
    eta: float | None = None


_EVEN = "SGM Uniform"  # timestep_spacing "trailing": they learned to begin at the noisiest step
PRESETS = MappingProxyType(
    {
        "none": Preset(),
        "lightning": Preset(8, 0.0, "EulerDiscreteScheduler", _EVEN),
        "hyper": Preset(8, 0.0, "DDIMScheduler", _EVEN, 0.0),
        "lcm": Preset(8, 1.5, "LCMScheduler"),
        "turbo": Preset(4, 0.0, "EulerAncestralDiscreteScheduler", _EVEN),
        "tcd": Preset(4, 0.0, "TCDScheduler", None, 0.3),
    }
)
_WORD = re.compile(r"(?<![a-z])(lightning|hyper|lcm|turbo|tcd)(?![a-z])|(lightning|turbo)", re.IGNORECASE)
_STEPS = re.compile(r"(?<![0-9])([1-9]|1[0-6])[ _-]?steps?(?![a-z])", re.IGNORECASE)


def guess(model: str) -> str:
    """The preset of a model, from its name: "none" where it says nothing."""
    found = _WORD.search(model)
    return (found[1] or found[2]).lower() if found else "none"


def of(model: str, name: str | None = None) -> Preset:
    """The preset of a model: the one of a name, or else the one that its own name tells, with the steps it tells."""
    preset = PRESETS[name or guess(model)]
    steps = _STEPS.search(model)
    return replace(preset, num_inference_steps=int(steps[1])) if steps and preset is not PRESETS["none"] else preset
