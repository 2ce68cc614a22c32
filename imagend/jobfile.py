"""From verified bytes to a Job, or to a refusal that names field, value and remedy. Bounded on hostile input."""

from __future__ import annotations

import difflib
import json
import math
import re
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from imagend import set_table
from imagend.errors import Expired, InvalidJob, TooLarge
from imagend.fetch_spec import VARIANT
from imagend.fields import PICTURE
from imagend.generate_spec import Generate
from imagend.job import (
    CLIENT_NAME,
    JOB_ID,
    MAX_JOB_BYTES,
    MAX_SEED,
    NAME,
    SPECS,
    Cancel,
    CancelRequest,
    Frozen,
    Header,
    Job,
    Ref,
    Spec,
)
from imagend.model_names import MODEL_NAME
from imagend.record import SHA256
from imagend.set_field import ITEM_NAME, TABLE, VALUE_NAME
from imagend.signing import job_id

MAX_DEPTH = 16
CLOCK_SKEW = timedelta(minutes=5)
MAX_PROBLEMS = 10
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # one that never ends is taken whole: linear time
_BRACKET = re.compile(r"[\[\]{}]")
_PRIVATE = re.compile(
    r"(negative_)?prompt|source|notes|mask(\.find(\..*)?)?|validation_prompts(\.\d+)?|items(\.\d+(\.values(\..*)?)?)?",
    re.DOTALL,
)
"""Fields whose values are in no message: it may reach a log."""
_NAME = re.compile(r"[\w.]{1,64}", re.ASCII)
_PATTERNS = {
    NAME: "must be a name of 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit",
    CLIENT_NAME: "must be a client's name as in allowed_signers, 1 to 64 letters, digits and any of . _ @ + -",
    MODEL_NAME: "must be a model's name as `imagend models` lists it, no path: without . or .. and no / at its ends",
    PICTURE: "must be ENTITY/VIEW, as `imagend references` lists them, or sha256: and 64 digits, of a file sent along",
    SHA256: "must be 64 hexadecimal digits in small letters, as sha256sum prints them",
    VARIANT: "must be a variant's name, such as fp16",
    ITEM_NAME: "must be a name of 1 to 60 letters, digits, '.', '_' and '-', the first a letter or digit",
    TABLE: "must be sha256: and 64 digits, of a table sent along",
    VALUE_NAME: "must be called by 1 to 32 letters, digits and '_', the first a letter",
    JOB_ID: "must be a job's id, 20 hexadecimal digits; list yours with: imagend status",
}
_OTHERS_WORDS = {  # what other programs call our fields
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "n": "count",
    "n_iter": "count",
    "batch_size": "count",
    "num_images_per_prompt": "count",
    "checkpoint": "model",
    "init_image": "image",
    "init_images": "image",
    "denoising_strength": "strength",
    "denoise": "strength",
    "id": "job",
}
_HEADER = tuple(field.alias or name for name, field in Header.model_fields.items())
Model = TypeVar("Model", bound=Frozen)


def parse(client: str, body: bytes) -> Job | CancelRequest:
    """Read the signed bytes of one job file. Raises InvalidJob or TooLarge."""
    fields = read_json(body)
    kind = fields.get("kind")
    spec_class = SPECS.get(kind) if isinstance(kind, str) else None
    if spec_class is None:
        raise _invalid([_problem("kind", fields.get("kind"), f"must be one of: {', '.join(SPECS)}", "kind" in fields)])
    errors: list[Any] = []
    header = _build(Header, {k: v for k, v in fields.items() if k in _HEADER}, errors)
    spec = _build(spec_class, {k: v for k, v in fields.items() if k not in _HEADER}, errors)
    if errors or header is None or spec is None:
        known = (*_HEADER, *spec_class.model_fields)
        raise _invalid([_explain(dict(details), known) for details in errors[:MAX_PROBLEMS]], len(errors))
    if isinstance(spec, Cancel):
        return CancelRequest(ref=Ref(spec.client or client, spec.job), header=header, signer=client)
    assert isinstance(spec, Spec)
    return Job.model_construct(ref=Ref(client, job_id(client, body)), header=header, spec=spec)  # its parts are checked


def with_items(spec: Generate, raw: bytes) -> Generate:
    """The spec of a job that names a table, with the items of that table in its place. Raises InvalidJob."""
    try:
        items = set_table.items_of(raw)
    except ValueError as error:
        raise _invalid([_problem("table", spec.table, f"cannot be used: {error}")]) from None
    errors: list[Any] = []
    whole = _build(Generate, spec.model_dump(mode="json") | {"items": items, "table": None}, errors)
    if whole is None:
        problems = [_explain(dict(details), tuple(Generate.model_fields)) for details in errors[:MAX_PROBLEMS]]
        raise _invalid(problems, len(errors))
    return whole


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
    if text.startswith("\ufeff"):
        raise InvalidJob("The file starts with a byte order mark. Write it as UTF-8 without one.")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise InvalidJob(f"The JSON is nested deeper than {MAX_DEPTH} levels. Job fields need at most 6.")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_constant,
        )
        if "\\u" in text:
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


class _Refused(NamedTuple):
    """A number that cannot be one. The object that holds it knows its name."""

    shown: str
    problem: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _invalid([_problem(name, None, "stands twice in one object; keep one", given=False)])
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, _Refused):
                raise _invalid([{"field": _shown(name), "value": item.shown, "problem": item.problem}])
        result[name] = value
    return result


def _integer(digits: str) -> int | _Refused:
    if len(digits) > 17 or abs(value := int(digits)) > MAX_SEED:
        why = f"is beyond ±{MAX_SEED} (2^53 - 1), which not every JSON reader keeps exact; use a smaller one"
        return _Refused(_clipped(digits), why)
    return value


def _number(digits: str) -> float | _Refused:
    value = float(digits)
    return value if math.isfinite(value) else _Refused(_clipped(digits), "is not finite; use an ordinary number")


def _no_constant(name: str) -> _Refused:
    return _Refused(name, "is no number in JSON; use an ordinary one")


def _build(model: type[Model], fields: dict[str, Any], errors: list[Any]) -> Model | None:
    """The model, or None with its errors added. Validated as JSON: lists, dates and names of enums are taken."""
    try:
        return model.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        errors += error.errors(include_url=False)
        return None


def _explain(details: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    field, value = ".".join(map(str, details["loc"])), details["input"]
    context = details.get("ctx", {})
    match details["type"]:
        case "missing":
            return _problem(field, None, "is missing; add it", given=False)
        case "extra_forbidden":
            meant = _OTHERS_WORDS.get(field.lower(), field)
            close = [meant] if meant in known else difflib.get_close_matches(field[:64], known, n=1)
            hint = f"perhaps you mean {close[0]}" if close else f"known fields are: {', '.join(known)}"
            return _problem(field, None, f"is not a field; {hint}", given=False)  # its value may be a prompt
        case "value_error" if not field:  # of several fields: the error names the one to change
            field, _, problem = str(context["error"]).partition(": ")
            return _problem(field, value.get(field), problem)
        case "value_error":
            return _problem(field, value, str(context["error"]))
        case "string_pattern_mismatch":
            return _problem(field, value, _PATTERNS[context["pattern"]])
        case "int_from_float" | "int_type":
            return _problem(field, value, "must be a whole number, such as 7")
        case "string_too_long" | "too_long":
            unit = "characters" if isinstance(value, str) else "entries"
            return _problem(field, value, f"must have at most {context['max_length']} {unit}")
        case "too_short":
            return _problem(field, value, "is empty; leave it out, or give at least one")
    message = details["msg"].removeprefix("Input ")
    return _problem(field, value, message[0].lower() + message[1:])


def _problem(field: str, value: Any, problem: str, given: bool = True) -> dict[str, Any]:
    if not given or _PRIVATE.fullmatch(field):
        return {"field": _shown(field), "problem": problem}
    return {
        "field": _shown(field),
        "value": _clipped(json.dumps(value, ensure_ascii=True, default=str)),
        "problem": problem,
    }


def _shown(field: str) -> str:
    """A field's name as it may stand in a message: a stranger's may hold anything."""
    return field if _NAME.fullmatch(field) else _clipped(json.dumps(field))


def _clipped(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _invalid(problems: list[dict[str, Any]], count: int = 0) -> InvalidJob:
    """`problems` are the first of `count`."""
    lines = [" ".join(filter(None, (f"{p['field']}:", p.get("value"), p["problem"]))) for p in problems]
    if count > len(problems):
        lines.append(f"and {count - len(problems)} more")
    return InvalidJob("; ".join(lines) + ". Field by field: docs/job.md, or `imagend schema`.", detail=problems)
