"""The gate before weight files: whole safetensors headers pass, whatever else lies there is named and costs little."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from fuzz.targets import safetensors, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend.errors import BrokenWeights
from imagend.weights import MAX_HEADER_BYTES, MAX_METADATA_BYTES, MAX_TENSORS, Tensor, read_header

A = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
B = {"dtype": "I64", "shape": [], "data_offsets": [12, 20]}
SHAPES_XL = sorted((REPOSITORY / "models" / "diffusers" / "shapes-xl").glob("*/*.safetensors"))


def refusal(path: Path) -> str:
    with pytest.raises(BrokenWeights) as caught:
        read_header(path, "xl/unet/x.safetensors")
    message = str(caught.value)
    assert message.startswith("The weight file xl/unet/x.safetensors cannot be used: ")
    assert message.endswith("get it again, or another one.")
    assert message.isprintable()
    assert len(message) < 400
    return message


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(raw)
    return path


def test_a_header_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, safetensors({"__metadata__": {"format": "pt"}, "b": B, "a.w": A}, bytes(20)))
    header = read_header(path, "x")
    assert header.tensors == {"a.w": Tensor("F16", (2, 3)), "b": Tensor("I64", ())}
    assert header.metadata == {"format": "pt"}


def test_tensors_of_no_elements_and_files_of_no_tensors_are_whole(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [12, 12]}
    assert read_header(written(tmp_path, safetensors({"a": A, "e": empty}, bytes(12))), "x").tensors["e"].shape == (
        0,
        7,
    )
    assert read_header(written(tmp_path, safetensors({})), "x").tensors == {}


@pytest.mark.parametrize("path", SHAPES_XL, ids=lambda path: path.parent.name)
def test_real_files_are_read_as_the_library_reads_them(path: Path) -> None:
    library = pytest.importorskip("safetensors", reason="needs the engine: pip install 'imagend[engine]'")
    header = read_header(path, "x")
    with library.safe_open(path, "pt") as file:
        assert header.tensors.keys() == set(file.keys())
        for name, tensor in header.tensors.items():
            assert tensor == (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
        assert header.metadata == file.metadata()


def test_a_link_is_followed(tmp_path: Path) -> None:
    """The Hugging Face cache is made of links."""
    (tmp_path / "link").symlink_to(SHAPES_XL[0])
    assert read_header(tmp_path / "link", "x").tensors


# What is refused

BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "a gap": ({"a": A, "b": B | {"data_offsets": [13, 21]}}, "gap or overlap at byte 12"),
    "an overlap": ({"a": A, "b": A}, "gap or overlap at byte 0"),
    "a gap at the start": ({"b": B}, "gap or overlap at byte 0"),
    "too little": ({"a": A}, "its tensors need 12 bytes, but 20 follow"),
    "too much": ({"a": A, "b": B | {"shape": [2], "data_offsets": [12, 28]}}, "need 28 bytes, but 20 follow"),
    "offsets backwards": ({"a": A | {"data_offsets": [12, 0]}}, "does not fill"),
    "offsets negative": ({"a": A | {"data_offsets": [-12, 0]}}, "the number '-12'"),
    "three offsets": ({"a": A | {"data_offsets": [0, 6, 12]}}, "impossible data_offsets"),
    "offsets true": ({"a": A | {"shape": [], "dtype": "I8", "data_offsets": [False, True]}}, "impossible data_offsets"),
    "a shape that overflows": ({"a": A | {"shape": [2**40, 2**40]}}, "impossible shape"),
    "a shape that overflows beside 0": ({"a": A | {"shape": [2**40, 2**40, 0]}}, "impossible shape"),
    "a shape of texts": ({"a": A | {"shape": ["2"]}}, "impossible shape"),
    "a shape of fractions": ({"a": A | {"shape": [2.0, 3.0]}}, "the number '2.0'"),
    "a shape that is none": ({"a": A | {"shape": None}}, "impossible shape"),
    "another shape": ({"a": A | {"shape": [7]}}, "does not fill"),
    "an unknown dtype": ({"a": A | {"dtype": "F17"}}, "unknown dtype 'F17'"),
    "a dtype that is a list": ({"a": A | {"dtype": ["F16"]}}, "unknown dtype"),
    "a field too many": ({"a": A | {"__reduce__": "os.system"}}, "dtype, shape and data_offsets alone"),
    "a field too few": ({"a": {"dtype": "F16", "shape": [2, 3]}}, "dtype, shape and data_offsets alone"),
    "a tensor that is none": ({"a": 1}, "dtype, shape and data_offsets alone"),
    "a path as name": ({"../../etc/x": A}, "'../../etc/x'"),
    "no name": ({"": A}, "a tensor is called ''"),
    "a name of 513": ({"n" * 513: A}, "1 to 512 letters"),
    "a name with a newline": ({"a\n": A}, "a tensor is called 'a\\n'"),
    "a name that looks right": ({"\u0430": A}, "a tensor is called '\\u0430'"),
    "metadata in metadata": ({"__metadata__": {"a": {}}}, "not an object of texts"),
    "metadata that are a list": ({"__metadata__": []}, "not an object of texts"),
    "a long text": ({"__metadata__": {"a": "x" * (MAX_METADATA_BYTES + 1)}}, "more than 1048576 bytes"),
    "half a character": ({"__metadata__": {"a": "\ud800"}}, "surrogates not allowed"),
    "numbers without end": ({"a": [0] * 400_000}, "more than that of 20000 tensors"),
    "too deep": ({"a": [[[[]]]]}, "nested deeper than 3 levels"),
    "an endless number": ({"a": 10**5000}, "which nothing can be"),
    "not a number": ({"a": float("nan")}, "the number 'NaN'"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, case: str) -> None:
    header, says = BAD_HEADERS[case]
    sys.set_int_max_str_digits(6000)  # to write the endless number
    try:
        raw = safetensors(header, bytes(20))
    finally:
        sys.set_int_max_str_digits(4300)
    assert says in refusal(written(tmp_path, raw))


@pytest.mark.parametrize("members", [b'"a":%s,"a":%s', b'"a":%s,"\\u0061":%s'])
def test_a_name_twice_is_refused(tmp_path: Path, members: bytes) -> None:
    one = json.dumps(A).encode()
    raw = safetensors(b"{" + members % (one, one) + b"}", bytes(12))
    assert "a name stands twice" in refusal(written(tmp_path, raw))


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    return file.getvalue()


DISGUISES = {
    "a zip archive": (_zip(), "a zip archive, as torch.save() writes pickles"),
    **{f"a pickle {n}": (pickle.dumps({"a": [1] * 99}, n), "it is a pickle") for n in (2, 3, 4, 5)},
    "a pickle 0": (pickle.dumps({"a": [1] * 99}, 0), "no safetensors file"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "nothing": (b"", "no safetensors file"),
    "8 bytes": (bytes(8), "no safetensors file"),
    "zeros": (bytes(999), "no safetensors file"),
    "a list": (safetensors(b"[]"), "no safetensors file"),
    "a header of 2^62": (b"\0\0\0\0\0\0\0\x40{}", "longer than"),
    "a header of 16 MiB and a byte": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "longer than"),
    "a header beyond the end": ((99).to_bytes(8, "little") + b"{}", "cut off: its header should have 99 bytes"),
    "not UTF-8": (safetensors(b'{"\xff":1}'), "not JSON in UTF-8"),
    "text after": (safetensors(b"{}{}"), "not JSON in UTF-8"),
    "UTF-16": (safetensors("{}".encode("utf-16-le")), "not JSON in UTF-8"),
}


@pytest.mark.parametrize("case", DISGUISES)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, case: str) -> None:
    raw, says = DISGUISES[case]
    assert says in refusal(written(tmp_path, raw))


@pytest.fixture
def never_hang() -> Iterator[None]:
    """Who waits at a pipe fails the test instead of stopping the run."""

    def give_up(*_: object) -> None:
        raise RuntimeError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a socket": (_socket, "No such device"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a dangling link": (lambda path: path.symlink_to("gone"), "No such file"),
    "nothing": (lambda path: None, "No such file"),
}


@pytest.mark.usefixtures("never_hang")
@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_holds_nobody_up(tmp_path: Path, case: str) -> None:
    make, says = NO_FILES[case]
    make(tmp_path / "x")
    assert says in refusal(tmp_path / "x")


# Limits, which must cost little to enforce

M = MAX_HEADER_BYTES
BOMBS: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b"{" + b"[" * (M - 1),
    "braces": lambda: b"{" * M,
    "escapes": lambda: b'{"' + b'\\"' * (M // 2 - 1),
    "backslashes": lambda: b'{"a":"' + b"\\" * (M - 6),
    "quotes": lambda: b"{" + b'"' * (M - 1),
    "short texts": lambda: b"{" + b'"",' * (M // 3 - 1),
    "commas": lambda: b"{" + b"," * (M - 1),
    "numbers": lambda: b'{"a":[' + b"0," * (M // 2 - 9) + b"0]}",
    "digits": lambda: b'{"a":' + b"9" * (M - 9) + b"}",
    "a fraction": lambda: b'{"a":0.' + b"9" * (M - 9) + b"}",
    "tensors": lambda: b"{" + b",".join(b'"%d":{}' % n for n in range(MAX_TENSORS + 2)) + b"}",
    "one tensor too many": lambda: json.dumps({str(n): {} for n in range(MAX_TENSORS + 1)}).encode(),
    "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(2**19)) + b"}}",
    "wide characters": lambda: b'{"__metadata__":{"a":"' + "😀".encode() * (M // 4 - 20) + b'"}}',
}
CHILD = """
import resource, signal, sys
from pathlib import Path
from imagend.errors import BrokenWeights
from imagend.weights import read_header
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
signal.alarm(100)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_header(path, path.name)
        print("accepted", path.name)
    except BrokenWeights:
        print("refused", path.name)
"""


def test_no_header_takes_long_or_more_than_its_memory(tmp_path: Path) -> None:
    """512 MiB for a process that reads them all, 100 s as the guard: each takes about half a second."""
    for name, make in BOMBS.items():
        raw = make()
        assert len(raw) <= M, name
        (tmp_path / name).write_bytes(safetensors(raw))
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"refused {name}" for name in sorted(BOMBS)]


def test_as_many_tensors_as_allowed_are_read(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": {"a": "x" * MAX_METADATA_BYTES}, **dict.fromkeys(map(str, range(MAX_TENSORS)), empty)}
    assert len(read_header(written(tmp_path, safetensors(header)), "x").tensors) == MAX_TENSORS


# What passes here, the library reads in the same way

NUMBERS = st.integers(-1, 9) | st.sampled_from([2**31, 2**53, 2**63, 2**64])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F32", "I8", "BOOL", "F4", "F8_E4M3", "C64", "F6_E2M3", "f16"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", "a/b", "c.d"]), ENTRIES, max_size=3), st.integers(0, 24))
@settings(deadline=None, database=None, max_examples=300)
def test_what_passes_is_read_in_the_same_way(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    weights(safetensors(header, bytes(size)))


@given(st.sampled_from(["F16", "F32", "I8", "F4"]), st.lists(st.integers(0, 5), max_size=3), st.binary(max_size=3))
@settings(deadline=None, database=None)
def test_a_tensor_that_fills_its_file_passes(dtype: str, shape: list[int], noise: bytes) -> None:
    """And in `weights` the library is asked, too."""
    bits = math.prod(shape) * {"F16": 16, "F32": 32, "I8": 8, "F4": 4}[dtype]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, bits // 8]}
    assert weights(safetensors({"a": entry}, bytes(bits // 8) + noise)) is (not noise and bits % 8 == 0)
