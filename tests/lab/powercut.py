"""What a power cut may not take: letters for a drill, and the judgement of a disk that was cut off from its daemon.

The judge mounts nothing and knows no file system. He is shown a disk/ and the ledger that was written before the cut,
looks at what is there, lets a real daemon recover and work until nothing is left to do, and looks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from conftest import CLIENT, Home, make_home, run_until_idle
from fakes import FakeExecutor
from lab.drill import Ledger, Letter, load_plan, save_plan

from imagend import config as configuration
from imagend.daemon.executor import Mailbox
from imagend.daemon.loop import Daemon
from imagend.errors import Rejected
from imagend.job import Ref
from imagend.messages import Run
from imagend.signing import Key, job_id, split
from imagend.spool import Spool, State

_ENDLESS = {"prompt": "take time", "num_inference_steps": 30}
_SETTINGS = """\
spool: disk/spool
outputs: disk/outputs
inboxes: [mail/inbox]
workers: {cpu0: cpu, cpu1: cpu}
max_attempts: 10
reserve_mb: 0
"""


def make_root(root: Path, key: Key) -> Home:
    """A home whose spool and outputs lie in disk/, where a test mounts something, and whose inbox does not."""
    home = make_home(root, key)
    with (root / "config.yaml").open("a") as file:
        file.write(_SETTINGS)
    config = configuration.load(root / "config.yaml")
    for folder in (*config.inboxes, root / "disk", root / "letters"):
        folder.mkdir(parents=True)
    return replace(home, config=config)


def write_letters(home: Home, jobs: int) -> list[Letter]:
    """Every way a job can go, again and again; the files lie in letters/, the plan in plan.json."""
    kinds: list[tuple[list[str], dict[str, Any]]] = [
        (["succeeded"], {"prompt": "one picture"}),
        (["succeeded"], {"prompt": "three pictures", "count": 3}),
        (["cancelled", "succeeded"], _ENDLESS),
        (["failed"], {"prompt": "refuse"}),
        (["succeeded"], {"prompt": "in haste", "priority": 8}),
        (["cancelled", "succeeded"], {"prompt": "hardly ever painted", "priority": 0}),
    ]
    plan = []
    for number in range(jobs):
        outcomes, fields = kinds[number % len(kinds)]
        body = home.body(nonce=str(number), **fields)
        id = job_id(CLIENT, body)
        plan.append(Letter(f"{id}.json", id, outcomes))
        (home.root / "letters" / plan[-1].name).write_bytes(home.seal(body))
        if "cancelled" in outcomes:
            plan.append(Letter(f"{id}.cancel.json", id, outcomes, cancels=True, late=True))
            (home.root / "letters" / plan[-1].name).write_bytes(home.sealed(kind="cancel", job=id, prompt=...))
    save_plan(home.root, plan)
    return plan


def write_jobs(home: Home) -> list[Letter]:
    """A few jobs that are painted as they are; the third takes a while."""
    plan = []
    for number in range(8):
        fields = {"prompt": "take time", "num_inference_steps": 150} if number == 2 else {"prompt": "a picture"}
        body = home.body(nonce=str(number), count=3, **fields)
        plan.append(Letter(f"{job_id(CLIENT, body)}.json", job_id(CLIENT, body), ["succeeded"]))
        (home.root / "letters" / plan[-1].name).write_bytes(home.seal(body))
    save_plan(home.root, plan)
    return plan


class Painter(FakeExecutor):
    """Paints as tests/kinds does, at once, and knows what it has painted."""

    def attempt(self, worker: str, run: Run) -> None:
        spec = run.spec | ({"prompt": "fail"} if run.spec["prompt"] == "refuse" else {})
        super().attempt(worker, run.model_copy(update={"spec": spec}))


@dataclass
class Judge:
    """`home` is a home of the judge's own, with the letters of the drill; each disk is shown to it in home's disk/."""

    home: Home
    plan: list[Letter]
    seen: Counter[str] = field(default_factory=Counter)
    """In which states acknowledged jobs were found: what came before the judge."""

    @classmethod
    def of(cls, drilled: Path, root: Path, key: Key) -> Judge:
        """A judge of the drill whose root is `drilled`, at home in `root`."""
        home = make_root(root, key)
        shutil.copytree(drilled / "letters", root / "letters", dirs_exist_ok=True)
        return cls(home, load_plan(drilled))

    def judge(self, ledger: Ledger) -> list[str]:
        """What was promised and is not kept, in words; nothing is the best."""
        wrong = list(self.at_rest(ledger))
        cancelled = self.still_to_cancel(ledger)
        self.fill_inbox(ledger)
        painters: list[Painter] = []

        def painter(mailbox: Mailbox) -> Painter:
            painters.append(Painter(mailbox))
            return painters[-1]

        with self.daemon(painter) as daemon:
            run_until_idle(daemon)
        wrong += self.in_the_end(cancelled)
        painted = {f"{run.job.client}/{run.job.id}/manifest.json" for run in painters[0].runs}
        wrong += [f"painted again: {name}" for name in painted & ledger.ended.keys()]
        return wrong

    @contextlib.contextmanager
    def daemon(self, executor: Callable[[Mailbox], Painter]) -> Iterator[Daemon]:
        """One whose own life nobody cuts: its syncs would only cost time. What it has to say is in its files."""
        with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs():
            patch.setattr(os, "fsync", lambda fd: None)
            daemon = self.home.daemon(executor)
            try:
                yield daemon
            finally:
                daemon.spool.close()

    def fill_inbox(self, ledger: Ledger) -> None:
        """The senders of what was not acknowledged still have it in the inbox."""
        (inbox,) = self.home.config.inboxes
        for path in inbox.iterdir():
            path.unlink()
        for letter in self.plan:
            if letter.name not in ledger.taken:
                shutil.copy(self.home.root / "letters" / letter.name, inbox)

    def still_to_cancel(self, ledger: Ledger) -> set[str]:
        """Jobs that a wish which was acknowledged must stop: they have not ended."""
        wished = {letter.id for letter in self.plan if letter.cancels and letter.name in ledger.taken}
        return {id for id in wished if not (self.home.config.outputs / CLIENT / id / "manifest.json").exists()}

    # What is there before anything is put right

    def at_rest(self, ledger: Ledger) -> Iterator[str]:
        yield from self.halves()
        spool = Spool(self.home.config.spool)
        for letter in self.plan:
            if letter.name in ledger.taken and not letter.cancels:
                ref = Ref(CLIENT, letter.id)
                state = spool.where(ref)
                self.seen[str(state)] += 1
                if state is None:
                    yield f"lost: {letter.id} was acknowledged"
                elif job_id(CLIENT, split_or_nothing(spool.read(ref))) != letter.id:
                    yield f"torn: {letter.id} was acknowledged"
        for name, digest in ledger.ended.items():
            path = self.home.config.outputs / name
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                yield f"lost: {name} was published"

    def halves(self) -> Iterator[str]:
        """Published results of which something is missing."""
        for folder in (self.home.config.outputs / CLIENT).glob("[!.]*/"):
            try:
                manifest = json.loads((folder / "manifest.json").read_bytes())
                told = {artifact["file"]: artifact["sha256"] for artifact in manifest["artifacts"]}
                found = {path.name for path in folder.iterdir()} - {"manifest.json"}
                whole = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == told[name] for name in told)
            except (OSError, ValueError) as error:
                yield f"torn: {folder.name}: {error}"
                continue
            if found != told.keys() or not whole:
                yield f"torn: {folder.name}: {sorted(found)} are not as the manifest tells"

    # What is there when nothing is left to do

    def in_the_end(self, cancelled: set[str]) -> Iterator[str]:
        yield from self.halves()
        home, jobs = self.home, {letter.id: letter.outcomes for letter in self.plan}
        for state, expected in ((State.PENDING, set()), (State.ACTIVE, set()), (State.DONE, jobs.keys())):
            found = {path.name for path in (home.config.spool / state / CLIENT).glob("*")}
            if found != {f"{id}.json" for id in expected}:
                yield f"{state}/: {sorted(found)}"
        if (published := {path.name for path in (home.config.outputs / CLIENT).glob("*")}) != jobs.keys():
            yield f"outputs/: {sorted(published ^ jobs.keys())} are missing or too many"
        for id in published & jobs.keys():
            outcome = home.outcome(Ref(CLIENT, id))
            if outcome not in ({"cancelled"} if id in cancelled else jobs[id]):
                yield f"{id} has {outcome}{', its cancel was acknowledged' * (id in cancelled)}"
        lines = Counter(line_id(line) for line in (home.config.outputs / "results.jsonl").read_bytes().splitlines())
        del lines[""]
        if lines != Counter(jobs.keys()):
            yield f"results.jsonl: {lines - Counter(jobs.keys())} too many, {Counter(jobs.keys()) - lines} missing"
        if drafts := list((home.config.outputs / ".drafts").glob("*/*")):
            yield f"drafts: {[draft.name for draft in drafts]}"


def split_or_nothing(raw: bytes) -> bytes:
    """A job's signed bytes; nothing where a job's file is torn."""
    try:
        return split(raw)[0]
    except Rejected:
        return b""


def line_id(line: bytes) -> str:
    """Whose end a line of the feed tells; a crash may leave a piece of one."""
    try:
        return str(json.loads(line)["id"])
    except ValueError:
        return ""
