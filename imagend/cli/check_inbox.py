"""imagend check, the part about inboxes: what they are mounted as, whether they answer, how late and by which clock."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from imagend import files
from imagend.cli.finding import Finding
from imagend.cli.init import login_name
from imagend.config import Config
from imagend.inbox import REJECTED, Inbox

LIMIT_S = 10.0
"""An inbox that gives no answer for so long is left alone: a mount whose server is away holds on for ever."""
SKEW_S = 60.0
"""A clock that differs by more is worth a word; imagend itself never compares the two."""
DELAY_S = 5.0
_LEAVE = (errno.EACCES, errno.EPERM)
_NFS_DIR_S = 60.0  # acdirmax where the mount names none: nfs(5)


class Mount(NamedTuple):
    point: str
    type: str
    options: frozenset[str]

    @property
    def is_nfs(self) -> bool:
        return self.type in ("nfs", "nfs4")


def mount_of(path: Path, mountinfo: str) -> Mount | None:
    """The mount that holds `path`, a resolved one; `mountinfo` is the text of /proc/self/mountinfo, see proc(5)."""
    best = None
    for line in mountinfo.splitlines():
        ours, _, theirs = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), ours.split()[4])
        kind, _, options = theirs.split(" ", 2)
        if path.is_relative_to(point) and (best is None or len(point) >= len(best.point)):  # a later one lies on top
            both = frozenset((ours.split()[5] + "," + options.rpartition(" ")[2]).split(","))
            best = Mount(point, kind, both)
    return best


def shelves(config: Config, mountinfo: str) -> Iterator[Finding]:
    for folder in (config.spool, config.outputs):
        mount = mount_of(folder.resolve(), mountinfo)
        if mount is not None and mount.is_nfs:
            what = f"{folder} lies on NFS ({mount.point}), where locks, syncs and renames are not what imagend needs"
            yield Finding("error", what, "put spool and outputs on a local disk; only an inbox may lie on NFS")


def mounted(inbox: Path, place: Path, mountinfo: str) -> Iterator[Finding]:
    """`place` is the inbox, resolved. Reads the table of mounts only, so it cannot hang."""
    mount = mount_of(place, mountinfo)
    if mount is not None:
        yield Finding("ok", f"{inbox} lies on {mount.type}, mounted at {mount.point}")
        if mount.is_nfs:
            yield from _nfs(inbox, mount)


def _nfs(inbox: Path, mount: Mount) -> Iterator[Finding]:
    if "hard" not in mount.options or mount.options & {"soft", "softerr"}:
        what = f"{inbox} is an NFS mount without `hard`: an error of the net looks like one of the disk"
        yield Finding("warning", what, f"mount {mount.point} with the option hard")
    seconds = {name: float(value) for name, _, value in (o.partition("=") for o in mount.options) if value.isdecimal()}
    late_s = 0.0 if "noac" in mount.options else seconds.get("actimeo", seconds.get("acdirmax", _NFS_DIR_S))
    positive = mount.options & {"lookupcache=positive", "lookupcache=pos", "lookupcache=none"}
    if late_s > DELAY_S and not positive:
        what = f"{inbox} may show a new file {late_s:g} s late (acdirmax, lookupcache=all)"
        yield Finding("warning", what, f"mount {mount.point} with lookupcache=positive or actimeo=1")


def inboxes(config: Config, mountinfo: str, status: dict[str, Any]) -> Iterator[Finding]:
    """All of it. `status` is what a living daemon tells, or {}."""
    asked = [(inbox, _ask(inbox, mountinfo)) for inbox in config.inboxes]
    until = time.monotonic() + LIMIT_S
    for inbox, answer in asked:
        try:
            yield from answer.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            what = f"{inbox} does not answer within {LIMIT_S:g} s"
            yield Finding("error", what, "see whether its server and the net are up; df, dmesg")
            yield from mounted(inbox, Path(os.path.normpath(inbox)), mountinfo)
    for told in status.get("inboxes", []):
        if (delay_s := told.get("delay_s")) is not None:
            what = f"{told['path']}: of the last 100 files none waited longer than {delay_s:g} s, says the daemon"
            yield Finding("ok", what)


def _ask(inbox: Path, mountinfo: str) -> SimpleQueue[list[Finding]]:
    """On a thread of its own, which may hang for ever: the process does not wait for it."""
    answer: SimpleQueue[list[Finding]] = SimpleQueue()

    def examine() -> None:
        try:
            answer.put([*_place(inbox), *mounted(inbox, inbox.resolve(), mountinfo), *_probe(inbox)])
        except OSError as error:
            fix = f"chown it to the user that runs imagend: {login_name()}" if error.errno in _LEAVE else "df, dmesg"
            answer.put([Finding("error", f"{inbox} cannot be read or written: {error.strerror}", fix)])

    Thread(target=examine, name=f"check-{inbox}", daemon=True).start()
    return answer


def _place(inbox: Path) -> Iterator[Finding]:
    rejected = inbox.parent / REJECTED
    if not inbox.is_dir():
        yield Finding("error", f"{inbox} is no folder", "imagend init, or correct the path in config.yaml")
        return
    yield Finding("ok", f"{inbox} is there")
    device = inbox.stat().st_dev
    if device != inbox.parent.stat().st_dev:
        fix = f"make the inbox a folder in the mount, so that {REJECTED}/ lies beside it on the same file system"
        yield Finding("error", f"{inbox} is itself a mount point", fix)
    elif rejected.is_symlink() or (rejected.exists() and not rejected.is_dir()):
        yield Finding("error", f"{rejected} is a link or a file; what is refused cannot go there", f"rm {rejected}")
    elif rejected.exists() and rejected.stat().st_dev != device:
        yield Finding("error", f"{rejected} lies on another file system than {inbox}", "mount them together")


def _probe(inbox: Path) -> Iterator[Finding]:
    """Make, rename, list and remove a dotfile, which no door looks at."""
    if not inbox.is_dir():
        return
    first, last = (inbox / f".imagend-check-{secrets.token_hex(4)}.{end}" for end in ("new", "old"))
    began = time.monotonic()
    files.replace_hint(first, b"")
    files.rename(first, last)
    made = time.monotonic()
    while last.name not in {entry.name for entry in os.scandir(inbox)} and time.monotonic() - made < DELAY_S:
        time.sleep(0.05)
    seen = time.monotonic()
    last.unlink()
    trip_ms = (time.monotonic() - seen + made - began) * 1000
    skew_s = Inbox(inbox).skew_s()
    yield Finding("ok", f"{inbox}: a file is made, renamed and removed in {trip_ms:.1f} ms")
    if seen - made > DELAY_S / 10:
        what = f"{inbox}: a listing shows a new file only after {seen - made:.1f} s"
        yield Finding("warning", what, "mount it with lookupcache=positive or actimeo=1")
    if abs(skew_s) > SKEW_S:
        what = f"{inbox}: its server's clock is {skew_s:+.0f} s from ours"
        yield Finding(
            "warning", what, "let both follow the same time servers (NTP); imagend itself does not rely on it"
        )
