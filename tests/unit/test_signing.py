"""imagend.signing against the real ssh-keygen: each unseals what the other seals.

Needs ssh-keygen, ssh-agent and ssh-add (openssh-client) and a POSIX shell; no network, no clock.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import signers, signing
from imagend.errors import BadKeys, CannotVerify, Rejected, Unauthorized, Unsigned, UsageError
from imagend.signers import NAMESPACE, AllowedSigners
from imagend.signing import Key, job_id, seal, split, unseal

NOW = datetime(2026, 11, 20, 15, tzinfo=UTC).timestamp()
DAY_S = 86400.0
BODY = '{"schema": "imagend.job/v1", "prompt": "a red cube, \\"signature\\": é", "seed": 7}'.encode()
RECIPE = """
body=$(cat job.json)
sig=$(printf %s "$body" | ssh-keygen -q -Y sign -n imagend-job@v1 -f KEY | sed '1d;$d' | tr -d '\\n')
printf '%s,"signature":"%s"}' "${body%\\}}" "$sig" > inbox/.tmp && sync inbox/.tmp && mv inbox/.tmp inbox/shot12.json
"""
examples = settings(deadline=None, database=None)


def brief(value: object) -> str:
    """The name of a case."""
    return ascii(value)[:60]


def keygen(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ssh-keygen", *map(str, arguments)], input=stdin, capture_output=True, check=False)


class Keys:
    """A folder with one key pair of each kind, made by ssh-keygen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kinds = {"alice": "ed25519", "mallory": "ed25519", "rsa": "rsa", "ecdsa": "ecdsa", "locked": "ed25519"}
        for name, kind in kinds.items():
            words = "secret" if name == "locked" else ""
            assert keygen("-q", "-t", kind, "-N", words, "-C", name, "-f", folder / name).returncode == 0

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def public(self, name: str) -> str:
        """Key type and key, as they stand in an allowed_signers file."""
        return " ".join((self.folder / f"{name}.pub").read_text().split()[:2])

    def sign(self, name: str, body: bytes, namespace: str = NAMESPACE, *options: str) -> bytes:
        armored = keygen("-q", "-Y", "sign", "-n", namespace, *options, "-f", self[name], stdin=body).stdout
        return b"".join(armored.splitlines()[1:-1])

    def verify(self, lines: str, principal: str, body: bytes, signature: bytes, *options: str) -> bool:
        """What ssh-keygen says about the same question."""
        (self.folder / "allowed").write_text(lines)
        armored = b"-----BEGIN SSH SIGNATURE-----\n" + signature + b"\n-----END SSH SIGNATURE-----\n"
        (self.folder / "sig").write_bytes(armored)
        files = ("-f", self.folder / "allowed", "-s", self.folder / "sig")
        return keygen("-Y", "verify", *options, *files, "-I", principal, "-n", NAMESPACE, stdin=body).returncode == 0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


ALICE, BOB = (Key(Ed25519PrivateKey.from_private_bytes(seed * 32)) for seed in (b"a", b"b"))
SIGNERS = AllowedSigners.parse(f"alice {ALICE.public_line('')}\n", "allowed_signers")
SEALED = seal(BODY, ALICE.sign(BODY))


def allowed(line: str) -> AllowedSigners:
    return AllowedSigners.parse(line, "allowed_signers")


def refusal(raw: bytes, signers: AllowedSigners = SIGNERS, now: float = NOW) -> str:
    with pytest.raises(Unauthorized) as caught:
        unseal(raw, signers, now)
    assert caught.type is Unauthorized  # and not Unsigned: nothing can become right by waiting
    return str(caught.value)


def accepts(raw: bytes, signers: AllowedSigners, now: float = NOW) -> bool:
    try:
        unseal(raw, signers, now)
    except Unauthorized:
        return False
    return True


def sealed_blob(*fields: bytes, preamble: bytes = b"SSHSIG\0\0\0\1", tail: bytes = b"") -> bytes:
    """BODY under a signature of these fields."""
    return seal(BODY, base64.b64encode(preamble + b"".join(map(signing._string, fields)) + tail))


def good_fields(namespace: bytes = NAMESPACE.encode(), reserved: bytes = b"", hash_name: str = "sha512") -> list[bytes]:
    """The fields of a signature that fits, whatever it claims: only the strictness of the reader can refuse it."""
    head, digest = [namespace, reserved, hash_name.encode()], hashlib.new(hash_name, BODY).digest()
    proof = ALICE.private.sign(b"SSHSIG" + b"".join(map(signing._string, [*head, digest])))
    return [ALICE.blob, *head, signing._string(b"ssh-ed25519") + signing._string(proof)]


# --- with ssh-keygen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["alice", "rsa", "ecdsa"])
@pytest.mark.parametrize("text", [BODY, BODY + b"\n\n", json.dumps({"a": [{}], "b": "}"}, indent=2).encode() + b"\n"])
def test_a_file_made_by_the_shell_recipe_unseals(keys: Keys, tmp_path: Path, key: str, text: bytes) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "job.json").write_bytes(text)
    subprocess.run(["sh", "-ec", RECIPE.replace("KEY", str(keys[key]))], cwd=tmp_path, check=True)
    raw = (tmp_path / "inbox/shot12.json").read_bytes()
    assert unseal(raw, allowed(f"bob {keys.public(key)}"), NOW) == ("bob", text.rstrip())
    assert list(json.loads(raw)) == [*json.loads(text), "signature"]


def test_ssh_keygen_accepts_what_we_sign(keys: Keys) -> None:
    for body in (BODY, b'{"a":1}', b'\n{"a": "' + b"x" * 60_000 + b'"\n}\t\n'):
        signed, signature = split(seal(body, ALICE.sign(body)))
        assert signed == body.rstrip()
        assert keys.verify(f"alice {ALICE.public_line('')}\n", "alice", signed, signature)
        assert not keys.verify(f"alice {ALICE.public_line('')}\n", "alice", signed + b" ", signature)


def test_agrees_with_ssh_keygen_whoever_signs_whatever_for_whichever_namespace(keys: Keys) -> None:
    dice, line, verdicts = random.Random(1), f"alice {keys.public('alice')}\n", []
    signers = allowed(line)
    kinds = itertools.product(("alice", "mallory"), (NAMESPACE, "file"), ("sha256", "sha512"))
    for key, namespace, hash_name in kinds:
        for size in range(13):
            body = json.dumps({"a": dice.randbytes(size * 9).hex()}).encode()
            signature = keys.sign(key, body, namespace, f"-Ohashalg={hash_name}")
            at = dice.randrange(1, len(body) - 1)
            changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
            for read in (body, changed):
                verdict = keys.verify(line, "alice", read, signature)
                assert accepts(seal(read, signature), signers) == verdict, (key, namespace, hash_name, size)
                verdicts.append(verdict)
    assert (verdicts.count(True), verdicts.count(False)) == (26, 182)


@pytest.mark.parametrize(
    ("patterns", "allows"),
    [
        ("imagend-job@v1", True),
        ("git,imagend-job@v1", True),
        ("imagend-*", True),
        ("*", True),
        ("**@v?", True),
        ("imagend?job@v?", True),
        ("*,!file", True),
        ("git", False),
        ("IMAGEND-JOB@V1", False),
        ("imagend-job@v", False),
        ("imagend-job@v1?", False),
        ("imagend.job@v1", False),
        ("[i]magend-job@v1", False),
        ("*,!imagend-*", False),
        ("!imagend-*,*", False),
        ("!file", False),
        ("", False),
        (" imagend-job@v1", False),
        (r"imagend\-job@v1", False),
        (r"\*", False),
    ],
)
def test_namespaces_are_matched_as_ssh_keygen_does(keys: Keys, patterns: str, allows: bool) -> None:
    line, signature = f'alice namespaces="{patterns}" {keys.public("alice")}\n', keys.sign("alice", BODY)
    assert keys.verify(line, "alice", BODY, signature) is allows
    assert accepts(seal(BODY, signature), allowed(line)) is allows
    if not allows:
        assert "is not allowed for the namespace 'imagend-job@v1'" in refusal(seal(BODY, signature), allowed(line))


@pytest.fixture(params=["UTC", "Asia/Kolkata"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", {"UTC": "UTC0", "Asia/Kolkata": "IST-5:30"}[request.param])
        time.tzset()
        yield request.param
    time.tzset()


@pytest.mark.parametrize(
    "window",
    [
        'valid-after="20261120"',
        'valid-after="20261120Z"',
        'valid-before="202611201030"',
        'valid-before="202611201030Z"',
        'valid-before="20261120103007"',
        'VALID-BEFORE="20261120103007Z",valid-after="20261119Z"',
    ],
)
def test_windows_are_read_as_ssh_keygen_does_to_the_second(keys: Keys, zone: str, window: str) -> None:
    line, signature = f"alice {window} {keys.public('alice')}\n", keys.sign("alice", BODY)
    signer = next(iter(allowed(line)))
    edge = signer.valid_before or signer.valid_after or 0
    for now in (edge - 1, edge, edge + 1):
        clock = datetime.fromtimestamp(now, UTC).strftime("-Overify-time=%Y%m%d%H%M%SZ")
        assert signer.valid_at(now) == keys.verify(line, "alice", BODY, signature, clock)
        assert signer.valid_at(now) == accepts(seal(BODY, signature), allowed(line), now)
    assert {signer.valid_at(edge - 1), signer.valid_at(edge + 1)} == {True, False}


@pytest.mark.parametrize("key", ["rsa", "ecdsa"])
def test_other_keys_are_verified_by_ssh_keygen(keys: Keys, key: str) -> None:
    signers = allowed(f"bob,robert@example.com {keys.public(key)}")
    raw = seal(BODY, keys.sign(key, BODY))
    assert unseal(raw, signers, NOW) == ("bob", BODY)
    no = refusal(raw.replace(b"red", b"Red"), signers)
    assert "incorrect signature" in no
    assert "changed" in no
    expired = allowed(f'bob valid-before="20261119Z" {keys.public(key)}')
    assert "expired at 2026-11-19T00:00:00Z" in refusal(raw, expired)


def test_a_key_in_a_fido_token_is_verified_by_ssh_keygen() -> None:
    """PROTOCOL.u2f: the token signs a digest of the application, its flags, a counter and a digest of the message."""
    kind, application, token = b"sk-ssh-ed25519@openssh.com", b"ssh:", Ed25519PrivateKey.generate()
    blob = b"".join(map(signing._string, [kind, token.public_key().public_bytes_raw(), application]))
    message, flags = signing._to_sign(BODY, b"sha512"), b"\x01\0\0\0\x2a"
    proof = token.sign(hashlib.sha256(application).digest() + flags + hashlib.sha256(message).digest())
    raw = sealed_blob(blob, NAMESPACE.encode(), b"", b"sha512", signing._string(kind) + signing._string(proof) + flags)
    signers = allowed(f"bob {kind.decode()} {base64.b64encode(blob).decode()}")
    assert unseal(raw, signers, NOW) == ("bob", BODY)
    assert "incorrect signature" in refusal(raw.replace(b"red", b"Red"), signers)


def test_a_machine_without_ssh_keygen_says_so(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, signers = seal(BODY, keys.sign("rsa", BODY)), allowed(f"bob {keys.public('rsa')}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotVerify, match="install openssh-client"):
        unseal(raw, signers, NOW)
    with pytest.raises(UsageError, match="install openssh-client"):
        signing.sign_with_ssh_keygen(BODY, keys["rsa"])
    assert accepts(SEALED, SIGNERS)  # Ed25519 needs no ssh-keygen


def test_an_ssh_keygen_that_hangs_is_given_up(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, signers = seal(BODY, keys.sign("rsa", BODY)), allowed(f"bob {keys.public('rsa')}")
    (tmp_path / "ssh-keygen").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    (tmp_path / "ssh-keygen").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(signing, "SSH_KEYGEN_LIMIT_S", 0.05)
    with pytest.raises(CannotVerify, match="no answer"):
        unseal(raw, signers, NOW)


def test_verifying_leaves_no_descriptor_open(keys: Keys) -> None:
    raw, signers = seal(BODY, keys.sign("rsa", BODY)), allowed(f"bob {keys.public('rsa')}")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    assert accepts(raw, signers)
    assert not accepts(raw.replace(b"red", b"Red"), signers)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_an_unknown_key_is_named_as_ssh_keygen_prints_it(keys: Keys) -> None:
    for name in ("mallory", "rsa"):
        printed = keygen("-l", "-f", f"{keys[name]}.pub").stdout.split()[1].decode()
        assert printed.startswith("SHA256:")
        no = refusal(seal(BODY, keys.sign(name, BODY)))
        assert f"{printed} is unknown here. Ask the operator to add it to allowed_signers" in no


# --- the file ---------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_changes_who_sends_what() -> None:
    """Exhaustive. The tab at the end is not signed, and one of its flips makes it another blank: 9 ^ 4 = 13."""
    raw, accepted = SEALED + b"\t", []
    for at, bit in itertools.product(range(len(raw)), range(8)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << bit
        try:
            assert unseal(bytes(flipped), SIGNERS, NOW) == ("alice", BODY)
        except Unauthorized:
            continue
        accepted.append((at, bit))
    assert accepted == [(len(SEALED), 2)]


def test_a_file_cut_anywhere_is_unsigned_so_that_the_door_waits() -> None:
    for size in range(len(SEALED)):
        with pytest.raises(Unsigned):
            unseal(SEALED[:size], SIGNERS, NOW)


@pytest.mark.parametrize("blanks", [b"", b"\n", b" \t\r\n", b"\r\n" * 4])
def test_a_few_blanks_at_the_end_do_not_matter(blanks: bytes) -> None:
    assert unseal(SEALED + blanks, SIGNERS, NOW) == ("alice", BODY)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        BODY,
        SEALED + b"\n" * 9,
        SEALED + b"\0",
        SEALED + b"\x0b",
        SEALED[:-1] + b',"x":1}',
        SEALED.replace(b',"signature":', b', "signature":'),
        SEALED.replace(b',"signature":', b',"Signature":'),
        SEALED[:-2] + b'\\"}',
        seal(BODY, b"A" * 8196),
    ],
    ids=brief,
)
def test_a_file_that_does_not_end_in_its_signature_is_unsigned(raw: bytes) -> None:
    with pytest.raises(Unsigned):
        unseal(raw, SIGNERS, NOW)


def test_ten_megabytes_of_lures_cost_one_look() -> None:
    """There is no clock here: a reader that tried each lure to the end would not return today."""
    lure = b',"signature":"'
    for raw in (lure * 700_000, lure + b"A" * 10_000_000, lure * 700_000 + b'"}' + b" " * 9, b'A"}' * 3_000_000):
        with pytest.raises(Unsigned):
            unseal(raw, SIGNERS, NOW)
    assert split(lure * 700_000 + b'AAAA"}') == (lure * 699_999 + b"}", b"AAAA")


@pytest.mark.parametrize("body", [b"", b"{", b"}", b"{}", b" { \n} ", b"[1]", b"null", b'{"a":1}x', b'x{"a":1}'])
def test_only_an_object_with_a_member_is_sealed_or_signed(keys: Keys, body: bytes) -> None:
    actions: list[Callable[[], bytes]] = [
        lambda: seal(body, b"AAAA"),
        lambda: ALICE.sign(body),
        lambda: signing.sign_with_ssh_keygen(body, keys["rsa"]),
    ]
    for action in actions:
        with pytest.raises(ValueError, match="JSON object"):
            action()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))
NAMES = st.text() | st.sampled_from(["signature", ',"signature":"', '"}'])


@examples
@given(st.dictionaries(NAMES, JSON | NAMES, min_size=1), st.sampled_from([None, 2]), st.text(" \t\r\n"))
def test_what_is_sealed_unseals(value: dict[str, object], indent: int | None, blanks: str) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    raw = seal(body + blanks.encode(), ALICE.sign(body + blanks.encode()))
    assert unseal(raw, SIGNERS, NOW) == ("alice", body)


def test_the_job_id_names_sender_and_bytes() -> None:
    assert job_id("alice", BODY) == hashlib.sha256(b"alice\0" + BODY).hexdigest()[:20]
    assert job_id("alice", BODY) != job_id("bob", BODY)  # or bob could have alice's job taken for a repeat of his
    assert job_id("alice", BODY) != job_id("alice", BODY + b" ")
    assert job_id("alice", b"x") != job_id("alicex", b"")


def test_the_same_job_signed_or_framed_differently_is_one_job(keys: Keys) -> None:
    signers = allowed(f"alice {ALICE.public_line('')}\nalice {keys.public('ecdsa')}")
    raws = [SEALED, SEALED + b"\n", seal(BODY, keys.sign("ecdsa", BODY)), seal(BODY, keys.sign("ecdsa", BODY))]
    assert len(set(raws)) == 4
    assert len({job_id(*unseal(raw, signers, NOW)) for raw in raws}) == 1


# --- the signature ----------------------------------------------------------------------------------------------------


def test_the_fields_used_below_are_good() -> None:
    assert accepts(sealed_blob(*good_fields()), SIGNERS)
    assert accepts(sealed_blob(*good_fields(hash_name="sha256")), SIGNERS)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (seal(BODY, b"not base64!"), "is not canonical base64 without line breaks"),
        (seal(BODY, b""), "is not canonical base64"),
        (seal(BODY, b"\xff\xfe\0"), "is not canonical base64"),
        (SEALED[:80] + SEALED[80:].replace(b"U1NI", b"U1N\nI"), "is not canonical base64"),
        (seal(BODY, ALICE.sign(BODY)[:-3] + b"B=="), "is not canonical base64"),
        (seal(BODY, ALICE.sign(BODY).rstrip(b"=")), "is not canonical base64"),
        (sealed_blob(*good_fields(), preamble=b"SSHSIG\0\0\0\2"), "is no SSHSIG blob of version 1"),
        (sealed_blob(*good_fields(), preamble=b"sshsig\0\0\0\1"), "is no SSHSIG blob"),
        (sealed_blob(*good_fields(), preamble=b""), "is no SSHSIG blob"),
        (sealed_blob(*good_fields()[:4]), "is no SSHSIG blob"),
        (sealed_blob(*good_fields(), b""), "is no SSHSIG blob"),
        (sealed_blob(*good_fields(), tail=b"\0\0\0"), "is no SSHSIG blob"),
        (sealed_blob(*good_fields(), tail=b"\xff\xff\xff\xffx"), "is no SSHSIG blob"),
        (sealed_blob(*good_fields(b"file")), "is for the namespace 'file', not 'imagend-job@v1'. Sign the bytes again"),
        (sealed_blob(*good_fields(b"file")), "ssh-keygen -Y sign -n imagend-job@v1"),
        (sealed_blob(*good_fields(NAMESPACE.encode() + b"\0")), r"'imagend-job@v1\x00', not 'imagend-job@v1'"),
        (sealed_blob(*good_fields(b"\n\x1b[2J\xff" * 99)), r"namespace '\n\x1b[2J\xff\n"),
        (sealed_blob(*good_fields(reserved=b"x")), "a hash or an extension that is not known here"),
        (sealed_blob(*good_fields(hash_name="sha1")), "a hash or an extension that is not known here"),
        (sealed_blob(*good_fields(hash_name="SHA512")), "a hash or an extension that is not known here"),
        (sealed_blob(*good_fields()[:4], b""), "is not of its key's type, ssh-ed25519"),
        (sealed_blob(*good_fields()[:4], good_fields()[4] + b"\0\0\0\0"), "is not of its key's type"),
        (sealed_blob(*good_fields()[:4], good_fields()[4][:-1]), "is not of its key's type"),
        (sealed_blob(*good_fields()[:4], good_fields()[4].replace(b"ssh-", b"SSH-")), "is not of its key's type"),
        (SEALED + SEALED, "does not fit"),
        (SEALED.replace(b": 7", b":7"), "does not fit the bytes before it: were they changed (reformatted?)"),
        (sealed_blob(*good_fields()[:4], signing._string(b"ssh-ed25519") + signing._string(bytes(64))), "does not fit"),
        (sealed_blob(BOB.blob, *good_fields()[1:]), "is unknown here"),
        (sealed_blob(b"", *good_fields()[1:]), "is unknown here"),
    ],
    ids=brief,
)
def test_a_refused_signature_says_why_and_what_to_do(raw: bytes, says: str) -> None:
    message = refusal(raw)
    assert says in message
    assert message.isprintable()
    assert len(message) < 600
    assert "ssh-keygen" in message or "operator" in message


def test_a_signature_that_claims_a_known_key_of_another_type_is_refused(keys: Keys) -> None:
    """An Ed25519 signature under alice's RSA key, and the other way round: the key in our list decides who verifies."""
    fields, signers = good_fields(), allowed(f"alice {ALICE.public_line('')}\nbob {keys.public('rsa')}")
    rsa = base64.b64decode(keys.public("rsa").split()[1])
    assert "ssh-keygen does not confirm" in refusal(sealed_blob(rsa, *fields[1:]), signers)
    theirs = signing._sshsig(keys.sign("rsa", BODY))
    assert "not of its key's type" in refusal(sealed_blob(ALICE.blob, *fields[1:4], theirs.signature), signers)


BLOBS = st.lists(st.binary(max_size=80) | st.sampled_from([ALICE.blob, NAMESPACE.encode(), b"", b"sha512"]), max_size=7)


@examples
@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda raw: seal(BODY, raw)))
def test_any_bytes_are_only_ever_refused(raw: bytes) -> None:
    with pytest.raises(Rejected):
        unseal(raw, SIGNERS, NOW)


@settings(examples, max_examples=300)
@given(BLOBS, st.integers(0, 400), st.binary(max_size=4))
def test_any_blob_is_only_ever_refused(fields: list[bytes], size: int, tail: bytes) -> None:
    blob = b"SSHSIG\0\0\0\1" + b"".join(map(signing._string, fields))
    for signature in (blob[:size], blob + tail):
        with pytest.raises(Unauthorized):
            unseal(seal(BODY, base64.b64encode(signature)), SIGNERS, NOW)


@pytest.mark.parametrize("key", ["alice", "ecdsa"])
def test_a_good_signature_cut_anywhere_is_refused(keys: Keys, key: str) -> None:
    blob, signers = base64.b64decode(keys.sign(key, BODY)), allowed(f"bob {keys.public(key)}")
    assert accepts(seal(BODY, base64.b64encode(blob)), signers)
    for size in range(len(blob)):
        assert not accepts(seal(BODY, base64.b64encode(blob[:size])), signers)


# --- the list of keys -------------------------------------------------------------------------------------------------

ED = ALICE.public_line("")
OTHER = BOB.public_line("")


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        (f"alice {ED}", ("alice", None, None, None)),
        (f'alice {ED} alice\'s laptop, "the new" one', ("alice", None, None, None)),
        (f" \talice\t \t{ED}\r", ("alice", None, None, None)),
        (f"alice@example.com,a,b {ED}", ("alice@example.com", None, None, None)),
        (f"0+A.b_c@d-{'e' * 54} {ED}", (f"0+A.b_c@d-{'e' * 54}", None, None, None)),
        (f"my.json.files {ED}", ("my.json.files", None, None, None)),
        (f'alice namespaces="git,imagend-job@v1" {ED}', ("alice", ("git", "imagend-job@v1"), None, None)),
        (f'alice NameSpaces="imagend*, \\"ssh-rsa x" {ED}', ("alice", ("imagend*", ' "ssh-rsa x'), None, None)),
        (f'alice namespaces="imagend*,a\\b" {ED}', ("alice", ("imagend*", "a\\b"), None, None)),
        (f'alice valid-after="19700102Z" {ED}', ("alice", None, 86400, None)),
        (f'alice valid-before="202712312359Z" {ED}', ("alice", None, None, 1830297540)),
        (
            f'alice valid-before="20271231235958Z",namespaces="*",valid-after="20240229Z" {ED}',
            ("alice", ("*",), 1709164800, 1830297598),
        ),
    ],
    ids=brief,
)
def test_a_good_line_is_read_and_ssh_keygen_reads_it_too(keys: Keys, line: str, reads: tuple[object, ...]) -> None:
    (signer,) = allowed(f"# comment\n\n \t# {OTHER}\n{line}\n")
    assert (signer.principal, signer.namespaces, signer.valid_after, signer.valid_before) == reads
    assert (signer.key_type, signer.key, signer.line) == ("ssh-ed25519", ALICE.blob, 4)
    assert accepts(SEALED, allowed(line))
    assert keys.verify(line + "\n", signer.principal, BODY, split(SEALED)[1], "-Overify-time=20261120Z")


CERTIFICATE = "certificates are not supported: list each client's own key"
UNREADABLE = 'it does not read: name [namespaces="…",valid-before="20271231Z"] ssh-ed25519 AAAA…'
NO_OPTIONS = "write namespaces="
NO_NAME = "cannot name a client: use up to 64 of"
DAMAGED = "key is damaged: copy it from the client's .pub file again"
NO_TIME = "is no time: write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, then Z if it is UTC"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("alice", UNREADABLE),
        ("alice ssh-ed25519", UNREADABLE),
        ('alice namespaces="git"', UNREADABLE),
        (f'alice namespaces="git {ED}', UNREADABLE),
        (ED, UNREADABLE),
        (f"alice rsa {ED}", "cannot read the options from 'rsa' on"),
        (f"alice\xa0{ED}", UNREADABLE),
        (f"* {ED}", "'*' is a pattern, but a key must tell who sends: name the one client that holds it"),
        (f"*@example.com {ED}", "'*@example.com' is a pattern"),
        (f"alice,b?b {ED}", "'alice,b?b' is a pattern"),
        (f"!mallory,alice {ED}", "'!mallory,alice' is a pattern"),
        (f'"alice" {ED}', f"'\"alice\"' {NO_NAME}"),
        (f",alice {ED}", f"'' {NO_NAME}"),
        (f"../alice {ED}", f"'../alice' {NO_NAME}"),
        (f"a/b {ED}", NO_NAME),
        (f".alice {ED}", NO_NAME),
        (f"-alice {ED}", NO_NAME),
        (f"a\0b {ED}", NO_NAME),
        (f"ali\u0441e {ED}", NO_NAME),
        (f"\u212aate {ED}", NO_NAME),
        (f"\ufeffalice {ED}", r"'\ufeffalice' cannot name a client"),
        (f"{'a' * 65} {ED}", NO_NAME),
        (f"Files {ED}", "neither 'files' nor ending in '.json'"),
        (f"files,alice {ED}", "neither 'files' nor ending in '.json'"),
        (f"alice.JSON {ED}", "neither 'files' nor ending in '.json'"),
        (f"alice cert-authority {ED}", CERTIFICATE),
        (f'alice namespaces="git",Cert-Authority {ED}', CERTIFICATE),
        (f"alice ssh-ed25519-cert-v01@openssh.com {ED.split()[1]}", CERTIFICATE),
        (f"alice ssh-dss {ED.split()[1]}", "the key type 'ssh-dss' is not supported: use one of ssh-ed25519, sk-ssh-"),
        (f"alice ecdsa-sha2-nistp999 {ED.split()[1]}", "the key type 'ecdsa-sha2-nistp999' is not supported"),
        (f"alice ssh-rsa {ED.split()[1]}", f"the ssh-rsa {DAMAGED}"),
        (f"alice {ED[:-1]}", f"the ssh-ed25519 {DAMAGED}"),
        (f"alice {ED[:-4]}", DAMAGED),
        (f"alice {ED}AAAA", DAMAGED),
        (f"alice {ED[:30]}\u0435{ED[31:]}", DAMAGED),
        (f"alice no-touch-required {ED}", "cannot read the options from 'no-touch-required' on"),
        (f"alice namespaces=git {ED}", "cannot read the options from 'namespaces=git' on"),
        (f"alice valid-before=20271231 {ED}", NO_OPTIONS),
        (f'alice namespaces="git", {ED}', NO_OPTIONS),
        (f'alice ,namespaces="git" {ED}', NO_OPTIONS),
        (f'alice namespaces="git",,valid-before="20271231" {ED}', NO_OPTIONS),
        (f'alice namespaces="git"valid-before="20271231" {ED}', NO_OPTIONS),
        (f'alice namespaces="git",namespaces="imagend*" {ED}', "each once"),
        (f'alice namespaces = "git" {ED}', UNREADABLE),
        (f'alice valid-before="tomorrow" {ED}', f"valid-before='tomorrow' {NO_TIME}"),
        (f'alice valid-after="2026-11-20" {ED}', f"valid-after='2026-11-20' {NO_TIME}"),
        (f'alice valid-after="20260229Z" {ED}', NO_TIME),
        (f'alice valid-after="202611202460" {ED}', NO_TIME),
        (f'alice valid-after="2026112010Z" {ED}', NO_TIME),
        (f'alice valid-after="19700101Z" {ED}', NO_TIME),
        (f'alice valid-after="00010101" {ED}', NO_TIME),
        (f'alice valid-after="" {ED}', NO_TIME),
        (f'alice valid-after="\u0662\u0660\u0662\u06661120" {ED}', NO_TIME),
        (f'alice valid-after="20261120Z",valid-before="20261120Z" {ED}', "valid-before is not later than valid-after"),
        (f"alice {OTHER}", "the key of bob (line 2): remove one of the two"),
        (f"Bob {OTHER}", "the key of bob (line 2)"),
    ],
    ids=brief,
)
def test_a_line_that_cannot_be_honoured_is_refused_by_number(line: str, says: str) -> None:
    with pytest.raises(BadKeys) as caught:
        AllowedSigners.parse(f"# team\nbob {OTHER}\n{line}\n", "/etc/imagend/allowed_signers")
    message = str(caught.value)
    assert message.startswith("/etc/imagend/allowed_signers: line 3: ")
    assert says in message
    assert "\n" not in message


@examples
@given(st.text() | st.text(alphabet='alice,"\\=*! \tsh-rdnomepv0129Z').map(lambda text: f"alice {text} {ED}"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        table = allowed(text)
    except BadKeys:
        return
    assert len(table) <= 1


def test_the_table_counts_lines_and_knows_its_clients() -> None:
    table = allowed(f'alice {ED}\nbob,rob {OTHER}\nbob valid-before="20270101Z" {OTHER}\n')
    assert len(table) == 3
    assert table.clients() == frozenset({"alice", "bob"})
    assert len(allowed("# nobody\n")) == len(allowed("").clients()) == 0


def test_only_a_newline_ends_a_line() -> None:
    """As for ssh-keygen: what follows another control character in a comment must not become a line of its own."""
    for end in ("\r", "\v", "\f", "\x1c", "\x85", "\u2028"):
        assert allowed(f"# bob{end}mallory {OTHER}\nalice {ED} laptop{end}mallory {OTHER}\n").clients() == {"alice"}


def test_of_overlapping_windows_any_that_fits_will_do() -> None:
    end, start = 'valid-before="20261120Z"', 'valid-after="20261122Z",valid-before="20261124Z"'
    table = allowed(f'alice {end} {ED}\nalice namespaces="git" {ED}\nalice {start} {ED}\n')
    day = datetime(2026, 11, 20, tzinfo=UTC).timestamp()
    assert [accepts(SEALED, table, day + n * DAY_S) for n in (-1, 0, 1, 2, 3, 4, 5)] == [1, 1, 0, 1, 1, 1, 0]
    key = f"The key {signers.fingerprint(ALICE.blob)}"
    todo = "Sign with another key, or ask the operator to change line 3 of allowed_signers."
    assert refusal(SEALED, table, day + DAY_S) == f"{key} is not valid before 2026-11-22T00:00:00Z. {todo}"
    assert refusal(SEALED, table, day + 5 * DAY_S) == f"{key} expired at 2026-11-24T00:00:00Z. {todo}"


def test_expiring_are_those_that_still_hold() -> None:
    dates = {"gone": "20261120Z", "soon": "20261125Z", "later": "20271120Z"}
    lines = [f'{name} valid-before="{date}" {Key.generate().public_line(name)}' for name, date in dates.items()]
    table = allowed("\n".join([*lines, f"never {ED}"]))
    assert [s.principal for s in table.expiring(NOW, 30 * DAY_S)] == ["soon"]
    assert [s.principal for s in table.expiring(NOW, 3650 * DAY_S)] == ["soon", "later"]


# --- signing ----------------------------------------------------------------------------------------------------------


def test_ssh_keygen_reads_the_keys_we_write(keys: Keys, tmp_path: Path) -> None:
    for comment, kept in (
        ("", ""),
        ("alice\n* ssh-rsa  laptop", " alice * ssh-rsa laptop"),
        ("x" * 80, f" {'x' * 80}"),
    ):
        path = tmp_path / "key"
        path.write_bytes(ALICE.private_bytes(comment))
        path.chmod(0o600)
        assert keygen("-y", "-P", "", "-f", path).stdout.decode() == ALICE.public_line(comment) + "\n"
        assert ALICE.public_line(comment) == ED + kept
        assert Key.load(path.read_bytes(), path).blob == ALICE.blob
        assert signing.sign_with_ssh_keygen(BODY, path) == ALICE.sign(BODY)  # Ed25519 is deterministic


def test_two_generated_keys_differ_and_do_not_show_their_secret() -> None:
    assert Key.generate().blob != Key.generate().blob
    assert base64.b64encode(ALICE.private.private_bytes_raw()).decode() not in repr(ALICE)


def test_a_plain_ed25519_key_signs_without_ssh_keygen(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, theirs = keys["alice"].read_bytes(), keys.sign("alice", BODY)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert signing.sign(BODY, keys["alice"], private) == theirs


def test_a_key_with_a_passphrase_asks_for_it(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = tmp_path / "askpass"
    ask.write_text("#!/bin/sh\necho $PASSPHRASE\n")
    ask.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(ask))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    monkeypatch.setenv("PASSPHRASE", "secret")
    signature = signing.sign(BODY + b"\n", keys["locked"], keys["locked"].read_bytes())
    assert unseal(seal(BODY, signature), allowed(f"bob {keys.public('locked')}"), NOW) == ("bob", BODY)
    monkeypatch.setenv("PASSPHRASE", "wrong")
    with pytest.raises(UsageError, match=r"ssh-keygen cannot sign with .*locked: .*incorrect passphrase"):
        signing.sign(BODY, keys["locked"], keys["locked"].read_bytes())
    with pytest.raises(UsageError, match="locked is no Ed25519 private key without a passphrase"):
        Key.load(keys["locked"].read_bytes(), keys["locked"])


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    started = subprocess.run(["ssh-agent", "-s", "-a", str(tmp_path / "agent")], capture_output=True, check=True)
    words = dict(word.split("=") for word in started.stdout.decode().replace("\n", ";").split(";") if "=" in word)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    yield
    subprocess.run(["ssh-agent", "-k"], capture_output=True, check=True)


@pytest.mark.parametrize("key", ["alice", "rsa"])
@pytest.mark.usefixtures("agent")
def test_a_key_that_an_agent_holds_is_named_by_its_public_half(keys: Keys, tmp_path: Path, key: str) -> None:
    subprocess.run(["ssh-add", "-q", str(keys[key])], check=True, capture_output=True)
    public = tmp_path / "only.pub"
    public.write_bytes(Path(f"{keys[key]}.pub").read_bytes())
    signature = signing.sign(BODY, public, public.read_bytes())
    assert unseal(seal(BODY, signature), allowed(f"bob {keys.public(key)}"), NOW) == ("bob", BODY)


@pytest.mark.parametrize("key", ["rsa", "ecdsa"])
def test_other_keys_sign_with_ssh_keygen(keys: Keys, key: str) -> None:
    signature = signing.sign(BODY, keys[key], keys[key].read_bytes())
    assert unseal(seal(BODY, signature), allowed(f"bob {keys.public(key)}"), NOW) == ("bob", BODY)
    with pytest.raises(UsageError, match="is no Ed25519 private key"):
        Key.load(keys[key].read_bytes(), keys[key])


@pytest.mark.parametrize("text", [b"", b"\xff\0", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key_is_refused_with_ssh_keygens_words(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"ssh-keygen cannot sign with .*/key: .+\. Name a key that it can use\."):
        signing.sign(BODY, path, text)
