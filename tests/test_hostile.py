"""Promise: no stranger's bytes or names stop imagend, come in unsigned, or lead out of their place; cheaply refused.

The parsers have tests of their own (tests/unit). Here is what goes through the whole door, changed in every way, and
what only the fuzz targets (tests/fuzz) would try; `make fuzz` runs those for longer.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import CLIENT, REPOSITORY, Home, make_home
from fuzz.targets import SIGNERS, TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagend import files, signing
from imagend.attachments import Attachments
from imagend.daemon.intake import Door, Policy
from imagend.errors import BadKeys, UnknownModel
from imagend.job import MAX_JOB_BYTES, Ref
from imagend.models import Models
from imagend.signers import AllowedSigners
from imagend.signing import Key, seal

GRACE_S = 60.0
each = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_door(home: Home) -> Door:
    text = (home.root / "keys" / "allowed_signers").read_text()
    policy = Policy(home.config, AllowedSigners.parse(text, "allowed_signers"))
    return Door(home.config.inboxes[0], policy, Attachments(home.config.spool / "attachments"))


def take_all(door: Door) -> list[Ref]:
    """Look until nothing unfinished has time any more, and take what comes."""
    taken = []
    for now in (0.0, 2 * GRACE_S, 4 * GRACE_S):
        for arrival in door.look(now):
            door.settle(arrival, None)
            taken.append(arrival.item.ref)
    assert (door.trouble, door.stuck) == (None, 0)
    return taken


def reasons(home: Home) -> dict[str, dict[str, Any]]:
    """By the name that the file has in rejected/."""
    found = {}
    for path in (home.config.inboxes[0].parent / "rejected").rglob("*.reason.json"):
        note = json.loads(path.read_bytes())
        assert os.path.lexists(path.with_name(note["file"]))
        found[note["file"]] = note["error"]
    return found


def signed(home: Home, start: bytes) -> bytes:
    """The file of `start` + "}", rightly signed, whatever that is."""
    body = start + b"}"
    with mock.patch.object(signing, "_object", lambda body: body):  # which refuses to sign what is no object
        return start + b',"signature":"' + home.key.sign(body) + b'"}'


# A corpus through the whole door: rightly signed, and wrong in what was signed

CORPUS: dict[str, Callable[[bytes], bytes]] = {  # from a good body without its last bracket
    "brackets": lambda good: good + b',"x":' + b"[" * 1000,
    "closed brackets": lambda good: good + b',"x":' + b"[" * 1000 + b"]" * 1000,
    "brackets to the limit": lambda good: good + b',"x":' + b"[" * (MAX_JOB_BYTES - 1000),
    "4,301 digits": lambda good: good + b',"seed":' + b"9" * 4301,
    "1e400": lambda good: good + b',"guidance_scale":1e400',
    "NaN": lambda good: good + b',"guidance_scale":NaN',
    "minus infinity": lambda good: good + b',"guidance_scale":-Infinity',
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "UTF-16 without mark": lambda good: good.decode().encode("utf-16-be"),
    "UTF-32": lambda good: good.decode().encode("utf-32"),
    "a mark": lambda good: b"\xef\xbb\xbf" + good,
    "an overlong slash": lambda good: good + b',"label":"\xc0\xaf"',
    "a surrogate in UTF-8": lambda good: good + b',"label":"\xed\xa0\x80"',
    "a lone surrogate": lambda good: good + b',"label":"\\ud800"',
    "twice": lambda good: good + b',"prompt":"again"',
    "twice after unescaping": lambda good: good + b',"\\u0070rompt":"again"',
    "an own signature": lambda good: good + b',"signature":"mine"',
    "two objects": lambda good: good + b"}{",
    "an array": lambda good: b"[" + good + b"}]" + b"{",
    "nothing": lambda good: b"{",
    "nothing at all": lambda good: b"",
    "NUL": lambda good: good + b"\0",
    "another's name": lambda good: good + b',"client":"bob"',
    "a path as model": lambda good: good + b',"model":"../../etc/passwd"',
    "a path as client": lambda good: (
        good.split(b', "prompt"')[0].replace(b'"generate"', b'"cancel"')
        + b',"job":"0123456789abcdef0123","client":"../active/alice"'
    ),
    "a path as kind": lambda good: good.replace(b'"generate"', b'"../generate"'),
    "a module as kind": lambda good: good.replace(b'"generate"', b'"main"'),
    "64 KiB of names": lambda good: good + b"".join(b',"%x":1' % n for n in range(7000)),
}


def _corpus(home: Home) -> Iterator[tuple[str, bytes]]:
    good = home.body()[:-1]
    for name, change in CORPUS.items():
        yield name, signed(home, change(good))
    for path in sorted((REPOSITORY / "tests" / "jobs" / "invalid").glob("*.json")):
        body = path.read_bytes().rstrip()
        if body.endswith(b"}") and not path.name.endswith(".expected.json"):  # else it would not be as bad as it was
            yield f"golden {path.stem}", signed(home, body[:-1])


def test_the_maker_of_the_corpus_signs_rightly(home: Home) -> None:
    assert signed(home, home.body()[:-1]) != b""
    home.put(signed(home, home.body()[:-1]), "good.json")
    assert len(take_all(make_door(home))) == 1


def test_what_is_signed_but_wrong_is_rejected_with_a_reason_and_good_jobs_come_in(home: Home) -> None:
    for name, raw in _corpus(home):
        home.put(raw, f"{name}.json")
    ref = home.drop("zz.json")
    assert take_all(make_door(home)) == [ref]
    errors = reasons(home)
    assert errors.keys() == {f"{name}.json" for name, _ in _corpus(home)}
    for name, error in errors.items():
        assert error["code"] in {"INVALID_PARAMETERS", "PAYLOAD_TOO_LARGE"}, (name, error)
        assert error["message"].isprintable(), name


CHILD = """
import resource, signal, sys
from pathlib import Path
from imagend import config
from imagend.attachments import Attachments
from imagend.daemon.intake import Door, Policy
from imagend.signers import AllowedSigners
root = Path(sys.argv[1])
settings = config.load(root / "config.yaml")
signers = AllowedSigners.parse((root / "keys" / "allowed_signers").read_text(), "allowed_signers")
door = Door(settings.inboxes[0], Policy(settings, signers), Attachments(settings.spool / "attachments"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
signal.alarm(100)
print(sum(len(door.look(now)) for now in (0.0, 1.0, 2.0, 120.0, 121.0, 122.0)), door.stuck, door.trouble)
"""


def test_the_whole_corpus_is_refused_within_32_mb_of_memory(home: Home) -> None:
    """With files of 3 GB, endless devices and pipes among them; 100 s as the guard."""
    for name, raw in _corpus(home):
        home.put(raw, f"{name}.json")
    inbox = home.config.inboxes[0]
    with (inbox / "sparse.json").open("wb") as file:
        file.truncate(3_000_000_000)
    os.mkfifo(inbox / "pipe.json")
    (inbox / "endless.json").symlink_to("/dev/zero")
    home.put(b'{"a":"' + b"\\" * 20_000_000, "backslashes.json")
    home.put(b',"signature":"' * 1_000_000, "lures.json")
    done = subprocess.run([sys.executable, "-c", CHILD, home.root], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[-1:], done.returncode) == (["0 0 None"], 0), done.stderr
    assert not any(error["code"] == "INTERNAL" for error in reasons(home).values())
    assert not [path.name for path in inbox.iterdir()]


def test_a_file_that_grows_while_it_is_read_is_not_removed_with_what_was_added(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = home.put(home.sealed(), "a.json"), files.read_untrusted

    def read_and_grow(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
        found = read(path, limit)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    door = make_door(home)
    monkeypatch.setattr("imagend.daemon.intake.files.read_untrusted", read_and_grow)
    (arrival,) = door.look(0.0)
    monkeypatch.undo()
    door.settle(arrival, None)
    assert path.read_bytes().endswith(b"more")
    assert take_all(door) == []
    assert reasons(home)["a.json"]["code"] == "UNAUTHORIZED"


# A good file changed in any way is not accepted, unless what was signed is as it was

MUTATIONS: list[Callable[[random.Random, bytes, bytes], bytes]] = [
    lambda chance, raw, other: _flipped(chance, raw),
    lambda chance, raw, other: raw[: chance.randrange(len(raw))],
    lambda chance, raw, other: raw[: chance.randrange(len(raw))] + other[chance.randrange(len(other)) :],
    lambda chance, raw, other: raw.replace(signing.split(raw)[1], signing.split(other)[1]),
    lambda chance, raw, other: b'{"prompt":"x",' + raw[1:],
    lambda chance, raw, other: raw[:-1] + b',"prompt":"x"}',
    lambda chance, raw, other: raw[:-1] + b',"signature":"' + signing.split(other)[1] + b'"}',
    lambda chance, raw, other: _inserted(chance, raw, chance.choice([b" ", b"\0", b"\n", b",", b'"', b"\\", b"{"])),
    lambda chance, raw, other: _inserted(chance, raw, chance.randbytes(chance.randrange(1, 40))),
    lambda chance, raw, other: raw + other,
    lambda chance, raw, other: raw + b" \t\r\n" * chance.randrange(3),
    lambda chance, raw, other: raw.replace(b"generate", b"gener\\u0061te"),
    lambda chance, raw, other: json.dumps(json.loads(raw), indent=chance.choice([None, 2])).encode(),
    lambda chance, raw, other: raw.replace(b",", b" ,", 1),
]


def _flipped(chance: random.Random, raw: bytes) -> bytes:
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]


def _inserted(chance: random.Random, raw: bytes, what: bytes) -> bytes:
    at = chance.randrange(len(raw) + 1)
    return raw[:at] + what + raw[at:]


@pytest.mark.parametrize("seed", range(4))
def test_no_changed_file_is_accepted_as_another_job(home: Home, key: Key, seed: int) -> None:
    """250 files, each a good one changed once or twice; what still comes in is one of the good ones to the byte."""
    chance = random.Random(seed)
    good = [home.sealed(prompt="a red circle"), home.sealed(label="one, two", count=2), home.sealed(nonce="\u00e9")]
    bodies = {signing.split(raw)[0] for raw in good}
    changed = []
    for number in range(250):
        raw, other = chance.sample(good, 2)
        for change in chance.choices(MUTATIONS, k=chance.choice([1, 1, 2])):
            try:
                raw = change(chance, raw, other)
            except (signing.Unsigned, ValueError, IndexError):  # the first change left nothing for the second
                continue
        changed.append(raw)
        home.put(raw, f"{number:03}.json")
    door = make_door(home)
    arrivals = [arrival for now in (0.0, 2 * GRACE_S) for arrival in door.look(now)]
    assert {signing.split(arrival.raw)[0] for arrival in arrivals} <= bodies
    assert all(arrival.item.ref.client == CLIENT for arrival in arrivals)
    errors = reasons(home)
    assert len(errors) == 250 - len({arrival.name for arrival in arrivals})
    assert {error["code"] for error in errors.values()} <= {"UNAUTHORIZED", "INVALID_PARAMETERS"}
    assert len(errors) > 150


# Names are keys, never paths

NAMES = st.binary(min_size=1, max_size=255).map(lambda name: name.translate(None, b"/\0")).filter(
    lambda name: name not in (b"", b".", b"..")
) | st.sampled_from([b"-rf", b"..json", b"\\..\\x.json", b"%2e%2e.json", b"a" * 255, b"con.json", b"\xe2\x80\xae.json"])


def everything(root: Path) -> set[Path]:
    return set(root.rglob("*"))


@each
@given(name=NAMES, folder=st.none() | NAMES, good=st.booleans())
def test_no_name_of_a_file_or_folder_leads_out(
    tmp_path_factory: pytest.TempPathFactory, key: Key, name: bytes, folder: bytes | None, good: bool
) -> None:
    home = make_home(tmp_path_factory.mktemp("home"), key)
    inbox, raw = home.config.inboxes[0], home.sealed() if good else b"no job"
    before = everything(home.root)
    place = inbox / os.fsdecode(folder or b"")
    place.mkdir(exist_ok=True)
    (place / os.fsdecode(name)).write_bytes(raw)
    taken = take_all(make_door(home))
    assert len(taken) <= good
    for path in everything(home.root) - before:
        assert path.is_relative_to(inbox) or path.is_relative_to(inbox.parent / "rejected")
        if path.is_file() and not path.name.endswith(".reason.json"):
            assert path.read_bytes() == raw


@each
@given(st.text(max_size=80) | st.sampled_from(["..", ".", "a/b", "../a", "files", "a.json", "-a", "a\0", "a" * 65]))
def test_whoever_may_sign_has_a_name_that_is_one_folder(name: str) -> None:
    """The name becomes a folder in every shelf, and comes from the operator's list alone."""
    try:
        signers = AllowedSigners.parse(f"{name} {next(iter(SIGNERS)).key_type} {_public()}\n", "allowed_signers")
    except BadKeys:
        return
    for client in signers.clients():
        assert client.isascii()
        assert client.isprintable()
        assert client == Path("x", client).name
        assert Path("pending", client, "id.json").resolve().parent.parent == Path("pending").resolve()
        assert not client.startswith((".", "-"))
        assert client != "files"


def _public() -> str:
    return base64.b64encode(next(iter(SIGNERS)).key).decode()


@each
@given(
    st.text(max_size=60) | st.sampled_from(["shapes-xl/", "../diffusers/shapes-xl", "./shapes-xl", "shapes-xl/unet"])
)
def test_only_a_listed_name_finds_a_model(name: str) -> None:
    with pytest.raises(UnknownModel):
        Models(REPOSITORY / "models").find(name)


def test_a_folder_of_models_on_another_disk_is_found_by_its_link(tmp_path: Path) -> None:
    """models/ is the operator's, who may link; the name of the link is the model's."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "mine").symlink_to(REPOSITORY / "models" / "diffusers" / "shapes-xl")
    models = Models(tmp_path)
    assert models.list() == ["mine"]
    models.check(models.find("mine"))
    assert len(models.digests(models.find("mine"))) == 4


# The fuzz targets, on what they start from and on that in pieces


@pytest.mark.parametrize("name", TARGETS)
def test_a_fuzz_target_keeps_its_promise_on_its_seeds_and_their_neighbours(name: str) -> None:
    if name == "picture":
        pytest.importorskip("PIL", reason="needs the engine: pip install 'imagend[engine]'")
    target, seeds = TARGETS[name]
    found = list(seeds())
    assert any(target(seed) for seed in found)
    chance = random.Random(name)
    for _ in range(400):
        raw = chance.choice([seed for seed in found if seed])
        for _ in range(chance.randrange(1, 4)):
            raw = _inserted(chance, raw, chance.randbytes(2)) if chance.random() < 0.3 else _flipped(chance, raw)
        target(raw)


def test_a_strangers_signature_under_a_clients_key_does_not_count(home: Home) -> None:
    body, stranger = home.body(), Key.generate()
    blob = base64.b64decode(stranger.sign(body)).replace(stranger.blob, home.key.blob)
    home.put(seal(body, base64.b64encode(blob)), "mismatch.json")
    assert take_all(make_door(home)) == []
    assert "does not fit the bytes before it" in reasons(home)["mismatch.json"]["message"]
