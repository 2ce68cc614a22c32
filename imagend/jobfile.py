"""From verified bytes to a Job, or to a refusal that names field, value and remedy. Bounded on hostile input."""

from __future__ import annotations

import difflib
import json
import math
import re
from datetime import datetime, timedelta
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from imagend.errors import Expired, InvalidJob, TooLarge
from imagend.job import MAX_JOB_BYTES, MAX_SEED, SPECS, Cancel, CancelRequest, Frozen, Generate, Header, Job, Ref
from imagend.signing import job_id

MAX_DEPTH = 16
CLOCK_SKEW = timedelta(minutes=5)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_PRIVATE = frozenset({"prompt", "negative_prompt"})  # never repeated in a message, which may reach a log
_HEADER = tuple(field.alias or name for name, field in Header.model_fields.items())
Model = TypeVar("Model", bound=Frozen)


def parse(client: str, body: bytes) -> Job | CancelRequest:
    """Read the signed bytes of one job file. Raises InvalidJob or TooLarge."""
    fields = read_json(body)
    kind = fields.get("kind")
    spec_class = SPECS.get(kind) if isinstance(kind, str) else None
    if spec_class is None:
        raise _invalid([_problem("kind", fields.get("kind"), f"must be one of: {', '.join(SPECS)}", "kind" in fields)])
    problems: list[dict[str, Any]] = []
    known = (*_HEADER, *spec_class.model_fields)
    header = _build(Header, {k: v for k, v in fields.items() if k in _HEADER}, problems, known)
    spec = _build(spec_class, {k: v for k, v in fields.items() if k not in _HEADER}, problems, known)
    if problems or header is None or spec is None:
        raise _invalid(problems)
    if isinstance(spec, Cancel):
        return CancelRequest(ref=Ref(client, spec.job), header=header)
    assert isinstance(spec, Generate)
    return Job(ref=Ref(client, job_id(client, body)), header=header, spec=spec)


def check_window(header: Header, now: datetime) -> None:
    """A job is accepted from 5 minutes before its issued_at (clocks differ) until its expires_at."""
    if header.issued_at > now + CLOCK_SKEW:
        raise InvalidJob(
            f"issued_at: {header.issued_at.isoformat()} lies in the future;"
            f" here it is {now.isoformat(timespec='seconds')}."
            " Set the sender's clock (NTP) and send the job again.",
            detail=[{"field": "issued_at", "value": header.issued_at.isoformat()}],
        )
    if now > header.deadline:
        raise Expired(
            f"The job expired at {header.deadline.isoformat()}; here it is {now.isoformat(timespec='seconds')}."
            " Sign it again with a new issued_at.",
            detail=[{"field": "expires_at", "value": header.deadline.isoformat()}],
        )


def read_json(body: bytes) -> dict[str, Any]:
    """Strict JSON (I-JSON, RFC 7493): UTF-8, one object, no duplicate names, no NaN, safe integers, 16 levels."""
    if len(body) > MAX_JOB_BYTES:
        raise TooLarge(len(body), MAX_JOB_BYTES)
    try:
        text = body.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise InvalidJob(
            f"The file is not UTF-8 (byte {error.start}). Write it as UTF-8 without a byte order mark."
        ) from None
    if _depth(text) > MAX_DEPTH:
        raise InvalidJob(f"The JSON is nested deeper than {MAX_DEPTH} levels. Job fields need at most 2.")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates hide behind \ud800 escapes
    except UnicodeEncodeError:
        raise InvalidJob(
            "A text holds half of a surrogate pair (\\ud800 to \\udfff). Write the character itself."
        ) from None
    except ValueError as error:
        raise InvalidJob(f"The file is not valid JSON: {error}. Check it with: jq . FILE") from None
    if not isinstance(value, dict):
        raise InvalidJob("The file must hold one JSON object: {...}.")
    return value


def _depth(text: str) -> int:
    """How deep brackets nest outside strings, without recursion: the json module's own would exhaust the stack."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidJob(
            f"The name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object. Keep one."
        )
    return result


def _integer(digits: str) -> int:
    if len(digits) > 17 or abs(value := int(digits)) > MAX_SEED:
        raise InvalidJob(
            f"The number {digits[:24]}{'…' if len(digits) > 24 else ''} is beyond ±{MAX_SEED} (2^53 - 1), which not"
            " every JSON reader keeps exact. Use a smaller one."
        )
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidJob(f"The number {digits[:24]} is not finite. Use an ordinary number.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidJob(f"{name} is not JSON. Use an ordinary number.")


def _build(
    model: type[Model], fields: dict[str, Any], problems: list[dict[str, Any]], known: tuple[str, ...]
) -> Model | None:
    """The model, or None with its problems added. Validated as JSON: lists, dates and names of enums are taken."""
    try:
        return model.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        problems += [_explain(dict(details), known) for details in error.errors(include_url=False)]
        return None


def _explain(details: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    field = ".".join(map(str, details["loc"]))
    context = details.get("ctx", {})
    match details["type"]:
        case "missing":
            return _problem(field, None, "is missing; every job needs it", given=False)
        case "extra_forbidden":
            close = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields are: {', '.join(known)}"
            return _problem(field, details["input"], f"is not a field; {hint}")
        case "value_error" if not field:
            return {"field": None, "problem": str(context["error"])}
        case "value_error":
            return _problem(field, details["input"], str(context["error"]))
        case "string_pattern_mismatch":
            return _problem(field, details["input"], f"must match {context['pattern']}")
        case "int_from_float" | "int_type":
            return _problem(field, details["input"], "must be a whole number, such as 7")
        case "datetime_parsing" | "datetime_type" | "datetime_from_date_parsing":
            return _problem(field, details["input"], "must be a time with time zone, such as 2026-11-20T15:00:00Z")
    message = details["msg"].removeprefix("Input ")
    return _problem(field, details["input"], message[0].lower() + message[1:])


def _problem(field: str, value: Any, problem: str, given: bool = True) -> dict[str, Any]:
    if not given or field in _PRIVATE:
        return {"field": field, "problem": problem}
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return {"field": field, "value": shown if len(shown) <= 60 else shown[:57] + "...", "problem": problem}


def _invalid(problems: list[dict[str, Any]]) -> InvalidJob:
    lines = [
        " ".join(part for part in (f"{p['field']}:" if p["field"] else "", p.get("value", ""), p["problem"]) if part)
        for p in problems
    ]
    return InvalidJob("; ".join(lines) + ". Field by field: docs/job.md, or `imagend schema`.", detail=problems)
