"""The names of noise schedulers: diffusers' classes, and AUTOMATIC1111's sampler names for them. Only a table.

A1111's names give the same look, never the same bits. "DPM fast", "DPM adaptive", "DPM++ 2S a" have no exact peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)

_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
_NEEDED = {"PNDMScheduler": {"skip_prk_steps": True}}  # as Stable Diffusion has it; else fewer than 4 steps fail
_KARRAS = ("Euler", "Heun", "LMS", "DPM2", "DPM2 a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ SDE", "UniPC")

NAMES = tuple(
    sorted(
        [*CLASSES, *_SAMPLERS, *(f"{sampler} Karras" for sampler in _KARRAS)], key=lambda name: (name in CLASSES, name)
    )
)


@dataclass(frozen=True)
class SchedulerChoice:
    """A diffusers class by name, and what to change in the model's own scheduler configuration."""

    class_name: str
    overrides: MappingProxyType[str, Any]


def choose(name: str) -> SchedulerChoice:
    """What `name` stands for. Raises KeyError when it is not one of NAMES (upper and lower case are the same)."""
    known = {candidate.lower(): candidate for candidate in NAMES}[name.lower()]
    if known in CLASSES:
        return SchedulerChoice(known, MappingProxyType(_NEEDED.get(known, {})))
    sampler, karras = known.removesuffix(" Karras"), known.endswith(" Karras")
    class_name, overrides = _SAMPLERS[sampler]
    return SchedulerChoice(class_name, MappingProxyType(overrides | ({"use_karras_sigmas": True} if karras else {})))


def sampler_name(class_name: str, config: dict[str, Any]) -> str:
    """The A1111 name of a configured diffusers scheduler, for infotext; the class name where there is none."""
    fits = [
        name
        for name, (candidate, overrides) in _SAMPLERS.items()
        if candidate == class_name and all(config.get(key) == value for key, value in overrides.items())
    ]
    return fits[0] if fits else class_name
