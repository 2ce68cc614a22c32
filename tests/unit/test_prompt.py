"""Prompt syntaxes as tables, as properties, and compel's own parser as the judge of ours."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from imagend.prompt import parse
from imagend.prompt_tree import (
    MAX_BLOCKS,
    MAX_CHARACTERS,
    MAX_NESTING,
    MAX_WEIGHT,
    MIN_WEIGHT,
    Fragment,
    Join,
    Prompt,
    PromptSyntax,
)

A1111, COMPEL, PLAIN = PromptSyntax.A1111, PromptSyntax.COMPEL, PromptSyntax.PLAIN
Blocks = list[list[tuple[str, float]]]
repeatable = settings(derandomize=True, deadline=None, database=None)


def blocks(prompt: Prompt) -> Blocks:
    return [[(fragment.text, fragment.weight) for fragment in block] for block in prompt.blocks]


# what AUTOMATIC1111's own docstring says, then its README, then the edges
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [[("normal text", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        (r"\(literal\]", [[("(literal]", 1.0)]]),
        ("(unnecessary)(parens)", [[("unnecessaryparens", 1.1)]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                [
                    ("a ", 1.0),
                    ("house", 1.5730000000000004),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641000000000006),
                    (".", 1.1),
                ]
            ],
        ),
        ("[less]", [[("less", 1 / 1.1)]]),
        ("[[less]", [[("less", 1 / 1.1 / 1.1)]]),
        ("(a: 1.5 )", [[("a", 1.5)]]),
        ("a:1.5) b]", [[("a:1.5) b]", 1.0)]]),
        ("(a:b:2)", [[("a:b", 2.0)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        ("", [[("", 1.0)]]),
        ("()", [[("", 1.0)]]),
        ("<lora:shapes:0.8> red", [[("<lora:shapes:0.8> red", 1.0)]]),
        (r"\\ \( \) \[ \] \x", [[(r"\ ( ) [ ] x", 1.0)]]),
        ("red BREAK blue", [[("red", 1.0)], [("blue", 1.0)]]),
        ("red\nBREAK\n(blue:1.2)", [[("red", 1.0)], [("", 1.0), ("blue", 1.2)]]),
        ("(red BREAK blue)", [[("red", 1.1)], [("blue", 1.1)]]),
        ("red BREAK", [[("red", 1.0)]]),
        ("BREAK red", [[("", 1.0)], [("red", 1.0)]]),
        ("BREAKFAST xBREAK break", [[("BREAKFAST xBREAK break", 1.0)]]),
        ("(a:10000000000)(b:-1)", [[("a", MAX_WEIGHT), ("b", MIN_WEIGHT)]]),
        (f"(((a:0):{'9' * 400}):0)", [[("a", MIN_WEIGHT)]]),
    ],
)
def test_a1111(text: str, expected: Blocks) -> None:
    assert blocks(parse(text, A1111)) == expected


COMPEL_TABLE: list[tuple[str, Blocks]] = [
    ("fire flames", [[("fire flames", 1.0)]]),
    ("fire (flames)", [[("fire flames", 1.0)]]),
    ("cat hot-dog eating", [[("cat hot-dog eating", 1.0)]]),
    ("(flames)0.5", [[("flames", 0.5)]]),
    ("(flames).5", [[("flames", 0.5)]]),
    ("(flames)2. b", [[("flames", 2.0), ("b", 1.0)]]),
    ("(flames) 1.3", [[("flames 1.3", 1.0)]]),
    ("fire flames.attend(0.5)", [[("fire", 1.0), ("flames", 0.5)]]),
    ('"fire flames" . attend(++)', [[("fire flames . attend(++)", 1.0)]]),
    ('"fire flames" .attend( ++ )', [[("fire flames", pow(1.1, 2))]]),
    ("flames+", [[("flames", 1.1)]]),
    ("(flowers)--- flames+++", [[("flowers", pow(0.9, 3)), ("flames", pow(1.1, 3))]]),
    ("(pretty flowers)+, the flames", [[("pretty flowers", 1.1), (", the flames", 1.0)]]),
    ("fire (flames (trees)1.5)2.0", [[("fire", 1.0), ("flames", 2.0), ("trees", 3.0)]]),
    ("(a (b)1.2 c)+", [[("a", 1.1), ("b", 1.1 * 1.2), ("c", 1.1)]]),
    ("(red, green. blue)1.2", [[("red , green . blue", 1.2)]]),
    ("foo(bar)1.3", [[("foo(bar)1.3", 1.0)]]),
    ("(a)+-", [[("a", 1.1), ("-", 1.0)]]),
    ("(a)-0.5", [[("a", 0.9), ("0.5", 1.0)]]),
    ("a badly (formed +test )prompt", [[("a badly formed +test prompt", 1.0)]]),
    ("(((a badly (formed +test )prompt", [[("(((a badly formed +test prompt", 1.0)]]),
    ("(a = b)1.3 (c)1.2", [[("(a = b)1.3", 1.0), ("c", 1.2)]]),
    ("(a - b)1.3", [[("(a - b)1.3", 1.0)]]),
    (r"\(a\) (b)1.2", [[("(a)", 1.0), ("b", 1.2)]]),
    (r"\\\\\((a)1.2", [[(r"\\\((a)1.2", 1.0)]]),
    (r'"say \"cheese\""1.2 (b\+)1.1', [[('say "cheese"', 1.2), (r"b\+", 1.1)]]),
    ('"a (b)1.2" c', [[("a", 1.0), ("b", 1.2), ("c", 1.0)]]),
    ('("a b" (c)2)1.1', [[("a b", 1.1), ("c", 2.2)]]),
    ('"unclosed (a)1.2', [[('"unclosed', 1.0), ("a", 1.2)]]),
    ('(a)1.2 "" (b)1.2', [[("a", 1.2), ("", 1.0), ("b", 1.2)]]),
    (r'"a\nb"+', [[("a b", 1.1)]]),
    ("(cat:1.3) BREAK x+", [[("cat:1 . 3 BREAK", 1.0), ("x", 1.1)]]),
    ("(a)\u0662.\u0665", [[("a", 2.5)]]),
    ('("a", "b (c)1.2").and()', [[("a", 1.0)], [("b", 1.0), ("c", 1.2)]]),
    ("(mountain, man).blend()", [[("mountain", 1.0)], [("man", 1.0)]]),
    ("(mountain man, x).and()", [[("mountain man , x .and()", 1.0)]]),
    ('("a = (b)1.2", "").blend(1, 2)', [[("a =", 1.0), ("b", 1.2)], [("", 1.0)]]),
    ('("a","b").and(1e3)', [[("a , b .and(1e3)", 1.0)]]),
]


@pytest.mark.parametrize(("text", "expected"), COMPEL_TABLE)
def test_compel(text: str, expected: Blocks) -> None:
    assert blocks(parse(text, COMPEL)) == expected


@pytest.mark.parametrize(
    ("text", "weights", "join", "plain"),
    [
        ('("a", "(b)1.2 c").and()', (1.0, 1.0), Join.CHAIN, "a b c"),
        ("(a, (b c)) .add ( 2 , 0.5 )", (2.0, 0.5), Join.CHAIN, "a b c"),
        ('("a", "b").and(99999, -1)', (MAX_WEIGHT, MIN_WEIGHT), Join.CHAIN, "a"),
        ('("a", "b").blend(7, 3)', (7.0, 3.0), Join.BLEND, "a b"),
        ('("a", "b").blend(1, -0.5, no_normalize)', (1.0, -0.5), Join.SUM, "a"),
    ],
)
def test_functions(text: str, weights: tuple[float, ...], join: Join, plain: str) -> None:
    prompt = parse(text, COMPEL)
    assert (prompt.weights, prompt.join, prompt.plain) == (weights, join, plain)


@pytest.mark.parametrize(
    ("text", "syntax", "what", "remedy"),
    [
        ("a" * (MAX_CHARACTERS + 1), PLAIN, "40001 characters", "Shorten it"),
        ("a" * (MAX_CHARACTERS + 1), A1111, "40001 characters", "Shorten it"),
        ("a" * (MAX_CHARACTERS + 1), COMPEL, "40001 characters", "Shorten it"),
        ("(" * 200, A1111, "nested deeper than 32", "close them"),
        ("[(" * 20, A1111, "nested deeper than 32", "close them"),
        ("(" * 200, COMPEL, "nested deeper than 32", "close them"),
        ("[(" * (MAX_NESTING // 2) + "(", A1111, "nested deeper than 32", "close them"),
        (")" * 9 + "(" * (MAX_NESTING + 1), COMPEL, "nested deeper than 32", "close them"),
        ("a BREAK " * MAX_BLOCKS + "b", A1111, "65 parts", "Join some"),
        (f"({', '.join('a' * (MAX_BLOCKS + 1))}).and()", COMPEL, "65 parts", "Join some"),
        ("a cat.swap(dog)", COMPEL, "no effect", "Remove it"),
        ("a cat withLora(shapes, 0.8) (b)1.2", COMPEL, "no effect", "Remove it"),
        ('("a", "b").and() red', COMPEL, "text after .and", "Move it"),
        ('("a", "b").blend(1, 1), red', COMPEL, "text after .blend", "Move it"),
        ('("a", "b").and(1)', COMPEL, "has 2 parts", "give it as many numbers"),
        ('("a", "b").blend(1, 2, 3)', COMPEL, "has 2 parts", "give it as many numbers"),
        ('("a", "b").blend(1, nan)', COMPEL, "has 2 parts", "give it as many numbers"),
        ('("a", "b").and(1, no_normalize)', COMPEL, "has 2 parts", "give it as many numbers"),
        ('("a", "b").blend(1, -1)', COMPEL, "times their sum", "Change the weights"),
        ('("a", "b").blend(0, 0)', COMPEL, "times their sum", "Change the weights"),
        ('("a", "b").blend(1, 99, no_normalize)', COMPEL, "times their sum", "Change the weights"),
    ],
)
def test_refusals(text: str, syntax: PromptSyntax, what: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(what)}.*{re.escape(remedy)}"):
        parse(text, syntax)


def test_what_is_just_possible() -> None:
    assert parse("(" * MAX_NESTING + "a" + ")" * MAX_NESTING, COMPEL).plain == "a"
    assert blocks(parse("(" * MAX_NESTING + "a:b", A1111)) == [[("a:b", MAX_WEIGHT)]]
    assert len(parse("a BREAK " * (MAX_BLOCKS - 1) + "b", A1111).blocks) == MAX_BLOCKS
    assert parse("(" * 200 + "\\", PLAIN) == Prompt(((Fragment("(" * 200 + "\\"),),), "(" * 200 + "\\")


@pytest.mark.parametrize(
    ("text", "syntax", "plain"),
    [
        (r"a ((red:1.3) [circle]) \(x\)", A1111, "a red circle (x)"),
        ("a (red BREAK blue) BREAK", A1111, "a red blue"),
        (r'a (red)1.3 "big" circle-- \(x\)', COMPEL, "a red big circle (x)"),
        ("a (red:1.3)", PLAIN, "a (red:1.3)"),
    ],
)
def test_plain_text(text: str, syntax: PromptSyntax, plain: str) -> None:
    assert parse(text, syntax).plain == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\vb\f(c)1.2", [[("a b", 1.0), ("c", 1.2)]]),
        ("()", [[("", 1.0)]]),
        ("((), a).and()", [[("", 1.0)], [("a", 1.0)]]),
        (r'"\0"+', [[(r"\0", 1.1)]]),
        ("a" + "+" * 9_999, [[("a", MAX_WEIGHT)]]),
        ("a" + "-" * 9_999, [[("a", pytest.approx(MIN_WEIGHT))]]),
        (f"((a)0){'9' * 400}", [[("a", MIN_WEIGHT)]]),
    ],
)
def test_what_breaks_compel(text: str, expected: Blocks) -> None:
    assert blocks(parse(text, COMPEL)) == expected


@pytest.mark.parametrize("syntax", PromptSyntax)
@pytest.mark.parametrize("text", ["", "  ", "a red,circle,, on  white. 3\n", "<lora:x:1>", "été 😀"])
def test_text_without_syntax_stays_as_it_was_written(text: str, syntax: PromptSyntax) -> None:
    assert parse(text, syntax) == Prompt(((Fragment(text),),), text)


@pytest.mark.parametrize("text", ["well-known,, +a", "a  (unclosed", "a) b", 'six" wide', "a=(b)"])
def test_compel_text_without_effect_stays_as_it_was_written(text: str) -> None:
    assert parse(text, COMPEL) == Prompt(((Fragment(text),),), text)


TOKENS = ["a", "red", "(", ")", "(", ")", "+", "-", "--", ".", ",", '"', '"', "\\", "=", "1.3", " ", " ", ".attend("]
TOKENS += ["\n", "5", '\\"', "\\(", "\\)", "1.", "é", "\u00a0", ":", "[", "]", ":1.2)", "BREAK", "_", "\t", "\\n"]
hostile = st.lists(st.sampled_from(TOKENS), max_size=16).map("".join)
CALLS = [
    '("',
    "(",
    '", "',
    ", ",
    '").and(',
    ").blend(",
    '").blend(',
    "1",
    "-0.5",
    ", 2",
    ")",
    ")",
    "no_normalize",
    "a b",
]
calls = st.lists(st.sampled_from(CALLS), max_size=8).map("".join).map("({}".format)


@repeatable
@given(st.text() | hostile | calls, st.sampled_from(PromptSyntax))
def test_any_text_is_read_or_refused(text: str, syntax: PromptSyntax) -> None:
    try:
        prompt = parse(text, syntax)
    except ValueError:
        return
    assert len(prompt.weights) == len(prompt.blocks) > 0
    assert all(block for block in prompt.blocks)
    assert all(MIN_WEIGHT <= fragment.weight <= MAX_WEIGHT for block in prompt.blocks for fragment in block)


@repeatable
@given(st.text() | hostile)
def test_plain_loses_nothing(text: str) -> None:
    assert "".join(fragment.text for block in parse(text, PLAIN).blocks for fragment in block) == text


@repeatable
@given(st.text() | hostile)
def test_a1111_loses_nothing_but_syntax(text: str) -> None:
    assume("BREAK" not in text)
    kept = "".join(fragment.text for block in parse(text, A1111).blocks for fragment in block)
    letters = re.compile(r"[^\W\d_]")
    assert letters.findall(kept) == letters.findall(text)


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of Python `action` runs: time, but the same on every machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


HOSTILE = [
    ")",
    "]",
    "()",
    "(a)1.3 ",
    "a+ ",
    "\\",
    '"',
    '\\" ',
    '"a\n',
    "( = ) ",
    ": 1 ",
    "+",
    "9",
    "a.attend( ) ",
    "(a:1.1)",
]


@pytest.mark.parametrize("syntax", PromptSyntax)
@pytest.mark.parametrize(
    "make",
    [
        *(lambda size, part=part: part * (size // len(part)) for part in HOSTILE),
        lambda size: "(" * MAX_NESTING + "a " * ((size - 33) // 2) + "=",
        lambda size: "( " * (MAX_NESTING - 1) + '"a" (b) ' * ((size - 64) // 8) + "=",
        lambda size: "a" + " " * (size - 1),
        lambda size: '("a", "b").and(' + "1, " * ((size - 20) // 3) + "x y)",
    ],
)
def test_reading_takes_no_more_than_linear_time(make: Callable[[int], str], syntax: PromptSyntax) -> None:
    small, large = make(MAX_CHARACTERS // 8), make(MAX_CHARACTERS)
    assert len(large) <= MAX_CHARACTERS
    assert lines_run(lambda: parse(large, syntax)) < 8.5 * lines_run(lambda: parse(small, syntax)) + 1000


def test_a_bracket_amiss_is_looked_at_once_not_once_for_each_around_it() -> None:
    few, many = ("( " * depth + "a " * 4_000 + "=" for depth in (2, MAX_NESTING))
    assert lines_run(lambda: parse(many, COMPEL)) < 1.1 * lines_run(lambda: parse(few, COMPEL))


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[str], tuple[str, list[float], Blocks] | None]]:
    """Compel's own parser: how blocks are joined, their weights and fragments, or None where it breaks."""
    compel = pytest.importorskip("compel.prompt_parser")
    import pyparsing

    pyparsing.ParserElement.enable_packrat()  # else each bracket around a bracket costs it four times the time
    parser = compel.PromptParser()

    def clamp(weight: float) -> float:
        return min(max(weight, MIN_WEIGHT), MAX_WEIGHT)

    def judged(text: str) -> tuple[str, list[float], Blocks] | None:
        try:
            read = parser.parse_conjunction(text)
        except (pyparsing.ParseException, compel.PromptParser.ParsingException, ValueError, OverflowError):
            return None
        parts, weights, join = read.prompts, [clamp(weight) for weight in read.weights], Join.CHAIN
        if len(parts) == 1 and isinstance(parts[0], compel.Blend):
            join = Join.BLEND if parts[0].normalize_weights else Join.SUM
            parts, weights = parts[0].prompts, parts[0].weights
        return join, weights, [[(child.text, clamp(child.weight)) for child in part.children] for part in parts]

    yield judged
    pyparsing.ParserElement.disable_memoization()


def agree(text: str, judge: Callable[[str], tuple[str, list[float], Blocks] | None]) -> bool:
    expected = judge(text)
    if expected and not all(expected[2] or [[]]):
        return True  # of `()` compel makes no fragment at all, and cannot encode that
    try:
        prompt = parse(text, COMPEL)
    except ValueError as error:
        return expected is None or any(reason in str(error) for reason in ("no effect", "times their sum"))
    if prompt == Prompt(((Fragment(text),),), text):  # without effect: compel may only have moved white space
        return (
            expected is not None
            and [len(block) for block in expected[2]] == [1]
            and ("".join(expected[2][0][0][0].split()) == "".join(text.split()))
        )
    return expected == (prompt.join, list(prompt.weights), blocks(prompt))


@pytest.mark.parametrize("text", [text for text, _ in COMPEL_TABLE])
def test_compel_itself_reads_the_table_so(text: str, judge: Any) -> None:
    assert agree(text, judge)


@settings(repeatable, max_examples=400)
@given(hostile)
@example(r"a \\\(b\\\) \(c (d)+")
@example("(a +b)1.2 (c+ d)++ -")
def test_compel_itself_reads_any_text_so(judge: Any, text: str) -> None:
    assert agree(text, judge)


item = st.sampled_from(
    ['"a"', '"red (cat)1.3"', "cat", "(a b)", '"a = b"', '"(a+ b"', '""', r'"a\"b\""', '"x, y. z"', "a+"]
)
number = st.sampled_from(["1", "0.5", "2.", ".5", "-0.5", "+1.5", "0", "10", "x", "1e3", "no_normalize"])


@settings(repeatable, max_examples=400)
@given(
    st.lists(item, min_size=1, max_size=3),
    st.lists(number, max_size=4),
    st.sampled_from(["and", "add", "blend"]),
    st.sampled_from(["", "", "", " x"]),
)
def test_compel_itself_reads_any_function_so(
    judge: Any, items: list[str], numbers: list[str], name: str, end: str
) -> None:
    assert agree(f"({', '.join(items)}).{name}({','.join(numbers)}){end}", judge)
