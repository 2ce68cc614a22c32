"""The door: from a stranger's file in an inbox to a verified job, or to rejected/ with a reason. It survives any file.

Each inbox has a door on a thread of its own and all that touches the inbox happens there: one that hangs (NFS) stops
neither painting nor status. A door never touches the queue: it shows verified jobs to the loop and gets verdicts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

import structlog

from imagend import files, jobfile
from imagend.config import Config
from imagend.daemon import limits
from imagend.errors import Forbidden, InvalidJob, Rejected, TooLarge, Unauthorized, Unsigned
from imagend.job import MAX_JOB_BYTES, CancelRequest, Job
from imagend.signers import AllowedSigners
from imagend.signing import unseal

log = structlog.get_logger()

MAX_BATCH = 256
ATTACHMENTS = "files"  # a folder of this name in an inbox holds no job files
REJECTED = "rejected"
LATER = "later"
Verdict = Rejected | str | None
"""None: taken, remove the file. A Rejected: say why. LATER: leave the file, ask again."""
Identity = tuple[int, int, int, int]


class DoorBug(Rejected):
    """imagend could not read this file. This is a bug: please report it."""


@dataclass(frozen=True)
class Policy:
    """What a door needs to know; replaced as a whole when keys or configuration change."""

    config: Config
    signers: AllowedSigners


@dataclass(frozen=True)
class Arrival:
    """A file at the door, verified and parsed. `raw` are the bytes that were, all of them."""

    path: Path
    identity: Identity
    raw: bytes
    item: Job | CancelRequest


class NotAFile(InvalidJob):
    """{} is not a regular file. Only job files belong here: write one elsewhere and rename it to this place."""


class NotAJobName(InvalidJob):
    """The name {!r} does not end in .json, so this is no job file. Rename it to NAME.json once it is complete."""


class Unreadable(Forbidden):
    """imagend may not read {}: {}. Give its group or user read permission (umask 027)."""


class Door:
    """One inbox. look() and settle() do all the work; serve() is its thread."""

    def __init__(self, inbox: Path, policy: Policy, wall: Callable[[], datetime] | None = None) -> None:
        self.inbox, self.policy = inbox, policy
        self.hint = Event()
        self.looked_at = time.monotonic()
        self.trouble: str | None = None
        self._trouble: str | None = None
        self._wall = wall or (lambda: datetime.now(UTC))
        self._waiting: dict[Path, tuple[Identity, float]] = {}
        self._stuck: dict[Path, Identity] = {}

    def serve(self, ask: Callable[[tuple[Arrival, ...]], tuple[Verdict, ...]]) -> None:
        """Look for ever. `ask` brings arrivals to the loop and returns its verdicts."""
        while True:
            arrivals = self.look(time.monotonic())
            verdicts = ask(arrivals) if arrivals else ()
            for arrival, verdict in zip(arrivals, verdicts, strict=True):
                self.settle(arrival, verdict)
            if len(arrivals) < MAX_BATCH or LATER in verdicts:
                self.hint.wait(self.policy.config.scan_interval_s)
                self.hint.clear()

    def look(self, now: float) -> tuple[Arrival, ...]:
        """The next verified jobs, at most MAX_BATCH; what can never become one is rejected on the way."""
        self.looked_at, self._trouble = now, None
        arrivals = self._arrivals(now)
        self.trouble = self._trouble  # in one step: the loop's thread reads it
        return arrivals

    def _arrivals(self, now: float) -> tuple[Arrival, ...]:
        try:
            paths = list(self._candidates())
        except OSError as error:
            if self.trouble is None:
                log.error("inbox cannot be read", inbox=str(self.inbox), why=str(error))
            self._cannot(self.inbox, error)
            return ()
        for memory in (self._waiting, self._stuck):
            for gone in memory.keys() - set(paths):
                del memory[gone]
        arrivals: list[Arrival] = []
        for path in paths:
            if (arrival := self._examine(path, now)) is not None:
                arrivals.append(arrival)
                if len(arrivals) == MAX_BATCH:
                    break
        return tuple(arrivals)

    def settle(self, arrival: Arrival, verdict: Verdict) -> None:
        """Do what the loop decided."""
        if verdict is None:
            self._remove(arrival)
        elif isinstance(verdict, Rejected):
            verdict.client = arrival.item.signer
            self._reject(arrival.path, arrival.identity, verdict)

    @property
    def stuck(self) -> int:
        """Files that could be neither taken in nor moved to rejected/."""
        return len(self._stuck)

    def _candidates(self) -> Iterator[Path]:
        """Every entry that is no dotfile, here and in client folders one level down; in order of name."""
        with os.scandir(self.inbox) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name == ATTACHMENTS:
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)
                continue
            try:
                with self._folder(Path(entry.path)) as folder:
                    paths = sorted(Path(entry.path, path.name) for path in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:  # one client's folder must not close the inbox to the others
                self._cannot(Path(entry.path), error)
                continue
            yield from (path for path in paths if not path.name.startswith(".") and path.name != ATTACHMENTS)

    @contextmanager
    def _folder(self, path: Path) -> Iterator[Path]:
        """The inbox or a client's folder in it, by a descriptor: a link that was put in its place is not followed.

        Else a stranger could list as inbox/x what is pending/alice when we remove it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with ExitStack() as stack:
            fd = os.open(self.inbox, flags)
            stack.callback(os.close, fd)
            if path != self.inbox:
                fd = os.open(path.name, flags | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            yield Path(f"/proc/self/fd/{fd}")

    def _examine(self, path: Path, now: float) -> Arrival | None:
        """The verified job in a file; None if there is none (yet): what is surely none has been rejected."""
        try:
            with self._folder(path.parent) as folder:
                identity = _identity((folder / path.name).lstat())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._cannot(path, error)
            return None
        if self._stuck.get(path) == identity or self._is_waiting(path, identity, now):
            return None
        try:
            return self._read(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (Unsigned, NotAJobName) as reason:  # perhaps not finished
            if path in self._waiting:
                self._reject(path, identity, reason)
            else:
                self._waiting[path] = (identity, now)
        except Rejected as reason:
            self._reject(path, identity, reason)
        except OSError as error:  # not the sender's fault: the disk, the network, our own limits
            self._cannot(path, error)
        except Exception:  # no stranger's file may stop the daemon, not even one that finds a bug
            log.exception("a file in the inbox met a bug", file=_shown(path))
            self._reject(path, identity, DoorBug())
        return None

    def _is_waiting(self, path: Path, identity: Identity, now: float) -> bool:
        """Whether an unfinished file still has time. A change gives it new time."""
        known, since = self._waiting.get(path, (None, now))
        if known != identity:
            self._waiting.pop(path, None)
            return False
        return now - since < self.policy.config.file_grace_s

    def _read(self, path: Path) -> Arrival:
        try:
            with self._folder(path.parent) as folder:
                raw, status = files.read_untrusted(folder / path.name, MAX_JOB_BYTES)
        except files.NotOrdinary:
            raise NotAFile(path.name) from None
        except PermissionError as error:
            raise Unreadable(path.name, error.strerror) from None
        if len(raw) > MAX_JOB_BYTES:
            raise TooLarge(max(status.st_size, len(raw)), MAX_JOB_BYTES)
        if path.suffix != ".json":
            raise NotAJobName(path.name)
        now = self._wall()
        client, body = unseal(raw, self.policy.signers, now.timestamp())
        try:
            item = jobfile.parse(client, body)
            jobfile.check_window(item.header, now)
            admit(item, self.policy.config)
        except Rejected as reason:
            reason.client = client
            raise
        return Arrival(path, _identity(status), raw, item)

    def _remove(self, arrival: Arrival) -> None:
        """Unlink the file that was read; if its sender has put another one in its place, that one stays."""
        try:
            with self._folder(arrival.path.parent) as folder:
                path = folder / arrival.path.name
                if _identity(path.lstat()) == arrival.identity:
                    path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._give_up(arrival.path, arrival.identity, error)

    def _reject(self, path: Path, identity: Identity, reason: Rejected) -> None:
        """Move the file beside its inbox, with its reason; the reason is there first."""
        self._waiting.pop(path, None)
        folder = self.inbox.parent / REJECTED / path.parent.relative_to(self.inbox)
        log.warning("rejected", file=_shown(path), code=reason.code, client=reason.client, why=_harmless(reason))
        try:
            files.make_folder(folder)
            target = _free(folder, path.name)
            at = self._wall().isoformat()
            note = {"error": reason.envelope(), "file": target.name, "client": reason.client, "at": at}
            files.write(_reason(target), json.dumps(note, indent=2).encode() + b"\n")
            with self._folder(path.parent) as source:
                if _identity((source / path.name).lstat()) == identity:
                    files.move(source / path.name, target)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._give_up(path, identity, error)

    def _give_up(self, path: Path, identity: Identity, error: OSError) -> None:
        """Say it once and leave the file alone until it changes."""
        log.error("a file cannot be moved out of the inbox", file=_shown(path), why=error.strerror)
        self._stuck[path] = identity

    def _cannot(self, path: Path, error: OSError) -> None:
        """Something of ours is in the way: the operator is told, and it is tried again at each look."""
        self._trouble = f"{path}: {error.strerror}. It is tried again; to find out what to do, run: imagend check"


def admit(item: Job | CancelRequest, config: Config) -> None:
    """What may be asked of this spool, and by whom. Raises Rejected."""
    audience = item.header.audience
    if audience is not None and audience != config.name:
        raise Forbidden(
            f"audience: {audience!r} is another spool's name; this one is {config.name!r}. Send it there.",
            detail=[{"field": "audience", "value": audience}],
        )
    if isinstance(item, Job) and item.spec.image_type not in (None, *config.image_types):
        known = ", ".join(config.image_types) or "none"
        raise InvalidJob(
            f"image_type: {item.spec.image_type!r} is not known; known are: {known} (config.yaml).",
            detail=[{"field": "image_type", "value": item.spec.image_type}],
        )
    limits.check(item, config)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _free(folder: Path, name: str) -> Path:
    """A place that is not taken, nor its reason's: x.json, x.2.json … A name too long for `.reason.json` is cut."""
    stem, suffix = (name[: -len(".json")], ".json") if name.endswith(".json") else (name, "")
    stem = os.fsdecode(os.fsencode(stem)[:200])
    candidate, number = folder / f"{stem}{suffix}", 1
    while os.path.lexists(candidate) or (os.path.lexists(_reason(candidate)) and not _left_over(candidate)):
        number += 1
        candidate = folder / f"{stem}.{number}{suffix}"
    return candidate


def _left_over(path: Path) -> bool:
    """Whether a crash came between the reason and the move of this very file."""
    try:
        raw, _ = files.read_untrusted(_reason(path), MAX_JOB_BYTES)  # perhaps a stranger's file of that name
        return bool(json.loads(raw)["file"] == path.name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _reason(path: Path) -> Path:
    return path.with_name(f"{path.name}.reason.json")


def _shown(path: Path) -> str:
    """A stranger's file name as it may stand in a log."""
    return path.name if path.name.isprintable() else ascii(path.name)


def _harmless(reason: Rejected) -> str:
    """What may stand in a log: which fields are wrong, not what the client wrote in them."""
    if isinstance(reason, Unauthorized) or not isinstance(reason.detail, list):
        return str(reason)
    return ", ".join(str(problem.get("field")) for problem in reason.detail)
