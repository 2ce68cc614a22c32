"""Sets as the daemon and its clients see them: outcomes, names, what is told where, what a worker may not say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle
from fakes import FakeExecutor, paint

from imagend import feed
from imagend.cli.watch import EXIT_STATUS
from imagend.client import Client, Partial
from imagend.daemon.executor import Heard
from imagend.daemon.loop import Daemon
from imagend.errors import UnsupportedSetting
from imagend.fields import Planned
from imagend.job import Outcome, Ref
from imagend.messages import Ended, Failure, Run

ITEMS = [{"name": name, "values": {"x": "red"}} for name in ("good", "bad-one", "better")]
SET = {"prompt": "a {x} circle", "items": ITEMS, "seed": 7}


def imagend(*arguments: object, cwd: Path) -> Any:
    command = [sys.executable, "-m", "imagend", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def events(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line, _ in feed.lines(home.config.spool / "events.jsonl", None)]


def test_some_items_fail_and_the_others_are_published(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(**SET)
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert manifest["outcome"] == "partial"
    assert [one.get("item") for one in manifest["artifacts"]] == ["good", "better", None]
    assert [one["file"] for one in manifest["artifacts"]] == ["good.png", "better.png", "contact.png"]
    assert [one.get("role") for one in manifest["artifacts"]] == [None, None, "contact_sheet"]
    error = Failure.of(UnsupportedSetting("no")).error.model_dump()
    assert manifest["items"] == [
        {"name": "good", "outcome": "succeeded"},
        {"name": "bad-one", "outcome": "failed", "error": error},
        {"name": "better", "outcome": "succeeded"},
    ]
    assert "error" not in manifest
    folder = home.config.outputs / ref.client / ref.id
    assert {path.name for path in folder.iterdir()} == {"good.png", "better.png", "contact.png", "manifest.json"}
    assert daemon.health.totals == {"succeeded": 0, "partial": 1, "failed": 0, "cancelled": 0}


def test_all_items_are_well_and_the_spec_is_whole(home: Home) -> None:
    daemon = home.daemon()
    refs = [
        home.drop(**SET | {"items": [ITEMS[0], ITEMS[2] | {"seed": 3}], "count": 2, "seed": seed}) for seed in (7, ...)
    ]
    run_until_idle(daemon)
    for ref, seed in zip(refs, (7, int(refs[1].id[:8], 16)), strict=True):
        manifest = home.manifest(ref)
        assert (manifest["outcome"], manifest["spec"]["count"], manifest["spec"]["seeds"]) == ("succeeded", 2, None)
        assert [item["seed"] for item in manifest["spec"]["items"]] == [seed, 3]
        assert [one["outcome"] for one in manifest["items"]] == ["succeeded", "succeeded"]
        assert [(one["file"], one.get("seed")) for one in manifest["artifacts"]] == [
            ("good-0000.png", seed),
            ("good-0001.png", seed + 1),
            ("better-0000.png", 3),
            ("better-0001.png", 4),
            ("contact.png", None),
        ]


def test_a_job_that_is_no_set_has_no_items_in_its_manifest(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(prompt="a {red} circle")
    run_until_idle(daemon)
    assert "items" not in home.manifest(ref)
    assert home.manifest(ref)["spec"]["prompt"] == "a {red} circle"


def test_feeds_tell_of_the_end_and_repeat_no_name(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(**SET)
    run_until_idle(daemon)
    daemon.health.write(0.0, "ready", (), daemon.turn, ())
    (line,) = home.feed()
    assert (line["outcome"], line["files"], line["code"]) == ("partial", [None, None, "contact.png"], None)
    told = [event for event in events(home) if event["data"].get("id") == ref.id]
    (end,) = (event for event in told if event["type"] == "imagend.partial")
    assert end["data"]["pictures"] == 2
    written = [event["data"]["file"] for event in told if event["type"] == "imagend.artifact.written"]
    assert written == [None, None, "contact.png"]
    assert "better" not in (home.config.spool / "events.jsonl").read_text()


def test_what_a_shell_hears_of_it(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(**SET)
    run_until_idle(daemon)
    assert set(EXIT_STATUS) >= set(Outcome)
    done = imagend("watch", ref.id, cwd=home.root)
    assert (done.returncode, "bad-one: no" in done.stdout) == (7, True)
    done = imagend("retrieve", ref.id, "here", cwd=home.root)
    assert done.returncode == 7
    assert (home.root / "here" / ref.id / "better.png").exists()
    done = imagend("history", "--json", "--failed", cwd=home.root)
    told = json.loads(done.stdout)
    assert (told["total"]["partial"], told["total"]["success_ratio"]) == (1, 0.0)
    assert [(job["outcome"], job["pictures"]) for job in told["jobs"]] == [("partial", 2)]
    done = imagend("requeue", ref.id, cwd=home.root)
    assert (done.returncode, "has pictures" in done.stderr) == (64, True)


def test_a_client_gets_what_there_is_with_the_reasons(home: Home) -> None:
    farm = Client(CLIENT, home.config.inboxes[0], home.config.outputs, home.root / "keys" / "id_ed25519")
    daemon = home.daemon()
    job, hopeless = farm.submit("generate", **SET), farm.submit("generate", prompt="fail {x}", items=ITEMS[:1])
    whole = farm.submit("generate", prompt="{x}", items=ITEMS[:1])
    run_until_idle(daemon)
    with pytest.raises(Partial, match="partial: bad-one") as caught:
        job.wait(timeout=60)
    assert list(caught.value.failed) == ["bad-one"]
    assert [picture.item for picture in caught.value.result.pictures] == ["good", "better", None]
    assert [picture.read() for picture in caught.value.result.pictures]
    assert [picture.role for picture in whole.wait(timeout=60).pictures] == [None, "contact_sheet"]
    assert hopeless.wait(timeout=60)


def meanwhile(home: Home, daemon: Daemon, *arguments: object) -> tuple[int, str]:
    """The exit status and the words of a command that waits, while the daemon goes on."""
    command = [sys.executable, "-m", "imagend", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=home.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run_until(daemon, lambda: process.poll() is not None)
    return process.returncode, process.communicate()[0]


def test_what_is_missing_is_painted_with_the_seeds_it_would_have_had(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(**SET | {"seed": ..., "count": 2})
    run_until_idle(daemon)
    status, _ = meanwhile(home, daemon, "redo", ref.id, "--item", "bad-one:x=green", "--wait")
    (again,) = (
        path.name for path in (home.config.outputs / CLIENT).iterdir() if len(path.name) == 20 and path.name != ref.id
    )
    assert status == 1  # it is as bad as it was: of this set all have failed
    manifest = home.manifest(Ref(CLIENT, again))
    assert (manifest["label"], manifest["items"][0]["outcome"]) == (f"redo of {ref}", "failed")
    seed = int(ref.id[:8], 16)
    assert manifest["spec"]["items"] == [{"name": "bad-one", "values": {"x": "green"}, "seed": seed}]
    assert (manifest["spec"]["count"], manifest["spec"]["prompt"]) == (2, SET["prompt"])


@pytest.mark.parametrize(
    ("job", "options", "said"),
    [
        ({"prompt": "a circle"}, [], "Nothing is missing"),
        (SET | {"items": ITEMS[:1]}, [], "Nothing is missing"),
        (SET, ["--item", "good:x=blue"], "good is none of what is missing of"),
        (SET, ["--item", "bad-one:y=blue"], "that no prompt uses"),
    ],
)
def test_what_cannot_be_painted_again_is_said(home: Home, job: dict[str, Any], options: list[str], said: str) -> None:
    daemon = home.daemon()
    ref = home.drop(**job)
    run_until_idle(daemon)
    done = imagend("redo", ref.id, *options, cwd=home.root)
    assert (done.returncode, said in done.stderr) == (64, True), done.stderr


def test_a_set_in_part_is_replayed_as_it_was(home: Home) -> None:
    daemon = home.daemon()
    ref = home.drop(**SET)
    run_until_idle(daemon)
    status, words = meanwhile(home, daemon, "replay", ref.id)
    assert (status, "the same bit for bit" in words) == (0, True)


class Liar(FakeExecutor):
    """Says of items what is not so."""

    failed: Mapping[str, str] = {}
    outcome = Outcome.PARTIAL
    planned: tuple[Planned, ...] = ()

    def attempt(self, worker: str, run: Run) -> None:
        error = Failure.of(UnsupportedSetting("no")).error
        made = tuple(paint(Path(run.folder), index, plan.seed, plan) for index, plan in enumerate(self.planned))
        failed = dict.fromkeys(self.failed, error)
        self.mailbox.put(Heard(worker, Ended(job=run.job, outcome=self.outcome, artifacts=made, failed=failed)))


SHEET = Planned("contact.png", None, None, "contact_sheet")
GOOD, BAD = Planned("good.png", 7, "good"), Planned("bad-one.png", 7, "bad-one")


@pytest.mark.parametrize(
    ("failed", "planned"),
    [
        (["stranger"], (GOOD, BAD, SHEET)),
        (["bad-one"], (GOOD, BAD, SHEET)),
        (["bad-one", "good"], (SHEET,)),
        (["bad-one"], (GOOD,)),
        (["bad-one"], (GOOD, SHEET._replace(role=None))),
        (["bad-one"], (GOOD._replace(item="bad-one"), SHEET)),
        ([], (GOOD, SHEET)),
    ],
)
def test_a_worker_that_tells_of_other_items_is_not_believed(
    home: Home, failed: list[str], planned: tuple[Planned, ...]
) -> None:
    outcome = Outcome.PARTIAL if failed else Outcome.SUCCEEDED
    liar = type("Liar", (Liar,), {"failed": failed, "planned": planned, "outcome": outcome})
    daemon = home.daemon(liar)
    ref: Ref = home.drop(**SET | {"items": ITEMS[:2]})
    run_until_idle(daemon)
    manifest = home.manifest(ref)
    assert (manifest["outcome"], manifest["error"]["code"], manifest["artifacts"]) == ("failed", "INTERNAL", [])
    assert "succeeded" not in {item["outcome"] for item in manifest.get("items", ())}


@pytest.mark.parametrize(("outcome", "failed"), [("succeeded", ["a"]), ("partial", []), ("cancelled", ["a"])])
def test_a_word_that_contradicts_itself_is_none(outcome: str, failed: list[str]) -> None:
    error = Failure.of(UnsupportedSetting("no")).error
    with pytest.raises(ValueError, match="succeeds in part"):
        Ended(job=Ref("a", "0" * 20), outcome=Outcome(outcome), failed=dict.fromkeys(failed, error))


TABLE = 'name,seed,x\r\ngood,7,red\r\nbetter,,"blue, or so"\r\n'


def submitted(home: Home, *options: object) -> Any:
    done = imagend("submit", "generate", "--prompt", "a {x} circle", *options, cwd=home.root)
    if done.returncode:
        return done.stderr
    (path,) = home.config.inboxes[0].glob("*.json")
    job = json.loads(path.read_text())
    path.unlink()
    return job["items"]


def test_a_set_is_submitted_from_a_table_or_from_options(home: Home) -> None:
    (home.root / "cars.csv").write_text(TABLE)
    good = {"name": "good", "values": {"x": "red"}, "seed": 7}
    assert submitted(home, "--set", "cars.csv") == [good, {"name": "better", "values": {"x": "blue, or so"}}]
    options = ("--item", "good:x=red", "--item", "good:seed=7", "--item", "new:x=a=b:c")
    assert submitted(home, *options) == [good, {"name": "new", "values": {"x": "a=b:c"}}]
    changed = submitted(home, "--set", "cars.csv", "--item", "better:x=green", "--item", "new:x=red")
    assert [(item["name"], item["values"]["x"]) for item in changed] == [
        ("good", "red"),
        ("better", "green"),
        ("new", "red"),
    ]


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        (None, ["--set", "cars.csv"], "Cannot read the table cars.csv: No such file"),
        ("x\nred\n", ["--set", "cars.csv"], "one of them `name`"),
        ("name,x\na,red\na,blue\n", ["--set", "cars.csv"], "the same name"),
        ("name,x\na/b,red\n", ["--set", "cars.csv"], "items.0.name"),
        ("name,y\na,red\n", ["--set", "cars.csv"], "no value for the {x} in prompt"),
        (None, ["--item", "good"], "not NAME:KEY=VALUE"),
        (None, ["--item", "a:x=red", "--item", "a:seed=red"], "items.0.seed"),
    ],
)
def test_what_is_wrong_with_a_set_is_said_before_it_is_sent(
    home: Home, table: str | None, options: list[str], said: str
) -> None:
    if table is not None:
        (home.root / "cars.csv").write_text(table)
    assert said in submitted(home, *options)
    assert list(home.config.inboxes[0].iterdir()) == []
