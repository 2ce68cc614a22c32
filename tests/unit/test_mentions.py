"""Names of embeddings in a text: as AUTOMATIC1111 and ComfyUI find them."""

from __future__ import annotations

import pytest

from imagend.mentions import Mention, Names
from imagend.prompt import parse
from imagend.prompt_tree import PromptSyntax

NAMES = Names(
    ["neg", "neg-xl", "bad prompt", "v1.5", "Art", "art", "x/Art", "old/dust", "new/dust", "new/Pixel", "face (2)", "é"]
)


def mention(written: str, *names: str, text: str = "") -> Mention:
    return Mention(text or written, written, names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", ["a red circle"]),
        ("", [""]),
        ("neg", [mention("neg", "neg")]),
        ("a Neg, b", ["a ", mention("Neg", "neg"), ", b"]),
        ("negative neglect my_neg neg2", ["negative neglect my_neg neg2"]),
        ("un-neg-xl!", ["un-", mention("neg-xl", "neg-xl"), "!"]),
        ("neg - xl", [mention("neg - xl", "neg-xl")]),
        ("neg-x", [mention("neg", "neg"), "-x"]),
        ("neg neg", [mention("neg", "neg"), " ", mention("neg", "neg")]),
        ("a bad\n prompt", ["a ", mention("bad\n prompt", "bad prompt")]),
        ("a bad, prompt", ["a bad, prompt"]),
        ("face (2) v1 . 5", [mention("face (2)", "face (2)"), " ", mention("v1 . 5", "v1.5")]),
        ("É", [mention("É", "é")]),
        ("embedding:neg", [mention("neg", "neg", text="embedding:neg")]),
        (
            "a embedding:neg-xl.safetensors, b",
            ["a ", mention("neg-xl", "neg-xl", text="embedding:neg-xl.safetensors"), ", b"],
        ),
        ("embedding:v1.5.pt", [mention("v1.5", "v1.5", text="embedding:v1.5.pt")]),
        ("neg.pt, v1.5.x", [mention("neg", "neg", text="neg.pt"), ", ", mention("v1.5", "v1.5"), ".x"]),
        ("neg. bin", [mention("neg", "neg"), ". bin"]),
        ("embedding:gone/x-1.pt, b", [mention("gone/x-1.pt", text="embedding:gone/x-1.pt"), ", b"]),
        ("embedding:negative b", [mention("negative", text="embedding:negative"), " b"]),
        ("word embedding: neg", ["word embedding: ", mention("neg", "neg")]),
        ("embedding :neg embedding", ["embedding :", mention("neg", "neg"), " embedding"]),
        ("wordembedding:x", ["wordembedding:x"]),
        ("Art", [mention("Art", "Art")]),
        ("art", [mention("art", "art")]),
        ("ART", [mention("ART", "Art", "art")]),
        ("dust", [mention("dust", "new/dust", "old/dust")]),
        ("old/dust", [mention("old/dust", "old/dust")]),
        ("pixel", [mention("pixel", "new/Pixel")]),
    ],
)
def test_what_is_found(text: str, expected: list[str | Mention]) -> None:
    assert NAMES.split(text) == expected


@pytest.mark.parametrize(
    ("text", "syntax"),
    [
        ("(embedding:bad prompt.pt:1.2) (v1.5:0.8) face \\(2\\)", PromptSyntax.A1111),
        ("(embedding:bad prompt.pt)1.2 (v1.5)0.8 face \\(2\\)", PromptSyntax.COMPEL),
        ("embedding:bad prompt.pt v1.5 face (2)", PromptSyntax.PLAIN),
    ],
)
def test_names_survive_every_syntax(text: str, syntax: PromptSyntax) -> None:
    prompt = parse(text, syntax)
    pieces = [piece for block in prompt.blocks for fragment in block for piece in NAMES.split(fragment.text)]
    for found in (pieces, NAMES.split(prompt.plain)):
        names = [piece.names for piece in found if isinstance(piece, Mention)]
        assert names == [("bad prompt",), ("v1.5",), ("face (2)",)]


@pytest.mark.parametrize(
    ("text", "asked"), [("neg", False), ("neg.pt", False), ("embedding:neg", True), ("embedding:x", True)]
)
def test_only_what_is_asked_for_must_be_there(text: str, asked: bool) -> None:
    (found,) = Names(["neg", "embedding"]).split(text)
    assert isinstance(found, Mention)
    assert found.asked is asked
    (word,) = Names(["embedding"]).split("embedding")
    assert isinstance(word, Mention)
    assert not word.asked


def test_without_embeddings_all_is_text_but_what_asks_for_one() -> None:
    assert Names([]).split("neg, v1.5") == ["neg, v1.5"]
    assert Names([]).split("a embedding:neg") == ["a ", mention("neg", text="embedding:neg")]


def test_many_names_and_a_long_text_take_no_time() -> None:
    names = Names([f"word{i} word{i + 1} word{i + 2}" for i in range(20_000)])
    steps = 0

    class Counting(dict):  # type: ignore[type-arg]
        def get(self, *key: object) -> object:
            nonlocal steps
            steps += 1
            return super().get(*key)

    names._root.after = Counting(names._root.after)
    text = "word7 word8 " * 3000
    assert names.split(text) == [text]
    assert steps <= 6000
