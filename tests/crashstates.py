"""The disk after a power cut: every state that a file system may leave of a recorded life.

A name is durable apart from the bytes it leads to. Two kinds of file system are followed:

Journalled (ext4, XFS): names change on disk in the order in which they were changed, so that a prefix of the changes is
found; a sync of anything makes all earlier changes durable.
Literal (POSIX and nothing more): every name that came or went since its folder was synced is found or not, each for
itself; so a rename may be found on one side only, on both or on neither.

In both, bytes that were not synced are found whole, torn, as zeros or not at all, and an inbox is a file system of its
own (it may be a network's): its names come and go whatever else is found. Between two syncs, what may be found only
grows; so the states are listed before each sync, and where there are more than a limit, the corners and a seeded sample
of the rest. After Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from disk import SYNCS, Op

Inode = int
Slot = tuple[Inode, str]
"""A name in a folder."""
Change = tuple[Slot, Inode | None] | tuple[Inode, bytes]
"""Where a name leads now, or what bytes a file has."""
Option = tuple[Change, ...]
Tree = dict[str, bytes | None]
"""Path to bytes; None for a folder, which stands before what is in it."""

ROOT: Inode = 0
INBOX = "spool/inbox"
_STALE = re.compile(
    r"spool/\.+(lock|owner|ballast)[^/]*|spool/\.?(status|durations)\.json[^/]*|outputs/\w+/\.?\w+\.state\.json[^/]*"
    r"|spool/events\.jsonl"
)
"""No start relies on these."""


class State(NamedTuple):
    """What is found after the power cut, and what the world knew by then."""

    tree: tuple[tuple[str, bytes | None], ...]
    delivered: frozenset[str] = frozenset()
    runs: tuple[str, ...] = ()
    published: frozenset[str] = frozenset()


class Disk(ABC):
    """What processes see, and what of it may be found after a power cut now."""

    def __init__(self, tree: Tree) -> None:
        self.seen: dict[Inode, dict[str, Inode]] = {ROOT: {}}
        self.found: dict[Inode, dict[str, Inode]] = {ROOT: {}}
        self.bytes: dict[Inode, list[bytes]] = {}
        """of each file; the last are what processes see, the first are surely no better than what is found"""
        self.inbox_names: dict[Slot, list[Inode | None]] = {}
        self._inodes = itertools.count(1)
        for path, data in tree.items():
            folder, name = self._slot(path)
            inode = self._new(data)
            self.seen[folder][name] = self.found[folder][name] = inode
        self.inbox = self._inode(INBOX)

    def _new(self, data: bytes | None) -> Inode:
        inode = next(self._inodes)
        if data is None:
            self.seen[inode], self.found[inode] = {}, {}
        else:
            self.bytes[inode] = [data]
        return inode

    def _inode(self, path: str) -> Inode:
        inode = ROOT
        for name in path.split("/") if path != "." else ():
            inode = self.seen[inode][name]
        return inode

    def _slot(self, path: str) -> Slot:
        folder, _, name = path.rpartition("/")
        return self._inode(folder or "."), name

    def _below(self, inode: Inode) -> Iterator[Inode]:
        """What lies on the same file system."""
        yield inode
        for below in self.seen.get(inode, {}).values():
            if below != self.inbox:
                yield from self._below(below)

    def does(self, op: Op) -> None:
        """An operation was done; its paths are relative to the root."""
        if not op.path.startswith(("spool", "outputs", ".")) or _STALE.fullmatch(op.path):
            return
        match op.name:
            case "open":
                folder, name = self._slot(op.path)
                inode = self.seen[folder].get(name)
                if inode is None:
                    self._change(((folder, name), self._new(b"")))
                elif op.truncates:
                    self.bytes[inode].append(b"")
            case "write":
                versions = self.bytes[self._inode(op.path)]
                before, data = versions[-1], op.data
                versions += (before + data[: len(data) // 2], before + bytes(len(data)), before + data)
            case "mkdir":
                self._change((self._slot(op.path), self._new(None)))
            case "unlink" | "remove" | "rmdir":
                self._change((self._slot(op.path), None))
            case "link":
                self._change((self._slot(op.target), self._inode(op.path)))
            case "rename" | "replace":
                self._change((self._slot(op.target), self._inode(op.path)), (self._slot(op.path), None))
            case "fsync":
                self._sync(self._inode(op.path))
            case "syncfs":
                for inode in list(self._below(self._inode(op.path))):
                    self._sync(inode)
            case "deliver":
                self._change((self._slot(op.path), self._new(op.data)))
                self._sync(self.inbox)
            case "utime" | "chmod":
                pass
            case unknown:
                raise ValueError(f"the model does not know {unknown}")

    def _change(self, *changes: tuple[Slot, Inode | None]) -> None:
        rest = []
        for slot, inode in changes:
            folder, name = slot
            if slot[0] == self.inbox:
                self.inbox_names.setdefault(slot, [self.found[folder].get(name)]).append(inode)
            else:
                rest.append((slot, inode))
            _lead(self.seen, slot, inode)
        if rest:
            self._names_change(tuple(rest))

    def _sync(self, inode: Inode) -> None:
        if inode in self.bytes:
            del self.bytes[inode][:-1]
        if inode == self.inbox:
            for slot, inodes in self.inbox_names.items():
                _lead(self.found, slot, inodes[-1])
            self.inbox_names.clear()
        else:
            self._names_sync(inode)

    @abstractmethod
    def _names_change(self, changes: tuple[tuple[Slot, Inode | None], ...]) -> None:
        """Outside of the inbox."""

    @abstractmethod
    def _names_sync(self, inode: Inode) -> None: ...

    @abstractmethod
    def _names_found(self) -> Iterator[Sequence[Option]]:
        """Choices, each to be made on its own; the first option of each is the oldest, the last the newest."""

    def trees(self, limit: int, dice: random.Random) -> Iterator[tuple[tuple[str, bytes | None], ...]]:
        """What may be found now; at most about `limit` of it."""
        choices: list[Sequence[Option]] = list(self._names_found())
        choices += _apart(self.inbox_names)
        choices += [
            [((inode, data),) for data in dict.fromkeys(versions)]
            for inode, versions in self.bytes.items()
            if len(versions) > 1
        ]
        for options in _pick(choices, limit, dice):
            names, data = {folder: dict(entries) for folder, entries in self.found.items()}, {}
            for key, value in itertools.chain.from_iterable(options):
                if isinstance(key, tuple):
                    _lead(names, key, value)  # type: ignore[arg-type]
                else:
                    data[key] = value
            yield tuple(self._walk(ROOT, "", names, data))

    def _walk(
        self, folder: Inode, above: str, names: dict[Inode, dict[str, Inode]], data: dict[Inode, bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, inode in sorted(names[folder].items()):
            path = f"{above}{name}"
            if inode in self.bytes:
                yield path, data[inode] if inode in data else self.bytes[inode][-1]
            else:
                yield path, None
                yield from self._walk(inode, f"{path}/", names, data)


class Journalled(Disk):
    def __init__(self, tree: Tree) -> None:
        self.journal: list[Option] = []
        super().__init__(tree)

    def _names_change(self, changes: tuple[tuple[Slot, Inode | None], ...]) -> None:
        self.journal.append(changes)

    def _names_sync(self, inode: Inode) -> None:
        for slot, leads_to in itertools.chain.from_iterable(self.journal):
            _lead(self.found, slot, leads_to)  # type: ignore[arg-type]
        self.journal.clear()

    def _names_found(self) -> Iterator[Sequence[Option]]:
        yield [tuple(itertools.chain.from_iterable(self.journal[:end])) for end in range(len(self.journal) + 1)]


class Literal(Disk):
    def __init__(self, tree: Tree) -> None:
        self.names: dict[Slot, list[Inode | None]] = {}
        super().__init__(tree)

    def _names_change(self, changes: tuple[tuple[Slot, Inode | None], ...]) -> None:
        for slot, inode in changes:
            self.names.setdefault(slot, [self.found[slot[0]].get(slot[1])]).append(inode)

    def _names_sync(self, inode: Inode) -> None:
        for slot in [slot for slot in self.names if slot[0] == inode]:
            _lead(self.found, slot, self.names.pop(slot)[-1])

    def _names_found(self) -> Iterator[Sequence[Option]]:
        yield from _apart(self.names)


def _lead(names: dict[Inode, dict[str, Inode]], slot: Slot, inode: Inode | None) -> None:
    folder, name = slot
    if inode is None:
        names[folder].pop(name, None)
    else:
        names[folder][name] = inode


def _apart(names: dict[Slot, list[Inode | None]]) -> Iterator[Sequence[Option]]:
    for slot, inodes in names.items():
        yield [((slot, inode),) for inode in dict.fromkeys(inodes)]


def _pick(choices: Sequence[Sequence[Option]], limit: int, dice: random.Random) -> Iterator[Sequence[Option]]:
    """Every way to choose; if there are more than `limit`, all old, all new, each alone otherwise, and a sample."""
    if math.prod(map(len, choices)) <= limit:
        yield from itertools.product(*choices)
        return
    old, new = [options[0] for options in choices], [options[-1] for options in choices]
    yield old
    yield new
    for number, options in enumerate(choices):
        yield from ([*old[:number], option, *old[number + 1 :]] for option in options)
        yield from ([*new[:number], option, *new[number + 1 :]] for option in options)
    for _ in range(limit):
        yield [dice.choice(options) for options in choices]


# From a life to its states


MARKS = ("deliver", "run", "published")
"""What the world learns. From then on it may hold us to it."""


def crash_states(disk: Disk, ops: Iterable[Op], limit: int, seed: int = 0) -> Iterator[State]:
    """Each state once that a power cut during `ops` may leave; ops may hold MARKS."""
    dice, met = random.Random(seed), set[State]()
    delivered, runs, published = set[str](), list[str](), set[str]()
    for last, op in itertools.pairwise((Op("", ""), *ops, Op("fsync", "."))):
        if op.name in (*SYNCS, *MARKS) and not last.name == op.name == "deliver":  # the world delivers all at once
            for tree in disk.trees(limit, dice):
                state = State(tree, frozenset(delivered), tuple(runs), frozenset(published))
                if state not in met:
                    met.add(state)
                    yield state
        match op.name:
            case "run":
                runs.append(op.path)
            case "published":
                published.add(op.path)
            case "deliver":
                delivered.add(op.path.removeprefix(f"{INBOX}/"))
                disk.does(op)
            case _:
                disk.does(op)


def snapshot(root: Path) -> Tree:
    """What of a home a power cut may touch."""
    tree: Tree = {}
    for top in ("spool", "outputs"):
        for path in sorted([root / top, *(root / top).rglob("*")]):
            name = str(path.relative_to(root))
            if path.exists() and not _STALE.fullmatch(name):
                tree[name] = None if path.is_dir() else path.read_bytes()
    return tree
