"""What `imagend install` may change on a host, as steps that can be told before they are done, and done twice.

A step makes what is missing. What is there in another way is the operator's: it is told of, and left.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imagend import files
from imagend.errors import UsageError

USER = "imagend"


class Step(Protocol):
    """What state() says: made or replaced, by do(); kept; or `differs: ` and how the operator mends it."""

    def state(self) -> str: ...

    def do(self) -> None: ...


class Host:
    """A file system's root, with the accounts that its processes have. `leave`: whether we may give files away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.leave = os.geteuid() == 0

    @property
    def is_ours(self) -> bool:
        """Whether it is the one that we run on."""
        return self.root == Path("/")

    def path(self, inside: Path) -> Path:
        return self.root / inside.relative_to("/")

    def user(self, name: str) -> int | None:
        return self._number("passwd", name, lambda: pwd.getpwnam(name).pw_uid)

    def group(self, name: str) -> int | None:
        return self._number("group", name, lambda: grp.getgrnam(name).gr_gid)

    def members(self, group: str) -> set[str]:
        if self.is_ours:
            return set(grp.getgrnam(group).gr_mem)
        return {name for line in self._lines("group") if line[0] == group for name in line[3].split(",")}

    def _number(self, table: str, name: str, ask: Callable[[], int]) -> int | None:
        """By name: here by all that nsswitch.conf names, in another root by its file."""
        if self.is_ours:
            try:
                return ask()
            except KeyError:
                return None
        if name == "root":
            return 0
        return next((int(line[2]) for line in self._lines(table) if line[0] == name), None)

    def _lines(self, table: str) -> list[list[str]]:
        path = self.path(Path("/etc", table))
        return [line.split(":") for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Accounts:
    """The user that imagend runs as, its group, and the clients' groups that it is a member of."""

    host: Host
    home: Path
    groups: tuple[str, ...]

    def __str__(self) -> str:
        return f"user {USER}, home {self.home}" + "".join(f", in group {group}" for group in self.groups)

    def state(self) -> str:
        there = self.host.user(USER) is not None and self.host.group(USER) is not None
        return "kept" if there and all(USER in self.host.members(group) for group in self.groups) else "made"

    def do(self) -> None:
        lines = [f'u {USER} - "imagend" {self.home} -', *(f"m {USER} {group}" for group in self.groups)]
        root = [] if self.host.is_ours else [f"--root={self.host.root}"]
        try:
            done = subprocess.run(
                ["systemd-sysusers", *root, "--inline", *lines], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise UsageError("systemd-sysusers is not here: install the package systemd.") from None
        if done.returncode:
            raise UsageError(f"systemd-sysusers: {' '.join(done.stderr.split())}.")


@dataclass(frozen=True)
class Folder:
    host: Host
    inside: Path
    mode: int = 0o755
    owner: str = USER
    group: str = USER

    def __str__(self) -> str:
        return f"{self.inside}  {self.owner}:{self.group} {self.mode:04o}"

    def state(self) -> str:
        path = self.host.path(self.inside)
        if not path.is_dir():
            return "made"
        status = path.stat()
        wanted = (self.host.user(self.owner), self.host.group(self.group))
        owned = (status.st_uid, status.st_gid) == wanted or not self.host.leave
        if owned and stat.S_IMODE(status.st_mode) == self.mode:
            return "kept"
        return f"differs: chown {self.owner}:{self.group} {path} && chmod {self.mode:04o} {path}"

    def do(self) -> None:
        path = self.host.path(self.inside)
        files.make_folder(path, 0o700)
        uid, gid = self.host.user(self.owner), self.host.group(self.group)
        if self.host.leave and uid is not None and gid is not None:
            os.chown(path, uid, gid)
        path.chmod(self.mode)  # after chown(), which takes setgid away


@dataclass(frozen=True)
class File:
    """`ours`: no file for the operator to edit; an older one is replaced."""

    host: Host
    inside: Path
    text: str
    ours: bool = False

    def __str__(self) -> str:
        return str(self.inside)

    def state(self) -> str:
        path = self.host.path(self.inside)
        if not path.exists():
            return "made"
        return "replaced" if self.ours and path.read_text() != self.text else "kept"

    def do(self) -> None:
        path = self.host.path(self.inside)
        files.make_folder(path.parent)
        files.write(path, self.text.encode())


@dataclass(frozen=True)
class Link:
    host: Host
    inside: Path
    target: Path

    def __str__(self) -> str:
        return f"{self.inside} -> {self.target}"

    def state(self) -> str:
        path = self.host.path(self.inside)
        if not os.path.lexists(path):
            return "made"
        ours = path.is_symlink() and path.readlink() == self.target
        return "kept" if ours else f"differs: ln -sfn {self.target} {path}"

    def do(self) -> None:
        path = self.host.path(self.inside)
        files.make_folder(path.parent)
        path.symlink_to(self.target)


@dataclass(frozen=True)
class Advice:
    """Something of the operator's that is to be changed, by the operator."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return self.what

    def state(self) -> str:
        return f"differs: {self.remedy}"

    def do(self) -> None: ...
