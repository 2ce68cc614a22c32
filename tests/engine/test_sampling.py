"""Schedule types, eta, prediction types and VAEs of jobs: the bits of diffusers, set by hand."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import siblings
import torch
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image

from imagend import schedulers
from imagend.job import Outcome

SIZE = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_plain()


def pixels(ended: Any, folder: Path) -> np.ndarray:
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return np.asarray(Image.open(folder / "0000.png").convert("RGB"))


def plainly(pipe: Any, class_name: str | None, changes: dict[str, Any], **call: Any) -> np.ndarray:
    cls: Any = getattr(diffusers, class_name or "EulerDiscreteScheduler")
    config = diffusers.EulerDiscreteScheduler.load_config(EMBEDDED, subfolder="scheduler")
    pipe.scheduler = cls.from_config(config, **changes)
    return np.asarray(pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(5), **SIZE | call).images[0])


KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}


@pytest.mark.parametrize(
    ("fields", "class_name", "changes", "call"),
    [
        ({"schedule_type": "Karras"}, None, KARRAS, {}),
        ({"schedule_type": "SGM Uniform"}, None, {"timestep_spacing": "trailing"}, {}),
        ({"scheduler": "DPM++ 2M", "schedule_type": "Automatic"}, "DPMSolverMultistepScheduler", KARRAS, {}),
        ({"scheduler": "Heun", "schedule_type": "Beta"}, "HeunDiscreteScheduler", {"use_beta_sigmas": True}, {}),
        ({"scheduler": "UniPC", "schedule_type": "exponential"}, "UniPCMultistepScheduler", EXPONENTIAL, {}),
        ({"scheduler": "DDIM", "eta": 0.5}, "DDIMScheduler", {}, {"eta": 0.5}),
        ({"scheduler": "TCD", "eta": 0.3}, "TCDScheduler", {}, {"eta": 0.3}),
        ({"prediction_type": "v_prediction"}, None, {"prediction_type": "v_prediction"}, {}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            None,
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {},
        ),
    ],
)
def test_a_job_is_sampled_as_diffusers_is_when_set_by_hand(
    painter: Painter,
    pipe: Any,
    tmp_path: Path,
    fields: dict[str, Any],
    class_name: str | None,
    changes: dict[str, Any],
    call: dict[str, Any],
) -> None:
    ended = painter.run(tmp_path, prompt=PROMPT, seed=5, **SIZE | fields)
    assert (pixels(ended, tmp_path) == plainly(pipe, class_name, changes, **call)).all()
    said = ended.engine["scheduler"]["config"]
    assert changes.items() <= said.items()


def test_schedule_types_are_different_pictures(painter: Painter, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    painted = [
        painter.run(tmp_path / str(number), prompt=PROMPT, seed=5, **SIZE | fields).artifacts[0].pixels_sha256
        for number, fields in enumerate(
            [{}, {"schedule_type": "Karras"}, {"schedule_type": "Beta"}, {"schedule_type": "Exponential"}]
        )
    ]
    assert len(set(painted)) == 4


def test_the_infotext_names_the_schedule_type(painter: Painter, tmp_path: Path) -> None:
    for number, fields in enumerate([{"schedule_type": "Beta"}, {"schedule_type": "SGM Uniform"}]):
        painter.run(tmp_path / str(number), prompt=PROMPT, seed=5, **SIZE | fields)
        with Image.open(tmp_path / str(number) / "0000.png") as image:
            assert f"Schedule type: {fields['schedule_type']}," in image.text["parameters"]  # type: ignore[attr-defined]


def test_what_the_models_own_scheduler_cannot_do_is_told(painter: Painter, tmp_path: Path) -> None:
    ended = painter.run(tmp_path, prompt=PROMPT, **SIZE, eta=0.5)
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert ended.failure.error.message.startswith("eta: does not go with EulerDiscreteScheduler")


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_the_tables_say_of_each_class_what_its_code_says(name: str) -> None:
    cls: Any = getattr(diffusers, name)
    takes = inspect.signature(cls.__init__).parameters.keys()
    types = schedulers.schedule_types(name)
    assert ("Karras" in types) == ("Beta" in types) == ("use_karras_sigmas" in takes)
    assert takes >= {"timestep_spacing"} or "Simple" not in types

    def goes(*arguments: Any) -> bool:
        try:
            schedulers.configure(name, *arguments)
        except ValueError:
            return False
        return True

    assert goes(None, None, True) == ("rescale_betas_zero_snr" in takes)
    assert goes(None, None, None, 0.5) == ("eta" in inspect.signature(cls.step).parameters)
    config = diffusers.EulerDiscreteScheduler.load_config(EMBEDDED, subfolder="scheduler")
    for schedule_type in types:  # each can be made, whatever the model's own configuration has
        own = config | {"use_exponential_sigmas": True}
        cls.from_config(own, **schedulers.configure(name, schedule_type).overrides)


def test_a_job_paints_with_another_vae(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "diffusers").mkdir(parents=True)
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    sibling = siblings.folder(tmp_path / "sibling", 4)
    shutil.copytree(sibling / "vae", root / "vae" / "soft")
    worker = Painter(root)
    ended = worker.run(tmp_path / "a", prompt=PROMPT, seed=5, vae="soft", **SIZE)
    plain = load_plain()
    plain.vae = diffusers.AutoencoderKL.from_pretrained(sibling / "vae", dtype=torch.float32)
    assert (pixels(ended, tmp_path / "a") == plainly(plain, None, {})).all()
    assert ended.engine["vae"]["name"] == "soft"
    with Image.open(tmp_path / "a" / "0000.png") as image:
        assert f"VAE hash: {ended.engine['vae']['sha256'][:10]}, VAE: soft" in image.text["parameters"]  # type: ignore[attr-defined]
    own = worker.run(tmp_path / "b", prompt=PROMPT, seed=5, **SIZE)
    assert (pixels(own, tmp_path / "b") == plainly(load_plain(), None, {})).all()
    missing = worker.run(tmp_path / "c", prompt=PROMPT, vae="sof", **SIZE)
    assert missing.failure.error.code == "MODEL_NOT_FOUND"
    assert "No VAE named 'sof'" in missing.failure.error.message
