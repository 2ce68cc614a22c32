"""The router on labelled requests: how often it is right, and what it goes by."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from imagend.edit_rules import RULES, Rule
from imagend.edit_settings import Edit
from imagend.router import Route, plain, route

FILE = REPOSITORY / "tests" / "edit_requests.csv"
SPLITS = [(author, split) for author in ("one", "two") for split in ("dev", "held_out")]
PATHS = ("simple", "complex")


def requests() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def confusion(author: str, split: str) -> Counter[tuple[str, str]]:
    """How many requests of an author and a split there are by (the right path, the one found)."""
    asked = [row for row in requests() if (row["author"], row["split"]) == (author, split)]
    return Counter((row["path"], route(row["request"]).path) for row in asked)


def right(found: Counter[tuple[str, str]]) -> float:
    return sum(found[path, path] for path in PATHS) / found.total()


def test_the_requests_are_many_and_honestly_split() -> None:
    rows = requests()
    assert len(rows) >= 200
    assert len({row["request"] for row in rows}) == len(rows)
    assert {row["language"] for row in rows} == {"en", "fr", "de"}
    assert min(Counter(row["category"] for row in rows).values()) >= 20
    for row in rows:
        odd = hashlib.sha256(row["request"].encode()).digest()[0] % 2
        assert row["split"] == ("held_out" if odd else "dev")


@pytest.mark.parametrize(("author", "split"), SPLITS)
def test_more_than_85_percent_are_told_rightly(author: str, split: str) -> None:
    assert right(confusion(author, split)) > 0.85


def test_the_documents_say_how_often_it_is_right() -> None:
    lines = ["| requests | simple, told so | simple, told complex | complex, told so | complex, told simple | right |"]
    lines.append("|---|---|---|---|---|---|")
    for author, split in SPLITS:
        found = confusion(author, split)
        cells = [found[path, told] for path in PATHS for told in (path, *(one for one in PATHS if one != path))]
        lines.append(f"| {author}, {split} | {' | '.join(map(str, cells))} | {right(found):.1%} |")
    table = "\n".join(lines)
    assert table in (REPOSITORY / "docs" / "routing.md").read_text(), f"docs/routing.md should hold:\n{table}"


@pytest.mark.parametrize(
    ("prompt", "path", "reason"),
    [
        ("Make the car RED!", "simple", "it changes a colour (red)"),
        ("put a hat on her", "complex", "it dresses somebody (put a hat on)"),
        ("Don\u2019t change the pose, only the colour", "simple", "it changes a colour (colour)"),
        ("ne change pas la pose, mais mets le fond en bleu", "simple", "it changes the background (fond en)"),
        ("keep the red hat but let him sit", "complex", "it changes a pose (let him sit)"),
        ("remove the jacket", "simple", "it removes something (remove)"),
        ("hebe die Hände", "complex", "it changes a pose (hebe die hande)"),
        ("nicer", "simple", "no rule says more"),
        ("", "simple", "no rule says more"),
    ],
)
def test_it_says_by_which_words_it_goes(prompt: str, path: str, reason: str) -> None:
    found = route(prompt)
    assert (found.path, found.reason) == (path, reason)


def test_it_doubts_where_rules_disagree() -> None:
    assert route("let him sit").confidence == 0.9
    assert route("let him sit in a red chair").confidence == 0.68
    assert route("nicer").confidence == 0.5


@pytest.mark.parametrize(
    ("given_", "reason"),
    [({"references": True}, "it names reference pictures"), ({"control": True}, "it names ControlNets")],
)
def test_what_the_job_names_counts_more_than_words(given_: dict[str, bool], reason: str) -> None:
    assert route("make it red", **given_) == Route(path="complex", reason=reason, confidence=1.0)


def test_the_operators_rules_come_first() -> None:
    edit = Edit(complex=("make|paint * red",), simple=("let him sit", "make it red"))
    assert route("make it very red", rules=edit.rules) == Route(
        path="complex", reason="a rule of config.yaml (make it very red)", confidence=0.75
    )
    assert route("let him sit", rules=edit.rules).path == "simple"


@pytest.mark.parametrize("pattern", ["", "* red", "red *", "Red", "re(d", "a||b", "a  b", "für", " ".join("a" * 17)])
def test_a_pattern_is_words_and_gaps(pattern: str) -> None:
    with pytest.raises(ValueError, match="must be words in small letters"):
        Edit(complex=(pattern,))


def test_each_rule_is_of_words_as_plain_has_them() -> None:
    """A word that plain() would spell otherwise would never match."""
    for rule in RULES:
        Edit(complex=rule.patterns[:100])
        assert all(plain(pattern) == pattern for pattern in rule.patterns)


def test_each_rule_is_used_by_some_request() -> None:
    reasons = Counter(route(row["request"]).reason.partition(" (")[0] for row in requests())
    assert reasons.keys() == {rule.reason for rule in RULES} | {"no rule says more"}


@given(st.text(max_size=300))
def test_any_text_gets_an_answer(text: str) -> None:
    found = route(text)
    assert 0 < found.confidence <= 1
    assert found == route(text)


def test_a_gap_is_of_six_words_at_most() -> None:
    rule: Any = Rule("complex", "far", 1.0, ("begin * end",))
    assert route("begin 1 2 3 4 5 6 end", rules=[rule]).path == "complex"
    assert route("begin 1 2 3 4 5 6 7 end", rules=[rule]).path == "simple"
