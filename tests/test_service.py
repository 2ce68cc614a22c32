"""The main job, whole: the daemon as people run it, a signed file dropped by a shell, real pictures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Home
from test_cli import imagend

pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
from PIL import Image

from imagend.job import Ref

PATIENCE_S = 120.0
JOB = {"prompt": "a large red circle on a blue background", "num_inference_steps": 8, "guidance_scale": 4.0, "seed": 7}


@contextlib.contextmanager
def serving(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """`imagend serve` in a process group of its own; whatever happens, nothing of it is left."""
    with (home.root / "serve.log").open("ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "imagend", "serve"], cwd=home.root, stderr=log, start_new_session=True
        )
    try:
        yield daemon
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def wait_for(condition: Callable[[], Any], home: Home) -> Any:
    """Look again and again, as people do who only have the files."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, (home.root / "serve.log").read_text()[-3000:]
        time.sleep(0.02)
    return found


def status(home: Home) -> dict[str, Any]:
    path = home.config.spool / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def worker(home: Home) -> dict[str, Any]:
    found: dict[str, Any] = status(home).get("workers", {}).get("cpu0", {})
    return found


def log(home: Home) -> list[dict[str, Any]]:
    lines = (home.root / "serve.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_submit_wait_shows_the_job_and_its_pictures_show_what_was_asked_for(home: Home) -> None:
    with serving(home) as daemon:
        options = [
            "--prompt",
            JOB["prompt"],
            "--num-inference-steps",
            100,  # seconds: long enough for those who look ten times a second
            "--guidance-scale",
            4,
            "--seed",
            7,
            "--count",
            2,
        ]
        done = imagend("submit", "generate", *options, "--wait", "--json", cwd=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        wait_for(lambda: sum(status(home)["totals"].values()), home)  # the manifest is there before the status is
        told = imagend("status", cwd=home.root)
        assert told.returncode == 0
        assert "1 succeeded, 0 partial, 0 failed, 0 cancelled" in told.stdout
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    assert status(home)["state"] == "stopped"
    manifest = lines[-1]["document"]
    page = (home.config.spool / "dashboard.html").read_text()
    assert '<span class="state stopped">' in page
    assert f"../outputs/{manifest['client']}/{manifest['id']}/0001.png" in page
    assert "red circle" not in page
    assert {line["state"] for line in lines} >= {"running", "ended"}
    assert "painting" in {line.get("stage") for line in lines}
    folder = home.config.outputs / manifest["client"] / manifest["id"]
    for artifact in manifest["artifacts"]:
        picture = np.asarray(Image.open(folder / artifact["file"])).astype(int)
        assert picture[64, 64, 0] > picture[64, 64, 2] + 80  # a red middle
        assert picture[4, 4, 2] > picture[4, 4, 0] + 80  # a blue corner
    assert "model_loading" in manifest["timings"]
    events = [line["event"] for line in log(home)]
    assert events.index("accepted") < events.index("started") < events.index("ended")
    assert "red circle" not in (home.root / "serve.log").read_text()  # prompts are nobody else's business


def test_the_daemon_stays_small(home: Home) -> None:
    with serving(home) as daemon:
        wait_for(lambda: worker(home).get("state") == "idle", home)
        fields = dict(line.split(":\t") for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines())
        assert int(fields["VmRSS"].removesuffix(" kB")) < 80_000


def test_a_job_released_by_sigterm_is_resumed_and_painted_pictures_are_kept(home: Home) -> None:
    with serving(home) as daemon:
        ref = home.drop(**JOB | {"num_inference_steps": 150, "count": 3})
        wait_for(lambda: worker(home).get("picture") == 1 or home.where(ref) == "done", home)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    assert home.where(ref) == "pending"
    draft = home.config.outputs / ".drafts" / ref.client / ref.id
    first = (draft / "0000.png").stat()
    with serving(home):
        wait_for(lambda: home.where(ref) == "done", home)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 1)
    assert (home.config.outputs / ref.client / ref.id / "0000.png").stat().st_mtime_ns == first.st_mtime_ns
    assert [artifact["seed"] for artifact in manifest["artifacts"]] == [7, 8, 9]


def test_a_killed_daemon_and_worker_lose_nothing_and_the_pixels_are_the_same(home: Home) -> None:
    job = JOB | {"num_inference_steps": 150, "count": 3}
    with serving(home) as daemon:
        undisturbed = home.drop(**job, nonce="undisturbed")
        wait_for(lambda: home.where(undisturbed) == "done", home)
        ref = home.drop(**job)
        wait_for(lambda: worker(home).get("job") == ref.id and worker(home).get("picture") == 1, home)
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
    assert home.where(ref) == "active"
    with serving(home):
        wait_for(lambda: home.where(ref) == "done", home)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 2)
    same = [artifact["pixels_sha256"] for artifact in home.manifest(undisturbed)["artifacts"]]
    assert [artifact["pixels_sha256"] for artifact in manifest["artifacts"]] == same
    assert [line["id"] for line in home.feed()] == [undisturbed.id, ref.id]


def is_kept(picture: Path) -> bool:
    """Whether it need not be painted again: it is saved, with a note, while the next one is painted."""
    note = picture.with_name(f".{picture.stem}.json")
    return note.exists() and note.read_bytes().endswith(b"}")


def test_a_set_that_is_killed_in_the_middle_goes_on_with_what_is_missing(home: Home) -> None:
    items = [{"name": f"{colour}-circle", "values": {"colour": colour}} for colour in ("red", "green", "blue")]
    job = JOB | {"prompt": "a large {colour} circle", "num_inference_steps": 150, "items": items}
    with serving(home) as daemon:
        ref = home.drop(**job)
        draft = home.config.outputs / ".drafts" / ref.client / ref.id
        wait_for(lambda: worker(home).get("picture") == 1 and is_kept(draft / "red-circle.png"), home)
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
    first = (draft / "red-circle.png").stat()
    assert not (draft / "green-circle.png").exists()
    with serving(home):
        wait_for(lambda: home.where(ref) == "done", home)
        alone = home.drop(**job | {"prompt": "a large green circle", "items": ...})
        wait_for(lambda: home.where(alone) == "done", home)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 2)
    folder = home.config.outputs / ref.client / ref.id
    assert (folder / "red-circle.png").stat().st_mtime_ns == first.st_mtime_ns
    names = [artifact["file"] for artifact in manifest["artifacts"]]
    assert names == ["red-circle.png", "green-circle.png", "blue-circle.png", "contact.png"]
    (plain,) = home.manifest(alone)["artifacts"]
    assert manifest["artifacts"][1]["pixels_sha256"] == plain["pixels_sha256"]


def test_an_edit_that_is_killed_at_any_stage_is_what_it_would_have_been(home: Home) -> None:
    """Daemon and worker, while the mask is made or the model read, and while its second picture is painted."""
    noise = np.random.default_rng(1).integers(0, 255, (128, 128, 3), np.uint8)
    front = home.config.reference / "shapes" / "front.png"
    front.parent.mkdir(parents=True)
    Image.fromarray(noise).save(front)
    job = JOB | {"kind": "edit", "image": "shapes/front", "mask": {"boxes": [[40, 40, 90, 90]]}, "count": 2}
    job |= {"num_inference_steps": 150}

    def killed(when: Callable[[dict[str, Any]], Any], ref: Ref) -> None:
        with serving(home) as daemon:
            wait_for(lambda: worker(home).get("job") == ref.id and when(worker(home)), home)
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()

    ref = home.drop(**job)
    killed(lambda seen: seen.get("stage") in ("masking", "model_loading"), ref)
    draft = home.config.outputs / ".drafts" / ref.client / ref.id
    killed(lambda seen: seen.get("picture") == 1 and is_kept(draft / "0000.png"), ref)
    first = (draft / "0000.png").stat()
    with serving(home):
        wait_for(lambda: home.where(ref) == "done", home)
        other = home.drop(**job, nonce="undisturbed")
        wait_for(lambda: home.where(other) == "done", home)
    manifest, undisturbed = home.manifest(ref), home.manifest(other)
    assert (manifest["outcome"], manifest["attempts"]) == ("succeeded", 3)
    folder = home.config.outputs / ref.client / ref.id
    assert (folder / "0000.png").stat().st_mtime_ns == first.st_mtime_ns
    same = [artifact["pixels_sha256"] for artifact in undisturbed["artifacts"]]
    assert [artifact["pixels_sha256"] for artifact in manifest["artifacts"]] == same
    with Image.open(folder / "0001.png") as image:
        made = np.asarray(image.convert("RGB")).copy()
    changed = (made != noise).any(axis=2)
    assert changed[50:80, 50:80].mean() > 0.9
    changed[30:100, 30:100] = False
    assert not changed.any()


def test_cancel_between_steps(home: Home) -> None:
    with serving(home):
        ref = home.drop(**JOB | {"num_inference_steps": 100, "count": 32})
        wait_for(lambda: worker(home).get("step"), home)
        done = imagend("cancel", ref.id, "--wait", cwd=home.root)
        assert done.returncode == 0
        assert "cancelled" in done.stdout
    assert home.outcome(ref) == "cancelled"
    assert home.manifest(ref)["artifacts"] == []


def test_a_second_daemon_is_refused_and_the_first_lives_on(home: Home) -> None:
    with serving(home) as daemon:
        wait_for(lambda: status(home).get("pid") == daemon.pid, home)
        second = imagend("serve", cwd=home.root)
        assert second.returncode == 69
        assert f"pid {daemon.pid}" in second.stderr
        assert daemon.poll() is None


def test_sighup_reads_the_configuration_again(home: Home) -> None:
    with serving(home) as daemon:
        wait_for(lambda: status(home), home)
        path = home.root / "config.yaml"
        path.write_text(path.read_text() + "max_attempts: none\n")
        daemon.send_signal(signal.SIGHUP)
        (reason,) = wait_for(lambda: status(home)["reasons"], home)
        assert "max_attempts" in reason
        assert status(home)["state"] == "degraded"


def test_serve_without_a_config_names_the_next_step(tmp_path: Path) -> None:
    done = imagend("serve", "--config", tmp_path / "none.yaml", cwd=tmp_path)
    assert done.returncode == 78
    assert "imagend init" in done.stderr


def test_serve_with_broken_keys_does_not_start_and_rejects_nobody(home: Home) -> None:
    ref = home.drop()
    (home.root / "keys" / "allowed_signers").write_text("alice no key\n")
    done = imagend("serve", cwd=home.root)
    assert done.returncode == 78
    assert "line 1" in done.stderr
    assert (home.config.inboxes[0] / f"{ref.id}.json").exists()


def test_an_inbox_that_is_not_there_degrades_the_daemon_and_may_come_later(home: Home) -> None:
    home.config.inboxes[0].rmdir()
    with serving(home):
        wait_for(lambda: status(home).get("state") == "degraded" and status(home)["reasons"], home)
        home.config.inboxes[0].mkdir()
        ref = home.drop(**JOB)
        wait_for(lambda: home.where(ref) == "done", home)
    assert home.outcome(ref) == "succeeded"


def test_replay_is_the_same_bit_for_bit_until_a_weight_is_another(home: Home) -> None:
    from safetensors.torch import load_file, save_file

    models = home.root / "models"
    shutil.copytree(home.config.models / "diffusers" / "shapes-xl", models / "diffusers" / "shapes-xl")
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace(f"models: {home.config.models}", f"models: {models}"))
    with serving(home) as daemon:
        ref = home.drop(**JOB | {"count": 2, "scheduler": "Euler a"})
        wait_for(lambda: home.where(ref) == "done", home)
        done = imagend("replay", ref.id, cwd=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"{ref}: painted again, the same bit for bit"
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    (weights,) = (models / "diffusers" / "shapes-xl" / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 0.1
    save_file(tensors, weights)
    with serving(home):
        done = imagend("replay", ref.id, "--json", cwd=home.root)
    told = json.loads(done.stdout)
    assert (done.returncode, told["equal"]) == (5, False)
    components = [difference["component"] for difference in told["differences"]]
    assert components == ["model.sha256", f"model.files.vae/{weights.name}"]
