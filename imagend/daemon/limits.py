"""What a client may ask for, and how much of it: at the door what no queue is needed for, in the loop the rest. Pure.

A refusal names the field or the number, its limit and what to do. Limits are config.yaml's: `limits` and `clients`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from imagend import presets
from imagend.config import Config
from imagend.daemon.turn import Turn
from imagend.errors import Forbidden, InvalidJob, QueueFull, RateLimited
from imagend.fetch_spec import Fetch
from imagend.generate_spec import Generate
from imagend.job import CancelRequest, Job
from imagend.model_names import wanted
from imagend.rights import Limits, Rights
from imagend.train_spec import Train

_NATIVE = 1024  # SDXL's own size: no model here is larger
_MINUTE_S = 60.0


def check(item: Job | CancelRequest, config: Config) -> None:
    """Whether the signer may ask this spool for this at all, whatever waits already. Raises Forbidden, InvalidJob."""
    _check_place(item, config)
    rights = config.rights(item.signer)
    if isinstance(item, CancelRequest):
        if item.ref.client != item.signer and not rights.operator:
            raise _forbidden("client", item.ref.client, "is another client: you may cancel only your own jobs.")
        return
    if rights.kinds is not None and item.kind not in rights.kinds:
        raise _forbidden("kind", item.kind, f"is not allowed for {_whom(item)}; allowed: {_names(rights.kinds)}.")
    if item.header.priority > rights.max_priority:
        why = f"is higher than {_whom(item)} may ask for: set it to {rights.max_priority} or less."
        raise _forbidden("priority", item.header.priority, why)
    if isinstance(item.spec, Generate):
        _check_painting(item, item.spec, rights, config)
    elif isinstance(item.spec, Fetch):
        _check_fetching(item, item.spec, rights, config)
    elif isinstance(item.spec, Train):
        _check_training(item, item.spec, rights, config)


def _check_place(item: Job | CancelRequest, config: Config) -> None:
    audience = item.header.audience
    if audience is not None and audience != config.name:
        raise Forbidden(
            f"audience: {audience!r} is another spool's name; this one is {config.name!r}. Send it there.",
            detail=[{"field": "audience", "value": audience}],
        )
    wanted_type = item.spec.image_type if isinstance(item, Job) and isinstance(item.spec, Generate) else None
    if wanted_type not in (None, *config.image_types):
        known = ", ".join(config.image_types) or "none"
        raise InvalidJob(
            f"image_type: {wanted_type!r} is not known; known are: {known} (config.yaml).",
            detail=[{"field": "image_type", "value": wanted_type}],
        )


def _check_painting(item: Job, spec: Generate, rights: Rights, config: Config) -> None:
    _check_model(item, spec, rights, config)
    if (asked := work(spec, config)) > rights.max_work:
        raise Forbidden(
            f"count x width x height x num_inference_steps: {asked:,.0f} megapixel-steps are more than the "
            f"{rights.max_work:,.0f} that {_whom(item)} may ask for in one job (max_work). Ask for fewer pictures or "
            "steps or a smaller size, in several jobs if need be.",
            detail=[{"field": "count", "value": pictures(spec)}],
        )


def _check_model(item: Job, spec: Generate | Train, rights: Rights, config: Config) -> None:
    model = wanted(spec.model or config.default_model).name
    if rights.models is not None and model not in rights.models:
        raise _forbidden("model", model, f"is not allowed for {_whom(item)}; allowed: {_names(rights.models)}.")


def _check_training(item: Job, spec: Train, rights: Rights, config: Config) -> None:
    if not rights.train:
        raise Forbidden(
            f"kind: train is not allowed for {_whom(item)}, who has not the right to train LoRAs. If you need it, ask "
            f"the operator for it: in config.yaml, clients: {{{item.signer}: {{train: true}}}}",
            detail=[{"field": "kind", "value": item.kind}],
        )
    _check_model(item, spec, rights, config)
    if spec.presented > config.train.max_presented:
        raise Forbidden(
            f"max_train_steps x train_batch_size x gradient_accumulation_steps: {spec.presented:,} are more than the "
            f"{config.train.max_presented:,} that one job may ask for (train.max_presented in config.yaml). Ask for "
            "less.",
            detail=[{"field": "max_train_steps", "value": spec.max_train_steps}],
        )


def _check_fetching(item: Job, spec: Fetch, rights: Rights, config: Config) -> None:
    if not rights.fetch:
        raise Forbidden(
            f"kind: fetch is not allowed for {_whom(item)}, who has not the right to fetch models. If you need it, ask "
            f"the operator for it: in config.yaml, clients: {{{item.signer}: {{fetch: true}}}}",
            detail=[{"field": "kind", "value": item.kind}],
        )
    if not config.fetch.allows(spec.host):
        raise Forbidden(
            f"source: {spec.host} is not among the hosts that may be fetched from. If you need it, ask the operator "
            "(fetch.hosts in config.yaml).",
            detail=[{"field": "source", "value": spec.host}],
        )


def work(spec: Generate, config: Config) -> float:
    """Megapixel-steps a job asks for; where it names no size, the upper estimate."""
    preset = config.image_types.get(spec.image_type) if spec.image_type else None
    width = spec.width or (preset.width if preset else _NATIVE)
    height = spec.height or (preset.height if preset else _NATIVE)
    steps = spec.num_inference_steps or presets.NUM_INFERENCE_STEPS
    if spec.chain is not None and spec.chain.upscale.strength is not None:
        steps += spec.chain.upscale.scale**2 * int(steps * spec.chain.upscale.strength)
    return pictures(spec) * width * height * steps / 1e6


def pictures(spec: Generate) -> int:
    return len(spec.seeds) if spec.seeds else (spec.count or 1) * max(1, len(spec.items))


def _forbidden(field: str, value: object, why: str) -> Forbidden:
    remedy = "If you need it, ask the operator (limits and clients in config.yaml)."
    return Forbidden(f"{field}: {value!s} {why} {remedy}", detail=[{"field": field, "value": value}])


def _whom(item: Job) -> str:
    return f"client {item.signer}"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


class Gate:
    """How much one client may put into the queue, and how fast. `clock` counts seconds and never goes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._jobs, self._cancels = _Bucket(), _Bucket()

    def admit(self, client: str, turn: Turn, config: Config) -> None:
        """Let one more job of a client in, beside those that wait. Raises QueueFull or RateLimited.

        Ask only for jobs that are new: what is known already takes no room.
        """
        limits = config.rights(client)
        if (waiting := turn.count(client)) >= limits.max_queued:
            raise QueueFull(f"{waiting} jobs of {client} wait", f"{limits.max_queued} for this client")
        if len(turn) >= config.max_queued:
            raise QueueFull(f"{len(turn)} jobs of all clients wait", f"{config.max_queued} in all")
        self._jobs.take(client, limits, self._clock(), "jobs")

    def admit_cancel(self, client: str, config: Config) -> None:
        """Let one wish to cancel in: it must work when the queue is full. Raises RateLimited."""
        self._cancels.take(client, config.rights(client), self._clock(), "cancels")

    def give_back(self, client: str, config: Config) -> None:
        """A job that was let in could not be taken in: it will be shown again."""
        self._jobs.give_back(client, config.rights(client))

    def give_back_cancel(self, client: str, config: Config) -> None:
        self._cancels.give_back(client, config.rights(client))


class _Bucket:
    """A token bucket per client that holds one minute's worth, as GCRA: one moment each (ITU-T I.371, annex A)."""

    def __init__(self) -> None:
        self._paid_until: dict[str, float] = {}

    def take(self, client: str, limits: Limits, now: float, what: str) -> None:
        paid = max(now, self._paid_until.get(client, now)) + _MINUTE_S / limits.jobs_per_minute
        if (early := paid - now - _MINUTE_S) > 1e-6:
            raise RateLimited(what, client, limits.jobs_per_minute, ceil(early))
        self._paid_until[client] = paid

    def give_back(self, client: str, limits: Limits) -> None:
        self._paid_until[client] = self._paid_until.get(client, 0.0) - _MINUTE_S / limits.jobs_per_minute
