"""Jobs of kind fetch through the real daemon: processes of their own, servers that misbehave, deaths, and who may."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home, run_until, run_until_idle
from disk import Op, Recorder, watched
from fetch_server import Handler, Server, running, serve
from scene import in_child
from test_cli import imagend
from test_fetch import DATA, DOWNLOAD, HOSTS, SHA256, civitai
from weightfiles import VAE, weights

from imagend import config as configuration
from imagend import records
from imagend.architecture import ModelKind
from imagend.cli.check import examine
from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import Fetching, LocalExecutor
from imagend.daemon.loop import Daemon
from imagend.job import Ref

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
HERE = Path(__file__).parent
PLAIN = "https://models.example.org/ink.safetensors"
FETCH: dict[str, Any] = {"kind": "fetch", "prompt": ..., "source": PLAIN, "sha256": SHA256}


@dataclass
class Farm:
    """A home whose client may fetch, models of its own, and the server that stands for every host."""

    home: Home
    server: Server
    pem: Path
    at_once: int = 1

    def executor(self, mailbox: Mailbox) -> LocalExecutor:
        command = (sys.executable, str(HERE / "fetching"), "--port", str(self.server.server_address[1]))
        fetching = Fetching(self.at_once, self.home.config.for_fetching, (*command, "--pem", str(self.pem)))
        painter = (sys.executable, str(HERE / "kinds"))
        return LocalExecutor({"cpu0": "cpu"}, self.home.config.models, mailbox, command=painter, fetching=fetching)

    def daemon(self, **settings: Any) -> Daemon:
        return self.home.daemon(self.executor, **settings)

    def fetch(self, fields: dict[str, Any] | None = None) -> Ref:
        """Drop such a job."""
        return self.home.drop_body(self.home.body(**FETCH | (fields or {})))

    def run(self, daemon: Daemon, *refs: Ref) -> None:
        """Until these have ended; the librarian, whose thread tests do without, looks when it is asked."""

        def ended() -> bool:
            if daemon.aftermath.unlisted:
                daemon.librarian.look()
            return all(self.home.where(ref) == "done" for ref in refs)

        run_until(daemon, ended)

    def stop(self, daemon: Daemon) -> None:
        daemon.mailbox.put(StopRequested())
        daemon.run()
        daemon.spool.close()

    @property
    def models(self) -> Path:
        return self.home.config.models

    def parts(self) -> list[Path]:
        """What has come and is not installed."""
        return sorted(self.models.glob(".fetch/*/tree/**/*.safetensors"))

    def left(self) -> list[str]:
        """All that lies in models/ beside the base."""
        found = (path.relative_to(self.models).as_posix() for path in self.models.rglob("*") if path.is_file())
        return sorted(name for name in found if not name.startswith("diffusers/") and not name.endswith(".lock"))

    def ranges(self) -> list[str | None]:
        """Where those who asked for the file wanted to begin."""
        path = PLAIN.removeprefix("https://models.example.org")
        return [headers.get("Range") for _, asked, headers in self.server.asked if asked == path]


@pytest.fixture
def farm(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Farm]:
    """capfd: the processes need a real stderr to inherit."""
    models = tmp_path / "models"
    shutil.copytree(REPOSITORY / "models" / "diffusers" / "shapes-xl", models / "diffusers" / "shapes-xl")
    path = home.root / "config.yaml"
    text = path.read_text().replace(f"models: {REPOSITORY / 'models'}", "models: models")
    hosts = json.dumps(list(HOSTS))
    path.write_text(f"{text}reserve_mb: 0\nclients: {{{home.client}: {{fetch: true}}}}\nfetch: {{hosts: {hosts}}}\n")
    with running(tmp_path) as (server, _):
        yield Farm(replace(home, config=configuration.load(path)), server, tmp_path / "server.pem")


def hang(after: int) -> Callable[[Handler], None]:
    """Serves so many bytes of the file, and nothing more until the test ends; with Range, all of it."""

    def behave(handler: Handler) -> None:
        if "Range" in handler.headers:
            return serve(handler, DATA, '"1"')
        handler.answer(DATA[:after], length=len(DATA), ETag='"1"')
        handler.wfile.flush()
        handler.server.release.wait()
        return None

    return behave


def fetched(daemon: Daemon) -> int:
    """How many bytes have come, as the loop knows."""
    running = daemon.slots["fetch0"].running
    return (running.progress.bytes_done or 0) if running and running.progress else 0


def status(farm: Farm) -> dict[str, Any]:
    path = farm.home.config.spool / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"queue": {"head": []}}
    return found


# What it is


def test_a_job_fetches_a_lora_and_the_manifest_is_its_record(farm: Farm) -> None:
    civitai(farm.server)
    daemon = farm.daemon()
    assert daemon.slots["fetch0"].state == "resting"
    ref = farm.fetch({"source": "civitai:10@20", "sha256": ..., "name": "styles/ink", "notes": "to try"})
    farm.run(daemon, ref)
    manifest = farm.home.manifest(ref)
    assert (manifest["outcome"], manifest["kind"], manifest["attempts"], manifest["artifacts"]) == (
        "succeeded",
        "fetch",
        1,
        [],
    )
    assert manifest["installed"] == {
        "kind": "lora",
        "name": "styles/ink",
        "sha256": SHA256,
        "files": {"ink.safetensors": SHA256},
        "size": len(DATA),
        "source": "https://civitai.com/models/10?modelVersionId=20",
        "version": "Ink & pen v2.0",
        "base": "Pony",
        "license": "allowNoCredit: False; allowCommercialUse: ['Image']; allowDerivatives: True",
    }
    place = farm.models / "loras" / "styles" / "ink.safetensors"
    record = records.read(place)
    assert record is not None
    assert (place.read_bytes(), record.fetched_by, record.notes) == (DATA, farm.home.client, "to try")
    assert daemon.librarian.find("styles/ink", ModelKind.LORA).path == place  # when its end is told, others may name it
    assert sorted(path.name for path in (farm.home.config.outputs / ref.client / ref.id).iterdir()) == ["manifest.json"]
    assert '"stage": "fetching"' in (farm.home.config.spool / "events.jsonl").read_text()
    run_until(daemon, lambda: not daemon.slots["fetch0"].up)  # it knows the network no longer than it must
    assert (daemon.slots["fetch0"].state, daemon.slots["fetch0"].deaths, daemon.state()) == ("resting", 0, "ready")
    farm.stop(daemon)


def test_a_whole_repository_is_one_job(farm: Farm) -> None:
    from test_fetch import folder_of, hugging_face

    vae = folder_of(REPOSITORY / "models" / "diffusers" / "shapes-xl" / "vae")
    hugging_face(farm.server, vae)
    daemon = farm.daemon()
    source = "https://huggingface.co/org/repo"
    ref = farm.fetch({"source": source, "sha256": ..., "name": "fix", "type": "vae"})
    farm.run(daemon, ref)
    installed = farm.home.manifest(ref)["installed"]
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in vae.items() if name.endswith(".safetensors")}
    assert (installed["kind"], installed["name"], installed["files"]) == ("vae", "fix", digests)
    farm.stop(daemon)


def test_progress_is_told_wherever_a_jobs_is(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon(heartbeat_s=60.0)  # else it is dead for who looks
    ref = farm.fetch()
    run_until(daemon, lambda: fetched(daemon) == 3000)
    state = farm.home.config.outputs / ref.client / f"{ref.id}.state.json"
    run_until(daemon, lambda: state.exists() and json.loads(state.read_text()).get("bytes_done") == 3000)
    run_until(daemon, lambda: status(farm)["workers"]["fetch0"].get("bytes_done") == 3000)
    worker = status(farm)["workers"]["fetch0"]
    assert (worker["lane"], worker["device"], worker["stage"]) == ("fetch", "network", "fetching")
    assert worker["bytes_total"] == len(DATA)
    niceness = os.getpriority(os.PRIO_PROCESS, daemon.executor._children["fetch0"].process.pid)  # type: ignore[attr-defined]
    assert niceness == os.getpriority(os.PRIO_PROCESS, 0) + 10
    whole = f"{len(DATA) / 1e6:.1f}"
    assert f"fetching 0.0 of {whole} MB" in imagend("queue", cwd=farm.home.root).stdout
    assert f"fetching 0.0 of {whole} MB" in imagend("status", cwd=farm.home.root).stdout
    told = imagend("watch", ref.id, "--json", "--timeout", "0", cwd=farm.home.root)
    assert json.loads(told.stdout)["bytes_done"] == 3000
    farm.stop(daemon)


# Who may


def test_a_client_without_the_right_is_refused_with_what_to_write(farm: Farm) -> None:
    mallory = farm.home.neighbour("mallory")
    daemon = farm.daemon()
    daemon.settings.reread_keys()
    ref = mallory.drop(**FETCH)
    run_until_idle(daemon)
    assert mallory.reason(f"{ref.id}.json") == {
        "code": "FORBIDDEN",
        "message": "kind: fetch is not allowed for client mallory, who has not the right to fetch models. If you need "
        "it, ask the operator for it: in config.yaml, clients: {mallory: {fetch: true}}",
        "detail": [{"field": "kind", "value": "fetch"}],
        "status": 403,
    }
    text = (farm.home.root / "config.yaml").read_text()
    assert "{mallory: {fetch: true}}" not in text
    (farm.home.root / "config.yaml").write_text(text.replace("clients: {", "clients: {mallory: {fetch: true}, "))
    daemon.settings.reload()  # what it says to write is what helps
    daemon.tell_doors()
    farm.server.file(PLAIN, DATA)
    ref = mallory.drop(**FETCH | {"nonce": "again"})
    farm.run(daemon, ref)
    assert farm.home.outcome(ref) == "succeeded"
    farm.stop(daemon)


def test_a_host_that_is_not_allowed_is_refused_at_the_door(farm: Farm) -> None:
    daemon = farm.daemon()
    ref = farm.fetch({"source": "https://evil.example/x.safetensors?token=secret"})
    run_until_idle(daemon)
    assert farm.home.reason(f"{ref.id}.json") == {
        "code": "FORBIDDEN",
        "message": "source: evil.example is not among the hosts that may be fetched from. If you need it, ask the "
        "operator (fetch.hosts in config.yaml).",
        "detail": [{"field": "source", "value": "evil.example"}],
        "status": 403,
    }
    assert farm.server.asked == []
    farm.stop(daemon)


# What goes wrong


def test_a_wrong_digest_fails_the_job_and_leaves_nothing(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA[:-1] + b"x")
    daemon = farm.daemon()
    ref = farm.fetch()
    farm.run(daemon, ref)
    manifest = farm.home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"], manifest["error"]["code"]) == ("failed", 1, "DOWNLOAD_FAILED")
    assert "Nothing was fetched from models.example.org: " in manifest["error"]["message"]
    assert f"and should have {SHA256}" in manifest["error"]["message"]
    assert "installed" not in manifest
    assert farm.left() == []
    farm.stop(daemon)


def test_what_the_job_wants_and_cannot_have_is_said(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA)
    other = weights(VAE)
    farm.server.file("https://models.example.org/b/ink.safetensors", other)
    daemon = farm.daemon()
    first = farm.fetch({"type": "lora"})
    farm.run(daemon, first)
    again = {"source": "https://models.example.org/b/ink.safetensors", "sha256": hashlib.sha256(other).hexdigest()}
    taken = farm.fetch(again | {"type": "lora"})
    wrong = farm.fetch(again | {"type": "lora", "name": "other"})
    farm.run(daemon, taken, wrong)
    assert "There is a LoRA ink already" in farm.home.manifest(taken)["error"]["message"]
    assert "it is a VAE: it belongs in vae/" in farm.home.manifest(wrong)["error"]["message"]
    assert {farm.home.manifest(ref)["error"]["code"] for ref in (taken, wrong)} == {"DOWNLOAD_FAILED"}
    assert farm.left() == ["loras/ink.safetensors", "loras/ink.safetensors.record.json"]
    farm.stop(daemon)


def test_tokens_that_others_can_read_are_not_used(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA)
    tokens = farm.home.config.fetch.tokens
    tokens.write_text("models.example.org canary-0123456789\n")
    tokens.chmod(0o644)
    daemon = farm.daemon()
    ref = farm.fetch()
    farm.run(daemon, ref)
    message = farm.home.manifest(ref)["error"]["message"]
    assert f"chmod 600 {tokens}" in message
    assert "canary" not in message
    tokens.chmod(0o600)  # the next process reads it anew
    ref = farm.fetch({"nonce": "2"})
    farm.run(daemon, ref)
    assert farm.home.outcome(ref) == "succeeded"
    assert farm.server.asked[-1][2]["Authorization"] == "Bearer canary-0123456789"
    farm.stop(daemon)


def test_a_lost_connection_is_tried_again_and_gone_on_with(farm: Farm) -> None:
    def cut(handler: Handler) -> None:
        serve(handler, DATA, '"1"', cut_at=None if "Range" in handler.headers else 3000)

    farm.server.on(PLAIN, cut)
    daemon = farm.daemon()
    ref = farm.fetch()
    farm.run(daemon, ref)
    assert (farm.home.outcome(ref), farm.home.manifest(ref)["attempts"]) == ("succeeded", 2)
    assert farm.ranges() == [None, "bytes=3000-"]
    assert farm.left() == ["loras/ink.safetensors", "loras/ink.safetensors.record.json"]
    farm.stop(daemon)


def test_a_connection_that_is_lost_at_every_attempt_fails_the_job_and_leaves_nothing(farm: Farm) -> None:
    farm.server.on(PLAIN, lambda handler: serve(handler, DATA, None, cut_at=3000))
    daemon = farm.daemon()
    ref = farm.fetch()
    farm.run(daemon, ref)
    manifest = farm.home.manifest(ref)
    assert (manifest["attempts"], manifest["error"]["code"]) == (3, "DOWNLOAD_FAILED")
    assert "models.example.org: the connection was cut" in manifest["error"]["message"]
    assert farm.left() == []
    farm.stop(daemon)


def test_what_takes_too_long_is_ended_and_can_be_gone_on_with(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    ref = farm.fetch()
    run_until(daemon, lambda: fetched(daemon) == 3000)
    running = daemon.slots["fetch0"].running
    assert running is not None
    assert running.until > daemon.clock() + 40_000  # its own limit, not a painter's
    running.until = 0.0
    farm.run(daemon, ref)
    error = farm.home.manifest(ref)["error"]
    assert (error["code"], "longer than 43200 s (fetch.time_limit_s" in error["message"]) == ("DOWNLOAD_FAILED", True)
    again = farm.fetch({"nonce": "again"})
    farm.run(daemon, again)
    assert (farm.home.outcome(again), farm.ranges()) == ("succeeded", [None, "bytes=3000-"])
    farm.stop(daemon)


# Deaths, cancels and stops


def test_a_killed_process_is_gone_on_with_by_the_next_attempt(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    ref = farm.fetch()
    run_until(daemon, lambda: fetched(daemon) == 3000)
    daemon.executor.kill("fetch0")
    farm.run(daemon, ref)
    assert (farm.home.outcome(ref), farm.home.manifest(ref)["attempts"]) == ("succeeded", 2)
    assert farm.ranges() == [None, "bytes=3000-"]
    farm.stop(daemon)


def test_a_killed_daemon_is_gone_on_with_and_its_process_dies_with_it(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    ref = farm.fetch()

    def die() -> None:
        daemon = farm.daemon()
        run_until(daemon, lambda: fetched(daemon) == 3000)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die)[0] == -signal.SIGKILL
    assert farm.home.where(ref) == "active"
    daemon = farm.daemon()
    farm.run(daemon, ref)
    assert (farm.home.outcome(ref), farm.home.manifest(ref)["attempts"]) == ("succeeded", 2)
    assert farm.ranges() == [None, "bytes=3000-"]
    farm.stop(daemon)


def test_a_daemon_that_dies_when_all_is_in_place_fetches_nothing_twice(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA)
    ref = farm.fetch()

    def die() -> None:
        daemon = farm.daemon()
        run_until(daemon, lambda: len(daemon.aftermath.unlisted) == 1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die)[0] == -signal.SIGKILL
    daemon = farm.daemon()
    farm.run(daemon, ref)
    manifest = farm.home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"], farm.ranges()) == ("succeeded", 2, [None])
    assert manifest["installed"]["files"] == {"ink.safetensors": SHA256}
    (farm.models / "loras" / "ink.safetensors").write_bytes(DATA[:-1] + b"x")  # whose record is not true any more
    other = farm.fetch({"nonce": "again"})
    farm.run(daemon, other)
    assert "There is a LoRA ink already" in farm.home.manifest(other)["error"]["message"]
    farm.stop(daemon)


def test_cancel_ends_it_and_leaves_nothing(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    running = farm.fetch()
    waiting = farm.fetch({"nonce": "waits"})
    run_until(daemon, lambda: fetched(daemon) == 3000)
    assert len(farm.parts()) == 1
    for ref in (running, waiting):
        farm.home.drop(kind="cancel", job=ref.id, prompt=...)
    farm.run(daemon, running, waiting)
    assert [farm.home.outcome(ref) for ref in (running, waiting)] == ["cancelled", "cancelled"]
    assert (farm.left(), farm.ranges()) == ([], [None])
    assert daemon.slots["fetch0"].deaths == 0  # it let go when it was asked to
    farm.stop(daemon)


def test_a_stop_releases_it_and_the_next_start_goes_on(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    ref = farm.fetch()
    run_until(daemon, lambda: fetched(daemon) == 3000)
    farm.stop(daemon)
    assert farm.home.where(ref) == "pending"
    daemon = farm.daemon()
    farm.run(daemon, ref)
    assert (farm.home.outcome(ref), farm.home.manifest(ref)["attempts"]) == ("succeeded", 1)
    assert farm.ranges() == [None, "bytes=3000-"]
    farm.stop(daemon)


class Slayer(Recorder):
    """Kills the process that fetches in place of one disk operation of the daemon, the daemon in place of another."""

    def __init__(self, fetcher_at: int, daemon_at: int) -> None:
        super().__init__()
        self.fetcher_at, self.daemon_at = fetcher_at, daemon_at
        self.daemon: Daemon | None = None

    def before(self, op: Op) -> None:
        super().before(op)
        if len(self.ops) == self.fetcher_at and self.daemon:
            self.daemon.executor.kill("fetch0")
        if len(self.ops) == self.daemon_at:
            os.kill(os.getpid(), signal.SIGKILL)


LONGEST = 160
"""Operations of a life, more or less."""


def slain(farm: Farm, seed: int) -> None:
    """A life that ends somewhere, and another; then all is as if there had been one."""
    dice = random.Random(seed)
    farm.server.file(PLAIN, DATA)
    other = weights(VAE)
    farm.server.file("https://models.example.org/vae.safetensors", other)
    sha256 = hashlib.sha256(other).hexdigest()
    refs = (
        farm.fetch(),
        farm.fetch({"source": "https://models.example.org/vae.safetensors", "sha256": sha256}),
        farm.home.drop(prompt="paint"),
    )
    slayer = Slayer(dice.randrange(LONGEST), dice.randrange(LONGEST))

    def live() -> None:
        daemon = slayer.daemon = farm.daemon(max_attempts=9)
        farm.run(daemon, *refs)
        farm.stop(daemon)

    def first() -> None:
        with watched(slayer):
            live()

    assert in_child(first)[0] in (0, -signal.SIGKILL)
    slayer = Slayer(0, 0)
    assert in_child(live)[0] == 0
    for ref in refs:
        manifest = farm.home.manifest(ref)
        assert (manifest["outcome"], manifest["attempts"] <= 3) == ("succeeded", True)
    names = ("loras/ink.safetensors", "vae/vae.safetensors")
    assert farm.left() == sorted(f"{name}{suffix}" for name in names for suffix in ("", records.SUFFIX))
    assert [(farm.models / name).read_bytes() for name in names] == [DATA, other]
    assert sorted(line["id"] for line in farm.home.feed()) == sorted(ref.id for ref in refs)


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere(farm: Farm, seed: int) -> None:
    slain(farm, seed)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(4, 104))
def test_killed_anywhere_again(farm: Farm, seed: int) -> None:
    slain(farm, seed)


# Lanes


def test_a_slow_download_keeps_no_job_from_being_painted(farm: Farm) -> None:
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    slow = farm.fetch({"priority": 9})
    run_until(daemon, lambda: fetched(daemon) == 3000)
    behind = farm.fetch({"priority": 9, "nonce": "behind"})
    painted = [farm.home.drop(prompt="paint", seed=seed, priority=0) for seed in range(5)]
    farm.run(daemon, *painted)
    assert {farm.home.outcome(ref) for ref in painted} == {"succeeded"}
    assert (farm.home.where(slow), farm.home.where(behind)) == ("active", "pending")
    assert daemon.slots["fetch0"].running is not None
    farm.stop(daemon)


def test_a_slow_painter_keeps_no_model_from_coming(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA)
    daemon = farm.daemon()
    slow = farm.home.drop(prompt="hang", priority=9)
    run_until(daemon, lambda: daemon.slots["cpu0"].running is not None)
    behind = farm.home.drop(prompt="paint", priority=9)
    ref = farm.fetch({"priority": 0})
    farm.run(daemon, ref)
    assert farm.home.outcome(ref) == "succeeded"
    assert (farm.home.where(slow), farm.home.where(behind)) == ("active", "pending")
    daemon.executor.kill("cpu0")
    farm.stop(daemon)


def test_as_many_at_once_as_config_says_and_no_more(farm: Farm) -> None:
    farm.at_once = 2
    farm.server.on(PLAIN, hang(after=3000))
    names = ("a", "b", "c")
    for name in names:
        farm.server.on(f"https://models.example.org/{name}.safetensors", hang(after=3000))
    daemon = farm.daemon()
    refs = [farm.fetch({"source": f"https://models.example.org/{name}.safetensors"}) for name in names]
    run_until(daemon, lambda: len(farm.parts()) == 2)
    refs.sort(key=lambda ref: str(farm.home.where(ref)))
    assert [farm.home.where(ref) for ref in refs] == ["active", "active", "pending"]
    farm.home.drop(kind="cancel", job=refs[0].id, prompt=...)
    run_until(daemon, lambda: farm.home.where(refs[2]) == "active")
    assert farm.home.where(refs[1]) == "active"
    farm.stop(daemon)


def test_two_jobs_that_want_the_same_fetch_it_once(farm: Farm) -> None:
    farm.at_once = 2
    farm.server.on(PLAIN, hang(after=3000))
    daemon = farm.daemon()
    refs = [farm.fetch({"nonce": str(number)}) for number in range(2)]
    fetchers = [daemon.slots[f"fetch{number}"] for number in range(2)]
    run_until(daemon, lambda: all(slot.running and slot.running.progress for slot in fetchers))

    def begun() -> list[str]:
        runs = [(slot.name, slot.running) for slot in fetchers]
        return [name for name, run in runs if run and run.progress and run.progress.bytes_done == 3000]

    run_until(daemon, lambda: len(begun()) == 1)
    farm.server.file(PLAIN, DATA)
    (first,) = begun()
    daemon.executor.kill(first)  # and whichever goes on, goes on with what came
    farm.run(daemon, *refs)
    assert [farm.home.outcome(ref) for ref in refs] == ["succeeded", "succeeded"]
    assert farm.ranges() == [None, "bytes=3000-"]
    farm.stop(daemon)


def test_an_operator_queues_it_again(farm: Farm) -> None:
    farm.server.file(PLAIN, DATA[:-1] + b"x")
    daemon = farm.daemon()
    ref = farm.fetch()
    farm.run(daemon, ref)
    assert farm.home.outcome(ref) == "failed"
    farm.server.file(PLAIN, DATA)
    assert imagend("requeue", str(ref), cwd=farm.home.root).returncode == 0
    run_until(daemon, lambda: farm.home.where(ref) == "pending" or farm.home.where(ref) == "active")
    farm.run(daemon, ref)
    assert farm.home.outcome(ref) == "succeeded"
    farm.stop(daemon)


def test_places_are_told_by_lane(farm: Farm) -> None:
    """And after a restart each waits in its own."""
    daemon = farm.daemon(max_attempts=1)
    (farm.home.config.spool / "orders").mkdir(exist_ok=True)
    assert imagend("pause", "--reason", "to look", cwd=farm.home.root).returncode == 0
    fetches = [farm.fetch({"nonce": str(number)}) for number in range(2)]
    paints = [farm.home.drop(prompt="paint", seed=number) for number in range(3)]
    for _ in range(2):
        run_until(daemon, lambda: len(status(farm)["queue"]["head"]) == 5)
        head = {entry["id"]: entry for entry in status(farm)["queue"]["head"]}
        for lane, refs in (("fetch", fetches), ("paint", paints)):
            told = [(head[ref.id]["lane"], head[ref.id]["queue_length"]) for ref in refs]
            assert told == [(lane, len(refs))] * len(refs)
            assert sorted(head[ref.id]["queue_position"] for ref in refs) == list(range(1, len(refs) + 1))
        for ref in (*fetches, *paints):
            path = farm.home.config.outputs / ref.client / f"{ref.id}.state.json"
            run_until(daemon, path.exists)
            state = json.loads(path.read_text())
            assert (state["queue_position"], state["queue_length"]) == (
                head[ref.id]["queue_position"],
                head[ref.id]["queue_length"],
            )
        farm.stop(daemon)
        for told in (farm.home.config.spool / "status.json", *farm.home.config.outputs.glob("*/*.state.json")):
            told.unlink()
        daemon = farm.daemon(max_attempts=1)
    farm.stop(daemon)


# As people run it


def test_check_says_for_whom_no_model_can_come(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def complaints() -> list[str]:
        found = examine(farm.home.root / "config.yaml")
        return [f"{one.what}: {one.fix}" for one in found if "models fetched" in one.what]

    assert complaints() == []
    access = os.access  # who runs tests as root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != farm.models and access(path, mode))
    (complaint,) = complaints()
    assert f"{farm.home.client} may have models fetched, and {farm.models} cannot be written" in complaint
    assert f"take fetch: true from clients.{farm.home.client}" in complaint


def test_submit_writes_such_a_job(farm: Farm) -> None:
    options = ["--sha256", SHA256.upper(), "--type", "lora", "--name", "styles/ink"]
    done = imagend("submit", "fetch", PLAIN, *options, cwd=farm.home.root)
    assert done.returncode == 0, done.stderr
    (path,) = farm.home.config.inboxes[0].glob("*.json")
    job = json.loads(path.read_text())
    told = {key: job[key] for key in ("kind", "source", "sha256", "type", "name")}
    assert told == {"kind": "fetch", "source": PLAIN, "sha256": SHA256, "type": "lora", "name": "styles/ink"}
    for arguments, word in (
        (["fetch", PLAIN], "sha256: null must be given"),
        (["fetch"], "source: is missing; add it"),
        (["fetch", "http://x.org/a.safetensors"], "must be an https URL"),
        (["generate", PLAIN, "--prompt", "x"], "source: is not a field"),
    ):
        refused = imagend("submit", *arguments, cwd=farm.home.root)
        assert (refused.returncode, word in refused.stderr) == (64, True), refused.stderr
    assert len(list(farm.home.config.inboxes[0].glob("*.json"))) == 1


def test_a_fetch_is_not_replayed(farm: Farm) -> None:
    civitai(farm.server)
    daemon = farm.daemon()
    ref = farm.fetch({"source": "20", "sha256": ...})
    farm.run(daemon, ref)
    farm.stop(daemon)
    refused = imagend("replay", ref.id, cwd=farm.home.root)
    assert refused.returncode == 64
    assert "imagend models verify" in refused.stderr
    assert "imagend submit fetch 20" in refused.stderr
    shown = imagend("watch", ref.id, cwd=farm.home.root)
    assert f"lora ink_pen v2; pin it as ink_pen v2@{SHA256[:10]}" in shown.stdout
    assert DOWNLOAD not in shown.stdout
