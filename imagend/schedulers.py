"""The names of noise schedulers: diffusers' classes, AUTOMATIC1111's samplers and schedule types. Only tables.

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

SCHEDULE_TYPES = ("Automatic", "Beta", "Exponential", "Karras", "SGM Uniform", "Simple")
_SIGMAS = {"Karras": "use_karras_sigmas", "Exponential": "use_exponential_sigmas", "Beta": "use_beta_sigmas"}
_OTHER_SIGMAS = ("use_lu_lambdas", "use_flow_sigmas")
_EVEN = {"timestep_spacing": "trailing"}  # SGM Uniform and Simple: from the noisiest step down
_AUTOMATIC = {  # what AUTOMATIC1111 takes where nothing else is chosen (modules/sd_samplers_kdiffusion.py)
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "Karras"),
    "DPM++ 2M SDE": "Exponential",
}
# Which classes know what, as their constructors and step() say.
_HAVE_SIGMAS = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
}
_HAVE_SPACING = set(CLASSES) - {"DPMSolverSinglestepScheduler", "LCMScheduler", "TCDScheduler"}
_HAVE_ZERO_SNR = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
_HAVE_ETA = {"DDIMScheduler", "TCDScheduler"}

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


def schedule_types(name: str) -> tuple[str, ...]:
    """Those that go with a scheduler, by any of its names, of which those that end in Karras have said theirs."""
    if name.lower().endswith(" karras"):
        return ("Automatic", "Karras")
    class_name = choose(name).class_name
    sigmas = _SIGMAS if class_name in _HAVE_SIGMAS else ()
    even = ("SGM Uniform", "Simple") if class_name in _HAVE_SPACING else ()
    return ("Automatic", *sorted(sigmas), *even)


def configure(
    name: str,
    schedule_type: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    eta: float | None = None,
) -> SchedulerChoice:
    """A scheduler by any of its names, set as a job wants it. None leaves what the model's own configuration says.

    Raises KeyError when the name is not one of NAMES; ValueError "field: why" where a setting does not go with it.
    """
    choice = choose(name)
    if name.lower().endswith(" karras"):
        schedule_type = schedule_type if schedule_type and schedule_type.lower() != "automatic" else "Karras"
    cls, changes = choice.class_name, dict(choice.overrides)
    if schedule_type is not None:
        (given,) = [one for one in SCHEDULE_TYPES if one.lower() == schedule_type.lower()]
        if given not in (fitting := schedule_types(name)):
            raise ValueError(f"schedule_type: does not go with {name}; what does is {', '.join(fitting)}")
        changes |= _scheduled(choice, name, given)
    if rescale_betas_zero_snr is not None:
        if rescale_betas_zero_snr and cls not in _HAVE_ZERO_SNR:
            raise ValueError(
                f"rescale_betas_zero_snr: does not go with {name}, but with {', '.join(sorted(_HAVE_ZERO_SNR))}"
            )
        changes["rescale_betas_zero_snr"] = rescale_betas_zero_snr
        if rescale_betas_zero_snr and cls in _HAVE_SPACING:
            changes |= _EVEN  # the step that is nothing but noise must be among them
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if eta and cls not in _HAVE_ETA:
        raise ValueError(f"eta: does not go with {name}, but with {' and '.join(sorted(_HAVE_ETA))}")
    return SchedulerChoice(cls, MappingProxyType(changes))


def _scheduled(choice: SchedulerChoice, name: str, schedule_type: str) -> dict[str, Any]:
    if schedule_type == "Automatic":
        sampler = next((one for one in _AUTOMATIC if one.lower() == name.lower()), None)
        return _scheduled(choice, name, _AUTOMATIC[sampler]) if sampler else {}
    if choice.class_name not in _HAVE_SIGMAS:
        return dict(_EVEN)
    others = dict.fromkeys((*_SIGMAS.values(), *_OTHER_SIGMAS), False)  # the model's own may have one, and one only
    return others | ({_SIGMAS[schedule_type]: True} if schedule_type in _SIGMAS else _EVEN)


def schedule_type_of(config: dict[str, Any]) -> str | None:
    """The schedule type of a configured diffusers scheduler, for infotext, where it can be told."""
    return next((name for name, key in _SIGMAS.items() if config.get(key)), None)


def sampler_name(class_name: str, config: dict[str, Any]) -> str:
    """The A1111 name of a configured diffusers scheduler, for infotext; the class name where there is none."""
    fits = [
        name
        for name, (candidate, overrides) in _SAMPLERS.items()
        if candidate == class_name and all(config.get(key) == value for key, value in overrides.items())
    ]
    return fits[0] if fits else class_name
