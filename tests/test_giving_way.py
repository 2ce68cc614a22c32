"""Training gives way to painting: when it is interrupted, when it goes on, and that it loses nothing by it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import Home, run_until

from imagend import references
from imagend.config import load
from imagend.daemon.loop import Daemon
from imagend.daemon.slots import Slot
from imagend.errors import BadConfig
from imagend.job import Ref
from imagend.lanes import Lane
from imagend.rights import Rights
from imagend.train_settings import Training


class Time:
    """Both clocks of a daemon, moved by hand."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon, self._now = daemon, 1000.0
        self._at = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
        daemon.clock, daemon.wall = lambda: self._now, lambda: datetime.fromtimestamp(self._at, UTC)

    def passes(self, seconds: float) -> None:
        """In steps of a second, with a look around after each."""
        for _ in range(round(seconds)):
            self._now, self._at = self._now + 1, self._at + 1
            look(self._daemon)


def look(daemon: Daemon) -> None:
    """Until nothing more happens."""
    for _ in range(3):
        daemon.look_around()
        while not daemon.mailbox.empty():
            daemon.handle(daemon.mailbox.get())


def hall(home: Home, cancel_grace_s: float = 1e6, **train: Any) -> tuple[Daemon, Time]:
    folder = home.root / "reference" / "datasets" / "hats"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"a picture")
    keys = {"max_queued": 100, "time_limit_s": 1e6, "silence_limit_s": 1e6, "cancel_grace_s": cancel_grace_s}
    daemon = home.daemon(clients={home.client: Rights(train=True)}, train=Training(**train), **keys)
    daemon.librarian.library = references.look(home.config.reference)
    return daemon, Time(daemon)


def train(home: Home, name: str = "stay", **fields: Any) -> Ref:
    body = home.body(kind="train", prompt=..., name=name, dataset="hats", nonce=name, **fields)
    return home.drop_body(body, f"{name}.json")


def paint(home: Home, number: int, prompt: str = "stay") -> Ref:
    return home.drop(f"{number}.json", prompt=prompt, nonce=str(number))


def doing(daemon: Daemon) -> Ref | None:
    running = slot(daemon).running
    return running.job.ref if running else None


def slot(daemon: Daemon) -> Slot:
    return daemon.slots["cpu0"]


def end(daemon: Daemon, time: Time, home: Home, ref: Ref) -> None:
    """A picture that stays until it is cancelled is cancelled."""
    daemon.stop_job(ref)
    time.passes(1)
    assert home.outcome(ref) == "cancelled"


def until_taken_in(daemon: Daemon, home: Home) -> None:
    run_until(daemon, lambda: not any(path.suffix == ".json" for path in home.config.inboxes[0].iterdir()))
    look(daemon)


def test_it_gives_way_at_once_and_goes_on_when_nothing_else_was_done_for_a_while(home: Home) -> None:
    daemon, time = hall(home, rest_s=10)
    training = train(home)
    until_taken_in(daemon, home)
    assert doing(daemon) == training
    picture = paint(home, 1)
    until_taken_in(daemon, home)
    assert doing(daemon) == picture
    assert home.where(training) == "pending"
    assert slot(daemon).starts == 1  # the worker stays
    end(daemon, time, home, picture)
    time.passes(5)
    assert doing(daemon) is None
    time.passes(6)
    assert doing(daemon) == training
    assert daemon.spool.attempts(training) == 1  # none was lost


def test_a_picture_goes_first_though_training_has_waited_longer(home: Home) -> None:
    daemon, _ = hall(home)
    train(home, priority=9)
    picture = paint(home, 1)
    until_taken_in(daemon, home)
    assert doing(daemon) == picture


def test_with_a_share_both_take_turns_and_each_gets_its_part(home: Home) -> None:
    daemon, time = hall(home, share=0.25, turn_s=60, rest_s=0)
    training = train(home)
    until_taken_in(daemon, home)
    pictures = [paint(home, number) for number in range(40)]
    until_taken_in(daemon, home)
    trained = 0
    for _ in range(40):
        time.passes(10)
        if (now := doing(daemon)) == training:
            trained += 10
        elif now is not None:
            end(daemon, time, home, now)
    assert home.where(training) in ("pending", "active")
    assert 0.2 <= trained / 400 <= 0.35
    assert 0 < sum(home.where(ref) == "done" for ref in pictures) < len(pictures)


def test_with_a_share_training_keeps_its_worker_for_a_turn(home: Home) -> None:
    daemon, time = hall(home, share=0.25, turn_s=60, rest_s=0)
    training = train(home)
    until_taken_in(daemon, home)
    picture = paint(home, 1)
    until_taken_in(daemon, home)
    time.passes(55)
    assert doing(daemon) == training
    time.passes(10)
    assert doing(daemon) == picture


@pytest.mark.parametrize("hours", ["11:00-13:00", "22:00-13:00"])
def test_in_quiet_hours_it_comes_first(home: Home, hours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagend.train_settings.LOCAL", UTC)
    daemon, time = hall(home, quiet_hours=hours)
    training = train(home)
    paint(home, 1)
    until_taken_in(daemon, home)
    assert doing(daemon) == training
    time.passes(600)
    assert doing(daemon) == training
    time.passes(3100)
    assert doing(daemon) != training


def test_a_cancel_of_what_gives_way_is_a_cancel(home: Home) -> None:
    daemon, _ = hall(home)
    training = train(home)
    until_taken_in(daemon, home)
    send, daemon.executor.send = daemon.executor.send, lambda *_: None  # type: ignore[method-assign]
    paint(home, 1)
    until_taken_in(daemon, home)
    running = slot(daemon).running
    assert running is not None
    assert running.released
    daemon.executor.send = send  # type: ignore[method-assign]
    daemon.stop_job(training)
    look(daemon)
    assert home.outcome(training) == "cancelled"


def test_one_that_does_not_let_go_is_killed_and_has_used_up_an_attempt(home: Home) -> None:
    daemon, time = hall(home, cancel_grace_s=5.0)
    training = train(home)
    until_taken_in(daemon, home)
    send, daemon.executor.send = daemon.executor.send, lambda *_: None  # type: ignore[method-assign]
    paint(home, 1)
    until_taken_in(daemon, home)
    daemon.executor.send = send  # type: ignore[method-assign]
    time.passes(10)
    assert slot(daemon).starts == 2
    assert home.where(training) == "pending"
    assert daemon.spool.attempts(training) == 1


def test_what_waits_for_an_operator_interrupts_nothing(home: Home) -> None:
    daemon, time = hall(home)
    training = train(home)
    until_taken_in(daemon, home)
    daemon.turn.hold({picture := paint(home, 1)})
    until_taken_in(daemon, home)
    time.passes(5)
    assert picture in daemon.turn
    assert doing(daemon) == training


def test_trainings_have_a_lane_of_their_own_in_the_queue(home: Home) -> None:
    daemon, time = hall(home)
    training, picture = train(home), paint(home, 1)
    until_taken_in(daemon, home)
    time.passes(10)
    assert doing(daemon) == picture
    assert daemon.turn.head(9, Lane.TRAIN) == [training]
    told = json.loads((home.config.spool / "status.json").read_text())
    (waiting,) = told["queue"]["head"]
    assert (waiting["id"], waiting["lane"], waiting["queue_position"]) == (training.id, "train", 1)


@pytest.mark.parametrize("hours", ["22:00", "25:00-06:00", "22-6"])
def test_hours_are_two_times_of_a_day(home: Home, hours: str) -> None:
    path = home.root / "config.yaml"
    path.write_text(f"{path.read_text()}train: {{quiet_hours: '{hours}'}}\n")
    with pytest.raises(BadConfig, match="must be two times of a day, such as 22:00-06:00"):
        load(path)
