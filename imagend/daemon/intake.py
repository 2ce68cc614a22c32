"""The door: from a stranger's file in an inbox to a verified job, or to rejected/ with a reason. It survives any file.

Each inbox has a door on a thread of its own and all that touches the inbox happens there: one that hangs (NFS) stops
neither painting nor status. A door never touches the queue: it shows verified jobs to the loop and gets verdicts.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

import structlog

from imagend import files, jobfile
from imagend.attachments import Attachments
from imagend.config import Config
from imagend.daemon import discreet, limits, sent_along
from imagend.daemon.held import Held, Why
from imagend.daemon.refused import Refused
from imagend.errors import Forbidden, InvalidJob, Rejected, TooLarge, UnknownJob, Unsigned
from imagend.inbox import GONE, UNKNOWN, Identity, Inbox, identity
from imagend.job import MAX_JOB_BYTES, CancelRequest, Job
from imagend.signers import AllowedSigners
from imagend.signing import unseal

log = structlog.get_logger()

Wall = Callable[[], datetime]
MAX_BATCH = 256
LATER = "later"
Verdict = Rejected | str | None
"""None: taken, remove the file. A Rejected: say why. LATER: leave the file, ask again."""
MEASURE_S = 60.0
_OF_THE_FILE = [{"field": "file"}]  # its name is its sender's text, too


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

    name: str
    identity: Identity
    dropped_at: float
    """when it got its name, by the clock of its file system"""
    raw: bytes
    item: Job | CancelRequest


class NotAFile(InvalidJob):
    """{} is not a regular file. Only job files belong here: write one elsewhere and rename it to this place."""


class NotAJobName(InvalidJob):
    """The name {!r} does not end in .json, so this is no job file. Rename it to NAME.json once it is complete."""


class Holes(InvalidJob):
    """The file holds NUL bytes: parts of it never arrived. Write to a name that starts with a dot, then rename."""


class Unreadable(Forbidden):
    """imagend may not read {}: {}. Give its group or user read permission (umask 027)."""


class Door:
    """One inbox. look() and settle() do all the work; serve() is its thread.

    An inbox is listed, the listing is worked through, and the next one begins: each file has its turn, and 100,000 of
    them are listed now and then, not for each batch. One that comes in between need not wait for all the others.
    """

    def __init__(self, inbox: Path, policy: Policy, attachments: Attachments, wall: Wall | None = None) -> None:
        self.inbox, self.policy, self._attachments = inbox, policy, attachments
        self.hint = Event()
        self.looked_at = time.monotonic()
        self.looked = False
        """whether look() has ever come to its end"""
        self.trouble: str | None = None
        self.skew_s: float | None = None
        """how far the inbox's clock is ahead of ours; None: not known"""
        self.delay_s: float | None = None
        """the longest that one of the last 100 jobs had to wait here; None: not known"""
        self.rejected: Counter[str] = Counter()
        """how many files, by the reason's code"""
        self.untold: deque[dict[str, str | None]] = deque(maxlen=1000)
        """what of them the loop has not told yet: file, client if it is known, code"""
        self._delays: deque[float] = deque(maxlen=100)
        self._wall = wall or (lambda: datetime.now(UTC))
        self._inbox = Inbox(inbox)
        self._ahead: deque[str] = deque()
        self._listed: set[str] = set()
        self._list_at = 0.0
        self._measure_at = 0.0
        self._held = Held()
        self._refused = Refused(self._inbox, lambda: self.policy.config.retention, self.looked_at)
        self._closed: str | None = None
        self._unreadable = ""

    def serve(self, ask: Callable[[tuple[Arrival, ...]], tuple[Verdict, ...]]) -> None:
        """Look for ever. `ask` brings arrivals to the loop and returns its verdicts."""
        while True:
            began = time.monotonic()
            verdicts: tuple[Verdict, ...] = ()
            try:
                self.measure(began)
                arrivals = self.look(began)
                verdicts = ask(arrivals) if arrivals else ()
                for arrival, verdict in zip(arrivals, verdicts, strict=True):
                    self.settle(arrival, verdict)
                idle = not self.more or (bool(verdicts) and set(verdicts) == {LATER})
            except OSError as error:  # one that nobody foresaw: the door must live
                self.trouble, idle = _trouble(str(self.inbox), error), True
            if idle:
                interval = self.policy.config.scan_interval_s
                if not verdicts:  # else hints by the thousand could keep us listing what is only held
                    time.sleep(min(time.monotonic() - began, interval))
                self.hint.wait(interval)
                self.hint.clear()

    @property
    def more(self) -> bool:
        """Whether files are listed that look() has not come to."""
        return bool(self._ahead)

    @property
    def stuck(self) -> int:
        """Files that could be neither taken in nor moved to rejected/."""
        return self._held.counts[Why.STUCK]

    def measure(self, now: float) -> None:
        """How far is the inbox's clock from ours? Asked once a minute; told in status.json. What is old goes."""
        self._refused.tend(now, self._wall().timestamp() + (self.skew_s or 0.0))
        if now < self._measure_at:
            return
        self._measure_at = now + MEASURE_S
        try:
            self.skew_s = self._inbox.skew_s()
            self._inbox.sweep_attachments(self._wall().timestamp() + self.skew_s - sent_along.LIFETIME_S)
        except OSError:  # we may have no leave to write here
            self.skew_s = None

    def look(self, now: float) -> tuple[Arrival, ...]:
        """The next verified jobs: at most MAX_BATCH files are read. What can never become a job is rejected."""
        self.looked_at = now
        if not self._ahead or now >= self._list_at:
            self._list(now)
        arrivals: list[Arrival] = []
        read = 0
        while self._ahead and read < MAX_BATCH:
            name = self._ahead.popleft()
            held = self._held.get(name)
            if held is None or held.look_at <= now:
                read += 1
                if (arrival := self._examine(name, now)) is not None:
                    arrivals.append(arrival)
        unreadable = self._unreadable if self._held.counts[Why.UNREADABLE] else None
        self.trouble = self._closed or unreadable  # in one step: the loop's thread reads it
        self.looked = True
        return tuple(arrivals)

    def settle(self, arrival: Arrival, verdict: Verdict) -> None:
        """Do what the loop decided."""
        if verdict is None:
            self._remove(arrival)
        elif isinstance(arrival.item, CancelRequest) and (
            verdict == LATER or (isinstance(verdict, UnknownJob) and self.more)
        ):
            self._listed.discard(arrival.name)  # its job may stand behind it: it counts as new in the next listing
        elif isinstance(verdict, Rejected):
            verdict.client = arrival.item.signer
            self._reject(arrival.name, arrival.identity, verdict)

    def _list(self, now: float) -> None:
        began = time.monotonic()
        try:
            names, closed = self._inbox.listing()
        except OSError as error:
            if self._closed is None:
                log.error("inbox cannot be read", inbox=str(self.inbox), why=str(error))
            self._closed = _trouble(str(self.inbox), error)
            self._ahead.clear()
            return
        self._closed = next((_trouble(f"{self.inbox}/{self._shown(name)}", error) for name, error in closed), None)
        if self._ahead:  # some that are new go first: one may be a cancel. But not all: the others have waited
            new = [name for name in names if name not in self._listed]
            self._ahead.extendleft(reversed(new[:MAX_BATCH]))
            self._ahead.extend(new[MAX_BATCH:])
        else:
            self._ahead.extend(names)
        self._listed = set(names)
        self._held.release_all_but(self._listed)
        took = time.monotonic() - began
        self._list_at = now + took + max(took, self.policy.config.scan_interval_s)

    def _examine(self, name: str, now: float) -> Arrival | None:
        """The verified job in a file; None if there is none (yet): what is surely none has been rejected."""
        held = self._held.get(name)
        known = UNKNOWN
        try:
            known = self._inbox.identity(name)
            if held is not None and self._held.rests(held, known, now):
                return None
            unfinished = held is not None and held.why is Why.UNFINISHED and held.identity == known
            try:
                raw, status = self._inbox.read(name)
            except files.NotOrdinary:
                raise NotAFile(_leaf(name), detail=_OF_THE_FILE) from None
            except PermissionError as error:
                raise Unreadable(_leaf(name), error.strerror, detail=_OF_THE_FILE) from None
            known = identity(status)
            arrival = Arrival(name, known, status.st_ctime, raw, self._verify(name, raw, status.st_size))
        except GONE:
            self._held.release(name)
        except (Unsigned, Holes, NotAJobName, Unreadable, *sent_along.LATE) as reason:  # not whole? a server's fault?
            if unfinished:
                self._reject(name, known, reason)
            else:
                self._held.keep(name, Why.UNFINISHED, known, now, self.policy.config.file_grace_s)
        except Rejected as reason:
            self._reject(name, known, reason)
        except OSError as error:  # not the sender's fault: the disk, the network, our own limits
            self._unreadable = _trouble(f"{self.inbox}/{self._shown(name)}", error)
            self._held.keep(name, Why.UNREADABLE, known, now)
        except Exception as bug:  # no stranger's file may stop the daemon, not even one that finds a bug
            where = "".join(traceback.format_tb(bug.__traceback__))  # without its message: a prompt may stand in it
            log.error("a file met a bug", file=self._shown(name), bug=type(bug).__name__, traceback=where)
            self._reject(name, known, DoorBug())
        else:
            if held is None or held.why is not Why.STUCK:
                self._held.release(name)
            return arrival
        return None

    def _verify(self, name: str, raw: bytes, size: int) -> Job | CancelRequest:
        """Who signed it, and is it a job that may come in? Raises Rejected."""
        if len(raw) > MAX_JOB_BYTES:
            raise TooLarge(max(size, len(raw)), MAX_JOB_BYTES)
        if not name.endswith(".json"):
            raise NotAJobName(_leaf(name), detail=_OF_THE_FILE)
        if b"\0" in raw:  # so a file looks whose pages come over the network out of order
            raise Holes
        now = self._wall()
        client, body = unseal(raw, self.policy.signers, now.timestamp())
        try:
            item = jobfile.parse(client, body)
            jobfile.check_window(item.header, now)
            limits.check(item, self.policy.config)
            item = sent_along.take(item, name, self._inbox, self._attachments, self.policy.config)
        except Rejected as reason:
            reason.client = client
            raise
        return item

    def _remove(self, arrival: Arrival) -> None:
        if self.skew_s is not None:
            self._delays.append(self._wall().timestamp() + self.skew_s - arrival.dropped_at)
            self.delay_s = max(self._delays)
        try:
            self._inbox.remove(arrival.name, arrival.identity)
            self._held.release(arrival.name)
        except GONE:
            self._held.release(arrival.name)
        except OSError as error:
            self._give_up(arrival.name, arrival.identity, error)

    def _reject(self, name: str, known: Identity, reason: Rejected) -> None:
        """Move the file beside its inbox, with its reason."""
        why = discreet.why(reason)
        log.warning("rejected", file=self._shown(name), code=reason.code, client=reason.client, why=why)
        note = {"error": reason.envelope(), "client": reason.client, "at": self._wall().isoformat()}
        try:
            self._inbox.reject(name, known, note)
            self._refused.add()
            self.rejected[reason.code] += 1
            self.untold.append({"file": self._shown(name), "client": reason.client, "code": reason.code})
            self._held.release(name)
        except GONE:
            self._held.release(name)
        except OSError as error:
            self._give_up(name, known, error)

    def _shown(self, name: str) -> str:
        return discreet.shown(name, self.policy.signers.clients())

    def _give_up(self, name: str, known: Identity, error: OSError) -> None:
        """Leave the file where it is, and try again when it has changed, or after a pause; say it once."""
        if self._held.keep(name, Why.STUCK, known, self.looked_at):
            log.error("a file cannot be moved out of the inbox", file=self._shown(name), why=error.strerror)


def _trouble(place: str, error: OSError) -> str:
    """Something of ours is in the way: the operator is told, and it is tried again."""
    return f"{place}: {error.strerror}. It is tried again; to find out what to do, run: imagend check"


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]
