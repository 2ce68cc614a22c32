"""Shortages of memory, as the daemon sees them: in the log, in the manifest, and remembered over restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, run_until_idle
from fakes import FakeExecutor, paint
from structlog.testing import capture_logs

from imagend.daemon import remembered
from imagend.daemon.executor import Heard
from imagend.daemon.loop import Daemon
from imagend.daemon.remembered import FILE, MAX_ENTRIES, Remembered
from imagend.errors import OutOfMemory
from imagend.job import Outcome, Ref
from imagend.messages import Ended, Failure, MemoryShort, Run

SEEN = {"model": "shapes-xl", "peaks": {"resident/painting": 5}, "estimates": {}, "failed": {"resident/decoding": 9}}


def told(key: str = "k", **fields: Any) -> dict[str, Any]:
    return {"mode": "resident", "seen": {"key": key} | SEEN | fields}


class Squeezed(FakeExecutor):
    """Runs out of memory: once, or, if the prompt says so, until it gives up. Then tells what it saw."""

    def attempt(self, worker: str, run: Run) -> None:
        def short(job: Ref, then: str | None) -> None:
            self.mailbox.put(Heard(worker, MemoryShort(job=job, stage="painting", rung="resident", then=then)))

        short(Ref("mallory", run.job.id), "group_offload")  # a late word
        short(run.job, "model_offload")
        if run.spec["prompt"] == "give up":
            short(run.job, None)
            failure = Failure.of(OutOfMemory("cuda:0", 64, 64, "resident", "None fits"))
            ended = Ended(job=run.job, outcome=Outcome.FAILED, failure=failure, memory=told())
        else:
            artifacts = tuple(paint(Path(run.folder), index, seed) for index, seed in enumerate(run.spec["seeds"]))
            ended = Ended(job=run.job, outcome=Outcome.SUCCEEDED, artifacts=artifacts, memory=told())
        self.mailbox.put(Heard(worker, ended))


def serve(home: Home, **fields: Any) -> tuple[Ref, list[Any], Daemon]:
    """One job, the log of it, and the daemon, which has let go of the spool."""
    ref = home.drop(**fields)
    with capture_logs() as log:
        daemon = home.daemon(Squeezed)
        run_until_idle(daemon)
    daemon.spool.close()
    return ref, [line for line in log if line["event"].startswith("out of memory")], daemon


def test_a_rung_is_a_warning_in_the_log_and_stands_in_the_manifest(home: Home) -> None:
    ref, log, _ = serve(home)
    assert [(line["log_level"], line["stage"], line["rung"], line["then"]) for line in log] == [
        ("warning", "painting", "resident", "model_offload")
    ]
    assert log[0]["job"] == str(ref)
    assert home.manifest(ref)["memory"] == told()


def test_the_end_of_the_ladder_is_an_error_in_the_log(home: Home) -> None:
    ref, log, _ = serve(home, prompt="give up")
    assert [line["log_level"] for line in log] == ["warning", "error"]
    assert home.manifest(ref)["error"]["code"] == "OUT_OF_MEMORY"
    assert home.manifest(ref)["memory"] == told()


def test_the_next_worker_is_told_what_the_last_one_saw_also_after_a_restart(home: Home) -> None:
    _, _, daemon = serve(home, nonce="1")
    assert daemon.executor.runs[0].known.memory == {}  # type: ignore[attr-defined]
    _, _, daemon = serve(home, nonce="2")
    assert daemon.executor.runs[0].known.memory == {"k": SEEN}  # type: ignore[attr-defined]


def test_only_what_was_seen_of_the_model_is_told(tmp_path: Path) -> None:
    kept = Remembered(tmp_path)
    kept.learn(told("a"))
    kept.learn(told("b", model="other"))
    assert kept.of("shapes-xl") == {"a": SEEN}
    assert Remembered(tmp_path).of("other") == {"b": SEEN | {"model": "other"}}
    assert Remembered(tmp_path).of("none") == {}


def test_a_worker_is_told_of_the_jobs_size_first_and_not_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "MAX_TOLD", 3)
    kept = Remembered(tmp_path)
    for key in ("a|64x64", "b|64x128", "c|64x64", "d|64x128", "e|64x128"):
        kept.learn(told(key))
    assert kept.of("shapes-xl", 64, 64).keys() == {"a|64x64", "c|64x64", "e|64x128"}


def test_what_was_told_of_longest_ago_is_forgotten_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MAX_ENTRIES", 3)
    kept = Remembered(tmp_path)
    for key in "abcad":
        kept.learn(told(key, peaks={"resident/painting": ord(key)} | ({"x": 1} if kept.of("shapes-xl") else {})))
    assert list(kept.of("shapes-xl")) == list(Remembered(tmp_path).of("shapes-xl")) == ["c", "a", "d"]
    assert MAX_ENTRIES == 512


@pytest.mark.parametrize(
    "memory",
    [
        None,
        {},
        {"seen": None},
        {"seen": {"key": "k"}},
        {"seen": {"key": 7} | SEEN},
        {"seen": {"key": "k" * 300} | SEEN},
        told(peaks={"a": -1}),
        told(peaks={"a": 1 << 60}),
        told(peaks={"a" * 65: 1}),
        told(peaks={str(number): 1 for number in range(65)}),
        told(surplus=1),
        told(model="m" * 257),
    ],
)
def test_nonsense_is_not_kept(tmp_path: Path, memory: Any) -> None:
    kept = Remembered(tmp_path)
    kept.learn(memory)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"schema": "other", "entries": {}}', '{"schema": "imagend.memory/v1"}', "[" * 9**5]
)
def test_a_damaged_file_costs_the_memory_and_nothing_else(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    kept = Remembered(tmp_path)
    assert kept.of("shapes-xl") == {}
    kept.learn(told())
    assert Remembered(tmp_path).of("shapes-xl") == {"k": SEEN}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps({"schema": "imagend.memory/v1", "entries": {"k": SEEN}}))
    (tmp_path / FILE).symlink_to(elsewhere)
    assert Remembered(tmp_path).of("shapes-xl") == {}


def test_news_only_is_written(tmp_path: Path) -> None:
    kept = Remembered(tmp_path)
    kept.learn(told())
    (tmp_path / FILE).unlink()
    kept.learn(told())
    assert not (tmp_path / FILE).exists()


def test_a_full_disk_costs_the_memory_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered.files, "replace_hint", full)
    kept = Remembered(tmp_path)
    kept.learn(told())
    assert kept.of("shapes-xl") == {"k": SEEN}
