"""Who sent this file? The signature is checked on the raw bytes, before anything parses them, and the answer comes from
our own list of keys, never from the file. No clock, and no disk but what ssh-keygen reads.

A job file is a JSON object whose last member, `,"signature":"<base64>"}`, signs all that stands before it plus `}`.
The base64 is an SSHSIG blob (OpenSSH, PROTOCOL.sshsig), read more strictly than ssh-keygen does: it has one form.
Ed25519 is verified here, at 0.1 ms a job; other keys by `ssh-keygen -Y verify`, at 8 ms.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from imagend.errors import CannotVerify, Unauthorized, Unsigned, UsageError
from imagend.signers import ED25519, NAMESPACE, AllowedSigners, Signer

SSH_KEYGEN_LIMIT_S = 10.0

_SIGN_AGAIN = f"Sign the bytes again with: ssh-keygen -Y sign -n {NAMESPACE} -f KEY"
_PREAMBLE = b"SSHSIG\0\0\0\1"  # and version 1
_BLANKS = b" \t\r\n"
_MEMBER = re.compile(rb',"signature":"([^"\\]{0,8192})"\}[ \t\r\n]{0,8}')  # the longest RSA key makes 5,700


def split(raw: bytes) -> tuple[bytes, bytes]:
    """(signed bytes, signature in base64). `Unsigned` may only mean that the file is still being written."""
    start = raw.rfind(b',"signature":"')  # base64 holds no quote, so only the last one can be the member's
    member = _MEMBER.fullmatch(raw, start) if start >= 0 else None
    if member is None:
        raise Unsigned
    return raw[:start] + b"}", member[1]


def seal(body: bytes, signature: bytes) -> bytes:
    """The job file of `body`, a JSON object, and the signature that sign() made of it."""
    return _object(body)[:-1] + b',"signature":"' + signature + b'"}'


def job_id(principal: str, body: bytes) -> str:
    """With the principal: else who signs another's bytes and drops them first makes the other's job look a repeat."""
    return hashlib.sha256(principal.encode() + b"\0" + body).hexdigest()[:20]


def unseal(raw: bytes, signers: AllowedSigners, now: float) -> tuple[str, bytes]:
    """(principal, signed bytes): from here on these bytes are the job, and the file is not looked at again."""
    body, signature = split(raw)
    sig = _sshsig(signature)
    signer = signers.find(sig.key, now)
    if signer.key_type == ED25519:
        _verify_here(sig, body)
    else:
        _verify_with_ssh_keygen(signer, signature, body)
    return signer.principal, body


def _object(body: bytes) -> bytes:
    """`body` without trailing blanks: what is signed, because it is what seal() keeps."""
    text = body.rstrip(_BLANKS)
    if not (text.lstrip(_BLANKS).startswith(b"{") and text.endswith(b"}") and text[:-1].strip(_BLANKS) != b"{"):
        raise ValueError("a job is a JSON object with at least one member")
    return text


class _Sshsig(NamedTuple):
    """The fields of PROTOCOL.sshsig, section 2."""

    key: bytes
    namespace: bytes
    reserved: bytes
    hash: bytes
    signature: bytes


def _sshsig(signature: bytes) -> _Sshsig:
    """Refuses what the protocol lets a verifier ignore: other padding bits, trailing bytes, `reserved`."""
    try:
        blob = base64.b64decode(signature, validate=True)
    except ValueError:
        blob = b""
    if not blob or base64.b64encode(blob) != signature:
        raise Unauthorized(f"The signature is not canonical base64 without line breaks. {_SIGN_AGAIN}")
    fields = _strings(blob.removeprefix(_PREAMBLE)) if blob.startswith(_PREAMBLE) else []
    if len(fields) != 5:
        raise Unauthorized(f"The signature is no SSHSIG blob of version 1. {_SIGN_AGAIN}")
    sig = _Sshsig(*fields)
    if sig.namespace != NAMESPACE.encode():
        theirs = ascii(sig.namespace[:64].decode("latin-1"))
        why = f"The signature is for the namespace {theirs}, not '{NAMESPACE}'. {_SIGN_AGAIN}"
        raise Unauthorized(why, detail=[{"field": "namespace", "value": theirs}])
    if sig.reserved or sig.hash not in (b"sha512", b"sha256"):
        raise Unauthorized(f"The signature uses a hash or an extension that is not known here. {_SIGN_AGAIN}")
    return sig


def _verify_here(sig: _Sshsig, body: bytes) -> None:
    parts = _strings(sig.signature)
    if [len(part) for part in parts] != [len(ED25519), 64] or parts[0] != ED25519.encode():
        raise Unauthorized(f"The signature is not of its key's type, {ED25519}. {_SIGN_AGAIN}")
    try:
        Ed25519PublicKey.from_public_bytes(_strings(sig.key)[1]).verify(parts[1], _to_sign(body, sig.hash))
    except InvalidSignature:
        why = "were they changed (reformatted?) after they were signed?"
        raise Unauthorized(f"The signature does not fit the bytes before it: {why} {_SIGN_AGAIN}") from None


def _verify_with_ssh_keygen(signer: Signer, signature: bytes, body: bytes) -> None:
    """Principal and key are those of our list; its options were weighed by find(), with the caller's clock."""
    line = f"{signer.principal} {signer.key_type} {base64.b64encode(signer.key).decode()}\n".encode()
    try:
        with os.fdopen(os.memfd_create("line"), "wb", 0) as allowed, os.fdopen(os.memfd_create("sig"), "wb", 0) as sig:
            allowed.write(line)
            sig.write(_armor("SSH SIGNATURE", base64.b64decode(signature)))
            files = ["-f", f"/proc/self/fd/{allowed.fileno()}", "-s", f"/proc/self/fd/{sig.fileno()}"]
            command = ["-Y", "verify", "-n", NAMESPACE, "-I", signer.principal, *files]
            _ssh_keygen(command, body, (allowed.fileno(), sig.fileno()), SSH_KEYGEN_LIMIT_S)
    except (OSError, NoSshKeygen) as no:
        raise CannotVerify(signer.key_type, no) from no
    except subprocess.SubprocessError as no:
        hint = f"Were the bytes changed (reformatted?) after they were signed? {_SIGN_AGAIN}"
        raise Unauthorized(f"ssh-keygen does not confirm the {signer.key_type} signature: {no}. {hint}") from no


@dataclass(frozen=True)
class Key:
    """An Ed25519 key without a passphrase: the only kind we sign with ourselves."""

    private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Key:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, private: bytes, path: Path) -> Key:
        try:
            key = load_ssh_private_key(private, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path} is no Ed25519 private key without a passphrase, as ssh-keygen writes it.")
        return cls(key)

    @property
    def blob(self) -> bytes:
        """The public key as SSH sends it (RFC 8709, section 4)."""
        return _string(ED25519.encode()) + _string(self.private.public_key().public_bytes_raw())

    def public_line(self, comment: str) -> str:
        return " ".join([ED25519, base64.b64encode(self.blob).decode(), *comment.split()])

    def private_bytes(self, comment: str) -> bytes:
        """PROTOCOL.key by hand, because `cryptography` writes no comment."""
        pair = self.private.private_bytes_raw() + self.private.public_key().public_bytes_raw()
        secret = os.urandom(4) * 2 + self.blob + _string(pair) + _string(" ".join(comment.split()).encode())
        secret += bytes(range(1, 1 + -len(secret) % 8))
        head = b"openssh-key-v1\0" + _string(b"none") * 2 + _string(b"") + b"\0\0\0\1"
        return _armor("OPENSSH PRIVATE KEY", head + _string(self.blob) + _string(secret))

    def sign(self, body: bytes) -> bytes:
        """The base64 that seal() puts in."""
        signature = _string(ED25519.encode()) + _string(self.private.sign(_to_sign(_object(body), b"sha512")))
        fields = (self.blob, NAMESPACE.encode(), b"", b"sha512", signature)
        return base64.b64encode(_PREAMBLE + b"".join(map(_string, fields)))


def sign(body: bytes, key_path: Path, private: bytes) -> bytes:
    """With any key. `private` is what stands in `key_path`, which may be a .pub if an agent holds the private half."""
    try:
        key = Key.load(private, key_path)
    except UsageError:
        return sign_with_ssh_keygen(body, key_path)
    return key.sign(body)


def sign_with_ssh_keygen(body: bytes, key_path: Path) -> bytes:
    """Like Key.sign(). ssh-keygen may ask for a passphrase at the terminal, hence no time limit."""
    try:
        armored = _ssh_keygen(["-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(key_path)], _object(body))
    except (OSError, subprocess.SubprocessError) as no:
        raise UsageError(f"ssh-keygen cannot sign with {key_path}: {no}. Name a key that it can use.") from no
    return b"".join(armored.splitlines()[1:-1])


class NoSshKeygen(subprocess.SubprocessError):
    """There is no ssh-keygen on this host, or it does not answer."""


def _ssh_keygen(arguments: list[str], stdin: bytes, fds: tuple[int, ...] = (), limit_s: float | None = None) -> bytes:
    """What it prints; SubprocessError with its last words if it fails. `fds` are the descriptors it may read."""
    command = ["ssh-keygen", *arguments]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, pass_fds=fds, timeout=limit_s, check=False)
    except FileNotFoundError:
        raise NoSshKeygen("ssh-keygen is not installed; install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise NoSshKeygen(f"ssh-keygen gave no answer in {limit_s:g} s") from None
    if done.returncode != 0:
        words = done.stderr.decode("ascii", "backslashreplace").strip() or f"exit status {done.returncode}"
        raise subprocess.SubprocessError(words.splitlines()[-1][:200])
    return done.stdout


def _to_sign(body: bytes, hash_name: bytes) -> bytes:
    """PROTOCOL.sshsig, section 3: what the key itself signs."""
    fields = (NAMESPACE.encode(), b"", hash_name, hashlib.new(hash_name.decode(), body).digest())
    return b"SSHSIG" + b"".join(map(_string, fields))


def _armor(label: str, data: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(data).decode()}-----END {label}-----\n".encode()


def _string(data: bytes) -> bytes:
    """RFC 4251, section 5."""
    return len(data).to_bytes(4, "big") + data


def _strings(data: bytes) -> list[bytes]:
    """The strings that `data` consists of; an empty list if it does not consist of whole ones."""
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return []
        found.append(data[at + 4 : end])
        at = end
    return found
