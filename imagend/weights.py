"""The gate before weight files: what a safetensors header may say, judged before any library opens the file.

The library itself takes minutes over a header of a million tensors, and takes duplicate names, any name and metadata
of 50 MB. Here each header is bounded in time and memory, and describes its file to the byte. Format: "Format" in the
README of https://github.com/huggingface/safetensors. Anything else, above all a pickle, is refused by its content.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from imagend import files
from imagend.errors import BrokenWeights
from imagend.header import Header, Tensor

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
START_BYTES = 9
MAX_METADATA_BYTES = 2**20  # of one value: kohya's ss_tag_frequency has 0.1 to 1 MB for some 10,000 pictures
_MAX_VALUES = 16 * MAX_TENSORS
_MAX_QUOTES = 2**20
_MAX_ELEMENTS = 2**53
_NAME = re.compile(r"[A-Za-z0-9._-]{1,512}")  # what modules of torch and their LoRAs are called, in diffusers and kohya
_BITS = {  # what the library can give to torch
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one that never ends is taken whole: linear time
_BRACKET = re.compile(rb"[\[\]{}]")
_DISGUISES = {
    b"PK\x03\x04": "it is a zip archive, as torch.save() writes pickles",
    b"\x80\x02": "it is a pickle",
    b"\x80\x03": "it is a pickle",
    b"\x80\x04": "it is a pickle",
    b"\x80\x05": "it is a pickle",
    b"GGUF": "it is a GGUF file",
    b"version ": "it is a Git LFS pointer, not the file it stands for",
}


def read_header(path: Path, name: str) -> Header:
    """What a weight file says of itself; `name` is what messages call it. Raises BrokenWeights.

    Links are followed: the file lies in models/, which is the operator's, and the Hugging Face cache is made of links.
    But no pipe is waited for.
    """
    try:
        with open(path, "rb", opener=files.no_waiting) as file:
            return _header(file)
    except OSError as error:
        raise BrokenWeights(name, error.strerror or "it cannot be read") from None
    except ValueError as error:
        raise BrokenWeights(name, error) from None


def _header(file: BinaryIO) -> Header:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    start = file.read(START_BYTES)
    check_start(start)
    length, rest = int.from_bytes(start[:8], "little"), status.st_size - 8
    if length > rest:
        raise ValueError(f"it is cut off: its header should have {length} bytes, but only {rest} follow")
    text = b"{" + file.read(length - 1)
    if len(text) != length:
        raise ValueError("it became shorter while it was read")
    _check_structure(text)
    try:
        fields = _DECODER.decode(text.decode("utf-8", "strict"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its header is not JSON in UTF-8 ({error})") from None
    metadata = _metadata(fields.pop("__metadata__", {}))
    return Header(MappingProxyType(_tensors(fields, rest - length)), MappingProxyType(metadata))


def check_start(start: bytes) -> None:
    """Whether a file that begins with these START_BYTES may be one at all. Raises ValueError."""
    if start[8:] != b"{" or int.from_bytes(start[:8], "little") > MAX_HEADER_BYTES:
        raise ValueError(
            next((what for magic, what in _DISGUISES.items() if start.startswith(magic)), _not_ours(start))
        )


def _not_ours(start: bytes) -> str:
    if start[8:] == b"{":
        return f"its header is longer than {MAX_HEADER_BYTES} bytes"
    return "it is no safetensors file"


def _check_structure(text: bytes) -> None:
    """Before it is parsed: a parser may need fifty times a text's size, and recurses."""
    bare = _STRING.sub(b"", text) if (quotes := text.count(b'"')) <= _MAX_QUOTES else b""
    if quotes > _MAX_QUOTES or bare.count(b",") > _MAX_VALUES or bare.count(b"[") > 2 * MAX_TENSORS + 1:
        raise ValueError(f"its header says more than that of {MAX_TENSORS} tensors")
    if bare.count(b"{") > MAX_TENSORS + 2:
        raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    depth = 0
    for bracket in _BRACKET.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > 3:
            raise ValueError("its header is nested deeper than 3 levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _number(text: str) -> int:
    """Fractions, too, which nothing in a header is."""
    if not text.isdecimal() or len(text) > 16:
        raise ValueError(f"its header has the number {_shown(text)}, which nothing can be")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_number, parse_float=_number, parse_constant=_number)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("its __metadata__ is not an object of texts")
    if any(len(text.encode()) > MAX_METADATA_BYTES for item in value.items() for text in item):
        raise ValueError(f"its __metadata__ has a text of more than {MAX_METADATA_BYTES} bytes")
    return value


def _tensors(fields: dict[str, Any], size: int) -> dict[str, Tensor]:
    """The tensors must fill the `size` bytes after the header, with no gap and no overlap."""
    if len(fields) > MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    places = []
    found = {}
    for name, entry in fields.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"a tensor is called {_shown(name)}: a name has 1 to 512 letters, digits, '.', '_' and '-'"
            )
        found[name], place = _tensor(name, entry)
        places.append(place)
    at = 0
    for begin, end in sorted(places):
        if begin != at:
            raise ValueError(f"its tensors leave a gap or overlap at byte {min(begin, at)} of its data")
        at = end
    if at != size:
        raise ValueError(f"its tensors need {at} bytes, but {size} follow its header")
    return found


def _tensor(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"the tensor {name} has the unknown dtype {_shown(dtype)}")
    if not (_is_whole(shape) and math.prod(max(1, number) for number in shape) <= _MAX_ELEMENTS):
        raise ValueError(f"the tensor {name} has the impossible shape {_shown(shape)}")
    if not (_is_whole(offsets) and len(offsets) == 2):
        raise ValueError(f"the tensor {name} has the impossible data_offsets {_shown(offsets)}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"the tensor {name} does not fill its data_offsets {_shown(offsets)}")
    return Tensor(dtype, tuple(shape)), (begin, end)


def _is_whole(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)
    )


def _shown(value: Any) -> str:
    """A stranger's text as it may stand in a message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
