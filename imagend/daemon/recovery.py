"""After any death, ours, a worker's or the machine's: every job in its right place again. Runs before anything else.

pending  active  outputs  done   means                                    what happens
   +       -        -       -    queued                                   nothing
   -       +        -       -    died during an attempt                   requeued, failed when attempts are used up,
                                                                          cancelled when that was wished
   -       +        +       -    died between publish and finish          finished
   +       -        +       -    ended while queued, died before finish   finished
   -       -        +       +    ended                                    nothing
   two of pending, active, done  the disk kept both ends of a rename      the later place is true
A file in both inbox and pending died between accept's two steps: it is accepted again, which does nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import structlog

from imagend import signing
from imagend.config import Config
from imagend.daemon.ending import Ending
from imagend.daemon.retry import worth_another_attempt
from imagend.errors import DaemonDied, Rejected
from imagend.job import Outcome, Ref
from imagend.lanes import Lane, lane_by
from imagend.messages import Failure
from imagend.outputs import Outputs
from imagend.spool import Spool, State

log = structlog.get_logger()


@dataclass(frozen=True)
class Queued:
    ref: Ref
    priority: int
    lane: Lane


def recover(spool: Spool, outputs: Outputs, ending: Ending, config: Config) -> list[Queued]:
    """Put things right and return the pending jobs in the order in which they were accepted."""
    outputs.settle()
    spool.sweep()
    active, waiting = spool.tickets(State.ACTIVE), spool.tickets(State.PENDING)
    ended = {ticket for ticket in active + waiting if outputs.ended(ticket.ref)}
    for ticket in sorted(ended):
        log.info("finished what a crash left", job=str(ticket.ref))
        ending.finish_again(ticket.ref)
    ending.tidy()
    died = [ticket for ticket in active if ticket not in ended]
    for ticket in died:
        _settle(ticket.ref, spool, ending, config.max_attempts)
    requeued = [ticket for ticket in died if spool.where(ticket.ref) is State.PENDING]
    queued = []
    pending = [ticket.ref for ticket in sorted(waiting + requeued) if ticket not in ended]
    for ref, raw in zip(pending, spool.read_pending(pending), strict=True):
        if (place := _place(ref, raw, config.default_upscaler)) is None:
            log.error("a job's file is damaged; it was set aside: submit it again", job=str(ref))
            spool.set_aside(ref)
        else:
            queued.append(Queued(ref, *place))
    ending.tidy()
    outputs.sweep({entry.ref for entry in queued})
    spool.attachments.sweep({entry.ref for entry in queued})
    return queued


def _place(ref: Ref, raw: bytes, default_upscaler: str) -> tuple[int, Lane] | None:
    """A queued job's priority and lane, without checking all of it, for 100,000 may wait; None if its bytes are others.

    They can be cut: a power failed before accept's fsync. Then its sender was told nothing and its inbox still has it.
    """
    try:
        body, _ = signing.split(raw)
        if signing.job_id(ref.client, body) != ref.id:
            return None
        fields = json.loads(body)
        priority, what = fields.get("priority", 5), (fields.get("kind"), fields.get("upscaler"))
        mask = fields.get("mask")
    except (Rejected, ValueError):
        return None
    # What an older imagend took in is judged when its turn comes.
    return priority if isinstance(priority, int) else 5, lane_by(*what, default_upscaler, mask)


def _settle(ref: Ref, spool: Spool, ending: Ending, max_attempts: int) -> None:
    """A job that was running when the daemon died."""
    attempts = spool.attempts(ref)
    failure = Failure.of(DaemonDied(attempts))
    if spool.cancel_wanted(ref):
        ending.end(ref, Outcome.CANCELLED)
    elif worth_another_attempt(failure, attempts, max_attempts):
        log.warning("requeued after a crash", job=str(ref), attempts=attempts)
        spool.requeue(ref, failure.error.message)
        ending.health.events.tell("requeued", ref, attempt=attempts, code=failure.error.code)
    else:
        ending.end(ref, Outcome.FAILED, failure=failure)
