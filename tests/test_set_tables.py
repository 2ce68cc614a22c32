"""Tables of sets that are sent along: read at the door, kept as long as they are needed, and gone into the manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from conftest import CLIENT, Home, run_until, run_until_idle
from test_attachments import kept, send
from test_door import GRACE_S, make_door, rejected, take

from imagend import set_table
from imagend.client import Client
from imagend.generate_spec import Generate
from imagend.job import Job
from imagend.rights import Limits

CSV = b'name,seed,x\r\ngood,7,red\r\nbetter,,"blue, or so"\r\n'
SHA256 = hashlib.sha256(CSV).hexdigest()
NAME = f"sha256:{SHA256}"
SET: dict[str, Any] = {"prompt": "a {x} circle", "table": NAME, "seed": 3}
ITEMS = [
    {"name": "good", "values": {"x": "red"}, "seed": 7},
    {"name": "better", "values": {"x": "blue, or so"}, "seed": 3},
]


def test_a_job_with_a_table_is_the_job_with_its_items(home: Home) -> None:
    daemon = home.daemon()
    send(home, CSV)
    ref, inline = home.drop(**SET), home.drop(**SET | {"table": ..., "items": ITEMS})
    run_until_idle(daemon)
    manifest, other = home.manifest(ref), home.manifest(inline)
    assert manifest["outcome"] == "succeeded"
    assert manifest["spec"] == other["spec"]
    assert (manifest["spec"]["items"], manifest["spec"]["table"]) == (ITEMS, None)
    assert manifest["artifacts"] == other["artifacts"]
    assert kept(home) == []


def test_the_client_sends_one(home: Home) -> None:
    (home.root / "hats.csv").write_bytes(CSV)
    farm = Client(CLIENT, home.config.inboxes[0], home.config.outputs, home.root / "keys" / "id_ed25519")
    daemon = home.daemon()
    job = farm.submit("generate", prompt="a {x} circle", table=farm.attach(home.root / "hats.csv"))
    run_until_idle(daemon)
    assert [picture.name for picture in job.wait(timeout=60).pictures] == ["good.png", "better.png", "contact.png"]


def test_it_outlives_a_restart_and_what_its_sender_does_with_the_file(home: Home) -> None:
    daemon = home.daemon()
    send(home, CSV)
    door = make_door(home)
    ref = home.drop(**SET, nonce="waits")
    (arrival,) = door.look(0.0)
    assert isinstance(arrival.item, Job)
    assert isinstance(arrival.item.spec, Generate)
    assert [item.name for item in arrival.item.spec.items] == ["good", "better"]
    daemon.reception.take_in([arrival])
    door.settle(arrival, None)
    daemon.spool.close()
    (home.config.inboxes[0] / "files" / SHA256).unlink()
    again = home.daemon()
    run_until_idle(again)
    assert home.outcome(ref) == "succeeded"


def test_another_job_finds_it_in_the_spool(home: Home) -> None:
    send(home, CSV)
    home.drop("a.json", **SET)
    door = make_door(home)
    assert len(take(door)) == 1
    (home.config.inboxes[0] / "files" / SHA256).unlink()
    home.drop("b.json", **SET, nonce="2")
    assert len(take(door, now=2.0)) == 1
    assert len(kept(home)) == 3


def test_one_that_is_not_there_is_waited_for(home: Home) -> None:
    door = make_door(home)
    home.drop("a.json", **SET)
    assert take(door) == rejected(home) == []
    take(door, now=GRACE_S + 1)
    error = home.reason("a.json")
    assert (error["code"], error["detail"]) == ("PICTURE_NOT_FOUND", [{"field": "table", "value": NAME}])
    assert error["message"].startswith(f"The table {NAME} is not there")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"x\nred\n", "one of them `name`"),
        (b"name,x\na\n", "line 2 has 1 cells"),
        (b"\xff\xfe" * 50, "is not UTF-8"),
        (b"\0" * 500, "first row must name the columns"),
        (b'name,x\na,"' + b"(" * 100_000, "is no CSV"),
        (b"name,x\n../a,red\n", "items.0.name"),
        (b"name,x\na,red\nA,blue\n", "stands there twice"),
        (b"name,y\na,red\n", "no value for the {x} in prompt"),
        (b"name,x,y\na,red,blue\n", "that no prompt uses"),
        (b"name,x\na," + b"((" * 200 + b"\n", "nested deeper"),
        (b"name,seed,x\na,9007199254740993,red\n", "items.0.seed"),
        (b"name," + b",".join(b"c%d" % i for i in range(40)) + b"\na" + b"," * 40 + b"\n", "items.0.values"),
    ],
)
def test_what_is_wrong_with_one_is_a_reason_to_reject_its_job(home: Home, raw: bytes, said: str) -> None:
    door = make_door(home)
    home.drop("a.json", **SET | {"table": send(home, raw)})
    assert take(door) == []
    assert rejected(home) == ["a.json"]
    assert home.reason("a.json")["code"] == "INVALID_PARAMETERS"
    assert said in home.reason("a.json")["message"]
    assert kept(home) == []  # it is of no use
    home.drop("b.json", **SET | {"table": send(home, CSV)})
    assert len(take(door, now=2.0)) == 1


def test_one_too_large_is_refused(home: Home) -> None:
    door = make_door(home)
    home.drop("a.json", **SET | {"table": send(home, b"n" * (set_table.MAX_BYTES + 1))})
    assert take(door) == kept(home) == []
    assert home.reason("a.json")["code"] == "PAYLOAD_TOO_LARGE"
    assert "The table files/" in home.reason("a.json")["message"]


def test_its_pictures_count_for_what_a_client_may_ask_for(home: Home) -> None:
    door = make_door(home, limits=Limits(max_work=20))
    send(home, CSV)
    size = {"width": 512, "height": 512, "num_inference_steps": 50}
    home.drop("a.json", **SET, **size)
    assert take(door) == []
    assert (home.reason("a.json")["code"], home.reason("a.json")["detail"]) == (
        "FORBIDDEN",
        [{"field": "count", "value": 2}],
    )
    assert kept(home) == []


def test_a_job_whose_table_is_gone_fails_and_says_so(home: Home) -> None:
    """Only somebody who reaches into the spool, or an operator who has it tried again, makes it so."""
    daemon = home.daemon()
    send(home, CSV)
    ref = home.drop(**SET)
    door = daemon.doors[0]
    (arrival,) = door.look(0.0)
    daemon.reception.take_in([arrival])
    door.settle(arrival, None)
    (home.config.spool / "attachments" / CLIENT / SHA256).unlink()
    run_until(daemon, lambda: daemon.outputs.ended(ref))
    assert home.manifest(ref)["error"]["code"] == "PICTURE_NOT_FOUND"
    assert SHA256 in home.manifest(ref)["error"]["message"]
