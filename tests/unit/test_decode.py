"""Strangers' pictures: pixels come out, upright and bare, or a refusal that says what to change; at little cost."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs the engine: pip install 'imagend[engine]'")

from fuzz.targets import chunk, png
from PIL import Image

from imagend.errors import BadPicture
from imagend.worker.decode import MAX_PICTURE_BYTES, open_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def two_colours() -> Image.Image:
    """32x16 pixels: the left half red, the right half blue."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    return image


def read(folder: Path, raw: bytes) -> Image.Image:
    (folder / "a").write_bytes(raw)
    return open_picture(folder / "a", "cat.png")


def refusal(folder: Path, raw: bytes) -> str:
    with pytest.raises(BadPicture) as caught:
        read(folder, raw)
    assert (caught.value.code, caught.value.status) == ("INVALID_PARAMETERS", 422)
    message = str(caught.value)
    assert message.startswith("The picture cat.png cannot be used: ")
    return message


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_pixels_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    image = two_colours()
    assert read(tmp_path, saved(image, kind, lossless=True)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (9, 8, 7, 6), (9, 8, 7, 6)),
        ("LA", (9, 6), (9, 9, 9, 6)),
        ("L", 9, (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 40_000, (156, 156, 156)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_or_rgba(tmp_path: Path, mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    assert read(tmp_path, saved(Image.new(mode, (4, 4), colour))).getpixel((0, 0)) == expected


def test_a_photo_is_turned_upright_and_loses_what_is_not_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn to the right to see it upright
    exif[0x010F] = "a camera"
    raw = saved(two_colours(), "JPEG", exif=exif, icc_profile=b"profile" * 20, comment=b"a secret", quality=95)
    picture = read(tmp_path, raw)
    assert picture.size == (16, 32)
    assert [max(range(3), key=picture.getpixel((8, y)).__getitem__) for y in (2, 29)] == [0, 2]  # red above blue
    assert picture.info == {}
    assert not picture.getexif()
    assert b"secret" not in saved(picture)


def test_a_photo_with_smaller_ones_behind_it_is_the_first(tmp_path: Path) -> None:
    """MPO: what telephones call .jpg."""
    raw = saved(two_colours(), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert read(tmp_path, raw).size == (32, 16)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "none of PNG, JPEG, WEBP. Convert it."),
    "text": (lambda: b"a cat", "none of PNG, JPEG, WEBP. Convert it."),
    **{
        kind: (lambda kind=kind: saved(two_colours(), kind), "none of PNG, JPEG, WEBP. Convert it.")  # type: ignore[misc]
        for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "EPS", "PDF", "TGA", "PCX", "ICNS", "DDS", "SGI")
    },
    "4,097 pixels": (lambda: png(4097, 1), "it has 4097x1 pixels; at most 4096x4096 are possible. Make it smaller."),
    "81 million": (lambda: png(9000, 9000, pixels=b""), "it has 9000x9000 pixels"),
    "144 million": (lambda: png(12_000, 12_000, pixels=b""), "it has more than 4096x4096 pixels. Make it smaller."),
    "2^62 pixels": (
        lambda: png(2**31 - 1, 2**31 - 1, pixels=b""),
        "it has more than 4096x4096 pixels. Make it smaller.",
    ),
    "moving PNG": (lambda: _moving("PNG"), "it is an animation. Send one picture of it."),
    "moving WEBP": (lambda: _moving("WEBP"), "it is an animation. Send one picture of it."),
    "bytes": (lambda: bytes(MAX_PICTURE_BYTES + 1), "more than 33554432 bytes. Send a smaller one."),
}


def _moving(kind: str) -> bytes:
    return saved(two_colours(), kind, save_all=True, append_images=[Image.new("RGB", (32, 16))])


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_single_picture_of_a_possible_size_is_refused(tmp_path: Path, case: str) -> None:
    make, says = BAD[case]
    assert says in refusal(tmp_path, make())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_anywhere_before_its_last_row_is_refused(tmp_path: Path, kind: str) -> None:
    raw = saved(Image.effect_noise((60, 40), 50).convert("RGB"), kind)
    for end in range(0, len(raw) - 20, max(1, len(raw) // 150)):
        refusal(tmp_path, raw[:end])


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link", "nothing"])
def test_only_an_ordinary_file_is_opened(tmp_path: Path, kind: str) -> None:
    (tmp_path / "good.png").write_bytes(png(8, 8))
    path = tmp_path / "a"
    match kind:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a link":
            path.symlink_to(tmp_path / "good.png")
    with pytest.raises(BadPicture, match="Send an ordinary file that imagend may read"):
        open_picture(path, "cat.png")


# Limits, which must cost little to enforce


@functools.cache
def _packed(size: int) -> bytes:
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(bytes(2**20)) for _ in range(size // 2**20)) + pack.flush()


def _jpeg_with(extra: bytes) -> bytes:
    raw = saved(two_colours(), "JPEG")
    return raw[:2] + extra + raw[2:]


def _endless_scans() -> bytes:
    """Each scan of 56 bytes makes the decoder visit 16 million pixels."""
    raw = saved(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    scan = raw[raw.rfind(b"\xff\xc4") : -2]
    return raw[:-2] + scan * 100_000 + raw[-2:]


PARTS = MAX_PICTURE_BYTES - 2**16
BOMBS: dict[str, Callable[[], bytes]] = {
    "zTXt": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + _packed(2**28))),
    "iTXt": lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + _packed(2**28))),
    "iCCP": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + _packed(2**28))),
    "many zTXt": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + _packed(2**20)) * 9000),
    "chunks": lambda: png(8, 8, chunk(b"aaAa", b"") * (PARTS // 12)),
    "empty IDAT": lambda: png(8, 8, chunk(b"IDAT", b"") * (PARTS // 12)),
    "comments": lambda: _jpeg_with(b"\xff\xfe\0\2" * (PARTS // 4)),
    "markers": lambda: _jpeg_with(b"\xff" * PARTS),
    "scans": _endless_scans,
}
CHILD = """
import resource, signal, sys
from pathlib import Path
from imagend.errors import BadPicture
from imagend.worker.decode import open_picture
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
signal.alarm(100)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        open_picture(path, path.name)
        print("read", path.name)
    except BadPicture:
        print("refused", path.name)
"""


def test_no_picture_takes_long_or_more_than_its_memory(tmp_path: Path) -> None:
    """1 GiB for a process that reads them all, 100 s as the guard: each takes half a second, undefended minutes."""
    for name, make in BOMBS.items():
        raw = make()
        assert len(raw) <= MAX_PICTURE_BYTES, name
        (tmp_path / name).write_bytes(raw)
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"refused {name}" for name in sorted(BOMBS)]


def test_pixels_beyond_those_announced_are_not_unpacked(tmp_path: Path) -> None:
    assert read(tmp_path, png(8, 8, pixels=_packed(2**28))).size == (8, 8)


def test_the_largest_picture_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, png(4096, 4096)).size == (4096, 4096)
