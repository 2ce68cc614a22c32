"""Jobs over a real NFSv4.2 mount: two hosts submit while the daemon runs on the server, or on a third host."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lab.nfs import LOCAL, LOSE_REPLIES, MOUNT_DISK, PATIENCE_S, SHARED, Farm
from lab.uml import PowerLost, missing

pytestmark = [pytest.mark.lab, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
everywhere = pytest.mark.parametrize(
    "third_host", [False, True], ids=["daemon on the server", "daemon on a third host"]
)

MakeFarm = Callable[..., Farm]


@pytest.fixture
def make_farm(tmp_path: Path) -> Iterator[MakeFarm]:
    """A farm that is switched off at the test's end."""
    farms: list[Farm] = []

    def make(third_host: bool, **settings: Any) -> Farm:
        farms.append(Farm(tmp_path, third_host, **settings))
        return farms[-1].__enter__()

    yield make
    for farm in farms:
        farm.__exit__()


def put(farm: Farm, name: str, data: bytes) -> Path:
    """A file that every guest can read."""
    path = farm.root / name
    path.write_bytes(data)
    return path


@everywhere
def test_two_hosts_submit_in_every_awkward_way(make_farm: MakeFarm, third_host: bool) -> None:
    farm = make_farm(third_host, options="vers=4.2,actimeo=30")
    alice, bob = farm.senders.values()
    farm.serve()
    farm.ready()
    now = datetime.now(UTC)
    # Half a file under its final name, the rest much later; a name that was removed while it was open; one job file
    # that both hosts submit, and that bob also drops by another name.
    half, regretted, same = (farm.sealed("alice", seed, now) for seed in (1, 2, 3))
    half_file, regretted_file, same_file = (
        put(farm, f"{name}.json", raw) for name, (_, raw) in (("half", half), ("regretted", regretted), ("same", same))
    )
    writing = alice.start(
        f"exec 3>{SHARED}/half.json; head -c 200 {half_file} >&3; "
        f"mkfifo /run/go; read < /run/go; tail -c +201 {half_file} >&3"
    )
    farm.expect("alice", half[0], 1)
    holding = alice.start(
        f"cp {regretted_file} {SHARED}/.regretted.json; exec 3<{SHARED}/.regretted.json; rm {SHARED}/.regretted.json; "
        f"mkfifo /run/forget; read < /run/forget"
    )
    farm.wait_for(lambda: ".nfs" in alice.run(f"ls -A {SHARED}"), "a silly rename")
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(farm.submit, name, "--as alice --file", same_file, seed=3) for name in ("alice", "bob")]
        drops = {"alice": farm.drop("alice", 100, 109), "bob": farm.drop("bob", 200, 209)}
        bob.run(f"cp {same_file} {SHARED}/.other.json && mv {SHARED}/.other.json {SHARED}/other.json")
        own = [pool.submit(farm.submit, name, seed=seed) for name, seed in (("alice", 10), ("bob", 11))]
        assert [future.result().status for future in both + own] == [0, 0, 0, 0]
    for name, future in drops.items():
        assert len(farm.note(name, future.result(PATIENCE_S).out)) == 10
    farm.wait_for(lambda: farm.ended() >= 23, "all but the half")
    assert farm.audit()["rejected"] == []
    alice.run("echo > /run/go")
    assert writing.result(PATIENCE_S).status == 0
    farm.check()
    alice.run("echo > /run/forget")
    assert holding.result(PATIENCE_S).status == 0
    assert farm.stop() == 0


@pytest.mark.parametrize("taken_in", [False, True], ids=["still in the inbox", "taken in already"])
def test_a_rename_that_reports_an_error_though_done_is_no_error(make_farm: MakeFarm, taken_in: bool) -> None:
    """The server renames; its answer is lost, and so is its memory of answers: asked again, it says ENOENT."""
    farm = make_farm(third_host=False, lease_s=90)  # no other traffic: what is lost first holds up all the rest
    farm.senders["alice"].run(f"ip neigh replace {farm.server.address} lladdr {farm.server.mac} nud permanent dev eth0")
    slowly = "strace -f -qq -o /dev/null -e trace=rename -e inject=rename:delay_enter=6s"
    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(farm.submit, "alice", seed=1, prefix=slowly)
        farm.wait_for(lambda: ".tmp" in farm.server.run(f"ls -A {farm.inbox}"), "a temporary file")
        farm.server.run(LOSE_REPLIES)
        farm.wait_for(lambda: farm.server.run(f"ls {farm.inbox}"), "the rename")
        assert not submitting.done()
        farm.server.run("sync")
        farm.server.powercut()
        farm.server.boot()
        farm.server.run(MOUNT_DISK)
        if taken_in:
            farm.serve()
            farm.wait_for(lambda: farm.ended() == 1, "the job painted")
        farm.export()
        done = submitting.result()
    if not taken_in:
        farm.serve()
    assert done.status == 0, done.err
    farm.check()


def test_a_server_that_hangs_stops_intake_and_nothing_else(make_farm: MakeFarm) -> None:
    farm = make_farm(third_host=True)
    farm.serve()
    farm.ready()
    farm.host.run("pkill -STOP -f nullworker")  # so that jobs are accepted and not painted
    farm.note("alice", farm.drop("alice", 1, 3).result(PATIENCE_S).out)
    farm.wait_for(lambda: sum(farm.status()["queue"][state] for state in ("pending", "active")) == 3, "three accepted")
    farm.server.pause()
    hanging = farm.drop("bob", 11, 13)
    farm.wait_for(lambda: farm.status()["state"] == "degraded", "degraded")
    status = farm.status()
    assert [SHARED in reason for reason in status["reasons"]] == [True]
    assert "does not answer" in status["reasons"][0]
    assert farm.ended() == 0
    farm.host.run("pkill -CONT -f nullworker")
    farm.wait_for(lambda: farm.ended() == 3, "the accepted jobs painted")
    farm.note("alice", farm.host.run(farm.dropping("alice", 21, 23, inbox=LOCAL)))
    farm.wait_for(lambda: farm.ended() == 6, "jobs of the other inbox painted")
    farm.wait_for(lambda: farm.status()["heartbeat"] > status["heartbeat"], "a heartbeat")
    assert farm.status()["state"] == "degraded"
    assert not hanging.done()
    farm.server.resume()
    assert len(farm.note("bob", hanging.result(PATIENCE_S).out)) == 3
    farm.check()
    farm.wait_for(lambda: farm.status()["state"] == "ready", "ready again")
    assert farm.stop() == 0


def test_a_daemon_starts_and_stops_while_the_server_hangs(make_farm: MakeFarm) -> None:
    farm = make_farm(third_host=True)
    farm.note("alice", farm.drop("alice", 1, 3).result(PATIENCE_S).out)
    farm.host.run(f"ls {SHARED}")
    farm.server.pause()
    farm.serve()
    farm.note("bob", farm.host.run(farm.dropping("bob", 11, 11, inbox=LOCAL)))
    farm.wait_for(lambda: farm.ended() == 1, "a job of the other inbox painted")
    assert farm.stop() == 0
    farm.serve()
    farm.note("bob", farm.host.run(farm.dropping("bob", 12, 12, inbox=LOCAL)))
    farm.wait_for(lambda: farm.ended() == 2, "another one")
    farm.server.resume()
    farm.check()


@everywhere
def test_a_power_cut_of_the_server_loses_nothing(make_farm: MakeFarm, third_host: bool) -> None:
    farm = make_farm(third_host)
    farm.serve()
    farm.ready()
    drops = {name: farm.drop(name, first, first + 14) for name, first in (("alice", 100), ("bob", 200))}
    farm.wait_for(lambda: farm.ended() >= 3, "a few jobs")
    farm.server.powercut()
    assert not any(future.done() for future in drops.values())
    farm.server_returns()
    if not third_host:
        farm.serve()
    for name, future in drops.items():
        done = future.result(PATIENCE_S)
        assert farm.note(name, done.out), done.err
    farm.check()
    assert farm.stop() == 0


@everywhere
def test_a_power_cut_of_a_client_loses_nothing_that_it_was_told_of(make_farm: MakeFarm, third_host: bool) -> None:
    farm = make_farm(third_host, file_grace_s=5)
    alice = farm.senders["alice"]
    farm.serve()
    farm.ready()
    alice.run(f"printf '{{' > {SHARED}/half.json")

    def one_after_the_other() -> None:
        for seed in range(100, 1000):
            farm.note("alice", farm.drop("alice", seed, seed).result(PATIENCE_S).out)

    with ThreadPoolExecutor() as pool:
        dropping = pool.submit(one_after_the_other)
        others = farm.drop("bob", 2000, 2009)
        farm.wait_for(lambda: farm.ended() >= 5, "a few jobs")
        alice.powercut()
        with pytest.raises(PowerLost):
            dropping.result(PATIENCE_S)
    alice.boot()
    farm.mount(alice)
    farm.note("alice", farm.drop("alice", 1, 3).result(PATIENCE_S).out)
    assert len(farm.note("bob", others.result(PATIENCE_S).out)) == 10
    farm.check(rejected=["half.json"])
    assert farm.stop() == 0


def test_clocks_that_differ(make_farm: MakeFarm) -> None:
    """The server's clock does not matter; a sender's may be behind by the lifetime of a job, ahead by 5 minutes."""
    farm = make_farm(third_host=True)
    alice, bob = farm.senders.values()
    for guest, seconds in ((farm.server, 3600), (alice, -3600), (bob, 3600)):
        guest.run(f"date -s @$(($(date +%s) + {seconds}))")
    farm.serve()
    farm.ready()
    skews = farm.wait_for(lambda: {door["path"]: door["skew_s"] for door in farm.status()["inboxes"]}, "the skew")
    assert [round(skews[path] / 600) for path in (SHARED, LOCAL)] == [6, 0]
    farm.note("alice", farm.drop("alice", 1, 5).result(PATIENCE_S).out)
    assert farm.submit("alice", seed=6).status == 0
    bodies = farm.drop("bob", 11, 11).result(PATIENCE_S).out
    assert bodies, "the sender is told that the file is in the inbox"
    farm.check(rejected=["bobs-11.json"])
    reason = json.loads(farm.server.run("cat /mnt/disk/drop/rejected/bobs-11.json.reason.json"))["error"]
    assert reason["code"] == "INVALID_PARAMETERS"
    assert "Set the sender's clock (NTP)" in reason["message"]
    farm.server.run("date -s @$(($(date +%s) - 7200))")
    farm.note("alice", farm.drop("alice", 7, 8).result(PATIENCE_S).out)
    farm.check(rejected=["bobs-11.json"])


@everywhere
def test_how_long_a_job_is_on_its_way(
    make_farm: MakeFarm, third_host: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the seconds from mv's return on a sender to acceptance; docs/nfs.md has them."""
    farm = make_farm(third_host)
    for number, options in enumerate(("vers=4.2", "vers=4.2,actimeo=1", "vers=4.2,noac", "vers=4.2,actimeo=30")):
        farm.remount(options)
        farm.serve()
        farm.ready()
        first = 100 * (number + 1)
        drops = {
            name: farm.drop(name, first + start, first + start + 19) for name, start in (("alice", 0), ("bob", 50))
        }
        refs = [ref for name, future in drops.items() for ref in farm.note(name, future.result(PATIENCE_S).out)]
        delays = farm.delays(farm.check(), refs)
        assert farm.stop() == 0
        with capsys.disabled():
            where = "a third host" if third_host else "the server"
            median, most = delays[len(delays) // 2], delays[-1]
            sys.stdout.write(
                f"\ndaemon on {where}, {options}: median {median:.3f} s, most {most:.3f} s of {len(delays)}"
            )
