"""What a client may ask for, as tables; the rate against a bucket filled drop by drop."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend.config import Config
from imagend.daemon.limits import Gate, check, work
from imagend.daemon.turn import Turn
from imagend.edit_spec import Edit
from imagend.errors import Forbidden, QueueFull, RateLimited, Rejected
from imagend.generate_spec import Generate
from imagend.job import CancelRequest, Header, Job, Ref
from imagend.mask_field import Mask
from imagend.train_spec import Train
from imagend.upscaling import Chain, UpscaleStep


def config(**keys: Any) -> Config:
    return Config.model_validate(keys)


def job(client: str = "alice", priority: int = 5, **spec: Any) -> Job:
    header = Header(schema="imagend.job/v1", kind="generate", issued_at="2026-11-20T00:00:00Z", priority=priority)  # type: ignore[arg-type]
    return Job(ref=Ref(client, "0" * 20), header=header, spec=Generate(prompt="", **spec))


def training(**fields: Any) -> Job:
    header = Header(schema="imagend.job/v1", kind="train", issued_at="2026-11-20T00:00:00Z")  # type: ignore[arg-type]
    return Job(ref=Ref("alice", "0" * 20), header=header, spec=Train(name="hats", dataset="hats", **fields))


def edit(**fields: Any) -> Job:
    header = Header(schema="imagend.job/v1", kind="edit", issued_at="2026-11-20T00:00:00Z")  # type: ignore[arg-type]
    spec = Edit(prompt="", image="leona/front", mask=Mask(whole=True), **fields)
    return Job(ref=Ref("alice", "0" * 20), header=header, spec=spec)


MAY = {"clients": {"alice": {"train": True}}}


def cancel(signer: str, owner: str) -> CancelRequest:
    header = Header(schema="imagend.job/v1", kind="cancel", issued_at="2026-11-20T00:00:00Z")  # type: ignore[arg-type]
    return CancelRequest(ref=Ref(owner, "0" * 20), header=header, signer=signer)


# What may be asked for at all


@pytest.mark.parametrize(
    ("keys", "item", "field", "words"),
    [
        ({"limits": {"kinds": []}}, job(), "kind", ["generate", "client alice", "allowed: none"]),
        ({"limits": {"models": ["a", "b"]}}, job(model="c"), "model", ["model: c ", "allowed: a, b."]),
        ({"limits": {"models": ["a"]}}, job(), "model", ["model: shapes-xl "]),
        ({"limits": {"kinds": ["generate"]}}, edit(), "kind", ["kind: edit ", "allowed: generate."]),
        ({"limits": {"models": ["a"]}}, edit(model="c"), "model", ["model: c "]),
        ({"limits": {"max_work": 31}}, edit(), "count", ["31 megapixel-steps", "max_work"]),
        ({"limits": {"max_priority": 6}}, job(priority=7), "priority", ["priority: 7 ", "6 or less"]),
        ({"limits": {"max_work": 31}}, job(), "count", ["31 megapixel-steps", "max_work", "fewer pictures"]),
        ({"clients": {"alice": {"max_priority": 4}}}, job(), "priority", ["4 or less"]),
        ({}, training(), "kind", ["kind: train", "alice", "clients: {alice: {train: true}}"]),
        (MAY | {"limits": {"models": ["a"]}}, training(), "model", ["model: shapes-xl "]),
        (MAY | {"train": {"max_presented": 999}}, training(), "max_train_steps", ["1,000", "999", "max_presented"]),
        (MAY, training(max_train_steps=100_000, train_batch_size=4), "max_train_steps", ["400,000"]),
        ({}, cancel("alice", "bob"), "client", ["bob is another client", "only your own"]),
        ({"clients": {"bob": {"operator": True}}}, cancel("alice", "bob"), "client", ["bob is another client"]),
    ],
)
def test_what_is_beyond_the_limits_is_forbidden_and_says_why(
    keys: dict[str, Any], item: Job | CancelRequest, field: str, words: list[str]
) -> None:
    with pytest.raises(Forbidden) as caught:
        check(item, config(**keys))
    envelope = caught.value.envelope()
    assert (envelope["code"], envelope["status"]) == ("FORBIDDEN", 403)
    assert [problem["field"] for problem in envelope["detail"]] == [field]  # the log shows no more than this
    assert all(word in envelope["message"] for word in words), envelope["message"]


def test_who_has_the_right_may_train() -> None:
    check(training(), config(**MAY))


@pytest.mark.parametrize(
    ("keys", "item"),
    [
        ({}, job(count=64, width=1024, height=1024, num_inference_steps=50, priority=9, model="any")),
        ({"limits": {"kinds": ["generate"], "models": ["shapes-xl"], "max_priority": 5}}, job()),
        ({"limits": {"models": ["a"]}, "default_model": "a"}, job()),
        ({"limits": {"max_work": 32}}, job()),
        ({"limits": {"models": []}, "clients": {"alice": {"models": None}}}, job()),
        ({"clients": {"bob": {"max_priority": 1}}}, job()),
        ({}, cancel("alice", "alice")),
        ({"limits": {"kinds": [], "max_priority": 0}}, cancel("alice", "alice")),
        ({"clients": {"alice": {"operator": True}}}, cancel("alice", "bob")),
    ],
)
def test_what_is_within_the_limits_is_allowed(keys: dict[str, Any], item: Job | CancelRequest) -> None:
    check(item, config(**keys))


SMALL = {"width": 64, "height": 64, "num_inference_steps": 10}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, 1024 * 1024 * 30),
        ({"count": 3, "num_inference_steps": 10}, 3 * 1024 * 1024 * 10),
        ({"seeds": (1, 2), "width": 64, "height": 128}, 2 * 64 * 128 * 30),
        ({"image_type": "character"}, 832 * 1216 * 30),
        ({"image_type": "character", "width": 64}, 64 * 1216 * 30),
        ({"image_type": "unknown"}, 1024 * 1024 * 30),
        (SMALL | {"chain": Chain(upscale=UpscaleStep(scale=4))}, 64 * 64 * 10),
        (SMALL | {"chain": Chain(upscale=UpscaleStep(strength=0.5))}, 64 * 64 * 10 + 128 * 128 * 5),
    ],
)
def test_work_is_pictures_times_pixels_times_steps(spec: dict[str, Any], expected: int) -> None:
    """A size that is not given is the image type's; without one, that of the largest model."""
    assert work(job(**spec).spec, Config()) == pytest.approx(expected / 1e6)


# How much, how fast


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(gate: Gate, client: str, turn: Turn, settings: Config) -> Rejected | None:
    try:
        gate.admit(client, turn, settings)
    except Rejected as reason:
        return reason
    return None


def fill(turn: Turn, client: str, count: int) -> None:
    for number in range(count):
        turn.add(Ref(client, str(number)), 5)


def test_a_full_queue_of_one_client_is_open_to_the_others() -> None:
    gate, turn = Gate(Clock()), Turn()
    fill(turn, "alice", 9)
    assert refusal(gate, "alice", turn, Config()) is None
    turn.add(Ref("alice", "9"), 5)
    reason = refusal(gate, "alice", turn, Config())
    assert isinstance(reason, QueueFull)
    assert (reason.code, reason.status) == ("QUEUE_FULL", 503)
    assert "10 jobs of alice wait" in str(reason)
    assert "10 for this client" in str(reason)
    assert "imagend cancel" in str(reason)
    assert refusal(gate, "bob", turn, Config()) is None
    assert refusal(gate, "alice", turn, config(clients={"alice": {"max_queued": 11}})) is None


def test_the_queue_is_full_for_all_at_max_queued() -> None:
    gate, turn = Gate(Clock()), Turn()
    for number in range(10):
        fill(turn, f"client{number}", 10)
    reason = refusal(gate, "bob", turn, Config())
    assert isinstance(reason, QueueFull)
    assert "100 jobs of all clients wait" in str(reason)
    assert "100 in all" in str(reason)
    turn.remove(turn.head(1)[0])
    assert refusal(gate, "bob", turn, Config()) is None


def test_no_more_jobs_a_minute_than_allowed_and_the_refusal_says_when() -> None:
    clock, slow = Clock(), config(limits={"jobs_per_minute": 6})
    gate, turn = Gate(clock), Turn()
    assert [refusal(gate, "alice", turn, slow) for _ in range(6)] == [None] * 6
    reason = refusal(gate, "alice", turn, slow)
    assert isinstance(reason, RateLimited)
    assert (reason.code, reason.status) == ("RATE_LIMITED", 429)
    assert "Send this one again in 10 s" in str(reason)
    assert refusal(gate, "bob", turn, slow) is None  # each its own
    clock.now += 9.5
    assert "again in 1 s" in str(refusal(gate, "alice", turn, slow))
    clock.now += 1.0
    assert refusal(gate, "alice", turn, slow) is None
    assert refusal(gate, "alice", turn, slow) is not None


def test_what_a_full_queue_refuses_costs_no_rate() -> None:
    clock, tight = Clock(), config(limits={"max_queued": 1, "jobs_per_minute": 2})
    gate, turn = Gate(clock), Turn()
    fill(turn, "alice", 1)
    assert all(isinstance(refusal(gate, "alice", turn, tight), QueueFull) for _ in range(5))
    turn.remove(Ref("alice", "0"))
    assert [refusal(gate, "alice", turn, tight) for _ in range(2)] == [None, None]


def test_cancels_are_counted_apart_and_pass_when_the_queue_is_full() -> None:
    clock, tight = Clock(), config(max_queued=0, limits={"jobs_per_minute": 2})
    gate = Gate(clock)
    assert isinstance(refusal(gate, "alice", Turn(), tight), QueueFull)
    gate.admit_cancel("alice", tight)
    gate.admit_cancel("alice", tight)
    with pytest.raises(RateLimited, match="cancels of alice"):
        gate.admit_cancel("alice", tight)
    gate.give_back_cancel("alice", tight)
    gate.admit_cancel("alice", tight)


def test_what_is_given_back_can_be_taken_again_and_no_more() -> None:
    gate, slow, turn = Gate(Clock()), config(limits={"jobs_per_minute": 3}), Turn()
    for _ in range(3):
        gate.admit("alice", turn, slow)
    gate.give_back("alice", slow)
    assert refusal(gate, "alice", turn, slow) is None
    assert isinstance(refusal(gate, "alice", turn, slow), RateLimited)


@given(st.integers(1, 20), st.lists(st.integers(0, 40), max_size=80))
@settings(deadline=None)
def test_the_rate_is_that_of_a_bucket(per_minute: int, waits_s: list[int]) -> None:
    """`per_minute` tokens at first, and so many a minute flow in, as exact fractions."""
    clock, gate, turn = Clock(), Gate(lambda: clock.now), Turn()
    tokens = Fraction(per_minute)
    for wait_s in waits_s:
        clock.now += wait_s
        tokens = min(Fraction(per_minute), tokens + Fraction(per_minute * wait_s, 60))
        allowed = refusal(gate, "alice", turn, config(limits={"jobs_per_minute": per_minute})) is None
        assert allowed == (tokens >= 1)
        tokens -= allowed
