"""The safety filter as the daemon has it: who is filtered, and what becomes of a job of which pictures are withheld."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Home, run_until_idle
from test_cli import imagend

from imagend.client import Client, Partial
from imagend.config import load
from imagend.rights import Rights


@pytest.mark.parametrize(
    ("for_all", "own", "mode"),
    [
        ("off", None, None),
        ("off", "off", None),
        ("off", "flag", "flag"),
        ("flag", None, "flag"),
        ("flag", "off", "flag"),
        ("flag", "block", "block"),
        ("block", "flag", "block"),
    ],
)
def test_the_stricter_of_both_is_in_force(home: Home, for_all: Any, own: Any, mode: str | None) -> None:
    home.drop()
    daemon = home.daemon(safety=for_all, clients={"alice": Rights(safety=own)})
    run_until_idle(daemon)
    (run,) = daemon.executor.runs  # type: ignore[attr-defined]
    assert (run.safety and run.safety.mode) == mode


def test_off_is_what_yaml_takes_for_no(home: Home) -> None:
    path = home.root / "config.yaml"
    path.write_text("safety: off\nclients: {bob: {safety: block}}\nsafety_classifier: {labels: [gore]}\n")
    config = load(path)
    assert config.filter_for("alice") is None
    found = config.filter_for("bob")
    assert found is not None
    assert (found.mode, found.classifier.labels) == ("block", ("gore",))


def test_a_job_of_which_some_is_withheld_is_partial(home: Home) -> None:
    ref = home.drop(prompt="unsafe", seeds=[7, 8])
    run_until_idle(home.daemon(safety="block"))
    manifest = home.manifest(ref)
    assert manifest["outcome"] == "partial"
    assert [one["file"] for one in manifest["artifacts"]] == ["0001.png"]
    (withheld,) = manifest["safety"]["withheld"]
    assert (withheld["index"], withheld["seed"], withheld["label"], withheld["score"]) == (0, 7, "nsfw", 0.9)
    folder = home.config.outputs / ref.client / ref.id
    assert {path.name for path in folder.iterdir()} == {"0001.png", "manifest.json"}
    client = Client(home.client, home.config.inboxes[0], home.config.outputs, "key")
    with pytest.raises(Partial) as caught:
        client.job(ref.id).wait()
    assert caught.value.failed == {"0000": {"code": "WITHHELD", "message": "nsfw"}}
    done = imagend("watch", ref.id, cwd=home.root)
    assert done.returncode == 7
    assert "picture 0 (seed 7) is withheld: nsfw, 90%" in done.stdout


def test_a_job_of_which_all_is_withheld_has_failed(home: Home) -> None:
    ref = home.drop(prompt="unsafe")
    run_until_idle(home.daemon(safety="block"))
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["error"]["code"], manifest["artifacts"]) == ("failed", "WITHHELD", [])
    assert manifest["safety"]["withheld"][0]["label"] == "nsfw"


def test_a_worker_that_keeps_what_it_says_it_withholds_publishes_none_of_it(home: Home) -> None:
    """The file lies in the draft all the same: it is a stray."""
    ref = home.drop(prompt="unsafe", seeds=[7, 8])
    daemon = home.daemon(safety="block")
    draft = home.config.outputs / ".drafts" / ref.client / ref.id
    send = daemon.executor.send

    def keeping(worker: str, message: Any) -> None:
        send(worker, message)
        if message.type == "run":
            (draft / "0000.png").write_bytes(b"unsafe")

    daemon.executor.send = keeping  # type: ignore[method-assign]
    run_until_idle(daemon)
    folder = home.config.outputs / ref.client / ref.id
    assert {path.name for path in folder.iterdir()} == {"0001.png", "manifest.json"}


@pytest.mark.parametrize(
    ("keys", "level", "words"),
    [
        ("", "ok", "no safety filter"),
        ("safety: flag\n", "error", "the safety filter is on: flag, and jobs fail: not one in models/safety/"),
        ("clients: {bob: {safety: block}}\n", "error", "the safety filter is on: off (bob: block), and jobs fail"),
    ],
)
def test_check_says_whether_a_filter_is_on_and_can_work(home: Home, keys: str, level: str, words: str) -> None:
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace(str(home.config.models), str(home.root / "models")) + keys)
    (home.root / "models").mkdir()
    (home.root / "models" / "diffusers").symlink_to(home.config.models / "diffusers")
    assert (level, words) in [(one[0], one[1][: len(words)]) for one in findings(home)]
    classifiers = pytest.importorskip("classifiers", reason="needs the engine: pip install 'imagend[engine]'")
    classifiers.save(home.root / "models" / "safety" / "it")
    (told,) = (what for _, what in findings(home) if "safety filter" in what)
    assert told.endswith(", by it") == bool(keys)


def findings(home: Home) -> list[tuple[str, str]]:
    done = imagend("check", "--json", cwd=home.root)
    return [(one["level"], one["what"]) for one in json.loads(done.stdout)]
