"""The soak: a real daemon and a painter that takes no time, under everything that happens in a year of service.

python tests/soak.py --jobs 100000 --seed 1: four clients send jobs, repeats and cancels; daemon and workers are killed,
stopped and replaced, logs are rotated, keys are added, expired, revoked and broken. For the second half one daemon is
left alone with the jobs and watched for leaks. At the end the books are audited: nothing lost, nothing double.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nullworker.generate import picture
from soak_client import Client

from imagend.feed import Place, lines
from imagend.signing import Key

TESTS = Path(__file__).parent
CLIENTS = ("ann", "bob", "cyd", "dan")
PATIENCE_S = 120.0
MANY = 1_000_000_000
CONFIG = f"""
models: {TESTS.parent / "models"}
workers: {{cpu0: cpu, cpu1: cpu}}
max_attempts: 10
max_jobs_per_worker: 200
reserve_mb: 0
max_queued: {MANY}
limits: {{max_queued: {MANY}, jobs_per_minute: {MANY}}}
scan_interval_s: 0.1
heartbeat_s: 0.5
"""


class Lost(AssertionError):
    """The soak found something."""


def check(condition: object, *what: object) -> None:
    if not condition:
        raise Lost(*what)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        check(time.monotonic() < end, f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.01)
    return found


@dataclass
class Service:
    """The daemon's process, which may only end when we end it."""

    root: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.root / "log"

    def start(self) -> None:
        command = [sys.executable, str(TESTS / "lab" / "null_daemon.py"), "serve"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.root, stderr=log)
        wait_for(lambda: self.status().get("pid") == self.pid, "the daemon's first status")

    @property
    def pid(self) -> int:
        assert self.process
        check(self.process.poll() is None, "the daemon ended by itself", self.process.returncode, self.last_words())
        return self.process.pid

    def end(self, number: int) -> int:
        pid, process = self.pid, self.process
        os.kill(pid, number)
        assert process
        return process.wait(PATIENCE_S)

    def last_words(self) -> str:
        return self.log.read_text()[-3000:]

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.root / "spool" / "status.json").read_text())
        return {}

    def workers(self) -> list[int]:
        pids: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                pids += map(int, (task / "children").read_text().split())
        return pids

    def sample(self) -> tuple[float, int]:
        """Resident MiB and open descriptors."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


class Keys:
    """allowed_signers, and what each client signs with."""

    def __init__(self, root: Path) -> None:
        self.file = root / "keys" / "allowed_signers"
        self.file.parent.mkdir()
        self.clients = {name: Client(root, name) for name in CLIENTS}
        self.lines: dict[tuple[str, int], str] = {}
        self.canaries: list[dict[str, Any]] = []
        self.refused = 0
        for client in self.clients.values():
            client.folder.mkdir(parents=True)
            client.inbox.mkdir(parents=True)
            self.add(client, 0)
            self.switch(client, 0)
        self.write()

    def add(self, client: Client, generation: int) -> None:
        key = Key.generate()
        (client.folder / f"key.{generation}").write_bytes(key.private_bytes(client.name))
        self.lines[client.name, generation] = key.public_line(client.name)

    def switch(self, client: Client, generation: int) -> None:
        temporary = client.folder / ".generation"
        temporary.write_text(str(generation))
        temporary.rename(client.folder / "generation")

    def write(self, text: str | None = None) -> None:
        lines = [f"{name} {line}\n" for (name, _), line in self.lines.items()]
        temporary = self.file.with_name(".allowed_signers")
        temporary.write_text("".join(lines) if text is None else text)
        temporary.rename(self.file)

    def rotate(self, client: Client, revoke: bool) -> None:
        """A new key beside the old one; the client changes over; then the old one is revoked, or has expired."""
        old, new = client.generation(), client.generation() + 1
        self.add(client, new)
        self.write()
        wait_for(lambda: self.canary(client, new), f"{client.name}'s new key to be taken")
        self.switch(client, new)
        if (client.folder / "ledger.json").exists():  # it has sent all it wanted to
            return
        signs_with = client.folder / "signs-with"
        wait_for(lambda: signs_with.read_text() == str(new) or (client.folder / "ledger.json").exists(), "new key")
        wait_for(lambda: not list(client.inbox.glob(f"{old}-*")), "what was signed with the old key to be taken")
        if revoke:
            del self.lines[client.name, old]
        else:
            self.lines[client.name, old] = f'valid-before="20200101Z" {self.lines[client.name, old]}'
        self.write()
        wait_for(lambda: not self.canary(client, old), f"{client.name}'s old key to be refused")

    def canary(self, client: Client, generation: int) -> bool:
        """Whether a job signed with that key is accepted. It is painted, too."""
        number = len(self.canaries) + self.refused
        fields = {"num_inference_steps": 1, "seed": number, "nonce": f"canary {number}", "priority": 9}
        body = client.body(kind="generate", prompt="canary", **fields)
        file = f"{generation}-canary-{number}.json"
        ref = client.drop(file, body, client.key(generation))
        wait_for(lambda: not (client.inbox / file).exists(), "a canary to be taken or refused")
        reason = client.rejected / f"{file}.reason.json"
        if reason.exists():
            check(json.loads(reason.read_text())["error"]["code"] == "UNAUTHORIZED", reason.read_text())
            self.refused += 1
            return False
        self.canaries.append({"client": client.name, "id": ref, "seed": number})
        return True


@dataclass
class Soak:
    root: Path
    jobs: int
    seed: int
    troubles: int
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        (self.root / "config.yaml").write_text(CONFIG)
        self.keys = Keys(self.root)
        self.service = Service(self.root)
        self.rng = random.Random(self.seed)
        self.feed = self.root / "outputs" / "results.jsonl"
        self._read_to: Place | None = None
        self._lines = 0

    # What happens

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        with self.clients() as clients:
            self.service.start()
            self.storm()
            self.service.end(signal.SIGKILL)
            self.service.start()
            samples = self.calm(clients)
        took = time.monotonic() - began
        check(self.service.end(signal.SIGTERM) == 0, "a clean stop")
        quarter = max(1, len(samples) // 4)
        first, last = samples[quarter : 2 * quarter], samples[-quarter:]  # in its first quarter its caches fill
        return {
            **self.audit(),
            "jobs_per_s": round(self.jobs / took, 1),
            "troubles": dict(self.done),
            "keys_refused": self.keys.refused,
            "rss_mib": [round(statistics.median(rss for rss, _ in part), 1) for part in (first, last)],
            "descriptors": [round(statistics.median(fds for _, fds in part)) for part in (first, last)],
            "samples": len(samples),
        }

    @contextlib.contextmanager
    def clients(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        share = self.jobs // len(CLIENTS)
        clients = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "soak_client.py"), str(self.root), name, str(share), str(self.seed)]
            )
            for name in CLIENTS
        ]
        try:
            yield clients
        finally:
            for client in clients:
                client.kill()
                client.wait()
            if (daemon := self.service.process) and sys.exc_info()[0]:
                daemon.kill()
                daemon.wait()

    def storm(self) -> None:
        """Every kind of trouble in turn, in random order, spread over the first half of the jobs."""
        kinds = [self.kill_daemon, self.kill_worker, self.stop_daemon, self.rotate_log]
        kinds += [self.expire_key, self.revoke_key, self.break_keys]
        for number in range(self.troubles):
            if number % len(kinds) == 0:
                self.rng.shuffle(kinds)
            wait_for(lambda n=number: self.ended() >= n * self.jobs // 2 // self.troubles, "jobs to end")  # type: ignore[misc]
            trouble = kinds[number % len(kinds)]
            trouble()
            self.done[trouble.__name__] += 1

    def calm(self, clients: list[subprocess.Popen[bytes]]) -> list[tuple[float, int]]:
        """One daemon's life, undisturbed: its memory and descriptors while jobs flow, until all have ended."""
        samples, seen, seen_at = [self.service.sample()], 0, time.monotonic()
        while any(client.poll() is None for client in clients) or not self.drained():
            samples.append(self.service.sample())
            if self.ended() > seen:
                seen, seen_at = self.ended(), time.monotonic()
            check(time.monotonic() - seen_at < PATIENCE_S, "nothing ends any more", self.service.last_words())
            time.sleep(0.05)
        check(all(client.returncode == 0 for client in clients), "a client failed")
        return samples

    def drained(self) -> bool:
        spool = self.root / "spool"
        folders = [*spool.glob("inbox/*"), *spool.glob("pending/*"), *spool.glob("active/*")]
        return not any(True for folder in folders for _ in folder.iterdir())

    def ended(self) -> int:
        """How many jobs have been announced so far."""
        for _, place in lines(self.feed, self._read_to):
            self._read_to = place
            self._lines += 1
        return self._lines

    # Troubles

    def kill_daemon(self) -> None:
        self.service.end(signal.SIGKILL)
        self.service.start()

    def stop_daemon(self) -> None:
        check(self.service.end(signal.SIGTERM) == 0, "a clean stop", self.service.last_words())
        self.service.start()

    def kill_worker(self) -> None:
        if pids := self.service.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(pids), signal.SIGKILL)

    def rotate_log(self) -> None:
        """As logrotate's copytruncate: the daemon writes to the stderr it was given."""
        shutil.copy(self.service.log, self.root / f"log.{self.done['rotate_log']}")
        os.truncate(self.service.log, 0)
        wait_for(self.service.log.read_bytes, "the daemon to go on logging")
        check(b"\0" not in self.service.log.read_bytes(), "the log has a hole")

    def expire_key(self) -> None:
        self._rotate(revoke=False)

    def revoke_key(self) -> None:
        self._rotate(revoke=True)

    def _rotate(self, revoke: bool) -> None:
        pid = self.service.pid
        self.keys.rotate(self.keys.clients[self.rng.choice(CLIENTS)], revoke)
        check(self.service.pid == pid, "keys need no restart")

    def break_keys(self) -> None:
        """The last good table stays in force, and status says so."""
        pid, client = self.service.pid, self.keys.clients[self.rng.choice(CLIENTS)]
        self.keys.write("ann this is no key\n")
        wait_for(self._says_broken, "status to be degraded")
        check(self.service.status()["state"] == "degraded")
        check(self.keys.canary(client, client.generation()), "the old table is in force no more")
        self.keys.write()
        wait_for(lambda: not self._says_broken(), "status to be well again")
        check(self.service.pid == pid, "keys need no restart")

    def _says_broken(self) -> bool:
        return any("allowed_signers" in reason for reason in self.service.status().get("reasons", ()))

    # The books

    def audit(self) -> dict[str, Any]:
        """Raises Lost unless each job that was sent has ended exactly once, as it should."""
        sent = {(entry["client"], entry["id"]): entry for entry in self.keys.canaries}
        for name, client in self.keys.clients.items():
            ledger = json.loads((client.folder / "ledger.json").read_text())
            sent |= {(name, entry["id"]): entry for entry in ledger}
        spool, outputs = self.root / "spool", self.root / "outputs"
        done = {(path.parent.name, path.stem) for path in spool.glob("done/*/*.json")}
        published = {(path.parent.parent.name, path.parent.name) for path in outputs.glob("*/*/manifest.json")}
        announced: Counter[tuple[str, str]] = Counter()
        for line, _ in lines(self.feed, None):
            entry = json.loads(line)
            announced[entry["client"], entry["id"]] += 1
        for place, found in (("done", done), ("published", published), ("announced", set(announced))):
            check(found == sent.keys(), f"{place}: lost", sent.keys() - found, "too many", found - sent.keys())
        check(set(announced.values()) == {1}, "announced twice", announced.most_common(3))
        check(not any(outputs.glob(".drafts/*/*")), "drafts are left")
        outcomes = Counter(self.judge(outputs / name / ref, sent[name, ref]) for name, ref in sent)
        codes = Counter(json.loads(p.read_text())["error"]["code"] for p in spool.glob("rejected/*/*.reason.json"))
        check(codes["UNAUTHORIZED"] == self.keys.refused, "jobs with good keys were refused", codes)
        check(codes.keys() <= {"UNAUTHORIZED", "JOB_NOT_FOUND"}, codes)  # a cancel may be listed before its job
        return {"jobs": len(sent), "outcomes": dict(outcomes), "cancels_too_early": codes["JOB_NOT_FOUND"]}

    def judge(self, folder: Path, told: dict[str, Any]) -> str:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.name for path in folder.iterdir()}
        if manifest["outcome"] == "succeeded":
            check(files == {"0000.png", "manifest.json"}, folder, files)
            check((folder / "0000.png").read_bytes() == picture(told["seed"]), "not the picture asked for", folder)
        else:
            check(manifest["outcome"] == "cancelled" and told.get("cancelled"), manifest)
            check(files == {"manifest.json"}, folder, files)
        return str(manifest["outcome"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--troubles", type=int, default=280, help="kills, stops, rotations")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagend-soak-") as root:
        soak = Soak(Path(root), arguments.jobs, arguments.seed, arguments.troubles)
        sys.stdout.write(json.dumps(soak.run(), indent=1) + "\n")


if __name__ == "__main__":
    main()
