"""python docs/pictures.py: paints docs/features.png anew, a picture for each feature, by the commands that users have.

Above what a command is given, below what it makes. All of it on the CPU, with the small models of this checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageFont

REPOSITORY = Path(__file__).resolve().parents[1]
SIDE, EDGE, LINE = 128, 8, 12
FIRST = (
    "generate",
    "--prompt",
    "a large red circle on a blue background",
    "--seed",
    "7",
    "--num-inference-steps",
    "20",
)
STAR = ("generate", "--prompt", "a large yellow star on a blue background", "--seed", "7")
RING = ("generate", "--prompt", "a green ring on a white background", "--seed", "7")
EDIT = ("--prompt", "a large green star on a blue background", "--seed", "7")


class Feature(NamedTuple):
    label: str
    given: str
    """the picture that is shown above"""
    words: tuple[str, ...]
    """after `imagend submit`"""


FEATURES = (
    Feature("--prompt", "", FIRST),
    Feature("--image first.png\n--strength 0.8", "first.png", (*STAR, "--image", "first.png", "--strength", "0.8")),
    Feature(
        "--control shapes-xl-mask=\nmask.png:0.75", "mask.png", (*RING, "--control", "shapes-xl-mask=mask.png:0.75")
    ),
    Feature(
        "--reference\ndusk.png:0.6",
        "dusk.png",
        ("generate", "--prompt", "", "--reference", "dusk.png:0.6", "--seed", "7"),
    ),
    Feature(
        "edit --mask 0,0,70,128\n(its left half, a star)",
        "first.png",
        ("edit", "--image", "first.png", "--mask", "0,0,70,128", "--mask-blur", "5", *EDIT),
    ),
    Feature("preprocess\n--type canny", "first.png", ("preprocess", "--image", "first.png", "--type", "canny")),
    Feature(
        "upscale --upscaler\nshapes-xl/2x (middle)",
        "first.png",
        ("upscale", "--image", "first.png", "--upscaler", "shapes-xl/2x"),
    ),
    Feature("--chain-upscale\n2::0.4 (the middle)", "", (*FIRST, "--chain-upscale", "2::0.4")),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        imagend("init", ".", cwd=place)
        config = place / "config.yaml"
        keys = yaml.safe_load(config.read_text()) | {"models": str(REPOSITORY / "models"), "workers": {"cpu0": "cpu"}}
        config.write_text(yaml.safe_dump(keys))
        draw_inputs(place)
        daemon = subprocess.Popen([sys.executable, "-m", "imagend", "serve"], cwd=place, stderr=subprocess.DEVNULL)
        try:
            made = [(feature, paint(place, feature)) for feature in FEATURES]
        finally:
            daemon.terminate()
            daemon.wait()
        whole = sheet(place, made).quantize(256, dither=Image.Dither.NONE)
    whole.save(REPOSITORY / "docs" / "features.png", optimize=True)


def imagend(*words: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "imagend", *words]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def draw_inputs(place: Path) -> None:
    mask = Image.new("RGB", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((8, 40, 72, 104), fill="white")
    mask.save(place / "mask.png")
    dusk = Image.new("RGB", (SIDE, SIDE), (245, 140, 20))
    ImageDraw.Draw(dusk).ellipse((40, 40, 88, 88), fill=(130, 40, 170))
    dusk.save(place / "dusk.png")


def paint(place: Path, feature: Feature) -> Image.Image:
    """The last picture of a job; that of the first job is also first.png."""
    told = imagend("submit", *feature.words, "--wait", "--json", cwd=place).splitlines()[-1]
    client, ref = (json.loads(told)[key] for key in ("client", "id"))
    folder = place / "outputs" / client / ref
    manifest = json.loads((folder / "manifest.json").read_text())
    picture = Image.open(folder / manifest["artifacts"][-1]["file"]).convert("RGB")
    if not (place / "first.png").exists():
        picture.save(place / "first.png")
    return picture


def sheet(place: Path, made: Sequence[tuple[Feature, Image.Image]]) -> Image.Image:
    step, font = SIDE + EDGE, ImageFont.load_default(10)
    whole = Image.new("RGB", (step * len(made) + EDGE, 2 * step + EDGE + 2 * LINE), "white")
    draw = ImageDraw.Draw(whole)
    for number, (feature, picture) in enumerate(made):
        x = EDGE + step * number
        draw.multiline_text((x, EDGE // 2), feature.label, fill="black", font=font, spacing=1)
        if feature.given:
            whole.paste(Image.open(place / feature.given).convert("RGB").resize((SIDE, SIDE)), (x, EDGE + 2 * LINE))
        left, top = ((size - SIDE) // 2 for size in picture.size)
        whole.paste(picture.crop((left, top, left + SIDE, top + SIDE)), (x, EDGE + 2 * LINE + step))
    return whole


if __name__ == "__main__":
    main()
