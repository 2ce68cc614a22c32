"""How a job is sampled: schedule types, presets of models of few steps, and what config.yaml says of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from imagend import jobfile, presets, schedulers
from imagend.architecture import Architecture, ModelKind
from imagend.config import Config
from imagend.daemon.recipe import complete, fill
from imagend.errors import UnsupportedSetting
from imagend.generate_spec import Generate
from imagend.job import Job, Ref
from imagend.model_names import named
from imagend.model_settings import ModelSettings
from imagend.models import Model

REF = Ref("alice", "0123456789abcdef0123")
MODEL = Model(ModelKind.BASE, "a", Path("a"), 1, Architecture(ModelKind.BASE, "diffusers", native_size=1024), False, ())
NO_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}

SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize(
    ("name", "schedule_type", "overrides"),
    [
        ("Euler", None, {}),
        ("Euler", "Automatic", {}),
        ("Euler", "karras", NO_SIGMAS | {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", "Exponential", NO_SIGMAS | {"use_exponential_sigmas": True}),
        ("UniPC", "Beta", NO_SIGMAS | {"use_beta_sigmas": True}),
        ("Euler", "SGM Uniform", NO_SIGMAS | {"timestep_spacing": "trailing"}),
        ("Euler a", "Simple", {"timestep_spacing": "trailing"}),
        ("DPM++ 2M", None, {"algorithm_type": "dpmsolver++"}),
        ("dpm++ 2m", "Automatic", NO_SIGMAS | {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
        ("DPM++ 2M SDE", "Automatic", NO_SIGMAS | SDE | {"use_exponential_sigmas": True}),
        ("DPM++ 2M SDE Karras", None, NO_SIGMAS | SDE | {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE Karras", "Automatic", NO_SIGMAS | SDE | {"use_karras_sigmas": True}),
    ],
)
def test_a_schedule_type_is_what_automatic1111_means_by_it(
    name: str, schedule_type: str | None, overrides: dict[str, Any]
) -> None:
    assert schedulers.configure(name, schedule_type).overrides == overrides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("LCM", "Karras"), "schedule_type: does not go with LCM; what does is Automatic"),
        (
            ("Euler a", "karras"),
            "schedule_type: does not go with Euler a; what does is Automatic, SGM Uniform, Simple",
        ),
        (("DPM++ 2M Karras", "Beta"), "what does is Automatic, Karras"),
        (("DPM++ SDE", "Simple"), "what does is Automatic, Beta, Exponential, Karras"),
        (("Euler", None, None, None, 0.3), "eta: does not go with Euler, but with DDIMScheduler and TCDScheduler"),
        (("Heun", None, None, True), "rescale_betas_zero_snr: does not go with Heun, but with DDIMScheduler, "),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        schedulers.configure(*arguments)


def test_zero_snr_begins_at_the_last_step_of_training() -> None:
    choice = schedulers.configure("Euler", None, "v_prediction", True)
    expected = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert choice.overrides == expected
    assert schedulers.configure("Euler", None, None, False).overrides == {"rescale_betas_zero_snr": False}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("sdxl_lightning_4step", "lightning"),
        ("realvisxlV40_v40LightningBakedvae", "lightning"),
        ("Hyper-SDXL-8steps", "hyper"),
        ("hyperrealistic xl", "none"),
        ("sd_xl_turbo_1.0_fp16", "turbo"),
        ("DreamShaperXL_TurboDPM", "turbo"),
        ("few steps/sdxl LCM", "lcm"),
        ("TCD-SDXL", "tcd"),
        ("ponyDiffusionV6XL", "none"),
        ("calcmodel", "none"),
    ],
)
def test_a_models_name_tells_its_preset(name: str, preset: str) -> None:
    assert presets.guess(name) == preset


def test_a_name_tells_the_steps_of_a_model_of_few_steps_only() -> None:
    assert presets.of("sdxl_lightning_4step").num_inference_steps == 4
    assert presets.of("Hyper-SDXL-12steps-CFG").num_inference_steps == 12
    assert presets.of("two steps from hell").num_inference_steps == 30
    assert presets.of("sdxl 4step").num_inference_steps == 30
    assert presets.of("sdxl 4step", "lightning").num_inference_steps == 4


def test_the_presets_are_those_of_the_document() -> None:
    text = (REPOSITORY / "docs" / "models.md").read_text()
    for name, preset in presets.PRESETS.items():
        own = "the model's own"
        row = f"{preset.num_inference_steps} | {preset.guidance_scale:g} | {preset.scheduler or own} | "
        row += f"{preset.schedule_type or own} | {'none' if preset.eta is None else f'{preset.eta:g}'} |"
        assert f"| {name} | {row}" in text


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_a_job_that_is_possible(name: str) -> None:
    preset = presets.PRESETS[name]
    spec = Generate(
        prompt="",
        scheduler=preset.scheduler,
        schedule_type=preset.schedule_type,
        eta=preset.eta,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
    )
    assert spec.eta == preset.eta


def sampling(name: str, settings: ModelSettings | None = None, **fields: Any) -> tuple[Any, ...]:
    config = Config(model_settings={name: settings} if settings else {})
    spec = complete(Generate(prompt="p", **fields), REF, config, replace(MODEL, name=name))
    assert complete(spec, REF, config, replace(MODEL, name=name)) == spec  # nothing is left open
    return spec.num_inference_steps, spec.guidance_scale, spec.scheduler, spec.schedule_type, spec.eta


EULER, DDIM = "EulerDiscreteScheduler", "DDIMScheduler"


@pytest.mark.parametrize(
    ("name", "settings", "fields", "expected"),
    [
        ("pony", None, {}, (30, 5.0, None, None, None)),
        ("lightning", None, {}, (8, 0.0, EULER, "SGM Uniform", None)),
        ("lightning", None, {"num_inference_steps": 6, "guidance_scale": 2.0}, (6, 2.0, EULER, "SGM Uniform", None)),
        ("lightning", None, {"schedule_type": "Karras"}, (8, 0.0, EULER, "Karras", None)),
        ("lightning", None, {"scheduler": "Euler a"}, (8, 0.0, "Euler a", "SGM Uniform", None)),
        ("lightning", None, {"scheduler": "DPM++ SDE"}, (8, 0.0, "DPM++ SDE", None, None)),
        ("lightning", None, {"scheduler": "DPM++ 2M Karras"}, (8, 0.0, "DPM++ 2M Karras", None, None)),
        ("lightning", ModelSettings(preset="none"), {}, (30, 5.0, None, None, None)),
        ("pony", ModelSettings(preset="tcd"), {}, (4, 0.0, "TCDScheduler", None, 0.3)),
        ("pony", ModelSettings(preset="tcd"), {"eta": 0.0}, (4, 0.0, "TCDScheduler", None, 0.0)),
        ("pony", ModelSettings(preset="tcd"), {"scheduler": "Euler"}, (4, 0.0, "Euler", None, None)),
        ("a hyper 2step", None, {}, (2, 0.0, DDIM, "SGM Uniform", 0.0)),
    ],
)
def test_what_a_job_does_not_say_its_models_preset_says(
    name: str, settings: ModelSettings | None, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert sampling(name, settings, **fields) == expected


def test_what_a_models_files_do_not_say_the_config_says() -> None:
    settings = ModelSettings(vae="fixed", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    config = Config(model_settings={"a": settings})
    spec = complete(Generate(prompt="p"), REF, config, MODEL)
    assert (spec.vae, spec.prediction_type, spec.rescale_betas_zero_snr) == ("fixed", "v_prediction", True)
    own = Generate(prompt="p", vae="mine", prediction_type="epsilon", rescale_betas_zero_snr=False)
    spec = complete(own, REF, config, MODEL)
    assert (spec.vae, spec.prediction_type, spec.rescale_betas_zero_snr) == ("mine", "epsilon", False)
    spec = complete(Generate(prompt="p"), REF, config, replace(MODEL, name="another"))
    assert (spec.vae, spec.prediction_type, spec.rescale_betas_zero_snr) == (None, None, None)


def test_a_setting_that_the_preset_makes_impossible_is_told() -> None:
    with pytest.raises(UnsupportedSetting, match=r"model: 'turbo', as it is set, .* eta: does not go with Euler"):
        complete(Generate(prompt="p", eta=0.5), REF, Config(), replace(MODEL, name="turbo"))


def test_pictures_that_would_become_too_large_are_refused_when_the_models_own_size_is_known() -> None:
    """Where a job names no size, its door could not know."""
    model = replace(MODEL, architecture=replace(MODEL.architecture, native_size=1032))
    job = Generate.model_validate({"prompt": "x", "chain": {"upscale": {"scale": 4}}})
    with pytest.raises(UnsupportedSetting, match="of 4128 pixels a side, and at most 4096 are possible"):
        complete(job, Ref("a", "0" * 20), Config(), model)
    assert complete(job, Ref("a", "0" * 20), Config(), MODEL).width == 1024


def test_the_upscaler_of_a_job_that_names_none_is_the_settings() -> None:
    config = Config(default_upscaler="esrgan 4x")
    for asked, found in ((None, "esrgan 4x"), ("Lanczos", "Lanczos"), ("ink@0123456789", "ink@0123456789")):
        chained = Generate.model_validate({"prompt": "x", "chain": {"upscale": {"upscaler": asked}}})
        spec = complete(chained, REF, config, MODEL)
        assert spec.chain is not None
        assert spec.chain.upscale.upscaler == found
        assert (ModelKind.UPSCALER, found) in named(spec.model_dump())
        header = {"schema": "imagend.job/v1", "kind": "upscale", "issued_at": "2026-11-20T15:00:00Z"}
        job = jobfile.parse("alice", json.dumps(header | {"image": "a/b", "upscaler": asked}).encode())
        assert isinstance(job, Job)
        filled = fill(job, config, None)  # type: ignore[arg-type]  # no shelf is asked
        assert (named(filled.spec.model_dump()), filled.model) == ([(ModelKind.UPSCALER, found)], None)
