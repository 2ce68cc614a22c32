"""The reader of job files: golden pairs in tests/jobs/, then whatever hypothesis and bad faith think of.

jobs/valid/NAME.json is a body (without signature), NAME.expected.json what it means with all defaults.
jobs/invalid/NAME.json are bytes, NAME tells their fault, NAME.expected.json is the envelope that their sender gets.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import jobfile
from imagend.edit_spec import UNFIT
from imagend.errors import Expired, InvalidJob, Rejected, TooLarge
from imagend.generate_spec import Generate
from imagend.job import MAX_JOB_BYTES, SPECS, CancelRequest, Header, Job
from imagend.job_schema import schema_of_job_file
from imagend.signing import job_id

JOBS = Path(__file__).parents[1] / "jobs"
CANARY = "canary-7f3a"  # stands in every prompt under jobs/invalid/
MINIMAL = {
    "schema": "imagend.job/v1",
    "kind": "generate",
    "issued_at": "2026-11-20T15:00:00Z",
    "prompt": "a red circle",
}
# Faults of the file as a whole, which no field can be blamed for.
OF_THE_FILE = re.compile(
    r"(a-word|array|byte-order-mark|control-character|empty|lone-surrogate|nested|not-utf-8|nul-bytes|single-quotes"
    r"|surrogates|trailing-comma|truncated|two-objects|utf-16)"
)


def bodies(folder: str) -> list[str]:
    return sorted(path.stem for path in (JOBS / folder).glob("*.json") if not path.stem.endswith(".expected"))


def golden(folder: str, name: str) -> tuple[bytes, dict[str, Any]]:
    expected = json.loads((JOBS / folder / f"{name}.expected.json").read_text(encoding="utf-8"))
    return (JOBS / folder / f"{name}.json").read_bytes(), expected


def body(**fields: Any) -> bytes:
    return json.dumps({k: v for k, v in (MINIMAL | fields).items() if v is not ...}).encode()


def outcome(raw: bytes) -> Job | CancelRequest | dict[str, Any]:
    """What the body says, or the envelope that its sender gets; anything else that parse() raises is a bug."""
    try:
        return jobfile.parse("alice", raw)
    except Rejected as error:
        return error.envelope()


def rejection(raw: bytes) -> dict[str, Any]:
    envelope = outcome(raw)
    assert isinstance(envelope, dict)
    return envelope


# Golden pairs


@pytest.mark.parametrize("name", bodies("valid"))
def test_a_valid_body_means_what_stands_beside_it(name: str) -> None:
    raw, expected = golden("valid", name)
    item = jobfile.parse("alice", raw)
    found = {"header": item.header.model_dump(mode="json", by_alias=True)}
    found |= {"spec": item.spec.model_dump(mode="json")} if isinstance(item, Job) else {"cancels": item.ref.id}
    found |= {} if isinstance(item, Job) else {"of": item.ref.client}
    assert found == expected
    assert item.signer == "alice"
    assert not isinstance(item, Job) or item.ref == ("alice", job_id("alice", raw))


@pytest.mark.parametrize("name", bodies("invalid"))
def test_an_invalid_body_is_answered_with_what_stands_beside_it(name: str) -> None:
    raw, expected = golden("invalid", name)
    assert rejection(raw) == expected


def test_every_golden_file_has_its_pair() -> None:
    for folder in ("valid", "invalid"):
        names = {path.name for path in (JOBS / folder).iterdir()}
        assert names == {f"{name}{ending}" for name in bodies(folder) for ending in (".json", ".expected.json")}


# What a refusal must say and must not


@pytest.mark.parametrize("name", [name for name in bodies("invalid") if not OF_THE_FILE.match(name)])
def test_a_refusal_names_field_value_and_remedy(name: str) -> None:
    error = rejection(golden("invalid", name)[0])
    assert (error["code"], error["status"]) == ("INVALID_PARAMETERS", 422)
    assert error["detail"]
    for problem in error["detail"]:
        assert problem["field"]
        assert problem["problem"]
        assert f"{problem['field']}: {problem.get('value', '')}".rstrip() in error["message"]
        # A prompt's value is private, and that of an unknown field may be a prompt under a wrong name.
        known = problem["field"].split(".")[0] in {*MINIMAL, *Header.model_fields, *Generate.model_fields, "job"}
        of_a_set = re.match(r"items(\.\d+(\.values.*)?)?$", problem["field"].strip('"'))
        silent = {"prompt", "negative_prompt", problem["field"] if of_a_set else ""}
        said_absent = re.search(r"missing|twice|must be one of|not a field", problem["problem"])
        assert "value" in problem or not known or problem["field"] in silent or said_absent
    assert "`imagend schema`" in error["message"]


@pytest.mark.parametrize("name", bodies("invalid"))
def test_no_refusal_repeats_the_prompt(name: str) -> None:
    assert CANARY not in json.dumps(rejection(golden("invalid", name)[0]))


@pytest.mark.parametrize(
    "raw",
    [
        body(prompt={"a": {"b": CANARY}}),
        body(prompt=[[CANARY]]),
        body(prompt=CANARY * 4000),  # 44,000 characters
        body(prompt=CANARY, negative_prompt=CANARY, kind="edit"),
        body(prompt=CANARY, prompt_syntax=None),
        body(prompt=CANARY, num_inference_steps=None, seed=1, seeds=[1]),
        body(prompt=CANARY, seed=2**53 - 1, count=2),
        body(prompt=CANARY, expires_at="2027-11-20T15:00:00Z"),
        body(Prompt=CANARY),
        body(negative=CANARY),
        body(text=CANARY),
        body(caption=[CANARY]),
        body(prompt=f'("{CANARY}", "b").blend(1)'),
        body(prompt=f'("{CANARY}", "b").blend(1, -1)'),
        body(prompt=f'("a", "b").and(1, 1) {CANARY}'),
        body(prompt=f"withLora({CANARY})"),
        body(prompt=f"{CANARY} BREAK " * 80, prompt_syntax="a1111"),
        body(prompt=CANARY)[:-2],
        body(prompt=CANARY).replace(b"7f3a", b"7f3a\xff"),
        body(prompt=CANARY).replace(b"7f3a", b"7f3a\\x"),
        body(prompt=CANARY).replace(b"7f3a", b"7f3a\\ud800"),
        body(prompt=CANARY).replace(b"7f3a", b'7f3a"'),
    ],
)
def test_a_prompt_stays_private_however_wrong_the_job(raw: bytes) -> None:
    assert CANARY in raw.decode("utf-8", "replace")
    assert CANARY not in json.dumps(rejection(raw))


def test_a_message_stays_short_and_on_one_line_whatever_the_field_names() -> None:
    names = ["x" * 60_000, "a\nb", "\x1b[31m", "\u202e", "", "{0.__class__}", "'; drop"]
    for name in names:
        message = rejection(body(**{name: 1}))["message"]
        assert message.isprintable()
        assert len(message) < 1000


def test_a_job_with_thousands_of_faults_is_told_of_the_first() -> None:
    error = rejection(body(**{f"f{number}": 1 for number in range(5000)}))
    assert len(json.dumps(error)) < 16_000
    assert "4990 more" in error["message"]


# Limits, which must cost nothing to enforce

HOSTILE = {
    "900,000 [": b"[" * 900_000,
    "as many [ as fit": b"[" * MAX_JOB_BYTES,
    "as many {": b'{"a":' * (MAX_JOB_BYTES // 5),
    "an endless string of escapes": b'"' + b'\\"' * (MAX_JOB_BYTES // 2 - 1),
    "an endless string of backslashes": b'{"a":"' + b"\\" * (MAX_JOB_BYTES - 6),
    "only quotes": b'"' * MAX_JOB_BYTES,
    "ten thousand names, one twice": b"{" + b",".join(b'"%x":1' % n for n in range(7000)) + b',"1b57":1}',
    "ten thousand unknown fields": body()[:-1] + b"," + b",".join(b'"%x":1' % n for n in range(6500)) + b"}",
    "an endless name": body(**{"x" * 64_000: 1}),
    "a number of 60,000 digits": body()[:-1] + b',"seed":' + b"9" * 60_000 + b"}",
    "a fraction of 60,000 digits": body()[:-1] + b',"seed":0.' + b"9" * 60_000 + b"}",
    "an exponent of 60,000 digits": body()[:-1] + b',"seed":1e' + b"9" * 60_000 + b"}",
    "60,000 surrogates": body(label="\ud800" * 10_000),
    "60,000 brackets in the prompt": body(prompt="(" * 39_000),
    "60,000 closed brackets in the prompt": body(prompt="()" * 19_000),
    "30,000 quotes in the prompt": body(prompt='"' * 30_000),
    "A1111 brackets": body(prompt="(a:1)" * 8_000, prompt_syntax="a1111"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_or_read_at_once(name: str) -> None:
    start = time.perf_counter()
    found = outcome(HOSTILE[name])
    assert time.perf_counter() - start < 60.0  # some 10 ms; what backtracks would need hours
    assert not isinstance(found, dict) or len(json.dumps(found)) < 16_000


def test_a_body_may_be_64_kib_and_no_byte_more() -> None:
    fits = body()[:-1] + b" " * (MAX_JOB_BYTES - len(body())) + b"}"
    assert isinstance(jobfile.parse("alice", fits), Job)
    with pytest.raises(TooLarge, match=rf"{MAX_JOB_BYTES + 1} bytes; .* at most {MAX_JOB_BYTES}"):
        jobfile.parse("alice", fits + b" ")


@pytest.mark.parametrize(("levels", "too_deep"), [(15, False), (16, True)])
def test_16_levels_of_json_are_read_and_no_more(levels: int, too_deep: bool) -> None:
    inner = b"[" * levels + b"]" * levels  # in the object, which is a level too
    assert ("nested deeper" in rejection(body()[:-1] + b',"seeds":' + inner + b"}")["message"]) is too_deep


def test_brackets_in_texts_are_no_levels() -> None:
    assert isinstance(jobfile.parse("alice", body(label='\\"[{' * 40, prompt="plain [[ text {{" + "{" * 20)), Job)


# When a job may be accepted


@pytest.mark.parametrize(
    ("expires_after", "now_after", "error"),
    [
        (None, timedelta(minutes=-5), None),  # clocks differ
        (None, timedelta(minutes=-5, seconds=-1), InvalidJob),
        (None, timedelta(hours=24), None),
        (None, timedelta(hours=24, seconds=1), Expired),
        (timedelta(hours=1), timedelta(hours=1), None),
        (timedelta(hours=1), timedelta(hours=1, seconds=1), Expired),
        (timedelta(days=7), timedelta(days=7), None),
    ],
)
def test_a_job_is_accepted_from_five_minutes_before_its_issue_until_it_expires(
    expires_after: timedelta | None, now_after: timedelta, error: type[Rejected] | None
) -> None:
    issued = datetime(2026, 11, 20, 15, tzinfo=UTC)
    expires = (issued + expires_after).isoformat() if expires_after else None
    header = jobfile.parse("alice", body(issued_at=issued.isoformat(), expires_at=expires)).header
    if error is None:
        jobfile.check_window(header, issued + now_after)
        return
    with pytest.raises(error) as caught:
        jobfile.check_window(header, issued + now_after)
    assert (issued + now_after).isoformat() in str(caught.value)  # our clock, so that both can be compared


def test_an_hour_is_the_same_in_every_time_zone() -> None:
    header = jobfile.parse("alice", body(issued_at="2026-11-20T23:30:00+14:00")).header
    assert header.issued_at == datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
    assert header.deadline == datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "moment", ["2026-11-20 15:00:00Z", "2026-11-20T15:00Z", "20261120T150000Z", "1795186800.5", "0001-01-01T00:00:00Z"]
)
def test_only_rfc_3339_of_this_millennium_is_a_time(moment: str) -> None:
    for field in ("issued_at", "expires_at"):
        error = rejection(body(**{field: moment}))
        assert [(problem["field"], problem["value"]) for problem in error["detail"]] == [(field, f'"{moment}"')]


def test_the_same_bytes_are_another_job_for_another_client() -> None:
    one, other = jobfile.parse("alice", body()), jobfile.parse("bob", body())
    assert (one.ref.client, other.ref.client) == ("alice", "bob")
    assert one.ref.id != other.ref.id


# Whatever comes, parse() returns or raises Rejected

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["generate", "cancel", "../x"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=12,
)
FIELDS = ("schema", *list(Header.model_fields)[1:], *Generate.model_fields, "job")


def survives(raw: bytes) -> None:
    found = outcome(raw)
    if isinstance(found, dict):
        assert len(json.dumps(found)) < 16_000
        assert found["message"].isprintable()


@given(st.binary())
@settings(deadline=None)
def test_any_bytes(raw: bytes) -> None:
    survives(raw)


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(), ANY_JSON))
@settings(deadline=None)
def test_any_object(fields: dict[str, Any]) -> None:
    survives(json.dumps(fields).encode())


@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=2))
@settings(deadline=None, max_examples=200)
def test_a_valid_job_with_any_value_in_any_field(fields: dict[str, Any]) -> None:
    survives(body(**fields))


@given(st.sampled_from(bodies("valid")), st.integers(0, 400), st.binary(max_size=3))
@settings(deadline=None)
def test_a_valid_body_with_any_bytes_in_it(name: str, at: int, noise: bytes) -> None:
    raw = golden("valid", name)[0]
    survives(raw[:at] + noise + raw[at + 1 :])


@given(st.text(alphabet='()[]{}"\\+-.:,1aBREAK andblend ', max_size=60), st.sampled_from(["compel", "a1111", "plain"]))
@settings(deadline=None)
def test_any_prompt(prompt: str, syntax: str) -> None:
    survives(body(prompt=prompt, prompt_syntax=syntax))


# The schema that `imagend schema` prints


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """JSON Schema 2020-12, as much of it as our schema uses; any other keyword is a KeyError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    types = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "integer": is_number and value == int(value),
        "number": is_number,
        "boolean": isinstance(value, bool),
        "null": value is None,
    }
    tests = {
        "type": lambda name: types[name],
        "const": lambda const: value == const,
        "enum": lambda values: value in values,
        "minimum": lambda bound: not is_number or value >= bound,
        "maximum": lambda bound: not is_number or value <= bound,
        "multipleOf": lambda step: not is_number or value % step == 0,
        "maxLength": lambda bound: not isinstance(value, str) or len(value) <= bound,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "format": lambda name: name == "date-time",
        "contentEncoding": lambda name: name == "base64",
        "minItems": lambda bound: not isinstance(value, list) or len(value) >= bound,
        "maxItems": lambda bound: not isinstance(value, list) or len(value) <= bound,
        "prefixItems": lambda each: (
            not isinstance(value, list) or all(fits(item, one, root) for item, one in zip(value, each, strict=False))
        ),
        "items": lambda each: not isinstance(value, list) or all(fits(item, each, root) for item in value),
        "anyOf": lambda choices: any(fits(value, choice, root) for choice in choices),
        "oneOf": lambda choices: sum(fits(value, choice, root) for choice in choices) == 1,
        "required": lambda names: not isinstance(value, dict) or names <= value.keys(),
        "properties": lambda known: all(fits(value[name], known[name], root) for name in known if name in value),
        "additionalProperties": lambda allowed: allowed or value.keys() <= schema["properties"].keys(),
        "maxProperties": lambda bound: not isinstance(value, dict) or len(value) <= bound,
        "patternProperties": lambda known: all(
            fits(value[name], known[pattern], root) for pattern in known for name in value if re.search(pattern, name)
        ),
        "$ref": lambda ref: fits(value, root["$defs"][ref.removeprefix("#/$defs/")], root),
    }
    tests |= dict.fromkeys(("title", "description", "default", "$schema", "$id", "$defs"), lambda _: True)
    normal = {key: set(item) if key == "required" else item for key, item in schema.items()}
    return all(tests[keyword](argument) for keyword, argument in normal.items())


def test_the_schema_is_one_of_draft_2020_12() -> None:
    schema = schema_of_job_file()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert [variant["title"] for variant in schema["oneOf"]] == list(SPECS)
    for variant in schema["oneOf"]:
        assert set(variant["required"]) <= set(variant["properties"])
        assert variant["additionalProperties"] is False
    references = re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema))
    assert {reference.removeprefix("#/$defs/") for reference in references} <= schema["$defs"].keys()


@pytest.mark.parametrize("kind", SPECS)
def test_the_schema_describes_every_field(kind: str) -> None:
    variant = next(variant for variant in schema_of_job_file()["oneOf"] if variant["title"] == kind)
    names = {field.alias or name for name, field in (Header.model_fields | SPECS[kind].model_fields).items()}
    names -= UNFIT.keys() if kind == "edit" else set()
    assert variant["properties"].keys() == names | {"signature"}
    silent = [name for name, value in variant["properties"].items() if not value.get("description")]
    assert silent == []


@pytest.mark.parametrize("name", bodies("valid"))
def test_the_schema_takes_what_the_daemon_takes(name: str) -> None:
    schema = schema_of_job_file()
    job = json.loads(golden("valid", name)[0])
    assert fits(job, schema, schema)
    assert fits(job | {"signature": "AAAA"}, schema, schema)


@pytest.mark.parametrize(
    "name",
    [
        "cancel-with-a-prompt",
        "cancel-with-bad-id",
        "cancel-of-a-path",
        "cancel-without-job",
        "clip-skip-negative",
        "edit-mask-box-negative",
        "edit-mask-box-of-3",
        "edit-mask-boxes-65",
        "edit-mask-expand-513",
        "edit-mask-finds-17",
        "edit-mask-finds-a-number",
        "edit-mask-of-an-unknown-field",
        "edit-transparency-black",
        "edit-with-a-chain",
        "edit-with-a-width",
        "edit-without-a-mask",
        "edit-without-image",
        "kind-unknown",
        "label-too-long",
        "metadata-some",
        "model-a-path",
        "priority-10",
        "prompt-missing",
        "schema-v2",
        "seed-beyond-2-to-the-53",
        "seeds-65",
        "steps-a-word",
        "steps-true",
        "unknown-field-steps",
        "width-not-a-multiple-of-8",
        "width-with-a-fraction",
    ],
)
def test_the_schema_refuses_what_the_daemon_refuses(name: str) -> None:
    schema = schema_of_job_file()
    assert not fits(json.loads(golden("invalid", name)[0]), schema, schema)
