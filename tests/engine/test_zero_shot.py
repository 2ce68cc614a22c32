"""CLIP's opinion on which way an edit goes: as plain transformers computes it; and the worker goes that way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from engine_conftest import EMBEDDED, REF, Painter
from PIL import Image

from imagend.config import Config
from imagend.daemon.recipe import complete
from imagend.edit_spec import Edit
from imagend.job import Outcome
from imagend.messages import Run
from imagend.worker.zero_shot import SENTENCES

NAME = "shapes/front"
WORDS = ("hm", "please", "nicer", "otra cosa", "mejor", "una silla", "surprise me", "do it", "vite", "ok", "x")


@pytest.fixture(scope="module")
def painter_with_clip(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    root = tmp_path_factory.mktemp("models")
    mask_net = REPOSITORY / "models" / "controlnet" / "shapes-xl-mask"
    for kind, path in (("diffusers", EMBEDDED), ("controlnet", mask_net)):
        (root / kind).mkdir()
        (root / kind / path.name).symlink_to(path)
    clips.save(root / "clip_text" / "small")
    return Painter(root)


def plainly(folder: Path, prompt: str) -> dict[str, float]:
    """The chance of each way, by plain calls."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [prompt, *(sentence for _, _, sentence in SENTENCES)]
    with torch.no_grad():
        found = network(**tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
    found = found / found.norm(dim=-1, keepdim=True)
    chances = (100 * found[1:] @ found[0]).softmax(-1)
    of = {"simple": 0.0, "complex": 0.0}
    for (path, _, _), chance in zip(SENTENCES, chances, strict=True):
        of[path] += float(chance)
    return of


def test_its_opinion_is_that_of_a_plain_call(painter_with_clip: Painter) -> None:
    pipelines, seen = painter_with_clip.pipelines, set()
    for prompt in WORDS:
        expected = plainly(painter_with_clip.models.root / "clip_text" / "small", prompt)
        found = pipelines.zero_shot.opinion(prompt)
        assert found.path == max(expected, key=expected.__getitem__)
        assert found.confidence == pytest.approx(expected[found.path], abs=0.006)
        assert found.reason.startswith("no rule says more; to the CLIP small it ")
        seen.add(found.path)
    assert seen == {"simple", "complex"}


def specs(painter: Painter, prompt: str) -> dict[str, dict[str, Any]]:
    quick = {"prompt": prompt, "image": NAME, "mask": {"whole": True}, "num_inference_steps": 3, "seed": 7}
    control = [{"image": NAME, "model": "shapes-xl-mask", "control_strength": 1.0}]
    made = {}
    for path, more in (("simple", {}), ("complex", {"control": control})):
        asked = Edit.model_validate_json(json.dumps(quick | {"path": path} | more))
        made[path] = complete(asked, REF, Config(), painter.models.find("shapes-xl")).model_dump(mode="json")
    return made


def paint(painter: Painter, folder: Path, picture: Path, spec: dict[str, Any], **more: Any) -> Any:
    folder.mkdir()
    run = Run(job=REF, kind="edit", spec=spec, folder=str(folder), pictures={NAME: str(picture)}, **more)
    ended = painter.worker.attempt(run, painter.worker.expect(run))
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    return ended


@pytest.mark.parametrize("path", ["simple", "complex"])
def test_the_worker_goes_the_way_that_it_says(painter_with_clip: Painter, tmp_path: Path, path: str) -> None:
    painter = painter_with_clip
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (128, 128, 3), np.uint8)).save(picture)
    prompt = next(word for word in WORDS if painter.pipelines.zero_shot.opinion(word).path == path)
    both = specs(painter, prompt)
    ended = paint(painter, tmp_path / "auto", picture, both["simple"], otherwise=both["complex"])
    assert ended.route.path == path
    assert "routing" in ended.timings
    alone = {way: paint(painter, tmp_path / way, picture, spec) for way, spec in both.items()}
    pixels = {way: done.artifacts[0].pixels_sha256 for way, done in alone.items()}
    assert ended.artifacts[0].pixels_sha256 == pixels[path]
    assert pixels["simple"] != pixels["complex"]
