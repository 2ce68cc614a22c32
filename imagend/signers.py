"""Who may ask: an allowed_signers file (ssh-keygen(1), ALLOWED SIGNERS) as a table of keys and their clients.

Read more strictly than ssh-keygen does: a line is honoured or refused, never half. Pure: no clock, no disk.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from imagend.errors import BadKeys, Unauthorized

NAMESPACE = "imagend-job@v1"
ED25519 = "ssh-ed25519"
SK_TYPES = ("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")  # keys in a FIDO token
ECDSA_TYPES = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
KEY_TYPES = (ED25519, *SK_TYPES, *ECDSA_TYPES, "ssh-rsa")

_CLIENT = re.compile(r"(?!files\Z|.*\.json\Z)[a-z0-9][a-z0-9._@+-]{0,63}", re.ASCII | re.IGNORECASE)
_QUOTED = r'"(?:\\"|\\(?!")|[^"\\])*"'  # \" is the only escape: a backslash before anything else is itself
_LINE = re.compile(rf'([^ \t]+)[ \t]+(?:((?:{_QUOTED}|[^ \t"])+)[ \t]+)??((?:ssh|sk|ecdsa)-[^ \t]+)[ \t]+([^ \t]+).*')
_OPTION = re.compile(rf"(namespaces|valid-after|valid-before)=({_QUOTED})(?:,(?=.)|\Z)", re.IGNORECASE)
_TIME = re.compile(r"\d{8}(?:\d{4}(?:\d\d)?)?Z?", re.ASCII)


@dataclass(frozen=True)
class Signer:
    """One line of an allowed_signers file: a key that speaks for a client. Times in unix seconds."""

    principal: str
    key_type: str
    key: bytes
    namespaces: tuple[str, ...] | None
    valid_after: int | None
    valid_before: int | None
    line: int

    def allows(self, namespace: str) -> bool:
        """ssh_config(5), PATTERNS: one pattern matches, and none that is negated."""
        patterns = ("*",) if self.namespaces is None else self.namespaces
        return {not p.startswith("!") for p in patterns if _glob(p.removeprefix("!")).fullmatch(namespace)} == {True}

    def valid_at(self, now: float) -> bool:
        return (self.valid_after or 0) <= now and (self.valid_before is None or now <= self.valid_before)


@dataclass(frozen=True)
class AllowedSigners:
    """The keys of all clients. Never changed: a changed file is a new table."""

    by_key: Mapping[bytes, tuple[Signer, ...]]

    @classmethod
    def parse(cls, text: str, source: str) -> AllowedSigners:
        """A key may stand on several lines (overlapping windows), but for one client only: the key tells who it is."""
        by_key: dict[bytes, tuple[Signer, ...]] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not (line := line.strip(" \t\r")) or line.startswith("#"):
                continue
            try:
                signer = _signer(line, number)
                others = by_key.get(signer.key, ())
                if others and others[0].principal != signer.principal:
                    raise ValueError(f"the key of {others[0].principal} (line {others[0].line}): remove one of the two")
            except ValueError as wrong:
                raise BadKeys(source, f"line {number}: {wrong}") from None
            by_key[signer.key] = (*others, signer)
        return cls(MappingProxyType(by_key))

    def __iter__(self) -> Iterator[Signer]:
        return (signer for lines in self.by_key.values() for signer in lines)

    def __len__(self) -> int:
        return sum(map(len, self.by_key.values()))

    def clients(self) -> frozenset[str]:
        return frozenset(signer.principal for signer in self)

    def expiring(self, now: float, within_s: float) -> tuple[Signer, ...]:
        """Those that are valid now and will not be in `within_s` seconds."""
        return tuple(s for s in self if s.valid_at(now) and s.valid_before and s.valid_before < now + within_s)

    def find(self, key: bytes, now: float) -> Signer:
        """A line of `key` that allows our namespace now; if none does, the error says what is missing."""
        lines, name = self.by_key.get(key, ()), f"The key {fingerprint(key)}"
        ours = [signer for signer in lines if signer.allows(NAMESPACE)]
        for signer in ours:
            if signer.valid_at(now):
                return signer
        if not lines:
            todo = "Ask the operator to add it to allowed_signers; ssh-keygen -y -f KEY prints the line to send"
            raise Unauthorized(f"{name} is unknown here. {todo}.")
        todo = f"Sign with another key, or ask the operator to change line {lines[-1].line} of allowed_signers"
        if not ours:
            raise Unauthorized(f"{name} is not allowed for the namespace '{NAMESPACE}'. {todo}.")
        if starts := [s.valid_after for s in ours if s.valid_after and s.valid_after > now]:
            raise Unauthorized(f"{name} is not valid before {_utc(min(starts))}. {todo}.")
        raise Unauthorized(f"{name} expired at {_utc(max(s.valid_before or 0 for s in ours))}. {todo}.")


def fingerprint(key: bytes) -> str:
    """As `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def _signer(line: str, number: int) -> Signer:
    """`principals [options] keytype key [comment]`, or a ValueError that says what is wrong and what to write."""
    words = _LINE.fullmatch(line)
    if words is None:
        raise ValueError('it does not read: name [namespaces="…",valid-before="20271231Z"] ssh-ed25519 AAAA…')
    names, listed, key_type, key = words.groups(default="")
    if "cert-authority" in listed.lower() or "-cert-v0" in key_type:
        raise ValueError("certificates are not supported: list each client's own key")
    if set("*?!") & set(names):
        raise ValueError(f"{names!r} is a pattern, but a key must tell who sends: name the one client that holds it")
    client = names.split(",")[0]  # its name becomes a folder's
    if not _CLIENT.fullmatch(client):
        allowed = "64 of A-Z a-z 0-9 . _ @ + -, the first a letter or digit, neither 'files' nor ending in '.json'"
        raise ValueError(f"{client!r} cannot name a client: use up to {allowed}")
    if key_type not in KEY_TYPES:
        raise ValueError(f"the key type {key_type!r} is not supported: use one of {', '.join(KEY_TYPES)}")
    options = _options(listed)
    after, before = (_unix_time(name, options.get(name)) for name in ("valid-after", "valid-before"))
    if after is not None and before is not None and before <= after:
        raise ValueError("valid-before is not later than valid-after: correct one of them")
    namespaces = tuple(options["namespaces"].split(",")) if "namespaces" in options else None
    return Signer(client, key_type, _public_key(key_type, key), namespaces, after, before, number)


def _public_key(key_type: str, key: str) -> bytes:
    try:
        load_ssh_public_key(f"{key_type} {key}".encode())
        return base64.b64decode(key, validate=True)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"the {key_type} key is damaged: copy it from the client's .pub file again") from None


def _options(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    while text:
        found = _OPTION.match(text)
        if found is None or found[1].lower() in options:
            how = 'namespaces="…", valid-after="…" or valid-before="…", each once, with commas and no blanks between'
            raise ValueError(f"cannot read the options from {text!r} on: write {how}")
        options[found[1].lower()] = found[2][1:-1].replace('\\"', '"')
        text = text[found.end() :]
    return options


def _unix_time(name: str, text: str | None) -> int | None:
    """Without a Z it is local time, as it is for ssh-keygen."""
    if text is None:
        return None
    try:
        if _TIME.fullmatch(text):
            time = datetime.strptime(text.rstrip("Z").ljust(14, "0"), "%Y%m%d%H%M%S")
            if (unix_s := int((time.replace(tzinfo=UTC) if text.endswith("Z") else time).timestamp())) > 0:
                return unix_s
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name}={text!r} is no time: write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, then Z if it is UTC")


def _utc(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"(\\\*)+", ".*", re.escape(pattern)).replace(r"\?", "."))
