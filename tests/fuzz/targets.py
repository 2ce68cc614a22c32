"""One function per parser: it takes any bytes, says whether they were accepted, and raises if a promise is broken."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from imagend import jobfile, prompt, signing
from imagend.architecture import ModelKind
from imagend.catalog import told
from imagend.errors import BadPicture, BrokenWeights, Rejected, Unauthorized
from imagend.generate_spec import Generate
from imagend.job import Job
from imagend.model_names import MODEL_NAME
from imagend.prompt_tree import MAX_BLOCKS, MAX_WEIGHT, MIN_WEIGHT, PromptSyntax
from imagend.recognise import recognise
from imagend.signers import AllowedSigners
from imagend.weights import read_header

PNG = b"\x89PNG\r\n\x1a\n"
REPOSITORY = Path(__file__).parents[2]
KEY = signing.Key(Ed25519PrivateKey.from_private_bytes(b"a" * 32))
SIGNERS = AllowedSigners.parse(f"alice {KEY.public_line('')}\n", "allowed_signers")
BODIES = [
    b'{"schema":"imagend.job/v1","kind":"generate","issued_at":"2026-11-20T15:00:00Z","prompt":"a red circle"}',
    b'{"schema":"imagend.job/v1","kind":"cancel","issued_at":"2026-11-20T15:00:00Z","job":"0123456789abcdef0123"}',
    b'{"a": "\\",\\"signature\\":\\"", "b": [1, {"c": 2e3}]}',
]
SEALED = [signing.seal(body, KEY.sign(body)) for body in BODIES]


def unseal(raw: bytes) -> bool:
    """Only what was signed is accepted, to the byte."""
    try:
        principal, body = signing.unseal(raw, SIGNERS, now=1_795_000_000.0)
    except Unauthorized as refusal:
        _check_message(str(refusal))
        return False
    assert (principal, body in BODIES) == ("alice", True)
    return True


def signature(raw: bytes) -> bool:
    """The same, of any bytes as the signature's blob."""
    return unseal(signing.seal(BODIES[0], base64.b64encode(raw)))


def job(raw: bytes) -> bool:
    """A job's client and names are never paths, and what was read can be written again."""
    try:
        item = jobfile.parse("alice", raw)
    except Rejected as refusal:
        _check_message(str(refusal))
        _check_message(json.dumps(refusal.detail), limit=16_000)
        return False
    assert item.signer == "alice"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+-]*", item.ref.client)  # a cancel may name another's
    assert re.fullmatch(r"[0-9a-f]{20}", item.ref.id)
    if isinstance(item, Job):
        assert item.ref.client == "alice"
        model = item.spec.model_dump().get("model")  # not every kind has one
        assert model is None or re.fullmatch(MODEL_NAME, model)
        assert type(item.spec).model_validate_json(item.spec.model_dump_json()) == item.spec
    return True


def table(raw: bytes) -> bool:
    """The items of a set: their names are those of files, and each fills in the whole template."""
    spec = Generate(prompt="a {x} on {name}, {{y}}", table=f"sha256:{'0' * 64}", seed=1)
    try:
        whole = jobfile.with_items(spec, raw)
    except Rejected as refusal:
        _check_message(str(refusal))
        _check_message(json.dumps(refusal.detail), limit=16_000)
        return False
    assert 1 <= len(whole.items) == len(whole.planned) - 1 <= 64
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.png", plan.file) for plan in whole.planned)
    assert len({plan.file.lower() for plan in whole.planned}) == len(whole.planned)
    for item in whole.items:
        assert whole.parts[item.name].prompt == f"a {item.values['x']} on {item.name}, {{y}}"
    return True


def prompts(raw: bytes) -> bool:
    """All three syntaxes; the tree is no larger than the text, and its weights are bounded."""
    text = raw.decode("utf-8", "ignore")
    for syntax in PromptSyntax:
        try:
            tree = prompt.parse(text, syntax)
        except ValueError as refusal:
            _check_message(str(refusal))
            continue
        fragments = [fragment for block in tree.blocks for fragment in block]
        assert len(tree.blocks) == len(tree.weights) <= MAX_BLOCKS
        assert len(fragments) <= len(text) + len(tree.blocks)
        assert all(MIN_WEIGHT <= fragment.weight <= MAX_WEIGHT for fragment in fragments)
        assert len(tree.plain) <= 2 * len(text)
    return True


def weights(raw: bytes) -> bool:
    """What passes the gate the library opens, and finds the same in it."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(raw)
        file.flush()
        try:
            header = read_header(Path(file.name), "x")
        except BrokenWeights as refusal:
            _check_message(str(refusal))
            return False
        for kind in ModelKind:
            with contextlib.suppress(ValueError):
                recognise(header, kind)
        told(header.metadata)
        try:
            from safetensors import safe_open
        except ImportError:  # the engine is not installed
            return True
        with safe_open(file.name, "np") as library:
            found = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118  it is no dict
            assert header.tensors == {
                name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in found.items()
            }
            assert header.metadata == (library.metadata() or {})
    return True


def header(raw: bytes) -> bool:
    """The same, of any bytes as the header's text."""
    return weights(safetensors(raw, bytes(20)))


def picture(raw: bytes) -> bool:
    """Pixels and nothing but pixels. A PNG's checksums are set right, else hardly one would be looked into."""
    from imagend.worker.decode import MAX_SIDE, open_picture

    with tempfile.NamedTemporaryFile() as file:
        file.write(summed(raw))
        file.flush()
        try:
            image = open_picture(Path(file.name), "x")
        except BadPicture as refusal:
            _check_message(str(refusal))
            return False
    assert image.mode in ("RGB", "RGBA")
    assert max(image.size) <= MAX_SIDE
    assert len(image.tobytes()) == image.width * image.height * len(image.mode)
    assert not image.info
    assert not image.getexif()
    return True


def _check_message(message: str, limit: int = 4000) -> None:
    assert message.isprintable(), ascii(message)
    assert len(message) < limit


# What to start from


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file of this header: an object, or the bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file (its specification, section 5.3)."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def summed(raw: bytes) -> bytes:
    """A PNG file with right checksums; anything else as it is."""
    if not raw.startswith(PNG):
        return raw
    fixed, at = PNG, len(PNG)
    while at + 12 <= len(raw):
        data = raw[at + 8 : at + 8 + int.from_bytes(raw[at : at + 4], "big")]
        fixed += chunk(raw[at + 4 : at + 8], data)
        at += 12 + len(data)
    return fixed + raw[at:]


def png(width: int, height: int, extra: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A black picture of 8-bit RGB, with `extra` chunks before its pixels."""
    rows = zlib.compress(bytes((1 + 3 * width) * height), 9) if pixels is None else pixels
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body = chunk(b"IHDR", size + b"\x08\x02\0\0\0") + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return PNG + body


def _signatures() -> Iterable[bytes]:
    return (base64.b64decode(signing.split(raw)[1]) for raw in SEALED)


def _jobs() -> Iterable[bytes]:
    return (path.read_bytes() for path in sorted((REPOSITORY / "tests" / "jobs").glob("*/*.json")))


def _tables() -> Iterable[bytes]:
    yield b"name,x\nred-car,(red)1.2\nb,\n"
    yield b'\xef\xbb\xbfname,seed,x\r\na,7,"blue, ""or"" so\r\nred"\r\n\r\nb,,{y}\r\n'
    yield b"x,name,z\na,b,c\n"
    yield b"name,x\n" + b"".join(b"i%d,%d\n" % (number, number) for number in range(64))


def _prompts() -> Iterable[bytes]:
    yield b'(a "b c"+ (d)1.2, e.attend(-) \\(f\\))++ g-'
    yield b'("a", "b (c)1.3", d+).blend(1, 0.5, -0.2, no_normalize)'
    yield b"(a:1.2) [b] BREAK (c(d:.5)) \\( e"
    yield "(été 😀)+, ".encode() * 30


def _weights() -> Iterable[bytes]:
    entry = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    yield safetensors({"__metadata__": {"format": "pt"}, "a": entry}, bytes(12))
    yield safetensors({"a": entry, "b": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]}}, bytes(20))
    yield safetensors({"a": {"dtype": "F4", "shape": [0, 2], "data_offsets": [0, 0]}})
    places = {"dtype": "U8", "shape": [1, 1], "data_offsets": [0, 1]}
    metadata = {"ss_tag_frequency": '{"a": {"b": 3}}', "ss_base_model_version": "sdxl"}
    yield safetensors({"__metadata__": metadata, "lora_unet_x_attn2_to_k.lora_down.weight": places}, bytes(1))
    yield safetensors({"model.diffusion_model.input_blocks.0.0.weight": places}, bytes(1))
    yield safetensors({"emb_params": places}, bytes(1))


def _pictures() -> Iterable[bytes]:
    yield png(3, 2)
    yield png(3, 2, chunk(b"tEXt", b"a\0b") + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 99)))
    try:
        from PIL import Image
    except ImportError:
        return
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode in [
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGBA"),
    ]:
        for options in ({}, {"exif": exif}, {"progressive": True, "lossless": True}):
            file = io.BytesIO()
            Image.new(mode, (5, 4)).save(file, kind, **options)
            yield file.getvalue()


TARGETS: dict[str, tuple[Callable[[bytes], bool], Callable[[], Iterable[bytes]]]] = {
    "unseal": (unseal, lambda: SEALED),
    "signature": (signature, _signatures),
    "job": (job, _jobs),
    "table": (table, _tables),
    "prompts": (prompts, _prompts),
    "weights": (weights, _weights),
    "header": (header, lambda: (raw[8:].rstrip(b"\0") for raw in _weights())),
    "picture": (picture, _pictures),
}
