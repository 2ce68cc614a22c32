"""Templates and tables of sets: what is filled in is what str.format makes of it, and no table stops a reader."""

from __future__ import annotations

import csv
import io
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import set_table
from imagend.prompt_tree import MAX_CHARACTERS, PromptSyntax
from imagend.set_field import (
    MAX_SET_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    Item,
    check_prompts,
    escaped,
    fill_in,
    planned,
)

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name != "name")
TEXT = st.text(alphabet=st.sampled_from('ab {}()[]:<>\\+-.1,"é\n'), max_size=20)


@given(TEXT)
def test_an_escaped_text_means_itself(text: str) -> None:
    assert fill_in(escaped(text), Item(name="a")) == text
    check_prompts(escaped(text), escaped(text), PromptSyntax.PLAIN, (), (Item(name="a"),))


@given(st.lists(st.tuples(TEXT, NAMES)), TEXT, st.data())
def test_each_placeholder_becomes_its_value_and_values_are_no_templates(
    pieces: list[tuple[str, str]], end: str, data: st.DataObject
) -> None:
    values = {name: data.draw(TEXT) for _, name in pieces}
    template = "".join(f"{escaped(text)}{{{name}}}" for text, name in pieces) + escaped(end)
    item = Item(name="a", values=values)
    expected = "".join(f"{text}{values[name]}" for text, name in pieces) + end
    assert fill_in(template, item) == expected == template.format(**values)
    check_prompts(template, None, PromptSyntax.PLAIN, (), (item,))


@given(st.text(alphabet="a{} ", max_size=12))
def test_a_template_is_read_as_str_format_reads_it_or_refused(template: str) -> None:
    try:
        found = fill_in(template, Item(name="n", values={"a": "A", "aa": "AA", "aaa": "3"}))
    except (ValueError, KeyError):
        return
    values = {"a": "A", "aa": "AA", "aaa": "3"}
    assert found == template.format(**values)


@pytest.mark.parametrize("template", ["{", "}", "{a b}", "{a.b}", "{a!r}", "{0}", "{}", "{a:>9}", "{{}", "{" * 41])
def test_what_str_format_would_do_besides_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="prompt: has a"):
        check_prompts(template, None, PromptSyntax.PLAIN, (), (Item(name="a"),))


def test_names_are_those_of_files() -> None:
    items = (Item(name="a", seed=3), Item(name="b-0000", seed=4))
    assert [plan.file for plan in planned(None, None, items)] == ["a.png", "b-0000.png", "contact.png"]
    assert [(plan.file, plan.seed) for plan in planned(None, 2, items)] == [
        ("a-0000.png", 3),
        ("a-0001.png", 4),
        ("b-0000-0000.png", 4),
        ("b-0000-0001.png", 5),
        ("contact.png", None),
    ]


def test_what_would_be_too_long_is_refused_before_it_is_made() -> None:
    item = Item(name="a", values={"x": "y" * MAX_VALUE_CHARACTERS})
    start = time.process_time()
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS} are possible"):
        check_prompts("{x}" * 20_000, None, PromptSyntax.COMPEL, (), (item,) * 1)
    many = tuple(Item(name=f"a{number}", values={"x": "y" * 4000}) for number in range(64))
    with pytest.raises(ValueError, match=f"at most {MAX_SET_CHARACTERS} are possible"):
        check_prompts("{x}", None, PromptSyntax.COMPEL, (), many)
    assert time.process_time() - start < 10  # it would be 80 million characters


# Tables


def table(rows: list[list[str]], **how: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **how).writerows(rows)
    return file.getvalue().encode()


CELLS = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_what_csv_writes_is_read_as_it_was(cells: list[tuple[str, str]], end: str, mark: bool) -> None:
    rows = [[f"i{number}", one, two] for number, (one, two) in enumerate(cells)]
    raw = table([["name", "x", "y"], *rows], lineterminator=end, quoting=csv.QUOTE_ALL)
    items = set_table.items_of((b"\xef\xbb\xbf" if mark else b"") + raw)
    assert items == [{"name": name, "values": {"x": one, "y": two}} for name, one, two in rows]


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text(alphabet="name,seed\"\n\r;'x7 \0", max_size=60).map(str.encode))
def test_any_bytes_are_items_or_refused(raw: bytes) -> None:
    for whole in (raw, b"name,x\n" + raw):
        try:
            items = set_table.items_of(whole)
        except ValueError:
            continue
        else:
            assert all(set(item) <= {"name", "values", "seed"} for item in items)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "first row"),
        (b"name,x\n", "a row for each item must follow"),
        (b"title,x\na,b\n", "one of them `name`"),
        (b"name,x,x\na,b,c\n", "two of its columns are called 'x'"),
        (b"name,x\na\n", "line 2 has 1 cells, and there are 2 columns"),
        (b"name,x\na,b,c\n", "line 2 has 3 cells"),
        (b'name,x\na,"b\n', "is no CSV"),
        (b'name,x\na,"b"c\n', "is no CSV"),
        (b"name,seed\na,red\n", "a seed that is no whole number"),
        (b"name,seed\na,-1\n", "a seed that is no whole number"),
        ("name,seed\na,\u0663\n".encode(), "a seed that is no whole number"),
        (b"name,x\na,\xff\n", "not UTF-8 (byte 9)"),
        ("name,x\na,b\n".encode("utf-16"), "not UTF-8"),
        (b"name\n" + b"a\n" * 65, "it has 65 rows; at most 64"),
        (b"name\n" + b"a" * set_table.MAX_BYTES, "more than 262144 bytes"),
        (b"name,x\na," + b"y" * 140_000, "is no CSV: field larger than field limit"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(raw: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        set_table.items_of(raw)


def test_blank_rows_are_passed_over_and_names_trimmed() -> None:
    assert set_table.items_of(b" name , x\n\n a ,red\n,\n") == [{"name": "a", "values": {"x": "red"}}]
