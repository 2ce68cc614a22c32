"""Whose turn it is: the index against the policy written down in the plainest way, and what the policy promises."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend.daemon.turn import FREE_TURN, Turn
from imagend.job import Ref
from imagend.lanes import Lane


class Plain:
    """What Turn promises, over one list: jobs in the order in which they stand in their lines."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Ref, int]] = []
        self.history: list[str] = []  # who was served, turn by turn
        self.came: list[str] = []
        self.paused: set[str] = set()
        self.held: dict[Ref, int | None] = {}  # with their priorities, once they are there

    def add(self, ref: Ref, priority: int, first: bool) -> None:
        if ref in self.jobs():
            return
        if ref in self.held:
            self.held[ref] = priority
            return
        self.waiting.insert(0 if first else len(self.waiting), (ref, priority))
        if ref.client not in self.came:
            self.came.append(ref.client)

    def jobs(self) -> list[Ref]:
        return [ref for ref, _ in self.waiting] + [ref for ref, priority in self.held.items() if priority is not None]

    def hold(self, jobs: set[Ref]) -> None:
        for ref in jobs - self.held.keys():
            priorities = dict(self.waiting)
            self.remove(ref)
            self.held[ref] = priorities.get(ref)
        for ref in sorted(self.held.keys() - jobs):
            if (priority := self.held.pop(ref)) is not None:
                self.add(ref, priority, first=True)

    def remove(self, ref: Ref) -> None:
        if ref in self.held:
            self.held[ref] = None
        self.waiting = [entry for entry in self.waiting if entry[0] != ref]

    def serve(self, ref: Ref) -> None:
        self.remove(ref)
        self.history.append(ref.client)

    def how_long_ago(self, client: str) -> tuple[int, int]:
        """Larger is longer ago; who was never served comes before all others, the first to come first."""
        if client not in self.history:
            return (1, -self.came.index(client))
        return (0, self.history[::-1].index(client))

    def next(self) -> Ref | None:
        candidates = [entry for entry in self.waiting if entry[0].client not in self.paused]
        if not candidates:
            return None
        if len(self.history) % 4 != 3:
            candidates = [entry for entry in candidates if entry[1] == max(priority for _, priority in candidates)]
        client = max({ref.client for ref, _ in candidates}, key=self.how_long_ago)
        own = [entry for entry in candidates if entry[0].client == client]
        return max(own, key=lambda entry: entry[1])[0]  # max() takes the first of equals

    def order(self) -> list[Ref]:
        ahead = Plain()
        ahead.waiting, ahead.history, ahead.came = list(self.waiting), list(self.history), self.came
        ahead.paused = self.paused
        order = []
        while (ref := ahead.next()) is not None:
            order.append(ref)
            ahead.serve(ref)
        return order


REFS = st.builds(Ref, st.sampled_from(["alice", "bob", "carol", "dave"]), st.sampled_from("0123456789"))
STEPS = (
    st.tuples(st.just("add"), REFS, st.integers(0, 9) | st.sampled_from([5, 9]), st.booleans())
    | st.tuples(st.just("remove"), REFS)
    | st.tuples(st.just("serve"))
    | st.tuples(st.just("hold"), st.sets(REFS, max_size=3))
    | st.tuples(st.just("pause"), st.sets(st.sampled_from(["alice", "bob", "carol"])))
)


@given(st.lists(STEPS, max_size=60))
@settings(deadline=None, max_examples=300)
def test_turn_does_what_the_plain_policy_does(steps: list[tuple[Any, ...]]) -> None:
    turn, plain = Turn(), Plain()
    for step in steps:
        match step:
            case ("add", ref, priority, first):
                turn.add(ref, priority, first=first)
                plain.add(ref, priority, first)
            case ("remove", ref):
                turn.remove(ref)
                plain.remove(ref)
            case ("hold", jobs):
                turn.hold(jobs)
                plain.hold(jobs)
            case ("pause", clients):
                turn.pause(clients)
                plain.paused = clients
            case _ if (ref := turn.next()) is not None:
                turn.serve(ref)
                plain.serve(ref)
        order = plain.order()
        assert list(turn) == turn.head(1000) == order
        assert turn.head(3) == order[:3]
        assert turn.next() == turn.next() == (order[0] if order else None)
        there = set(plain.jobs())
        assert (len(turn), set(turn) <= there) == (len(there), True)
        assert all(ref in turn for ref in there)
        assert set(turn.passed_over(1000)) == there - set(order)
        counts = Counter(ref.client for ref in there)
        assert turn.per_client() == counts
        assert [turn.count(client) for client in ("alice", "bob")] == [counts["alice"], counts["bob"]]
    assert list(turn) == served(turn)


def served(turn: Turn) -> list[Ref]:
    order = []
    while (ref := turn.next()) is not None:
        turn.serve(ref)
        order.append(ref)
    return order


def fill(turn: Turn, client: str, count: int, priority: int = 5) -> None:
    for number in range(count):
        turn.add(Ref(client, f"{priority}.{number}"), priority)


def names(refs: list[Ref]) -> str:
    return " ".join(ref.client[0] for ref in refs)


def test_a_flood_of_one_does_not_make_the_others_wait() -> None:
    turn = Turn()
    fill(turn, "mallory", 1000)
    fill(turn, "alice", 2)
    fill(turn, "bob", 3)
    assert names(turn.head(10)) == "m a b m a b m b m m"


def test_a_flood_of_urgent_jobs_leaves_every_fourth_turn_to_the_others() -> None:
    turn = Turn()
    fill(turn, "mallory", 1000, priority=9)
    fill(turn, "alice", 2, priority=5)
    fill(turn, "bob", 2, priority=0)
    assert names(turn.head(17)) == "m m m a m m m b m m m a m m m b m"


@pytest.mark.parametrize("turns_before", range(2 * FREE_TURN))
def test_who_comes_new_is_served_within_four_turns_whatever_the_others_ask_for(turns_before: int) -> None:
    turn = Turn()
    for client in ("mallory", "malvin", "mallet"):
        fill(turn, client, 100, priority=9)
    for _ in range(turns_before):
        turn.serve(turn.next() or pytest.fail("the queue is empty"))
    fill(turn, "alice", 1, priority=0)
    assert Ref("alice", "0.0") in turn.head(FREE_TURN)


def test_nobody_waits_longer_than_four_turns_for_each_that_waits() -> None:
    turn, clients = Turn(), [f"c{number}" for number in range(7)]
    for number, client in enumerate(clients):
        fill(turn, client, 200, priority=9 - number)
    order = [ref.client for ref in turn.head(200 * 4)]
    for client in clients:
        at = [-1] + [place for place, name in enumerate(order) if name == client]
        assert max(later - earlier for earlier, later in pairwise(at)) <= FREE_TURN * len(clients)


def test_who_leaves_and_comes_back_gains_nothing() -> None:
    """One that drops its jobs one by one is served as often as one whose jobs all wait."""
    turn, order = Turn(), []
    fill(turn, "alice", 100)
    for number in range(20):
        turn.add(Ref("bob", str(number)), 5)
        ref = turn.next()
        assert ref is not None
        turn.serve(ref)
        order.append(ref.client)
    assert Counter(order) == {"alice": 10, "bob": 10}


def test_a_clients_own_jobs_go_by_priority_then_as_they_came() -> None:
    turn = Turn()
    for number, priority in enumerate([5, 5, 9, 1]):
        turn.add(Ref("alice", str(number)), priority)
    turn.add(Ref("alice", "back"), 5, first=True)
    assert [ref.id for ref in turn] == ["2", "back", "0", "1", "3"]


def test_a_job_that_is_cancelled_takes_no_turn() -> None:
    turn = Turn()
    fill(turn, "alice", 3)
    fill(turn, "bob", 3)
    for number in range(2):
        turn.remove(Ref("alice", f"5.{number}"))
    assert names(list(turn)) == "a b b b"
    turn.remove(Ref("nobody", "0"))


def test_a_job_added_twice_keeps_its_place_and_priority() -> None:
    turn = Turn()
    turn.add(Ref("alice", "0"), 5)
    turn.add(Ref("alice", "0"), 9)
    turn.remove(Ref("alice", "0"))
    assert (list(turn), turn.next(), turn.per_client(), turn.count("alice")) == ([], None, {}, 0)


def test_a_halted_queue_serves_nobody_and_keeps_its_order() -> None:
    turn = Turn()
    fill(turn, "alice", 2)
    turn.halted = True
    assert turn.next() is None
    assert names(turn.head(5)) == "a a"
    turn.halted = False
    assert names(served(turn)) == "a a"


def test_jobs_that_wait_for_an_operator_are_told_what_for() -> None:
    turn = Turn()
    fill(turn, "alice", 3)
    fill(turn, "bob", 2)
    held = Ref("alice", "5.1")
    turn.hold({held})
    turn.pause({"bob"})
    assert turn.passed_over(2) == {held: "release", Ref("bob", "5.0"): "resume"}
    assert names(turn.head(9)) == "a a"
    turn.hold(set())
    assert turn.next() == held  # before the others of its client


# Lanes


def test_each_lane_has_an_order_and_turns_of_its_own() -> None:
    """What is queued, served, held and paused in one moves nothing in the other."""
    turn, alone = Turn(), Turn()
    paints = [Ref(client, f"{number}") for number in range(20) for client in ("a", "b")]
    fetches = [Ref("a", f"f{number}") for number in range(50)]
    for paint in paints:
        turn.add(paint, 5)
        alone.add(paint, 5)
    for fetch in fetches:
        turn.add(fetch, 9, lane=Lane.FETCH)
    assert turn.head(100) == alone.head(100)
    assert turn.head(100, Lane.FETCH) == fetches
    assert list(turn) == [*alone, *fetches]
    served = []
    for fetch in fetches[:5]:
        assert turn.next(Lane.FETCH) == fetch
        turn.serve(fetch)
        for queue in (turn, alone):
            served.append(queue.next())
            queue.serve(served[-1])
    assert served[::2] == served[1::2]
    assert (turn.length(Lane.PAINT), turn.length(Lane.FETCH), len(turn)) == (35, 45, 80)
    assert turn.count("a") == alone.count("a") + 45
    assert turn.per_client() == {"a": alone.count("a") + 45, "b": alone.count("b")}
    assert list(turn.snapshot(Lane.FETCH)) == fetches[5:]


def test_an_operators_word_holds_in_every_lane() -> None:
    turn = Turn()
    paint, fetch, other = Ref("a", "1"), Ref("a", "2"), Ref("b", "3")
    turn.add(paint, 5)
    turn.add(fetch, 5, lane=Lane.FETCH)
    turn.add(other, 5, lane=Lane.FETCH)
    turn.pause({"a"})
    assert (turn.next(), turn.next(Lane.FETCH)) == (None, other)
    assert turn.passed_over(9) == {paint: "resume", fetch: "resume"}
    turn.pause(set())
    turn.hold({other, paint})
    assert (turn.next(), turn.head(9, Lane.FETCH)) == (None, [fetch])
    assert (turn.length(Lane.PAINT), turn.length(Lane.FETCH)) == (1, 2)
    turn.hold(set())
    assert (turn.next(), turn.head(9, Lane.FETCH)) == (paint, [fetch, other])  # each back in its own
    turn.halted = True
    assert (turn.next(), turn.next(Lane.FETCH)) == (None, None)
    for ref in (paint, fetch, other):
        turn.remove(ref)
    assert (turn.length(Lane.PAINT), turn.length(Lane.FETCH), len(turn)) == (0, 0, 0)
