"""A home for imagend in a temporary folder: config, keys, a client who signs, and a daemon stepped by hand."""

from __future__ import annotations

import gc
import json
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeExecutor

from imagend import config as configuration
from imagend.config import Config
from imagend.daemon.executor import Executor, Mailbox
from imagend.daemon.intake import Door, Policy
from imagend.daemon.librarian import Librarian
from imagend.daemon.loop import Daemon
from imagend.daemon.retention import Retention
from imagend.job import Ref
from imagend.models import Models
from imagend.outputs import Outputs
from imagend.signers import NAMESPACE, AllowedSigners
from imagend.signing import Key, job_id, seal
from imagend.spool import Spool, State
from imagend.survey import Survey

os.environ["OMP_NUM_THREADS"] = "1"  # for every worker: bits depend on it, and a tiny model is faster so
pytest.register_assert_rewrite("scene")  # its checks say what they found
REPOSITORY = Path(__file__).parents[1]
CLIENT = "alice"
UNLIMITED = "max_queued: 1000000\nlimits: {max_queued: 1000000, jobs_per_minute: 10000000}\n"


@dataclass
class Home:
    root: Path
    config: Config
    key: Key
    client: str = CLIENT

    def neighbour(self, name: str) -> Home:
        """Another client of the same place, with a key of its own."""
        key = Key.generate()
        with self.config.allowed_signers.open("a") as signers:
            signers.write(f'{name} namespaces="{NAMESPACE}" {key.public_line(name)}\n')
        return replace(self, key=key, client=name)

    def fields(self, **fields: Any) -> dict[str, Any]:
        """A valid generate job, changed by `fields`; a value of ... leaves a field out."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        base = {"schema": "imagend.job/v1", "kind": "generate", "issued_at": now, "prompt": "a red circle"}
        return {name: value for name, value in (base | fields).items() if value is not ...}

    def body(self, **fields: Any) -> bytes:
        return json.dumps(self.fields(**fields)).encode()

    def sealed(self, **fields: Any) -> bytes:
        return self.seal(self.body(**fields))

    def seal(self, body: bytes) -> bytes:
        return seal(body, self.key.sign(body))

    def drop(self, name: str | None = None, **fields: Any) -> Ref:
        """Put a job into the inbox; its reference."""
        return self.drop_body(self.body(**fields), name)

    def drop_body(self, body: bytes, name: str | None = None) -> Ref:
        ref = Ref(self.client, job_id(self.client, body))
        self.put(self.seal(body), name or f"{ref.id}.json")
        return ref

    def put(self, raw: bytes, name: str) -> Path:
        """Put bytes into the inbox as a careful client does: another name first, then a rename."""
        path = self.config.inboxes[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(raw)
        return temporary.rename(path)

    def reason(self, name: str) -> dict[str, Any]:
        """The error in rejected/NAME.reason.json."""
        path = self.config.inboxes[0].parent / "rejected" / f"{name}.reason.json"
        return json.loads(path.read_text())["error"]

    def manifest(self, ref: Ref) -> dict[str, Any]:
        return json.loads((self.config.outputs / ref.client / ref.id / "manifest.json").read_text())

    def outcome(self, ref: Ref) -> str:
        return str(self.manifest(ref)["outcome"])

    def feed(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl."""
        return [json.loads(line) for line in (self.config.outputs / "results.jsonl").read_text().splitlines()]

    def where(self, ref: Ref) -> State | None:
        return Spool(self.config.spool).where(ref)

    def daemon(self, executor: Callable[[Mailbox], Executor] = FakeExecutor, **settings: Any) -> Daemon:
        """A daemon that owns this home's spool; step() moves it."""
        config = self.config.model_copy(update={"heartbeat_s": 0.02} | settings)
        mailbox: Mailbox = queue.SimpleQueue()
        spool, outputs = Spool(config.spool), Outputs(config.outputs)
        spool.open()
        outputs.open()
        survey = Survey(Models(config.models, config.extra_model_paths), settle_s=0.0)
        librarian = Librarian(survey, config.reference, config.spool, lambda: None, time.monotonic)
        *_, librarian.catalog = survey.look()  # without its thread, which would write to the spool beside the loop
        librarian.ready = True
        daemon = Daemon(
            config=config,
            reload=lambda: configuration.load(self.root / "config.yaml"),
            spool=spool,
            outputs=outputs,
            librarian=librarian,
            executor=executor(mailbox),
            doors=[
                Door(inbox, Policy(config, AllowedSigners.parse("", "")), spool.attachments) for inbox in config.inboxes
            ],
            mailbox=mailbox,
        )
        retention = Retention(spool, outputs, daemon.ending.is_tidied, lambda: daemon.settings.config)
        daemon.health.retain(retention)  # without its thread, too
        daemon.settings.read_keys()
        daemon.tell_doors()
        daemon.recover()
        return daemon


def step(daemon: Daemon) -> bool:
    """One turn of doors and loop; whether anything is left to do."""
    arrived = 0
    for door in daemon.doors:
        arrivals = door.look(time.monotonic())
        arrived += len(arrivals)
        for arrival, verdict in zip(arrivals, daemon.reception.take_in(arrivals), strict=True):
            door.settle(arrival, verdict)
    daemon.look_around()
    daemon.wait()
    return bool(arrived or any(door.more for door in daemon.doors) or len(daemon.turn) or daemon.busy)


def run_until(daemon: Daemon, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not reached within {limit_s} s; {daemon.health.reasons}"
        step(daemon)


def run_until_idle(daemon: Daemon, limit_s: float = 60.0) -> None:
    run_until(daemon, lambda: not step(daemon), limit_s)


@pytest.fixture(autouse=True)
def few_descriptors() -> Iterator[None]:
    """Daemons that a test left hold their locks until they are collected, which beside a torch in memory is seldom."""
    yield
    if len(os.listdir("/proc/self/fd")) > 200:  # noqa: PTH208
        gc.collect()


@pytest.fixture(scope="session")
def key() -> Key:
    return Key.generate()


@pytest.fixture
def home(tmp_path: Path, key: Key) -> Home:
    return make_home(tmp_path, key)


def make_home(root: Path, key: Key) -> Home:
    (root / "keys").mkdir(parents=True)
    (root / "config.yaml").write_text(f"models: {REPOSITORY / 'models'}\nclient: {{name: {CLIENT}}}\n{UNLIMITED}")
    private = root / "keys" / "id_ed25519"
    private.write_bytes(key.private_bytes(CLIENT))
    private.chmod(0o600)
    (root / "keys" / "allowed_signers").write_text(f'{CLIENT} namespaces="{NAMESPACE}" {key.public_line(CLIENT)}\n')
    config = configuration.load(root / "config.yaml")
    for inbox in config.inboxes:
        inbox.mkdir(parents=True)
    return Home(root, config, key)
