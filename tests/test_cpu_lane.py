"""The lane for jobs that need no GPU: workers of their own where there are GPUs, the painters where there are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle
from fakes import FakeExecutor

from imagend.config import Config
from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import LocalExecutor
from imagend.daemon.loop import Daemon
from imagend.errors import BadConfig
from imagend.job import Ref
from imagend.lanes import HOST, NETWORK, Lane, lane_at, lane_by
from imagend.mask_field import Mask

UPSCALE: dict[str, Any] = {"kind": "upscale", "prompt": ..., "image": "leona/front"}
BOXES: dict[str, Any] = {"kind": "mask", "prompt": ..., "image": "leona/front", "mask": {"boxes": [[0, 0, 8, 8]]}}
WORDS: dict[str, Any] = BOXES | {"mask": {"find": "the car"}}
CANNY: dict[str, Any] = {"kind": "preprocess", "prompt": ..., "image": "leona/front", "type": "canny"}


class WithHost(FakeExecutor):
    def slots(self) -> Mapping[str, str]:
        return {"gpu0": "cuda:0", "host0": HOST}


class Alone(FakeExecutor):
    def slots(self) -> Mapping[str, str]:
        return {"gpu0": "cuda:0"}


def workers_of(daemon: Daemon) -> dict[str, str]:
    """Which worker took which job, by the live feed."""
    daemon.health.events.write(daemon.clock(), at_once=True)
    lines = (daemon.spool.root / "events.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return {one["data"]["id"]: one["data"]["worker"] for one in told if one["type"] == "imagend.started"}


@pytest.fixture
def picture(home: Home) -> Path:
    image = pytest.importorskip("PIL.Image")
    path = home.config.reference / "leona" / "front.png"
    path.parent.mkdir(parents=True)
    image.linear_gradient("L").convert("RGB").resize((64, 48)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "upscaler", "default", "lane"),
    [
        ("generate", None, "Lanczos", Lane.PAINT),
        ("upscale", None, "Lanczos", Lane.CPU),
        ("upscale", "lanczos", "RealESRGAN", Lane.CPU),
        ("upscale", None, "RealESRGAN", Lane.PAINT),
        ("upscale", "RealESRGAN", "Lanczos", Lane.PAINT),
        ("upscale", ["Lanczos"], "Lanczos", Lane.PAINT),
        ("preprocess", None, "RealESRGAN", Lane.CPU),
        ("fetch", None, "Lanczos", Lane.FETCH),
        (["fetch"], {}, "Lanczos", Lane.PAINT),
        (None, None, "Lanczos", Lane.PAINT),
    ],
)
def test_what_needs_no_gpu_goes_by_a_lane_of_its_own(kind: object, upscaler: object, default: str, lane: Lane) -> None:
    assert lane_by(kind, upscaler, default) is lane


@pytest.mark.parametrize(
    ("mask", "lane"),
    [
        ({"boxes": [[0, 0, 8, 8]]}, Lane.CPU),
        ({"find": None, "image": "leona/mask"}, Lane.CPU),
        ({"find": ["the car"]}, Lane.PAINT),
        (Mask(find=("the car",)), Lane.PAINT),
        (Mask(whole=True), Lane.CPU),
        (["find"], Lane.CPU),
        (None, Lane.CPU),
    ],
)
def test_a_mask_needs_a_gpu_where_words_name_it(mask: object, lane: Lane) -> None:
    """As it stands in a file, and as it was read."""
    assert lane_by("mask", None, "Lanczos", mask) is lane
    assert lane_by("edit", None, "Lanczos", mask) is Lane.PAINT


def test_a_workers_lane_follows_from_its_device() -> None:
    told = {device: lane_at(device) for device in ("cuda:1", "cpu", HOST, NETWORK)}
    assert told == {"cuda:1": Lane.PAINT, "cpu": Lane.PAINT, HOST: Lane.CPU, NETWORK: Lane.FETCH}


def test_there_is_one_where_all_others_have_gpus() -> None:
    gpus = {"a": "cuda:0", "b": "cuda:1"}
    assert Config(workers=gpus).slots() == gpus | {"host0": HOST}
    assert Config(workers=gpus, cpu_workers=0).slots() == gpus
    mixed = {"a": "cuda:0", "b": "cpu"}
    assert Config(workers=mixed).slots() == mixed
    assert Config(workers=mixed, cpu_workers=2).slots() == mixed | {"host0": HOST, "host1": HOST}


def test_its_names_are_taken(tmp_path: Path) -> None:
    from imagend import config as configuration

    for name in ("host0", "fetch3"):
        (tmp_path / "config.yaml").write_text(f"workers: {{{name}: cpu}}\n")
        with pytest.raises(BadConfig, match=f"{name} is the name of a worker that imagend adds"):
            configuration.load(tmp_path / "config.yaml")


def test_a_gpu_that_paints_keeps_nothing_waiting_that_needs_none(home: Home, picture: Path) -> None:
    daemon = home.daemon(WithHost)
    daemon.librarian.look()
    long = home.drop(prompt="stay", priority=9)
    run_until(daemon, lambda: daemon.slots["gpu0"].running is not None)
    behind, words = home.drop(priority=9), home.drop(**WORDS)
    quick = [home.drop(**fields, priority=0) for fields in (UPSCALE, UPSCALE | {"scale": 4}, CANNY, BOXES)]
    run_until(daemon, lambda: all(home.where(ref) == "done" for ref in quick))
    assert {home.outcome(ref) for ref in quick} == {"succeeded"}
    assert (home.where(long), home.where(behind), home.where(words)) == ("active", "pending", "pending")
    assert workers_of(daemon) == {long.id: "gpu0"} | {ref.id: "host0" for ref in quick}


def test_without_such_a_worker_the_painters_do_it_in_turn(home: Home, picture: Path) -> None:
    daemon = home.daemon(Alone)
    daemon.librarian.look()
    refs = [home.drop(**fields) for fields in ({"prompt": "first"}, UPSCALE, CANNY, {"prompt": "last"})]
    run_until_idle(daemon)
    assert {home.outcome(ref) for ref in refs} == {"succeeded"}
    assert set(workers_of(daemon).values()) == {"gpu0"}


def test_after_a_restart_each_waits_in_its_lane(home: Home, picture: Path) -> None:
    """Also where the next daemon has no worker for one of them."""
    halted = home.daemon(WithHost)
    halted.librarian.look()
    halted.turn.halted = True
    refs: dict[str, Ref] = {}

    def all_wait() -> bool:
        halted.turn.halted = True  # no order says so
        return len(halted.turn) == 2

    refs = {"paint": home.drop(prompt="x"), "cpu": home.drop(**UPSCALE)}
    run_until(halted, all_wait)
    assert {lane: halted.turn.head(9, Lane(lane)) for lane in refs} == {lane: [ref] for lane, ref in refs.items()}
    halted.spool.close()
    second = home.daemon(WithHost)
    assert {lane: second.turn.head(9, Lane(lane)) for lane in refs} == {lane: [ref] for lane, ref in refs.items()}
    second.spool.close()
    third = home.daemon(WithHost, default_upscaler="RealESRGAN")  # by a network, which wants the GPU
    assert (third.turn.length(Lane.CPU), set(third.turn.head(9))) == (0, set(refs.values()))
    third.spool.close()
    third = home.daemon(Alone)
    assert (third.turn.length(Lane.CPU), set(third.turn.head(9))) == (0, set(refs.values()))
    third.spool.close()


def test_a_real_worker_of_that_lane_makes_the_same_bits(
    home: Home, picture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
    from PIL import Image

    def local(mailbox: Mailbox) -> LocalExecutor:
        return LocalExecutor({"host0": HOST}, home.config.models, mailbox, home.config.for_workers())

    daemon = home.daemon(local)
    daemon.librarian.look()
    refs = [home.drop(**UPSCALE), home.drop(**CANNY)]
    run_until(daemon, lambda: all(home.where(ref) == "done" for ref in refs), 240.0)
    large, edges = (home.manifest(ref)["artifacts"][0] for ref in refs)
    want = Image.open(picture).resize((128, 96), Image.Resampling.LANCZOS).tobytes()
    assert large["pixels_sha256"] == hashlib.sha256(want).hexdigest()
    assert (edges["width"], edges["height"]) == (64, 48)
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()
