"""Chained jobs as the daemon has them: a folder for each step, told step by step; what stays when the second fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until, run_until_idle
from test_cli import imagend
from test_events import told

from imagend import results
from imagend.cli import look
from imagend.client import Client
from imagend.daemon.loop import Daemon
from imagend.job import Ref
from imagend.outputs import Outputs

CHAIN: dict[str, Any] = {"chain": {"upscale": {}}}
BOTH = {f"{name}/000{index}.png" for name in ("generate", "upscale") for index in (0, 1)}


def published(home: Home, ref: Ref) -> set[str]:
    folder = home.config.outputs / ref.client / ref.id
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_result_has_a_folder_for_each_step(home: Home) -> None:
    ref = home.drop(seeds=[7, 9], **CHAIN)
    run_until_idle(home.daemon())
    artifacts = home.manifest(ref)["artifacts"]
    assert [(one["file"], one["index"], one["seed"]) for one in artifacts] == [
        ("generate/0000.png", 0, 7),
        ("generate/0001.png", 1, 9),
        ("upscale/0000.png", 0, 7),
        ("upscale/0001.png", 1, 9),
    ]
    assert published(home, ref) == BOTH | {"manifest.json"}
    folder = home.config.outputs / ref.client / ref.id
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())}
    assert modes == {ref.id: "0o750", "generate": "0o750", "upscale": "0o750", "manifest.json": "0o640"}
    assert (folder / "upscale" / "0000.png").stat().st_mode & 0o777 == 0o640
    assert home.feed()[0]["files"] == [one["file"] for one in artifacts]


def test_its_events_tell_the_steps_and_their_stages_and_progress_never_falls(home: Home) -> None:
    ref = home.drop(count=2, **CHAIN)
    run_until_idle(home.daemon())
    happened = [(event["type"].removeprefix("imagend."), event["data"]) for event in told(home) if "subject" in event]
    happened = [(word, data) for word, data in happened if data.get("id") == ref.id]
    chained = [
        (word, data.get("chain_step"), data.get("stage"), data.get("file"))
        for word, data in happened
        if word in ("step.start", "step.finish", "artifact.written", "completed")
    ]
    stages = {
        name: [(word, name, f"{name}-ing", None) for word in ("step.start", "step.finish")] * 2
        for name in ("generate", "upscale")
    }
    assert chained == [
        ("step.start", "generate", None, None),
        *stages["generate"],
        ("step.finish", "generate", None, None),
        ("step.start", "upscale", None, None),
        *stages["upscale"],
        ("step.finish", "upscale", None, None),
        *(("artifact.written", None, None, file) for file in sorted(BOTH)),
        ("completed", None, None, None),
    ]
    progress = [data["progress"] for word, data in happened if word in ("step.start", "generating") and "stage" in data]
    assert progress == sorted(progress)
    assert all("seconds" in data for word, data in happened if word == "step.finish")


@pytest.mark.parametrize("prompt", ["upscaling fails", "upscaling dies"])
def test_what_was_painted_stays_when_upscaling_fails(home: Home, prompt: str) -> None:
    ref, after = home.drop("a.json", prompt=prompt, count=2, **CHAIN), home.drop("b.json")
    run_until_idle(home.daemon(max_attempts=1))
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["attempts"]) == ("failed", 1)
    assert [one["file"] for one in manifest["artifacts"]] == ["generate/0000.png", "generate/0001.png"]
    assert published(home, ref) == {"generate/0000.png", "generate/0001.png", "manifest.json"}
    assert [event["data"]["file"] for event in told(home) if event["type"] == "imagend.artifact.written"][:2] == [
        "generate/0000.png",
        "generate/0001.png",
    ]
    assert published(home, after) == {"0000.png", "manifest.json"}


@pytest.mark.parametrize("prompt", ["fail", "die", "upscaling lies"])
def test_nothing_stays_when_painting_fails_or_what_was_made_is_not_as_told(home: Home, prompt: str) -> None:
    ref = home.drop(prompt=prompt, count=2, **CHAIN)
    run_until_idle(home.daemon(max_attempts=1))
    assert (home.outcome(ref), home.manifest(ref)["artifacts"]) == ("failed", [])
    assert published(home, ref) == {"manifest.json"}


def test_nothing_stays_of_a_job_that_is_cancelled_while_it_upscales(home: Home) -> None:
    ref = home.drop(prompt="upscaling stays", **CHAIN)
    daemon = home.daemon()
    run_until(daemon, lambda: at_upscaling(daemon))
    home.drop(kind="cancel", job=ref.id, prompt=...)
    run_until_idle(daemon)
    assert (home.outcome(ref), published(home, ref)) == ("cancelled", {"manifest.json"})


def at_upscaling(daemon: Daemon) -> bool:
    running = daemon.slots["cpu0"].running
    return running is not None and running.progress is not None and running.progress.chain_step == "upscale"


def test_status_says_which_step_it_is_and_how_far(home: Home) -> None:
    ref = home.drop(prompt="upscaling stays", count=2, **CHAIN)
    daemon = home.daemon()
    run_until(daemon, lambda: at_upscaling(daemon))
    run_until(daemon, lambda: look.look(home.config, ref).worker.get("progress") == 1.0)
    worker = look.look(home.config, ref).worker
    assert (worker["stage"], worker["chain_step"]) == ("upscale-ing", "upscale")
    job = client(home).job(ref.id)
    run_until(daemon, lambda: job.state().get("progress") == 1.0)


def client(home: Home) -> Client:
    return Client(home.client, home.config.inboxes[0], home.config.outputs, "key")


def test_what_readers_of_results_do_with_folders(home: Home, tmp_path: Path) -> None:
    ref = home.drop(**CHAIN)
    run_until_idle(home.daemon())
    folder = home.config.outputs / ref.client / ref.id
    copied = results.copy(folder, tmp_path / "copy", home.manifest(ref))
    assert {str(path.relative_to(tmp_path / "copy")) for path in copied} == {
        "generate/0000.png",
        "upscale/0000.png",
        "manifest.json",
    }
    (found,) = results.found(home.config.outputs)
    assert found.size > sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    pictures = client(home).job(ref.id).wait().pictures
    assert [picture.save(tmp_path / "saved").name for picture in pictures] == [
        f"{ref.id}-generate-0000.png",
        f"{ref.id}-upscale-0000.png",
    ]


def test_a_result_is_removed_whole(home: Home) -> None:
    ref = home.drop(**CHAIN)
    run_until_idle(home.daemon())
    outputs = Outputs(home.config.outputs)
    outputs.open()
    outputs.withdraw(ref)
    assert not (home.config.outputs / ref.client / ref.id).exists()
    assert list((home.config.outputs / ".trash").iterdir()) == []


def test_submit_chains(home: Home) -> None:
    done = imagend("submit", "generate", "--prompt", "a circle", "--chain-upscale", "4:esrgan 4x", cwd=home.root)
    assert done.returncode == 0, done.stderr
    run_until_idle(daemon := home.daemon())
    (run,) = daemon.executor.runs  # type: ignore[attr-defined]
    assert run.spec["chain"] == {"upscale": {"scale": 4, "upscaler": "esrgan 4x", "strength": None}}
    for text, chosen in (("2::0.3", {}), ("2:esrgan: 4x:0.3", {"upscaler": "esrgan: 4x"})):
        done = imagend("submit", "generate", "--prompt", "a circle", "--chain-upscale", text, cwd=home.root)
        assert done.returncode == 0, done.stderr
        run_until_idle(daemon)
        asked = {"scale": 2, "upscaler": "Lanczos", "strength": 0.3} | chosen
        assert daemon.executor.runs[-1].spec["chain"] == {"upscale": asked}  # type: ignore[attr-defined]
    refused = imagend("submit", "generate", "--prompt", "a circle", "--chain-upscale", "3", cwd=home.root)
    assert refused.returncode == 64
    assert "chain.upscale.scale: 3 should be 2 or 4" in refused.stderr
