"""Shortages of memory: what they look like, what is let go of, and real ones, in a worker of limited address space."""

from __future__ import annotations

import errno
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Home, run_until_idle
from PIL import Image
from structlog.testing import capture_logs
from test_worker import end

torch = pytest.importorskip("torch")

from imagend.daemon.executor import Mailbox  # noqa: E402
from imagend.daemon.local import LocalExecutor  # noqa: E402
from imagend.job import Ref  # noqa: E402
from imagend.worker.memory import tiled  # noqa: E402
from imagend.worker.shortage import Catch, is_out_of_memory  # noqa: E402

LIMITED = REPOSITORY / "tests" / "limited"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory", 2), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shape mismatch"), False),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException | None, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)], ids=["torch", "numpy"])
def test_real_failures_to_allocate_are_recognised(allocate: Any) -> None:
    with Catch() as caught:
        allocate()
    assert caught.said is not None
    assert "allocate" in caught.said


def test_what_is_caught_keeps_nothing_alive_even_where_a_library_keeps_the_error() -> None:
    stored: list[BaseException] = []
    alive: list[Any] = []

    def tensor() -> Any:
        made = torch.ones(8)
        alive.append(weakref.ref(made))
        return made

    def fail() -> None:
        held = tensor()
        stored.append(ValueError(held.sum().item()))
        raise stored[-1]

    def work() -> None:
        held = tensor()
        try:
            fail()
        except ValueError as cause:
            stored.append(torch.OutOfMemoryError(f"no memory for {len(held)}"))
            raise stored[-1] from cause

    with Catch() as caught:
        work()
    assert caught.said == "no memory for 8"
    assert len(stored) == len(alive) == 2
    assert [one() for one in alive] == [None, None]


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="other"), Catch():
        raise ValueError("other")


def limited(mailbox: Mailbox) -> LocalExecutor:
    command = (sys.executable, str(LIMITED))
    return LocalExecutor({"cpu0": "cpu"}, REPOSITORY / "models", mailbox, command=command)


def picture(home: Home, ref: Ref) -> Any:
    return np.asarray(Image.open(home.config.outputs / ref.client / ref.id / "0000.png").convert("RGB"))


def test_real_shortages_in_a_real_worker(home: Home, plain: Any, capfd: pytest.CaptureFixture[str]) -> None:
    quick: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}
    small = home.drop("a.json", **quick, width=64, height=64, seed=7, nonce="1")
    decoding = home.drop("b.json", **quick, width=1024, height=1024, seed=200)
    hopeless = home.drop("d.json", **quick, width=1024, height=896, seed=2)
    after = home.drop("e.json", **quick, width=64, height=64, seed=7, nonce="2")
    with capture_logs() as log:
        daemon = home.daemon(limited)
        run_until_idle(daemon, limit_s=240)
        end(daemon)

    def plainly(ref: Ref, tile: int | None) -> Any:
        spec = home.manifest(ref)["spec"]
        generator = torch.Generator("cpu").manual_seed(spec["seeds"][0])
        size = {"width": spec["width"], "height": spec["height"]}
        with tiled(plain.vae, tile):
            return np.asarray(plain(spec["prompt"], **quick, **size, generator=generator).images[0])

    memory = home.manifest(decoding)["memory"]
    assert {retry["stage"] for retry in memory["retries"]} == {"decoding"}
    assert "resident" in memory["retries"][0]["rung"]
    assert memory["exact"] is False
    assert (picture(home, decoding) == plainly(decoding, memory["vae_tile"])).all()

    manifest = home.manifest(hopeless)
    assert manifest["error"]["code"] == "OUT_OF_MEMORY"
    assert "1024x896" in manifest["error"]["message"]

    assert (picture(home, after) == picture(home, small)).all()
    assert (picture(home, after) == plainly(after, None)).all()
    assert home.manifest(after)["memory"]["exact"] is True
    assert not [line for line in log if line["event"] == "worker died"]
    levels = {(line["job"], line["log_level"]) for line in log if line["event"].startswith("out of memory")}
    assert levels == {(str(decoding), "warning"), (str(hopeless), "warning"), (str(hopeless), "error")}
