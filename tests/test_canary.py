"""Nothing that a client writes is found where another may read: not in its files, the log, status.json or the feed.

Canaries stand in every text and name that a client can choose; each file but the client's own is then searched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import CLIENT, Home, run_until, step

from imagend import logs
from imagend.daemon.executor import Mailbox, StopRequested
from imagend.daemon.local import LocalExecutor
from imagend.job import MAX_JOB_BYTES, Ref
from imagend.rights import Limits
from imagend.signing import Key, seal

STATES = ("pending", "active", "done", "journal", "damaged")
OWN = ("outputs", "outputs/.drafts", "spool/inbox", "spool/rejected", *(f"spool/{state}" for state in STATES))
"""A client's folder in each of these is its own."""


def local(mailbox: Mailbox) -> LocalExecutor:
    command = (sys.executable, str(Path(__file__).parent / "kinds"))
    return LocalExecutor({"cpu0": "cpu"}, Path("models"), mailbox, command=command)


def canary(client: Home, what: str = "") -> str:
    return f"canary-{client.client}-{what}"


def good(client: Home, what: str, /, **fields: Any) -> Ref:
    """A job with canaries in all its texts, and in the name of its file."""
    texts = {key: canary(client, f"{what}-{key}") for key in ("prompt", "negative_prompt", "label", "nonce")}
    return client.drop(f"{client.client}/{canary(client, what)}.json", **texts | fields)


def good_ones(client: Home) -> dict[str, Ref]:
    """Every way a job can end. A prompt that is no canary tells the worker what to do (tests/kinds)."""
    return {
        "succeeded": good(client, "good", metadata="full"),
        "a set": good(
            client, "set", negative_prompt="{x}", items=[{"name": canary(client), "values": {"x": canary(client)}}]
        ),
        "unknown model": good(client, "model", model=canary(client, "model")),
        "bug": good(client, "raise", prompt="raise"),
        "refused": good(client, "refuse", prompt="refuse"),
        "dead": good(client, "die", prompt="kill"),
        "cancelled": good(client, "queued", priority=0),
    }


BAD: dict[str, dict[str, Any]] = {  # * stands for a canary
    "unknown-value": {"promt": "*"},
    "unknown-name": {"*": 1},
    "twice-nested": {"prompt": {"*": ["*"]}},
    "steps": {"num_inference_steps": "*"},
    "label": {"label": "*\n"},
    "label-too-long": {"label": "*" * 200},
    "nonce": {"nonce": "*" * 100},
    "model": {"model": "*/"},
    "kind": {"kind": "*"},
    "scheduler": {"scheduler": "*"},
    "audience": {"audience": "*"},
    "image-type": {"image_type": "*"},
    "schema": {"schema": "*"},
    "issued": {"issued_at": "*"},
    "syntax": {"prompt_syntax": "*"},
    "brackets": {"prompt": "(*" * 40},
    "item": {"items": [{"name": "*", "values": {"x": "*"}}]},
    "item-name": {"items": [{"name": "*/", "values": {"*": "*"}}]},
    "priority": {"priority": 9, "label": "*"},
    "work": {"count": 64, "num_inference_steps": 150, "label": "*"},
    "of-another": {"kind": "cancel", "job": "0" * 20, "client": "*"},
    "of-nobody": {"kind": "cancel", "job": "0" * 20, "label": "*"},
}


def drop_bad_ones(client: Home) -> int:
    """Every way a file can be refused; how many there are."""
    for what, fields in BAD.items():
        text = json.dumps({key: value for key, value in fields.items() if value is not ...})
        marked = json.loads(text.replace("*", canary(client, what)))
        texts = dict.fromkeys(("prompt", "negative_prompt"), ...) if "job" in fields else {}
        good(client, what, **texts | marked)
    mark, body = canary(client, "file").encode(), client.body(prompt=canary(client))
    raw = {
        "unsigned.json": mark,
        "not-json.json": client.seal(b'{"prompt": %s}' % mark),
        "not-utf-8.json": client.seal(b'{"prompt": "%s\xff"}' % mark),
        "changed.json": client.seal(body).replace(b"canary", b"canary-changed"),
        "stranger.json": seal(body, Key.generate().sign(body)),
        "large.json": mark * (MAX_JOB_BYTES // len(mark) + 1),
        "no-job-name": client.seal(body),
        "line\nbreak.json": mark,
    }
    for name, data in raw.items():
        client.put(data, f"{client.client}/{canary(client, name)}")
    os.mkfifo(client.config.inboxes[0] / client.client / f"{canary(client, 'pipe')}.json")
    return len(BAD) + len(raw) + 1


def found(root: Path, clients: list[str]) -> Iterator[str]:
    """Where a canary is that does not belong there: in a path or in the bytes of a file."""
    for path in sorted(root.rglob("*")):
        place = str(path.relative_to(root))
        for client in clients:
            if any(f"{place}/".startswith(f"{folder}/{client}/") for folder in OWN):
                continue
            if f"canary-{client}" in place:
                yield place
            elif path.is_file() and f"canary-{client}".encode() in path.read_bytes():
                yield f"in {place}"


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The lines that `imagend serve` writes, and what its workers print."""
    path = tmp_path_factory.mktemp("log") / "log"
    with path.open("w", buffering=1) as file:
        monkeypatch.setattr(sys, "stderr", file)
        logs.set_up()
        yield path
        structlog.reset_defaults()


def test_no_client_finds_anothers_words(home: Home, log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clients = [home, home.neighbour("bob")]
    names = [client.client for client in clients]
    statuses = set[str]()

    def serve(until: Callable[[], bool]) -> None:
        """A daemon from its start to its end; every status.json that it writes is kept."""
        daemon = home.daemon(local, limits=Limits(max_priority=8, max_queued=40), max_attempts=1, file_grace_s=0.01)

        def done() -> bool:
            statuses.add((home.config.spool / "status.json").read_text())
            statuses.add(repr(daemon.health.last_errors))  # perhaps gone when the file is written next
            return until()

        step(daemon)
        run_until(daemon, done)
        daemon.mailbox.put(StopRequested())
        daemon.run()
        daemon.spool.close()

    def refused(name: str) -> int:
        return len(list((home.config.inboxes[0].parent / "rejected").glob(f"{name}/*.reason.json")))

    jobs = {client.client: good_ones(client) for client in clients}
    for client in clients:
        wish = jobs[client.client]["cancelled"].id
        client.drop(f"{client.client}/c.json", kind="cancel", job=wish, prompt=...)
    refs = [ref for of_one in jobs.values() for ref in of_one.values()]
    serve(lambda: all(home.config.outputs.joinpath(*ref, "manifest.json").exists() for ref in refs))
    expected = {client.client: drop_bad_ones(client) for client in clients}
    serve(lambda: all(refused(name) == expected[name] for name in names))
    late = [good(client, "late", prompt="take time", num_inference_steps=150) for client in clients]
    serve(lambda: any((home.config.spool / "active" / ref.client / f"{ref.id}.json").exists() for ref in late))

    codes = {what: (home.manifest(ref).get("error") or {}).get("code") for what, ref in jobs[CLIENT].items()}
    assert codes == {
        "succeeded": None,
        "unknown model": "MODEL_NOT_FOUND",
        "bug": "INTERNAL",
        "refused": "INVALID_PARAMETERS",
        "dead": "WORKER_DIED",
        "cancelled": None,
        "a set": None,
    }
    assert list(found(home.root, names)) == []
    told = log.read_text() + "".join(capfd.readouterr())
    assert all(word in told for word in ("rejected", "a worker met a bug", "worker died", '"event": "ended"'))
    assert "canary" not in told
    assert len(statuses) > 10
    assert "canary" not in "".join(statuses)
    for name in names:  # they do sing: the client's own folders are full of them
        for folder in ("outputs", "spool/pending", "spool/done", "spool/rejected"):
            assert any(found(home.root / folder / name, [name])), folder
