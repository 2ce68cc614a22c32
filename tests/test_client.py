"""imagend.client: the one file for other hosts, alone in a folder, against the daemon's own loop."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, REPOSITORY, Home, run_until, run_until_idle, step
from fakes import FakeExecutor

from imagend.client import Cancelled, Client, Failed, Picture, Rejected
from imagend.daemon.loop import Daemon


@pytest.fixture
def farm(home: Home) -> Client:
    return Client(CLIENT, home.config.inboxes[0], home.config.outputs, home.root / "keys" / "id_ed25519")


def meanwhile(daemon: Daemon, call: Callable[[], Any]) -> Any:
    """What a call returns, or raises, while the daemon goes on."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        step(daemon)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def test_the_readmes_script_runs_where_only_the_file_is(home: Home, tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert script
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "client.py").write_bytes((REPOSITORY / "imagend" / "client.py").read_bytes())
    text = script[1].replace("/mnt/farm/inbox", str(home.config.inboxes[0]))
    text = text.replace("/mnt/farm/outputs", str(home.config.outputs))
    text = text.replace("~/.ssh/id_ed25519", str(home.root / "keys" / "id_ed25519"))
    (place / "script.py").write_text(text)
    daemon = home.daemon()
    done = meanwhile(
        daemon,
        lambda: subprocess.run(
            [sys.executable, "-S", "script.py"], cwd=place, capture_output=True, text=True, timeout=60
        ),
    )
    assert done.returncode == 0, done.stderr
    (line,) = home.feed()
    saved = sorted(path.name for path in (place / "pictures").iterdir())
    assert saved == [f"{line['id']}-{index:04d}.png" for index in range(4)]
    assert (home.config.outputs / CLIENT / line["id"] / "retrieved").exists()


def test_states_are_told_on_the_way_and_pictures_are_checked(home: Home, farm: Client) -> None:
    daemon, seen = home.daemon(), list[str]()
    job = farm.submit("generate", prompt="“a red circle”", seeds=[3, 9])
    assert job.state() == {"state": "unknown"}
    result = meanwhile(daemon, lambda: job.wait(60, lambda state: seen.append(state["state"])))
    assert seen[-1] == "succeeded"
    assert [picture.seed for picture in result.pictures] == [3, 9]
    assert result.pictures[1].read() == b"picture of seed 9"
    assert result.manifest["spec"]["prompt"] == "“a red circle”"
    result.pictures[0].path.write_bytes(b"another")
    with pytest.raises(ValueError, match="as its manifest says"):
        result.pictures[0].read()


def test_why_a_job_failed_or_was_rejected_is_raised(home: Home, farm: Client) -> None:
    daemon = home.daemon()
    failing, wrong = farm.submit("generate", prompt="fail"), farm.submit("generate", prompt="x", width=1)
    run_until_idle(daemon)
    with pytest.raises(Failed, match="failed: no") as failed:
        failing.wait(0)
    assert failed.value.code == "INVALID_PARAMETERS"
    with pytest.raises(Rejected, match="rejected: width: ") as rejected:
        wrong.wait(0)
    assert (rejected.value.code, rejected.value.document["error"]["status"]) == ("INVALID_PARAMETERS", 422)


def test_a_client_with_a_folder_of_its_own_uses_that(home: Home, farm: Client) -> None:
    (home.config.inboxes[0] / CLIENT).mkdir()
    good, wrong = farm.submit("generate", prompt="x"), farm.submit("generate", prompt="x", width=1)
    assert len(list((home.config.inboxes[0] / CLIENT).iterdir())) == 2
    run_until_idle(home.daemon())
    assert good.wait(0).pictures
    with pytest.raises(Rejected):
        wrong.wait(0)


def test_a_wait_ends_and_the_job_goes_on_until_it_is_cancelled(home: Home, farm: Client) -> None:
    daemon = home.daemon()
    job = farm.submit("generate", prompt="stay")
    run_until(daemon, lambda: daemon.busy)
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(0)
    wish = farm.job(job.id).cancel()
    assert wish.id != job.id
    run_until_idle(daemon)
    with pytest.raises(Cancelled):
        job.wait(0)


def test_a_picture_is_sent_along(home: Home, farm: Client, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"what it holds is looked at by the worker")
    name = farm.attach(tmp_path / "photo.png")
    job = farm.submit("upscale", image=name)
    daemon = home.daemon()
    run_until(daemon, lambda: bool(daemon.executor.runs))  # type: ignore[attr-defined]
    assert isinstance(daemon.executor, FakeExecutor)
    place = daemon.executor.runs[0].pictures[name]
    assert job.id in place or Path(place).read_bytes() == (tmp_path / "photo.png").read_bytes()


def test_a_key_that_is_not_there_is_named(home: Home, tmp_path: Path) -> None:
    lost = Client(CLIENT, home.config.inboxes[0], home.config.outputs, tmp_path / "none")
    with pytest.raises(RuntimeError, match=f"cannot sign with {tmp_path}/none: "):
        lost.submit("generate", prompt="x")
    assert not list(home.config.inboxes[0].iterdir())


def test_pictures_of_two_folders_do_not_overwrite_each_other(tmp_path: Path) -> None:
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for step_name in ("generate", "upscale"):
        (tmp_path / "0123" / step_name).mkdir(parents=True)
        (tmp_path / "0123" / step_name / "0000.png").touch()
        artifact = {"file": f"{step_name}/0000.png", "seed": 1, "sha256": digest}
        saved = Picture(tmp_path / "0123", artifact).save(tmp_path / "saved")
        assert saved.name == f"0123-{step_name}-0000.png"
