"""What systemd hears (sd_notify(3)), on a real datagram socket: in process on our own clock, and from a real daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY, Home, run_until, step
from fakes import FakeExecutor

from imagend import config as configuration
from imagend.daemon.executor import Heard, ReloadRequested, StopRequested
from imagend.daemon.loop import Daemon
from imagend.daemon.notify import EXTEND_S, Notifier, Systemd
from imagend.messages import Message, Progress
from imagend.orders import Pause, Wishes

PATIENCE_S = 60.0


@dataclass
class Ear:
    """systemd's end of the socket."""

    address: str
    socket: socket.socket
    words: list[dict[str, str]] = field(default_factory=list)

    def hear(self) -> list[dict[str, str]]:
        """What is new, a dict per datagram."""
        new = []
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self.socket.recv(65536).decode()
                new.append(dict(line.split("=", 1) for line in text.splitlines()))
        self.words += new
        return new

    def until(self, condition: Callable[[dict[str, str]], object]) -> dict[str, str]:
        """Wait for a datagram; the ones before it are skipped."""
        self.socket.settimeout(PATIENCE_S)
        while True:
            word = dict(line.split("=", 1) for line in self.socket.recv(65536).decode().splitlines())
            self.words.append(word)
            if condition(word):
                return word


@pytest.fixture(params=["file", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    address = str(tmp_path / "notify") if request.param == "file" else f"@imagend-test-{os.getpid()}-{time.time_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        yield Ear(address, own)


class Sleepy(FakeExecutor):
    """Its worker is up, and says no word until the test says so."""

    def start(self, worker: str) -> None:
        pass


def attach(daemon: Daemon, ear: Ear, watchdog_s: float = 0.0) -> Systemd:
    """The daemon's supervisor, which the test alone tends, at times that it chooses."""
    return Systemd(Notifier(ear.address), watchdog_s, daemon)


# In process


def test_ready_is_said_once_when_inboxes_and_models_were_looked_at_and_a_worker_is_up(home: Home, ear: Ear) -> None:
    daemon = home.daemon(Sleepy)
    daemon.librarian.ready = False
    systemd = attach(daemon, ear)
    now = time.monotonic()

    def ready() -> bool:
        systemd.tend(now)
        return any("READY" in word for word in ear.hear())

    daemon.look_around()
    assert not ready()
    for door in daemon.doors:
        door.look(now)
    assert not ready()
    FakeExecutor.start(daemon.executor, "cpu0")  # type: ignore[arg-type]
    daemon.wait()
    assert daemon.slots["cpu0"].state == "idle"
    assert not ready()
    daemon.librarian.ready = True
    assert ready()
    assert not ready()


def test_while_a_worker_loads_more_time_is_asked_for_again_and_again_and_after_that_never(home: Home, ear: Ear) -> None:
    daemon = home.daemon(Sleepy)
    systemd = attach(daemon, ear)
    step(daemon)
    now = daemon.doors[0].looked_at
    asked = 0
    for second in range(int(EXTEND_S)):
        systemd.tend(now + second)
        asked += [word.get("EXTEND_TIMEOUT_USEC") for word in ear.hear()].count(str(int(EXTEND_S * 1e6)))
    assert 3 <= asked <= 10
    FakeExecutor.start(daemon.executor, "cpu0")  # type: ignore[arg-type]
    daemon.wait()
    for second in range(100, 200):
        systemd.tend(now + second)
    assert not [word for word in ear.hear() if "EXTEND_TIMEOUT_USEC" in word]


@pytest.mark.parametrize("trouble", ["a mount that hangs", "models that hang", "workers that die"])
def test_what_never_comes_does_not_keep_the_service_from_starting(home: Home, ear: Ear, trouble: str) -> None:
    """systemd would kill a daemon that takes in jobs, again and again."""
    daemon = home.daemon(Sleepy if trouble == "workers that die" else FakeExecutor)
    systemd = attach(daemon, ear)
    step(daemon)
    daemon.wait()
    if trouble == "a mount that hangs":
        daemon.doors[0].looked = False
    elif trouble == "models that hang":
        daemon.librarian.ready = False
    else:
        daemon.slots["cpu0"].deaths = 1
    began = time.monotonic()
    systemd.tend(began)
    assert not [word for word in ear.hear() if "READY" in word]
    if trouble == "workers that die":
        daemon.slots["cpu0"].deaths = 2
    systemd.tend(began + 100.0)
    assert [word for word in ear.hear() if word.get("READY") == "1"]


def test_the_status_line_shows_who_is_painted_how_far_and_how_many_wait(home: Home, ear: Ear) -> None:
    daemon = home.daemon()
    systemd = attach(daemon, ear)
    ref = home.drop(prompt="stay", seed=1)
    home.drop(prompt="stay", seed=2)
    home.drop(prompt="stay", seed=3)
    run_until(daemon, lambda: daemon.slots["cpu0"].running is not None and len(daemon.turn) == 2)
    running = daemon.slots["cpu0"].running
    assert running is not None
    ref = running.job.ref

    def shown(now: float, message: Message | None = None) -> list[str]:
        if message:
            daemon.handle(Heard("cpu0", message))
        systemd.tend(now)
        return [word["STATUS"] for word in ear.hear() if "STATUS" in word]

    assert shown(0.0) == [f"busy alice {ref.id[:4]}… starting, 2 queued"]
    assert shown(1.1, Progress(job=ref, stage="model_loading")) == [f"busy alice {ref.id[:4]}… model_loading, 2 queued"]
    painting = Progress(job=ref, stage="painting", picture=1, pictures=4, step=17, steps=30)
    assert shown(1.2, painting) == [], "no more than one a second"
    assert shown(2.2) == [f"busy alice {ref.id[:4]}… 2/4 step 17/30, 2 queued"]
    assert shown(3.3) == [], "the same is not told again"
    daemon.health.trouble("disk", "the disk\nMAINPID=1 is full\udce9")
    assert shown(4.4) == [f"degraded alice {ref.id[:4]}… 2/4 step 17/30, 2 queued. the disk MAINPID=1 is full?"]
    evil = Progress(job=ref, stage="x\nREADY=1\nMAINPID=1")
    daemon.health.trouble("disk", None)
    assert shown(5.5, evil) == [f"busy alice {ref.id[:4]}… x READY=1 MAINPID=1, 2 queued"]
    daemon.health.wishes = Wishes(pause=Pause())
    assert shown(6.0) == [], "no more than one a second"
    assert shown(6.6) == [f"busy alice {ref.id[:4]}… x READY=1 MAINPID=1, 2 queued, paused"]
    daemon.health.trouble("disk", "é" * 10_000)
    systemd.tend(7.7)
    (word,) = [word for word in ear.hear() if "STATUS" in word]
    assert list(word) == ["STATUS"]
    assert len(word["STATUS"]) <= 500


def test_the_watchdog_is_fed_by_looking_around_at_half_its_time(home: Home, ear: Ear) -> None:
    daemon = home.daemon()
    systemd = attach(daemon, ear, watchdog_s=20.0)
    fed = []
    for second in range(60):
        systemd.tend(1000.0 + second)
        fed += [second for word in ear.hear() if word.get("WATCHDOG") == "1"]
    assert fed == [0, 10, 20, 30, 40, 50]
    quiet = attach(daemon, ear)
    for second in range(60):
        quiet.tend(1000.0 + second)
    assert not [word for word in ear.hear() if "WATCHDOG" in word]


def test_what_could_not_be_sent_is_sent_later(home: Home, ear: Ear, tmp_path: Path) -> None:
    daemon = home.daemon()
    notifier = Notifier(ear.address)
    systemd = Systemd(notifier, 20.0, daemon)
    step(daemon)
    there, notifier._address = notifier._address, str(tmp_path / "nobody")
    systemd.tend(100.0)
    assert ear.hear() == []
    notifier._address = there
    systemd.tend(101.0)
    assert {name for word in ear.hear() for name in word} == {"WATCHDOG", "READY", "STATUS"}


def test_a_socket_that_nobody_reads_stops_nothing(home: Home, ear: Ear) -> None:
    notifier = Notifier(ear.address)
    while notifier.tell(STATUS="x" * 1000):
        pass
    systemd = Systemd(notifier, 20.0, home.daemon())
    systemd.tend(100.0)
    ear.hear()
    systemd.tend(101.0)
    assert [word for word in ear.hear() if word.get("WATCHDOG") == "1"]


def test_reload_and_stop_are_told_by_the_loop_itself(home: Home, ear: Ear) -> None:
    daemon = home.daemon()
    daemon.health.supervisor = attach(daemon, ear)
    run_until(daemon, lambda: [word for word in ear.hear() if "READY" in word])
    before = time.monotonic_ns() // 1000
    daemon.mailbox.put(ReloadRequested())
    run_until(daemon, lambda: ear.hear() and ear.words[-1].get("READY") == "1")
    (reloading,) = [word for word in ear.words if "RELOADING" in word]
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    daemon.mailbox.put(StopRequested())
    run_until(daemon, lambda: ear.hear() and any("STOPPING" in word for word in ear.words))
    grace = daemon.settings.config.stop_grace_s
    (stopping,) = [word for word in ear.words if "STOPPING" in word]
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > grace * 1e6


def test_a_reload_before_ready_is_not_told(home: Home, ear: Ear) -> None:
    """systemd would take the READY after it for that of the start."""
    daemon = home.daemon(Sleepy)
    daemon.health.supervisor = attach(daemon, ear)
    daemon.mailbox.put(ReloadRequested())
    for _ in range(3):
        step(daemon)
    assert not [word for word in ear.hear() if {"READY", "RELOADING"} & word.keys()]


def test_the_environment_is_read_once_and_not_left_to_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(**environment: str) -> tuple[str, float] | None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = configuration.supervision()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
        return found

    me = str(os.getpid())
    assert asked() is None
    assert asked(NOTIFY_SOCKET="/run/n") == ("/run/n", 0.0)
    assert asked(NOTIFY_SOCKET="@n", WATCHDOG_USEC="3000000", WATCHDOG_PID=me) == ("@n", 3.0)
    assert asked(NOTIFY_SOCKET="@n", WATCHDOG_USEC="3000000") == ("@n", 3.0)
    assert asked(NOTIFY_SOCKET="@n", WATCHDOG_USEC="3000000", WATCHDOG_PID="1") == ("@n", 0.0), "another's watchdog"
    assert asked(NOTIFY_SOCKET="@n", WATCHDOG_USEC="soon") == ("@n", 0.0)
    assert asked(NOTIFY_SOCKET="vsock:2:1234") is None
    assert asked(WATCHDOG_USEC="3000000") is None


# A real daemon


@contextlib.contextmanager
def serving(home: Home, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(REPOSITORY / "tests" / "lab" / "null_daemon.py"), "serve"]
    with (home.root / "log").open("ab") as log:
        daemon = subprocess.Popen(command, cwd=home.root, stderr=log, env=os.environ | environment)
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def test_a_daemons_life_as_systemd_hears_it(home: Home, ear: Ear) -> None:
    with serving(home, NOTIFY_SOCKET=ear.address, WATCHDOG_USEC="1000000") as daemon:
        ear.until(lambda word: word.get("READY") == "1")
        ear.until(lambda word: word.get("STATUS") == "ready, 0 queued")
        ear.until(lambda word: word.get("WATCHDOG") == "1")
        daemon.send_signal(signal.SIGHUP)
        ear.until(lambda word: "RELOADING" in word)
        ear.until(lambda word: word.get("READY") == "1")
        ref = home.drop(seed=7)
        ear.until(lambda word: word.get("WATCHDOG") == "1")
        daemon.send_signal(signal.SIGTERM)
        ear.until(lambda word: word.get("STOPPING") == "1")
        assert daemon.wait(PATIENCE_S) == 0
    ear.hear()
    assert not [word for word in ear.words if {"MAINPID", "FDSTORE"} & word.keys()]
    assert sum(word.get("READY") == "1" for word in ear.words) == 2
    assert home.where(ref) in ("done", "pending", None)


def test_a_loop_that_hangs_feeds_no_watchdog_though_its_threads_live(home: Home, ear: Ear) -> None:
    """The file of keys becomes a pipe that nobody writes to; doors reject files meanwhile, for more than its time."""
    keys = home.config.allowed_signers
    text = keys.read_text()
    config = home.root / "config.yaml"
    config.write_text(config.read_text() + "scan_interval_s: 0.2\nfile_grace_s: 0.2\n")
    with serving(home, NOTIFY_SOCKET=ear.address, WATCHDOG_USEC="400000") as daemon:
        ear.until(lambda word: word.get("READY") == "1")
        ear.until(lambda word: word.get("WATCHDOG") == "1")
        keys.unlink()
        os.mkfifo(keys)
        with keys.open("w") as pipe:  # opened: the loop stands in its open() or read()
            ear.hear()
            for number in range(4):
                home.put(b"no job", f"{number}.json")
                end = time.monotonic() + PATIENCE_S
                while not (home.config.inboxes[0].parent / "rejected" / f"{number}.json.reason.json").exists():
                    assert time.monotonic() < end, (home.root / "log").read_text()
                    time.sleep(0.02)
            assert not [word for word in ear.hear() if "WATCHDOG" in word]
            pipe.write(text)
        keys.unlink()
        keys.write_text(text)
        ear.until(lambda word: word.get("WATCHDOG") == "1")
        daemon.send_signal(signal.SIGABRT)  # as systemd's watchdog does
        # faulthandler reads the frames of threads that run meanwhile, which may fault, rarely: dead it is either way
        assert daemon.wait(PATIENCE_S) in (-signal.SIGABRT, -signal.SIGSEGV)
    assert "loop.py" in (home.root / "log").read_text().partition("Fatal Python error")[2]


def test_without_a_socket_none_of_it_is_made(home: Home) -> None:
    program = f"""
import os, sys
os.environ.pop("NOTIFY_SOCKET", None)
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
sys.argv[1:] = ["serve", "--config", {str(home.root / "config.yaml")!r}]
from imagend.daemon import loop
loop.Daemon.run = lambda daemon: print(daemon.health.supervisor, "imagend.daemon.notify" in sys.modules)
from imagend.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=home.root, capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"
