"""An inbox on a file system that lies as NFS does: whatever it says, each job ends once and each bad file is told why.

Door, loop and clients are the real ones. A seed that fails is replayed with: pytest tests/test_lying.py -k 'lies[SEED]'
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, make_home
from lying import Lies

from imagend import files
from imagend.cli import drop
from imagend.daemon.loop import Daemon
from imagend.errors import UsageError
from imagend.job import Ref
from imagend.signing import Key, job_id

SEEDS = 500
HONEST_AT = 120.0
LIMIT_S = 600.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: these tests are about names, not about disks."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=where))
    yield path
    shutil.rmtree(path)


class World:
    """One home, a clock, clients on other hosts, and what they expect."""

    def __init__(self, home: Home, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.home, self.random = home, random.Random(seed)
        self.inbox = home.root / "nfs" / "inbox"
        self.inbox.mkdir(parents=True)
        self.rejected = self.inbox.parent / "rejected"
        self.lies = Lies(self.inbox.parent, seed, HONEST_AT)
        self.jobs: set[Ref] = set()
        self.perhaps: set[Ref] = set()
        """jobs whose file was replaced before anybody had to have read it"""
        self.bad: dict[bytes, str] = {}
        self.tries: Counter[bytes] = Counter()
        """how often a file was dropped at most: a client who was told of an error drops it again"""
        self.plan: list[tuple[float, Any]] = []
        self.began = datetime.now(UTC)
        self.skew_s = self.random.choice([0, -5 * 3600, 7 * 3600])
        home.config = home.config.model_copy(update={"file_grace_s": 40.0, "inboxes": (self.inbox,)})
        self.daemon = self._daemon()
        self.lies.install(patch)
        read = files.read_untrusted

        def replaced_meanwhile(path: Path, limit: int) -> Any:
            answer = read(path, limit)
            if self.swaps and Path(path).name in self.swaps:
                self.swaps.pop(Path(path).name)()
            return answer

        self.swaps: dict[str, Any] = {}
        patch.setattr(files, "read_untrusted", replaced_meanwhile)

    def _daemon(self) -> Daemon:
        daemon = self.home.daemon(heartbeat_s=0.0)
        daemon.clock = lambda: self.lies.now
        daemon.wall = daemon.ending.wall = lambda: self.began + timedelta(seconds=self.lies.now)
        return daemon

    def at(self, seconds: float, act: Any) -> None:
        self.plan.append((seconds, act))

    def turn(self) -> bool:
        """A second or so passes; whether anything is left to do."""
        self.lies.now += self.random.uniform(0.2, 3.0)
        for when, act in sorted(self.plan, key=lambda item: item[0]):
            if when <= self.lies.now:
                self.plan.remove((when, act))
                try:
                    with self.lies.abroad():
                        act()
                except OSError:  # a client tries again
                    self.at(self.lies.now + 2.0, act)
        (door,) = self.daemon.doors
        arrivals = door.look(self.lies.now)
        for arrival, verdict in zip(arrivals, self.daemon.reception.take_in(arrivals), strict=True):
            door.settle(arrival, verdict)
        self.daemon.look_around()
        self.daemon.wait()
        return bool(self.plan or self.left() or door.more or len(self.daemon.turn) or self.daemon.busy)

    def left(self) -> list[str]:
        """What lies in the inbox and is no dotfile, really."""
        with self.lies.truth():
            return [str(path) for path in self.inbox.rglob("[!.]*") if path.is_symlink() or not path.is_dir()]

    # What clients do

    def job(self, **fields: Any) -> tuple[bytes, Ref]:
        body = self.home.body(nonce=str(self.random.random()), **fields)
        return self.home.seal(body), Ref(CLIENT, job_id(CLIENT, body))

    def put(self, name: str, raw: bytes) -> None:
        """As imagend submit does."""

        def write() -> None:
            with self.lies.truth():
                if (self.inbox / name).exists() and name == "same.json":
                    raise OSError  # another's; this client waits until it is gone
            self.tries[raw] += 1
            files.write(self.inbox / name, raw)

        self.at(self.lies.now, write)

    def submit(self, raw: bytes, ref: Ref) -> None:
        try:
            drop.put(self.home.config, raw, ref)
        except UsageError as error:
            raise OSError(str(error)) from None

    def write_in_parts(self, name: str, raw: bytes) -> None:
        """A careless client: the name is there before the bytes are, and some of them before those in front."""
        path, cut = self.inbox / name, self.random.randrange(1, len(raw))
        holes = self.random.random() < 0.3

        def begin() -> None:
            Path.write_bytes(path, b"\0" * cut + raw[cut:] if holes else raw[:cut])
            os.utime(path, (self.server_time(), self.server_time()))

        def complete() -> None:
            with path.open("r+b") as file:
                file.write(raw)

        self.at(self.lies.now, begin)
        self.at(self.lies.now + self.random.uniform(0.0, 30.0), complete)

    def server_time(self) -> float:
        return self.began.timestamp() + self.lies.now + self.skew_s

    def scenes(self) -> None:
        """Some clients, at some times, each with a way of its own."""
        good = [self.plain, self.twice, self.under_two_names, self.in_parts, self.replaced, self.own_folder]
        scenes = [*good, self.spoilt, self.oversize, self.no_file, self.never_finished]
        for number in range(self.random.randint(3, 6)):
            scene = self.random.choice(scenes)
            self.at(self.random.uniform(0.0, 60.0), lambda scene=scene, number=number: scene(f"{number}"))
        self.at(self.random.uniform(0.0, 60.0), lambda: (self.inbox / ".nfs0001").write_bytes(b"held by somebody"))

    def plain(self, _: str) -> None:
        raw, ref = self.job()
        self.jobs.add(ref)
        self.at(self.lies.now, lambda: self.submit(raw, ref))

    def twice(self, name: str) -> None:
        raw, ref = self.job()
        self.jobs.add(ref)
        for _ in range(2):
            self.at(self.lies.now + self.random.uniform(0.0, 10.0), lambda: self.put(f"{name}.json", raw))

    def under_two_names(self, name: str) -> None:
        raw, ref = self.job()
        self.jobs.add(ref)
        for end in "ab":
            self.at(self.lies.now + self.random.uniform(0.0, 10.0), lambda end=end: self.put(f"{name}{end}.json", raw))

    def in_parts(self, name: str) -> None:
        raw, ref = self.job()
        self.jobs.add(ref)
        self.write_in_parts(f"{name}.json", raw)

    def replaced(self, name: str) -> None:
        """While the door reads the first, or whenever."""
        (first, one), (second, other) = self.job(), self.job()
        self.perhaps.add(one)
        self.jobs.add(other)
        name = f"{name}.json"

        def swap() -> None:
            with self.lies.truth():  # at this very moment
                files.write(self.inbox / name, second)

        with self.lies.truth():
            files.write(self.inbox / name, first)
        if self.random.random() < 0.5:
            self.swaps[name] = swap
            self.at(200.0, lambda: self.swaps.pop(name)() if name in self.swaps else None)
        else:
            self.at(self.lies.now + self.random.uniform(0.0, 10.0), lambda: self.put(name, second))

    def own_folder(self, name: str) -> None:
        """A folder that is made, emptied, removed and made again under the door's eyes."""
        raw, ref = self.job()
        self.jobs.add(ref)

        own, bad = self.inbox / f"client{name}", self.spoil()
        self.bad[bad] = "UNAUTHORIZED"

        def drop_into(name: str, raw: bytes) -> None:
            own.mkdir(exist_ok=True)
            self.tries[raw] += 1
            files.write(own / name, raw)

        def empty() -> None:
            with self.lies.truth():
                there = own.exists()
            if there:
                own.rmdir()  # until it is empty

        self.at(self.lies.now, lambda: drop_into("a.json", raw))
        self.at(self.lies.now + 20.0, empty)
        self.at(self.lies.now + 30.0, lambda: drop_into("b.json", bad))

    def spoil(self) -> bytes:
        raw, _ = self.job(seed=1)
        return raw.replace(b'"seed": 1', b'"seed": 2')

    def spoilt(self, name: str) -> None:
        raw = self.spoil()
        self.bad[raw] = "UNAUTHORIZED"
        self.put(f"{self.random.choice([name, 'same'])}.json", raw)

    def oversize(self, name: str) -> None:
        raw = name.encode() * 70_000
        self.bad[raw] = "PAYLOAD_TOO_LARGE"
        self.put(f"{name}.json", raw)

    def no_file(self, name: str) -> None:
        (self.inbox / f"{name}.json").symlink_to(f"nowhere-{name}")
        self.bad[f"nowhere-{name}".encode()] = "INVALID_PARAMETERS"

    def never_finished(self, name: str) -> None:
        raw = self.job()[0][:-30]
        self.bad[raw] = "UNAUTHORIZED"
        self.put(f"{name}.json", raw)

    # What must hold in the end

    def check(self) -> None:
        home, (door,) = self.home, self.daemon.doors
        assert (self.left(), door.trouble, door.stuck, self.daemon.health.reasons) == ([], None, 0, {})
        told = [(line["client"], line["id"]) for line in home.feed()] if self.jobs else []
        assert len(told) == len(set(told))
        assert self.jobs <= {Ref(*one) for one in told} <= self.jobs | self.perhaps
        published = {
            Ref(path.parent.parent.name, path.parent.name) for path in home.config.outputs.glob("*/*/manifest.json")
        }
        assert published == {Ref(*one) for one in told}
        assert {home.outcome(ref) for ref in published} <= {"succeeded"}
        found: Counter[bytes] = Counter()
        for path in sorted(self.rejected.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            assert not path.name.startswith("."), path
            if path.name.endswith(".reason.json"):
                assert os.path.lexists(str(path).removesuffix(".reason.json")), f"{path} tells of nothing"
                continue
            content = bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
            note = json.loads(path.with_name(f"{path.name}.reason.json").read_text())
            assert (note["file"], note["error"]["code"]) == (path.name, self.bad[content])
            found[content] += 1
        assert found.keys() == self.bad.keys()
        assert (self.inbox / ".nfs0001").read_bytes() == b"held by somebody"
        assert all(count <= max(1, self.tries[content]) for content, count in found.items())


def live(seed: int, folder: Path, key: Key) -> World:
    """One world, from its first job to the quiet after the last lie, and what must hold then."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(make_home(folder / str(seed), key), seed, patch)
        world.scenes()
        while world.turn() or world.lies.now < HONEST_AT:
            assert world.lies.now < LIMIT_S, f"still there: {world.left()}, {world.daemon.health.reasons}"
        for _ in range(20):
            world.turn()
    world.check()
    return world


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_an_inbox_lies(seed: int, folder: Path, key: Key) -> None:
    live(seed, folder, key)


def test_each_lie_is_told(folder: Path, key: Key) -> None:
    """Else the others prove nothing."""
    told = sum((live(seed, folder, key).lies.told for seed in range(20)), Counter[str]())
    kinds = {"refused", "done, and the answer lost", "not there yet", "still there", "still the old one"}
    assert {kind for kind, times in told.items() if times > 5} == kinds
