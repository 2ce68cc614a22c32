"""imagend doctor: all that check finds, and how the place fares: disks, jobs, leftovers, devices, versions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from imagend import config as configuration
from imagend import files
from imagend.cli.check import examine
from imagend.cli.finding import Finding, report
from imagend.cli.install import drift
from imagend.cli.look import daemon_alive, read
from imagend.config import Config
from imagend.errors import BadConfig
from imagend.outputs import DRAFTS
from imagend.spool import DAMAGED, STATUS, State

ROUNDS = 16
SLOW_MS = 50.0
"""A disk that takes so long to make a small file durable holds up every job: each needs some ten of them."""
OLD_S = 3600.0
"""What no living process can still be writing."""
_LISTED = 3
_DEVICES = """
import json, torch
print(json.dumps([torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]))
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also what is well")
    parser.add_argument("--json", action="store_true", help="findings as a JSON list, all of them")
    parser.epilog = "exit status: 0 when nothing is wrong (warnings may stand), 78 otherwise; it mends nothing itself"


def run(arguments: argparse.Namespace) -> int:
    path = configuration.find(arguments.config)
    findings = list(examine(path))
    with contextlib.suppress(BadConfig):  # examine() has said so
        config = configuration.load(path)
        findings += [*_place(config), *_service(path.absolute(), config)]
    return report(findings, arguments.json, arguments.all)


def _place(config: Config) -> Iterator[Finding]:
    for folder in dict.fromkeys((config.spool, config.outputs)):
        if folder.is_dir() and os.access(folder, os.W_OK):
            yield from _disk(folder, config.reserve_mb)
    if config.spool.is_dir():
        alive = daemon_alive(read(config.spool / STATUS))
        yield from _twice(config.spool, alive)
        yield from _damaged(config.spool)
        yield from _leftovers(config, alive)
    yield from _versions()
    yield from _gpus(config)


def _service(path: Path, config: Config) -> Iterator[Finding]:
    """An upgrade, or paths that have moved in config.yaml: the unit may keep the daemon from writing there."""
    if drift(path, config):
        what = "the systemd unit is not what this imagend and config.yaml would have"
        yield Finding("warning", what, "sudo imagend install && sudo systemctl restart imagend")


def _disk(folder: Path, reserve_mb: int) -> Iterator[Finding]:
    free_mb = files.free_bytes(folder) >> 20
    room = f"{folder}: {free_mb:,} MB are free; imagend stops taking jobs below {reserve_mb:,} (reserve_mb)"
    if free_mb < reserve_mb:
        yield Finding("error", room, "make room, or lower reserve_mb in config.yaml")
    elif free_mb < 2 * reserve_mb:
        yield Finding("warning", room, "make room before it is full")
    else:
        yield Finding("ok", room)
    durable_ms = _durable_ms(folder)
    what = f"{folder}: a small file is durable after {durable_ms:.1f} ms (median of {ROUNDS})"
    if durable_ms > SLOW_MS:
        yield Finding("warning", what, "put it on an SSD, or on a disk that others do not keep busy")
    else:
        yield Finding("ok", what)


def _durable_ms(folder: Path) -> float:
    probe = folder / f".imagend-doctor-{os.getpid()}"
    times = []
    try:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            files.write(probe, b"a probe of imagend doctor\n", 0o600)
            times.append(time.perf_counter() - start)
    finally:
        probe.unlink(missing_ok=True)
    return statistics.median(times) * 1000


def _twice(spool: Path, alive: bool) -> Iterator[Finding]:
    """A job on its way from folder to folder is in both for an instant: seen twice, it stays there."""
    if twice := _in_two(spool) & _in_two(spool) if alive else _in_two(spool):
        what = f"{len(twice)} jobs lie in two states: {_some(twice)}"
        yield Finding("warning", what, f"{'re' * alive}start imagend: it then takes the later one")


def _in_two(spool: Path) -> set[str]:
    found = [{f"{path.parent.name}/{path.stem}" for path in (spool / state).glob("*/[!.]*.json")} for state in State]
    pending, active, done = found
    return pending & active | pending & done | active & done


def _damaged(spool: Path) -> Iterator[Finding]:
    if damaged := {f"{path.parent.name}/{path.stem}" for path in (spool / DAMAGED).glob("*/*.json")}:
        what = f"{len(damaged)} jobs were found with other bytes than those signed: {_some(damaged)}"
        yield Finding("warning", what, f"check the disk; drop the jobs anew; then remove them from {spool / DAMAGED}")


def _leftovers(config: Config, alive: bool) -> Iterator[Finding]:
    """Temporary files by those who died before the rename. The daemon sweeps its own at its start."""
    fix = "rm them: who wrote them died before the file was whole"
    places = [(inbox, pattern, fix) for pattern in ("*/.*", ".*") for inbox in config.inboxes]
    if not alive:
        places += [(config.spool, "*/*/.*.tmp", "start imagend: it removes them")]
        places += [(config.outputs / DRAFTS, "*/*", "start imagend: what is half painted there is finished or removed")]
    for folder, pattern, fix in places:
        old = {str(path.relative_to(folder)) for path in folder.glob(pattern) if _age_s(path) > OLD_S}
        if old:
            yield Finding("warning", f"{folder}: {len(old)} leftovers, older than an hour: {_some(old)}", fix)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _versions() -> Iterator[Finding]:
    """What pyproject.toml asks for against what is installed. An editable install knows it, too."""
    wrong: list[str] = []
    right: list[str] = []
    for text in metadata.requires("imagend") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "engine"}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # examine() has said so where it matters
        told = f"{requirement.name} {version}"
        (right if requirement.specifier.contains(version.partition("+")[0]) else wrong).append(told)
    yield Finding("ok", f"Python {sys.version.split()[0]}, {', '.join(right)}")
    if wrong:
        what = f"imagend was not tested with {', '.join(wrong)}"
        yield Finding("warning", what, "pip install -c constraints.txt 'imagend[engine]'")


def _gpus(config: Config) -> Iterator[Finding]:
    """In another process: PyTorch takes seconds, and a device that hangs must not hang us."""
    wanted = {name: device for name, device in config.slots().items() if device.startswith("cuda")}
    if not wanted:
        return
    try:
        asked = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, timeout=120, check=True)
        names = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Finding("error", f"PyTorch cannot say which GPUs there are: {error}", "see nvidia-smi")
        return
    for worker, device in wanted.items():
        number = int(device.partition(":")[2] or 0)
        if number < len(names):
            yield Finding("ok", f"worker {worker}: {device} is {names[number]}")
        else:
            what = f"worker {worker}: there is no {device}; PyTorch sees {len(names)} CUDA devices"
            yield Finding("error", what, "correct workers in config.yaml, or the driver: nvidia-smi")


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_LISTED]) + (" …" if len(listed) > _LISTED else "")
