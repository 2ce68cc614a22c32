"""Upscaling networks: the same bits as plain spandrel, tiles without seams, less memory, and files that are no use."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import upscalers
from engine_conftest import EMBEDDED, Painter
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from upscalers import upscale

from imagend.job import Outcome
from imagend.memory_plan import OVERLAP, UPSCALER_TILES, upscaler_tile
from imagend.messages import MemoryShort, Progress
from imagend.worker import network
from imagend.worker.network import spans

pytestmark = pytest.mark.skipif(find_spec("spandrel") is None, reason="needs spandrel: pip install --no-deps spandrel")
QUICK = {"prompt": "a large red circle on a blue background", "num_inference_steps": 3, "seed": 7}
# Plain spandrel, in a process of its own: the whole library wants torchvision for two architectures, which is not here.
PLAINLY = """
import sys, types
if "torchvision" not in sys.modules:
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
    functional = sys.modules["torchvision.transforms.functional"]
    functional.InterpolationMode = functional.rotate = functional.normalize = object
import numpy, torch
from PIL import Image
from spandrel import ModelLoader
torch.set_num_threads(1)
model = ModelLoader().load_from_file(sys.argv[1])
picture = torch.from_numpy(numpy.array(Image.open(sys.argv[2]))).permute(2, 0, 1)[None].float() / 255
found = (model(picture)[0] * 255).round().byte().permute(1, 2, 0).numpy()
Image.fromarray(found).save(sys.argv[3])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "diffusers").mkdir()
    (root / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    folder = root / "upscale_models"
    upscalers.compact(folder / "compact 4x.safetensors")
    upscalers.compact(folder / "compact 2x.safetensors", scale=2)
    upscalers.esrgan(folder / "esrgan 4x.safetensors")
    upscalers.esrgan(folder / "esrgan 2x.safetensors", scale=2)
    upscalers.compact(folder / "repair 1x.safetensors", scale=1)
    upscalers.compact(folder / "grey 2x.safetensors", scale=2, num_in_ch=1, num_out_ch=1)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Painter:
    return Painter(root)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    picture(90, 60).save(path)
    return path


def picture(width: int, height: int) -> Image.Image:
    """Shapes, and a little noise."""
    image = Image.new("RGB", (width, height), (40, 90, 160))
    draw = ImageDraw.Draw(image)
    for number in range(width * height // 400):
        left, top = number * 37 % width, number * 53 % height
        draw.ellipse((left, top, left + 17, top + 11), fill=(number * 71 % 256, number * 29 % 256, number * 13 % 256))
    noise = np.random.default_rng(1).integers(0, 9, (height, width, 3), np.uint8)
    return Image.fromarray(np.asarray(image) // 2 + noise)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def plainly(root: Path, name: str, source: Path, target: Path) -> Image.Image:
    file = root / "upscale_models" / f"{name}.safetensors"
    subprocess.run([sys.executable, "-c", PLAINLY, file, source, target], check=True, capture_output=True)
    return Image.open(target)


@pytest.mark.parametrize("name", ["compact 4x", "compact 2x", "esrgan 4x", "esrgan 2x"])
def test_a_picture_of_one_tile_has_the_bits_of_a_plain_spandrel_call(
    engine: Painter, root: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    scale = int(name[-2])
    ended = upscale(engine, photo, tmp_path / "a", upscaler=name, scale=scale)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    expected = np.asarray(plainly(root, name, photo, tmp_path / "plain.png"))
    assert (pixels(tmp_path / "a" / "0000.png") == expected).all()
    upscaler = ended.engine["upscaler"]
    file = root / "upscale_models" / f"{name}.safetensors"
    assert (upscaler["name"], upscaler["scale"]) == (name, scale)
    assert upscaler["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(ended.engine["versions"]) == {"imagend", "pillow", "spandrel", "torch"}
    assert ended.memory == {"upscaler_tile": 512, "exact": True}


def test_a_network_of_4_asked_for_2_is_scaled_down_and_one_of_2_asked_for_4_goes_twice(
    engine: Painter, root: Path, photo: Path, tmp_path: Path
) -> None:
    upscale(engine, photo, tmp_path / "a", upscaler="esrgan 4x", scale=2)
    large = plainly(root, "esrgan 4x", photo, tmp_path / "large.png")
    expected = large.resize((180, 120), Image.Resampling.LANCZOS)
    assert (pixels(tmp_path / "a" / "0000.png") == np.asarray(expected)).all()
    upscale(engine, photo, tmp_path / "b", upscaler="esrgan 2x", scale=4)
    plainly(root, "esrgan 2x", photo, tmp_path / "once.png").close()
    twice = plainly(root, "esrgan 2x", tmp_path / "once.png", tmp_path / "twice.png")
    assert (pixels(tmp_path / "b" / "0000.png") == np.asarray(twice)).all()
    told = [(one.step, one.steps) for one in engine.said if isinstance(one, Progress)]
    assert told == [(0, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("name", "size"), [("compact 4x", (700, 150)), ("esrgan 2x", (150, 800))])
def test_tiles_have_no_seams(engine: Painter, root: Path, tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Each part is what the whole picture would have there, and no line between two stands out."""
    picture(*size).save(tmp_path / "wide.png")
    scale = int(name[-2])
    ended = upscale(engine, tmp_path / "wide.png", tmp_path / "a", upscaler=name, scale=scale)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    told = [(one.step, one.steps) for one in engine.said if isinstance(one, Progress)]
    assert told == [(0, 1), (1, 2), (2, 2)]
    found = pixels(tmp_path / "a" / "0000.png").astype(int)
    whole = np.asarray(plainly(root, name, tmp_path / "wide.png", tmp_path / "plain.png")).astype(int)
    assert np.abs(found - whole).max() <= 1
    (_, end), (begin, _) = spans(max(size), 512)
    assert end - begin == OVERLAP


@pytest.mark.parametrize("length", [1, 128, 129, 500, 512, 513, 1000, 4096])
@pytest.mark.parametrize("tile", UPSCALER_TILES)
def test_tiles_cover_a_side_and_no_three_overlap(length: int, tile: int) -> None:
    found = spans(length, tile)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(end - begin <= max(tile, 1) for begin, end in found)
    assert all(end - begin == OVERLAP for (_, end), (begin, _) in pairwise(found))
    assert all(begin >= end for (_, end), (begin, _) in zip(found, found[2:], strict=False))
    total = np.zeros(length * 2)
    for begin, end in found:
        total[begin * 2 : end * 2] += network._weights(begin, end, length, 2).numpy()
    assert np.abs(total - 1).max() < 1e-6


def test_where_memory_runs_out_tiles_are_halved_and_the_manifest_says_so(
    engine: Painter, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(300, 200).save(tmp_path / "photo.png")
    in_tiles = network.Network._in_tiles

    def short(self: Any, image: Any, tile: int, said: Any) -> Any:
        if tile > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return in_tiles(self, image, tile, said)

    monkeypatch.setattr(network.Network, "_in_tiles", short)
    ended = upscale(engine, tmp_path / "photo.png", tmp_path / "a", upscaler="compact 2x")
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    assert (ended.memory["upscaler_tile"], ended.memory["exact"]) == (128, False)
    assert [retry["rung"] for retry in ended.memory["retries"]] == ["tile/512", "tile/256"]
    assert [(one.rung, one.then) for one in engine.said if isinstance(one, MemoryShort)] == [
        ("tile/512", "tile/256"),
        ("tile/256", "tile/128"),
    ]
    whole = np.asarray(plainly(root, "compact 2x", tmp_path / "photo.png", tmp_path / "plain.png")).astype(int)
    assert np.abs(pixels(tmp_path / "a" / "0000.png").astype(int) - whole).max() <= 1
    monkeypatch.setattr(network.Network, "_in_tiles", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    ended = upscale(engine, tmp_path / "photo.png", tmp_path / "b", upscaler="compact 2x")
    assert ended.failure.error.code == "OUT_OF_MEMORY"
    assert "tile/512; tile/256; tile/128" in ended.failure.error.message


def test_less_memory_is_planned_for(engine: Painter, photo: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert upscaler_tile(512, 512, 64, 4, 8 << 30) == 512
    assert upscaler_tile(512, 512, 64, 4, 2 << 30) == 256
    assert upscaler_tile(512, 512, 64, 4, 1 << 20) == 128
    assert upscaler_tile(512, 512, 64, 1, 1 << 30) == 512
    monkeypatch.setattr(engine.pipelines.ladder.gauge, "available", lambda held=0: 0)
    ended = upscale(engine, photo, tmp_path / "a", upscaler="compact 2x")
    assert ended.memory == {"upscaler_tile": 128, "exact": False}


def test_each_tile_is_a_cancel_point(engine: Painter, tmp_path: Path) -> None:
    picture(700, 60).save(tmp_path / "wide.png")

    def stop(message: Any) -> None:
        if isinstance(message, Progress) and message.step == 1:
            engine.worker.stop()

    engine.hear = stop
    assert upscale(engine, tmp_path / "wide.png", tmp_path / "a", upscaler="esrgan 2x").outcome is Outcome.CANCELLED
    engine.hear = None


def test_a_chain_by_a_network(engine: Painter, root: Path, tmp_path: Path) -> None:
    chain = {"upscale": {"upscaler": "compact 2x"}}
    ended = engine.run(tmp_path, **QUICK, chain=chain)
    assert ended.outcome is Outcome.SUCCEEDED, ended.failure
    small, large = ended.artifacts
    expected = plainly(root, "compact 2x", tmp_path / small.file, tmp_path / "plain.png")
    assert (pixels(tmp_path / large.file) == np.asarray(expected)).all()
    assert ended.engine["upscaler"]["name"] == "compact 2x"
    assert ended.engine["versions"]["spandrel"]
    text = Image.open(tmp_path / large.file).text  # type: ignore[attr-defined]
    assert "Postprocess upscaler: compact 2x" in text["parameters"]
    before = (tmp_path / large.file).stat().st_ino
    engine.run(tmp_path, **QUICK, chain=chain)
    assert (tmp_path / large.file).stat().st_ino == before
    upscalers.compact(root / "upscale_models" / "other 2x.safetensors", scale=2, seed=1)
    again = engine.run(tmp_path, **QUICK, chain={"upscale": {"upscaler": "other 2x"}})
    assert again.artifacts[1].pixels_sha256 != large.pixels_sha256


@pytest.mark.parametrize("kind", ["upscale", "chain"])
def test_one_that_is_not_there_lists_those_there_are_and_nothing_is_painted(
    engine: Painter, photo: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "upscale":
        ended = upscale(engine, photo, tmp_path / "a", upscaler="esrgan 3x")
    else:
        ended = engine.run(tmp_path / "a", **QUICK, chain={"upscale": {"upscaler": "esrgan 3x"}})
    assert ended.failure.error.code == "MODEL_NOT_FOUND"
    for part in ("'esrgan 3x'", "compact 2x", "esrgan 4x", "and Lanczos", "imagend fetch https://huggingface.co/"):
        assert part in ended.failure.error.message
    assert list((tmp_path / "a").iterdir()) == []


def test_lanczos_may_be_named(engine: Painter, photo: Path, tmp_path: Path) -> None:
    ended = upscale(engine, photo, tmp_path / "a", upscaler="lanczos")
    expected = Image.open(photo).resize((180, 120), Image.Resampling.LANCZOS)
    assert (pixels(tmp_path / "a" / "0000.png") == np.asarray(expected)).all()
    assert ended.engine["upscaler"] == {"name": "Lanczos", "scale": 2}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("repair 1x", "it is one that repairs pictures and makes none larger"),
        ("grey 2x", "it is made for 1 channels, not for RGB"),
        ("numbered", "its layers are numbered beyond their number"),
        ("misshapen", "cannot be loaded: "),
        ("flat", "cannot be loaded: "),
        ("huge", "cannot be loaded: "),
        ("cut", "cannot be used: "),
        ("of a kind unknown", "none of ESRGAN, Compact"),
    ],
)
def test_a_file_that_is_no_use_says_why(
    engine: Painter, root: Path, photo: Path, tmp_path: Path, name: str, said: str
) -> None:
    good = load_file(root / "upscale_models" / "compact 2x.safetensors")
    path = root / "upscale_models" / f"{name}.safetensors"
    match name:
        case "numbered":  # a million layers of it would be made
            save_file(
                good | {"body.1000000.weight": torch.zeros(12, 16, 3, 3), "body.1000000.bias": torch.zeros(12)}, path
            )
        case "misshapen":
            save_file(good | {"body.2.weight": torch.zeros(16, 8, 3, 3)}, path)
        case "flat":
            save_file(good | {"body.10.bias": torch.tensor(1.0)}, path)
        case "huge":  # a layer of 100,000 x 100,000 x 9 numbers
            save_file(good | {"body.0.weight": torch.zeros(100_000, 3, 1, 1)}, path)
        case "cut":
            path.write_bytes((root / "upscale_models" / "compact 2x.safetensors").read_bytes()[:-7])
        case "of a kind unknown":
            save_file({"layers.0.weight": torch.zeros(3, 3), "layers.1.weight": torch.zeros(3, 3)}, path)
    try:
        ended = upscale(engine, photo, tmp_path / "a", upscaler=name)
        assert ended.failure.error.code == "MODEL_UNUSABLE", ended.failure
        assert said in ended.failure.error.message
        assert upscale(engine, photo, tmp_path / "b", upscaler="compact 2x").outcome is Outcome.SUCCEEDED
    finally:
        if name not in ("repair 1x", "grey 2x"):
            path.unlink()


def test_neither_torchvision_nor_the_whole_of_spandrel_is_imported(root: Path) -> None:
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from imagend.architecture import ModelKind\n"
        "from imagend.models import Models\n"
        "from imagend.worker import network\n"
        f"models = Models(Path({str(root)!r}))\n"
        "model = models.find('esrgan 2x', ModelKind.UPSCALER)\n"
        "network._architecture(model, models.header(model).tensors)\n"
        "print(json.dumps([name for name in sys.modules if name.startswith(('torchvision', 'spandrel'))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert "spandrel.architectures.ESRGAN" in found
    assert "spandrel.architectures.LaMa" not in found
    assert not any(name.startswith("torchvision") for name in found)


def test_the_trained_one_comes_nearer_to_the_truth_than_lanczos(painter: Painter, tmp_path: Path) -> None:
    """shapes-xl/2x, on shapes that are drawn at twice the size: a star and a ring."""
    true = Image.new("RGB", (1024, 1024), (30, 60, 220))
    draw = ImageDraw.Draw(true)
    star = [(512, 80), (640, 420), (960, 420), (700, 620), (800, 960), (512, 740), (220, 960)]
    draw.polygon(star, fill=(245, 220, 30))
    draw.ellipse((60, 60, 400, 400), fill=(220, 30, 30))
    draw.ellipse((150, 150, 310, 310), fill=(30, 60, 220))
    true = true.resize((256, 256), Image.Resampling.BOX)
    true.resize((128, 128), Image.Resampling.LANCZOS).save(tmp_path / "small.png")
    errors = {}
    for upscaler in ("shapes-xl/2x", "Lanczos"):
        ended = upscale(painter, tmp_path / "small.png", tmp_path / upscaler.replace("/", "-"), upscaler=upscaler)
        assert ended.outcome is Outcome.SUCCEEDED, ended.failure
        found = pixels(tmp_path / upscaler.replace("/", "-") / "0000.png").astype(float)
        errors[upscaler] = ((found - np.asarray(true)) ** 2).mean()
    assert errors["shapes-xl/2x"] < errors["Lanczos"], errors
