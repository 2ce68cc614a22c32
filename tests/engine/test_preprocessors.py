"""Control pictures from plain ones: as OpenCV and transformers make them, by tiny untrained models; poses as drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import pytest
import torch
import transformers
from engine_conftest import EMBEDDED, Painter, load_plain
from PIL import Image

from imagend.control import ControlType
from imagend.errors import BrokenModel, NoPreprocessor
from imagend.job import Outcome
from imagend.models import Models
from imagend.worker.pose import draw
from imagend.worker.preprocessors import Preprocessors

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
STANDING = np.array(
    [
        *((60, 20), (64, 16), (56, 16), (68, 18), (52, 18)),  # nose, eyes, ears
        *((75, 40), (45, 40), (85, 60), (35, 60), (90, 80), (30, 80)),  # shoulders, elbows, wrists
        *((68, 80), (52, 80), (69, 105), (51, 105), (70, 125), (50, 125)),  # hips, knees, ankles
    ],
    float,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A models folder with a tiny Depth Anything and a tiny ViTPose."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, patch_size=14, **sizes)
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(root / "preprocessors" / "depth")
    processor = transformers.DPTImageProcessorPil(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True
    )
    processor.save_pretrained(root / "preprocessors" / "depth")
    backbone = transformers.VitPoseBackboneConfig(
        image_size=(32, 24), patch_size=(8, 8), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, num_labels=17)
    transformers.VitPoseForPoseEstimation(config).save_pretrained(root / "preprocessors" / "people")
    transformers.VitPoseImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(
        root / "preprocessors" / "people"
    )
    return Models(root)


def owned(kind: Any, folder: Path) -> Any:
    """Not mapped from its file, whose alignment decides bits."""
    network = kind.from_pretrained(folder, local_files_only=True).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


def test_edges_are_opencvs() -> None:
    found = np.asarray(Preprocessors(Models(Path("/nowhere"))).make(ControlType.CANNY, NOISE))
    assert (found == cv2.Canny(np.asarray(NOISE), 100, 200)[..., None]).all()
    assert set(np.unique(found)) == {0, 255}


def test_depth_is_that_of_transformers_from_black_to_white(models: Models) -> None:
    preprocessors = Preprocessors(models)
    found = np.asarray(preprocessors.make(ControlType.DEPTH, NOISE))
    folder = models.root / "preprocessors" / "depth"
    processor = transformers.DPTImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        said = owned(transformers.DepthAnythingForDepthEstimation, folder)(**processor(NOISE, return_tensors="pt"))
    plain = processor.post_process_depth_estimation(said, target_sizes=[(48, 64)])[0]["predicted_depth"]
    plain = ((plain - plain.min()) / (plain.max() - plain.min()) * 255).round().to(torch.uint8).numpy()
    assert (found == plain[..., None]).all()
    assert (found.min(), found.max()) == (0, 255)
    (told,) = preprocessors.used
    assert (told["type"], told["name"], len(told["sha256"])) == ("depth", "depth", 64)


def test_a_pose_is_that_of_transformers_drawn(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagend.worker.pose.SCORE", -1e9)  # an untrained model is sure of nothing
    found = np.asarray(Preprocessors(models).make(ControlType.POSE, NOISE))
    folder = models.root / "preprocessors" / "people"
    processor = transformers.VitPoseImageProcessorPil.from_pretrained(folder)
    boxes = [[[0, 0, 64, 48]]]
    with torch.no_grad():
        network = owned(transformers.VitPoseForPoseEstimation, folder)
        said = network(**processor(NOISE, boxes=boxes, return_tensors="pt"))
    person = processor.post_process_pose_estimation(said, boxes=boxes)[0][0]
    assert (found == np.asarray(draw(person["keypoints"].numpy(), person["scores"].numpy(), (64, 48)))).all()
    assert found.any()


def test_a_pose_has_openposes_colours() -> None:
    """Points as they are, limbs at 60 %; the neck, which COCO has not, between the shoulders."""
    picture = np.asarray(draw(STANDING, np.ones(17), (120, 140)))
    points = {(60, 20): (255, 0, 0), (60, 40): (255, 85, 0), (45, 40): (255, 170, 0), (75, 40): (85, 255, 0)}
    points |= {(30, 80): (170, 255, 0), (90, 80): (0, 255, 85), (50, 125): (0, 170, 255), (70, 125): (85, 0, 255)}
    points |= {(52, 18): (255, 0, 170), (68, 18): (255, 0, 85)}
    for (x, y), colour in points.items():
        assert tuple(picture[y, x]) == colour
    limbs = {(40, 50): (153, 102, 0), (80, 50): (102, 153, 0), (60, 30): (0, 0, 153), (51, 115): (0, 153, 102)}
    for (x, y), colour in limbs.items():
        assert tuple(picture[y, x]) == colour
    assert not picture[:8].any()


def test_points_that_are_not_seen_are_not_drawn() -> None:
    assert not np.asarray(draw(STANDING, np.zeros(17), (120, 140))).any()
    scores = np.ones(17)
    scores[5] = 0.1  # the left shoulder: no neck either, and no arms
    picture = np.asarray(draw(STANDING, scores, (120, 140)))
    assert tuple(picture[40, 45]) == (255, 170, 0)
    assert not picture[40, 60].any()
    assert not picture[40, 75].any()


def test_a_job_makes_its_control_picture_and_says_by_what(models: Models, tmp_path: Path) -> None:
    for kind, source in (
        ("diffusers", EMBEDDED),
        ("controlnet", EMBEDDED.parents[1] / "controlnet" / "shapes-xl-mask"),
    ):
        (models.root / kind).mkdir(exist_ok=True)
        (models.root / kind / source.name).symlink_to(source)
    painter, places = Painter(models.root), {"a/b": tmp_path / "b.png", "a/c": tmp_path / "c.png"}
    wide = NOISE.resize((128, 128))
    wide.save(places["a/b"])
    Preprocessors(models).make(ControlType.DEPTH, wide).save(places["a/c"])
    job = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 1}
    control = {"type": "depth", "model": "shapes-xl-mask", "control_strength": 1.0}
    made = painter.run(tmp_path / "1", places, **job, control=[control | {"image": "a/b", "preprocess": True}])
    given = painter.run(tmp_path / "2", places, **job, control=[control | {"image": "a/c"}])
    assert made.outcome is Outcome.SUCCEEDED, made.failure
    assert made.artifacts[0].pixels_sha256 == given.artifacts[0].pixels_sha256
    assert [one["name"] for one in made.engine["preprocessors"]] == ["depth"]
    assert "preprocessors" not in given.engine


def test_an_edit_is_guided_by_pose_and_depth_of_its_original_as_in_plain_diffusers(
    models: Models, tmp_path: Path
) -> None:
    """The complex way, as the daemon writes it into the spec."""
    net = EMBEDDED.parents[1] / "controlnet" / "shapes-xl-mask"
    for kind, source in (("diffusers", EMBEDDED), ("controlnet", net)):
        (models.root / kind).mkdir(exist_ok=True)
        if not (models.root / kind / source.name).exists():
            (models.root / kind / source.name).symlink_to(source)
    photo = NOISE.resize((128, 128))
    photo.save(tmp_path / "b.png")
    control = {"model": "shapes-xl-mask", "image": "a/b", "preprocess": True}
    both = [control | {"type": "pose", "control_strength": 0.4}, control | {"type": "depth"}]
    job = {"kind": "edit", "prompt": "a red circle", "num_inference_steps": 3, "seed": 1, "image": "a/b"}
    job |= {"mask": {"whole": True}, "path": "complex", "strength": 0.7}
    ended = Painter(models.root).run(tmp_path / "1", {"a/b": tmp_path / "b.png"}, **job, control=both)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert [one["type"] for one in ended.engine["preprocessors"]] == ["pose", "depth"]
    nets = [owned(diffusers.ControlNetModel, net) for _ in range(2)]
    bare = load_plain()
    pipe = diffusers.StableDiffusionXLControlNetInpaintPipeline(
        **bare.components, controlnet=diffusers.MultiControlNetModel(nets), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt="a red circle",
        num_inference_steps=3,
        strength=0.7,
        image=photo,
        mask_image=Image.new("L", (128, 128), 255),
        control_image=[Preprocessors(models).make(type_, photo) for type_ in (ControlType.POSE, ControlType.DEPTH)],
        controlnet_conditioning_scale=[0.4, 0.5],
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]
    with Image.open(tmp_path / "1" / "0000.png") as image:
        assert (np.asarray(image.convert("RGB")) == np.asarray(expected)).all()


def test_without_a_model_it_says_what_to_get(tmp_path: Path) -> None:
    for type_, where in ((ControlType.DEPTH, "depth-anything/"), (ControlType.POSE, "usyd-community/vitpose")):
        with pytest.raises(NoPreprocessor, match=f"imagend fetch https://huggingface.co/{where}"):
            Preprocessors(Models(tmp_path)).make(type_, NOISE)


def test_a_model_that_is_not_whole_fails_the_job_and_not_the_worker(models: Models, tmp_path: Path) -> None:
    source = models.root / "preprocessors" / "depth"
    folder = tmp_path / "preprocessors" / "depth"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):  # but not preprocessor_config.json
        (folder / name).write_bytes((source / name).read_bytes())
    with pytest.raises(BrokenModel, match="it lacks preprocessor_config"):
        Preprocessors(Models(tmp_path)).make(ControlType.DEPTH, NOISE)
