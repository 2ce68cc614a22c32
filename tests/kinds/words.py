"""What a worker says beside the truth. Who returns nothing paints after it."""

from __future__ import annotations

import threading
from typing import Any, NoReturn

from fakes import paint

from imagend.errors import UnsupportedSetting
from imagend.job import Outcome, Ref
from imagend.manifest import Artifact
from imagend.messages import Cancel, Ended, Failure, Message, Progress, Ready, Stop, encode

_FAILED = Failure.of(UnsupportedSetting("not so"))
_former: Ref | None = None


def _say(context: Any, *words: Message) -> None:
    context.pipelines.connection.sendall(b"".join(map(encode, words)))


def _say_bytes(context: Any, line: bytes) -> NoReturn:
    context.pipelines.connection.sendall(line)
    threading.Event().wait()
    raise AssertionError


def babble(spec: dict[str, Any], context: Any) -> None:
    _say_bytes(context, b"\x80\x04 this is not JSON\n")


def say_arrived(spec: dict[str, Any], context: Any) -> None:
    _say_bytes(context, b'{"type":"arrived","arrivals":[],"reply":null}\n')


def give_orders(spec: dict[str, Any], context: Any) -> None:
    _say_bytes(context, encode(Stop()) + encode(Cancel(job=context.job)))


def speak_at_length(spec: dict[str, Any], context: Any) -> None:
    _say_bytes(context, encode(Progress(job=context.job, stage="x")).replace(b'"x"', b'"' + b"x" * 65 + b'"'))


def endless_line(spec: dict[str, Any], context: Any) -> None:
    while True:
        context.pipelines.connection.sendall(b"x" * 65536)


def endless_words(spec: dict[str, Any], context: Any) -> None:
    words = encode(Progress(job=context.job, stage="painting")) * 1000
    while True:
        context.pipelines.connection.sendall(words)


def speak_of_another_job(spec: dict[str, Any], context: Any) -> None:
    """`negative_prompt` is its id. The files it names are there."""
    other = Ref(context.job.client, spec["negative_prompt"])
    artifact = paint(context.folder, 0, 0)
    _say(
        context,
        Progress(job=other, stage="painting"),
        Ended(job=other, outcome=Outcome.CANCELLED),
        Ended(job=other, outcome=Outcome.FAILED, failure=_FAILED),
        Ended(job=other, outcome=Outcome.SUCCEEDED, artifacts=(artifact,)),
        Ended(job=Ref("../../etc", "passwd"), outcome=Outcome.CANCELLED),
    )


def get_ready_again(spec: dict[str, Any], context: Any) -> None:
    _say(context, Ready(device="cuda:7", versions={"torch": "9"}))


def end_twice(spec: dict[str, Any], context: Any) -> tuple[Artifact, ...]:
    """And serve() says it a third time."""
    global _former
    _former = context.job
    artifacts = tuple(paint(context.folder, index, seed) for index, seed in enumerate(spec["seeds"]))
    _say(context, *[Ended(job=context.job, outcome=Outcome.SUCCEEDED, artifacts=artifacts)] * 2)
    return artifacts


def end_the_former_job(spec: dict[str, Any], context: Any) -> None:
    assert _former
    _say(context, Progress(job=_former, stage="painting"), Ended(job=_former, outcome=Outcome.CANCELLED))
    _say(context, Ended(job=_former, outcome=Outcome.FAILED, failure=_FAILED))


def cancel_unasked(spec: dict[str, Any], context: Any) -> None:
    _say(context, Ended(job=context.job, outcome=Outcome.CANCELLED))
