"""A life that is recorded: a daemon at work, letters that come to it, and a ledger of what it has promised so far.

python tests/lab/drill.py FOLDER MOMENTS SEED STRIKE [VICTIM ARGUMENTS]: goes on where no test can (in a guest), for
which it knows the standard library alone. FOLDER holds config.yaml, keys, plan.json and letters/; STRIKE is a shell
command that is run at each moment, with the moment's number in place of {}.

What the daemon promised is told by others' files alone: a letter that has left the inbox is acknowledged, a job in
results.jsonl has ended. A moment's ledger is read before the moment, so that it holds nothing younger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

VICTIM = Path(__file__).with_name("victim.py")
LIMIT_S = 120.0


@dataclass(frozen=True)
class Letter:
    """A job file, or a cancel, and how the job may end."""

    name: str
    id: str
    outcomes: list[str]
    cancels: bool = False
    late: bool = False
    """Not before the job was acknowledged: it then finds it at work."""


@dataclass
class Ledger:
    """What has been promised: letters (names) acknowledged, jobs (id: digest of the manifest) ended."""

    taken: list[str] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)


@dataclass
class Drill:
    """`root` outlives power cuts and holds the inbox; config.yaml there says that spool and outputs are in disk/."""

    root: Path
    plan: list[Letter]
    before: Ledger = field(default_factory=Ledger)
    """what was promised in an earlier life"""
    log: str = "victim.log"

    def __post_init__(self) -> None:
        self.waiting = [letter for letter in self.plan if letter.name not in self.before.taken]
        self.sent: list[Letter] = []
        self.known = dict(self.before.ended)

    @property
    def inbox(self) -> Path:
        return self.root / "mail" / "inbox"

    def send(self, count: int) -> None:
        """Drop the next letters whose time has come."""
        here = set(os.listdir(self.inbox))  # noqa: PTH208
        taken = {*self.before.taken, *(letter.name for letter in self.sent if letter.name not in here)}
        for letter in [letter for letter in self.waiting if not letter.late or f"{letter.id}.json" in taken][:count]:
            temporary = self.inbox / f".{letter.name}"
            temporary.write_bytes((self.root / "letters" / letter.name).read_bytes())
            temporary.rename(self.inbox / letter.name)
            self.waiting.remove(letter)
            self.sent.append(letter)

    def ledger(self) -> Ledger:
        here = set(os.listdir(self.inbox))  # noqa: PTH208
        taken = [letter.name for letter in self.sent if letter.name not in here]
        for manifest in self._announced():
            if manifest not in self.known:
                raw = (self.root / "disk" / "outputs" / manifest).read_bytes()
                self.known[manifest] = hashlib.sha256(raw).hexdigest()
        return Ledger(self.before.taken + taken, dict(self.known))

    def _announced(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            for line in (self.root / "disk" / "outputs" / "results.jsonl").read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    with contextlib.suppress(ValueError):  # one that an earlier death cut
                        yield json.loads(line)["manifest"]

    def live(
        self, moments: int, seed: int, strike: Callable[[int, Ledger], None], arguments: Sequence[str] = ()
    ) -> None:
        """Work from the daemon's start until `moments` have come and gone, and to the end of all work after them."""
        dice = random.Random(seed)
        with self.serving(arguments) as daemon:
            for moment in range(moments):
                self.send(1 + len(self.waiting) // (moments - moment))
                if moment == moments // 10:  # those before strike the start
                    self.wait(lambda: self._works(daemon.pid), daemon)
                if moment >= moments // 10:
                    self._let_work(dice.randint(0, 5), daemon)
                time.sleep(dice.choice((0.0, dice.uniform(0.0, 0.03))))  # not to wait for anything: to strike anywhere
                strike(moment, self.ledger())
            self.finish(daemon)
        strike(moments, self.ledger())

    def finish(self, daemon: subprocess.Popen[bytes]) -> None:
        """Wait for all work to be done; then a clean stop."""

        def done() -> bool:
            self.send(len(self.waiting))
            return not self.waiting and self._idle()

        self.wait(done, daemon)
        daemon.terminate()
        assert daemon.wait(LIMIT_S) == 0

    def _let_work(self, steps: int, daemon: subprocess.Popen[bytes]) -> None:
        """Until so many more letters and jobs have been dealt with: the same on a quick machine and on a busy one."""
        goal = self._dealt_with() + steps
        self.wait(lambda: self._dealt_with() >= goal or self._idle(), daemon)

    def _dealt_with(self) -> int:
        ledger = self.ledger()
        return len(ledger.taken) + len(ledger.ended)

    def _idle(self) -> bool:
        ledger = self.ledger()
        jobs = {letter.id for letter in self.plan if letter.name in ledger.taken}
        return len(ledger.taken) == len(self.plan) - len(self.waiting) and len(jobs) <= len(ledger.ended)

    def wait(self, condition: Callable[[], bool], daemon: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert daemon.poll() is None, (self.root / self.log).read_text()[-2000:]
            assert time.monotonic() < end, (self.root / self.log).read_text()[-2000:]
            time.sleep(0.01)

    def _works(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError, ValueError):  # no hint, or one that a power cut emptied
            status = json.loads((self.root / "disk" / "spool" / "status.json").read_bytes())
            return bool(status["pid"] == pid and status["state"] != "starting")
        return False

    @contextlib.contextmanager
    def serving(self, arguments: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, str(VICTIM), *arguments, "serve", "--config", str(self.root / "config.yaml")]
        with (self.root / self.log).open("ab") as log:
            daemon = subprocess.Popen(command, cwd=self.root, stderr=log, start_new_session=True)
        try:
            yield daemon
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def load_plan(root: Path) -> list[Letter]:
    return [Letter(**letter) for letter in json.loads((root / "plan.json").read_text())]


def save_plan(root: Path, plan: list[Letter]) -> None:
    (root / "plan.json").write_text(json.dumps([asdict(letter) for letter in plan]))


if __name__ == "__main__":
    folder, moments, seed, command, *rest = sys.argv[1:]

    def strike(moment: int, ledger: Ledger) -> None:
        print(json.dumps(asdict(ledger)), flush=True)  # noqa: T201
        subprocess.run(command.replace("{}", str(moment)), shell=True, check=True, stdout=sys.stderr)

    Drill(Path(folder), load_plan(Path(folder))).live(int(moments), int(seed), strike, rest)
