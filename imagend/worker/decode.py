"""Strangers' pictures: from a file to pixels, or to a refusal that says what to change. Bounded on hostile input.

Pillow has some 40 decoders, warns of 89 million pixels and refuses only twice as many: here it is three, and 16.8
million. What is not pixels (colour profile, EXIF, texts) is dropped, after EXIF's orientation has been applied.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from imagend import files
from imagend.errors import BadPicture
from imagend.fields import MAX_PICTURE_BYTES as MAX_PICTURE_BYTES
from imagend.fields import MAX_SIDE as MAX_SIDE

MAX_READS = 100_000  # 32 MiB in the 8 KiB chunks of libpng make 20,000; in empty ones they take Pillow half a minute
MAX_SCANS = 200  # a progressive JPEG has 10; each costs 20 ms at this size, and takes 56 bytes
FORMATS = ("PNG", "JPEG", "WEBP")

# what Pillow's decoders raise on files that are cut or damaged
_DAMAGED = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, struct.error, zlib.error)
_TOO_MANY_PIXELS = (Image.DecompressionBombWarning, Image.DecompressionBombError)


class _Bounded(io.BytesIO):
    """Bytes in memory that may be read in so many pieces only."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("too many pieces")
        return super().read(size)


def open_picture(path: Path, name: str) -> Image.Image:
    """read_picture() and decode()."""
    return decode(read_picture(path, name), name)


def read_picture(path: Path, name: str) -> bytes:
    """A picture's file, of at most 32 MiB. Raises BadPicture, in which it is called `name`. No link is followed."""
    try:
        raw, _ = files.read_untrusted(path, MAX_PICTURE_BYTES)
    except OSError as error:
        raise BadPicture(name, error.strerror, "Send an ordinary file that imagend may read") from None
    if len(raw) > MAX_PICTURE_BYTES:
        raise BadPicture(name, f"it has more than {MAX_PICTURE_BYTES} bytes", "Send a smaller one")
    return raw


def decode(raw: bytes, name: str) -> Image.Image:
    """The picture as RGB, or RGBA if it has transparency: PNG, JPEG or WEBP of one frame, at most 4096x4096 pixels.

    Raises BadPicture, in which it is called `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sloppy EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(raw, name)
    except UnidentifiedImageError:
        raise BadPicture(name, f"it is none of {', '.join(FORMATS)}", "Convert it") from None
    except _TOO_MANY_PIXELS:
        raise BadPicture(name, f"it has more than {MAX_SIDE}x{MAX_SIDE} pixels", "Make it smaller") from None
    except _DAMAGED as error:
        raise BadPicture(name, f"it is damaged ({type(error).__name__})", "Save it anew") from None


def _decode(raw: bytes, name: str) -> Image.Image:
    with Image.open(_Bounded(raw), formats=FORMATS) as image:
        width, height = image.size
        if max(width, height) > MAX_SIDE:
            what = f"it has {width}x{height} pixels; at most {MAX_SIDE}x{MAX_SIDE} are possible"
            raise BadPicture(name, what, "Make it smaller")
        if getattr(image, "n_frames", 1) != 1 and image.format != "MPO":  # a photo, with smaller ones behind it
            raise BadPicture(name, "it is an animation", "Send one picture of it")
        if image.format in ("JPEG", "MPO") and raw.count(b"\xff\xda") > MAX_SCANS:
            raise BadPicture(name, f"it has more than {MAX_SCANS} scans", "Save it anew")
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        upright = upright.point(lambda value: value / 256).convert("L")
    pixels = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    bare = Image.new(pixels.mode, pixels.size)
    bare.paste(pixels)
    return bare
