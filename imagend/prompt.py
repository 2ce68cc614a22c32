"""Three prompt syntaxes, read into one tree: which text has which weight. Pure: no torch, no disk; it encodes nothing.

Strangers write what is read here: every parser is linear and none recurses. Compel's own (pyparsing) is neither: seven
brackets around one word cost it 20 s, each further one four times as much. Its syntax is therefore read here, to the
same fragments and weights (the tests compare), functions included. On purpose different, because compel
- ignores what was asked for: `.swap()`, `withLora()`, text after `.and(…)`. Here: ValueError;
- breaks: on vertical tabs, form feeds, and prompts or parts of nothing but `()`. Here: spaces, and an empty text;
- rewrites text without any syntax (`a,b` to `a, b`; in quotes `\\0`, `\\x…`, `\\u…`). Here: left as it is.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

MAX_CHARACTERS = 40_000
MAX_NESTING = 32
MAX_BLOCKS = 64
MIN_WEIGHT, MAX_WEIGHT = 0.0, 3.0
MAX_BLEND = 10.0  # how far a weight of .blend() may exceed the sum of them all


class PromptSyntax(enum.StrEnum):
    COMPEL = "compel"
    A1111 = "a1111"
    PLAIN = "plain"


class Join(enum.StrEnum):
    """How blocks become one: one after the other, mixed in proportion, or added up as weighted (`no_normalize`)."""

    CHAIN = "chain"
    BLEND = "blend"
    SUM = "sum"


@dataclass(frozen=True)
class Fragment:
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """`blocks` are encoded apart (split at BREAK, or the parts of .and() and .blend()), each has its weight.

    `plain` is the text without any syntax, for the pooled embedding.
    """

    blocks: tuple[tuple[Fragment, ...], ...]
    plain: str
    weights: tuple[float, ...] = (1.0,)
    join: Join = Join.CHAIN


def parse(text: str, syntax: PromptSyntax) -> Prompt:
    """Read a prompt; raises ValueError, which says what to change. Unbalanced brackets are text, not an error."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARACTERS} are possible. Shorten it")
    if syntax is PromptSyntax.A1111:
        return _a1111(text)
    return _compel(text) if syntax is PromptSyntax.COMPEL else _unweighted(text)


_Piece = tuple[str, float]


def _unweighted(text: str) -> Prompt:
    return Prompt(((Fragment(text),),), text)


def _factor(number: str) -> float:
    return max(-1e6, min(float(number), 1e6))  # so that no product is infinite, and none times zero is NaN


def _clamp(weight: float) -> float:
    return max(MIN_WEIGHT, min(weight, MAX_WEIGHT))


def _fragments(pieces: Iterable[_Piece]) -> tuple[Fragment, ...]:
    return tuple(Fragment(text, _clamp(weight)) for text, weight in pieces) or (Fragment(""),)


def _fuse(pieces: Iterable[_Piece], join: Callable[[list[str]], str]) -> list[_Piece]:
    """Neighbours of equal weight become one."""
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [(join([text for text, _ in run]), weight) for weight, run in runs]


def _check_depth(depth: int) -> None:
    if depth > MAX_NESTING:
        raise ValueError(f"its brackets are nested deeper than {MAX_NESTING}: close them, or put \\ before each")


def _check_blocks(count: int) -> None:
    if count > MAX_BLOCKS:
        raise ValueError(f"it has {count} parts (BREAK, .and, .blend); at most {MAX_BLOCKS} are possible. Join some")


# AUTOMATIC1111: what its parse_prompt_attention does, except that a BREAK between brackets is a BREAK, too.

_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*+([+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)|[^\\()\[\]:]++|:")
_BREAK = re.compile(r"(?<!\s)\s*+\bBREAK\b\s*+")
_OPENS, _CLOSES = {"(": ")", "[": "]"}, {")": 1.1, "]": 1 / 1.1}


def _a1111(text: str) -> Prompt:
    blocks: list[list[_Piece]] = [[]]
    for piece, weight in _a1111_pieces(text):
        if piece is None:
            blocks.append([])
        else:
            blocks[-1].append((piece, weight))
    if len(blocks) > 1 and not any(piece.strip() for piece, _ in blocks[-1]):
        blocks.pop()  # nothing follows the last BREAK
    _check_blocks(len(blocks))
    plain = " ".join("".join(piece for piece, _ in block) for block in blocks)
    return Prompt(tuple(_fragments(_fuse(block, "".join)) for block in blocks), plain, (1.0,) * len(blocks))


def _a1111_pieces(text: str) -> list[tuple[str | None, float]]:
    pieces: list[tuple[str | None, float]] = []  # None: a BREAK
    opened: dict[str, list[int]] = {")": [], "]": []}

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _TOKEN.finditer(text):
        token, number = match.group(0, 1)
        closer = ")" if number else token
        if token[0] == "\\":
            pieces.append((token[1:], 1.0))
        elif token in _OPENS:
            opened[_OPENS[token]].append(len(pieces))
            _check_depth(sum(map(len, opened.values())))
        elif opened.get(closer):
            multiply(opened[closer].pop(), _factor(number) if number else _CLOSES[token])
        else:
            first, *others = _BREAK.split(token)
            pieces.append((first, 1.0))
            for other in others:
                pieces += (None, 1.0), (other, 1.0)
    for closer, starts in opened.items():
        for start in starts:
            multiply(start, _CLOSES[closer])
    return pieces


# Compel 2.5: each expression of its grammar as a pattern that never backs up.

_SYNTAX = frozenset('()"+-\\')  # where none of these stands, compel finds nothing to do
_S = r"[ \t\r\n]*+"
_UNSIGNED = r"(?>\d+\.\d*|\.\d+|[0-9]+)"
_SIGNED = r"(?>[+-]?(?:\d+\.\d*|\.\d+)|-?[0-9]+)"
_KEYWORD = r"[A-Za-z0-9_-]++"
_OPTION = rf"(?>{_KEYWORD}{_S}={_S}(?:{_SIGNED}|{_KEYWORD})|{_SIGNED}|{_KEYWORD})"
_ATTEND = rf"{_S}\.attend{_S}\({_S}(\++|-+|{_UNSIGNED}){_S}\)"
_AFTER_WORD = re.compile(rf"{_ATTEND}|(\++|-+)")
_AFTER_BRACKET = re.compile(rf"{_ATTEND}|(\++|-+|{_UNSIGNED})")
_CALL = re.compile(rf"{_S}\){_S}\.(and|add|blend){_S}\({_S}((?:{_OPTION}(?:{_S},{_S}{_OPTION})*+)?+){_S}\)")
_NO_EFFECT = re.compile(rf"\.swap{_S}\(|(?<!\w)(?:useLora|withLora){_S}\(")
_SPACE = re.compile(_S)
_WORD = re.compile(r'(?:\\[()",.+=-]|[+-](?![ \t\r\n()",.+=-]|\Z)|[^ \t\r\n()",.+=-])++')
_FREE_WORD = re.compile(r"[^ \t\r\n]*+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
_BRACKET = re.compile(r"\\.|[()]", re.DOTALL)
_ESCAPED = re.compile(r'(?<!\\)(\\++)([()"])')

_Event = str | float | None  # a text, the weight of what opens here, the end of what was opened


def _compel(text: str) -> Prompt:
    if _SYNTAX.isdisjoint(text):
        return _unweighted(text)
    source = re.sub(r",(\S)", r", \1", re.sub(r"[\v\f]", " ", text))
    _check(source)
    if call := _call(source):
        return call
    pieces = _fuse(_scaled(_Reader(source).prompt()), _one_text)
    plain = " ".join(piece for piece, _ in pieces)
    if all(weight == 1 for _, weight in pieces) and plain.split() == source.split():
        return _unweighted(text)
    return Prompt((_fragments(pieces),), plain)


def _check(source: str) -> None:
    if found := _NO_EFFECT.search(source):
        raise ValueError(f"`{found[0]}…)` has no effect on SDXL pictures, although compel reads it. Remove it")
    depth = 0
    for match in _BRACKET.finditer(source):
        depth = max(0, depth + {"(": 1, ")": -1}.get(match[0], 0))
        _check_depth(depth)


def _call(source: str) -> Prompt | None:
    """`("a", "b").and(1, 0.5)` or `.blend(…)`; None when the text is no such call."""
    blocks: list[list[_Piece]] = []
    position = _skip(source, 0)
    while source[position : position + 1] == ("," if blocks else "("):
        reader, position = _Reader(source), _skip(source, position + 1)
        end = reader.target(position)
        if end is None:  # in quotes, but not well-formed between brackets
            if not (match := _QUOTED.match(source, position)):
                return None
            reader, end = _Reader(_unquoted(match[1])), match.end()
            reader.prompt()
        blocks.append(_fuse(_scaled(reader.events), _one_text))
        position = _skip(source, end)
    if not blocks or not (call := _CALL.match(source, position)):
        return None
    if source[call.end() :].strip():
        raise ValueError(f"text after .{call[1]}(…) has no effect. Move it into the brackets")
    return _called(call[1], blocks, re.findall(_OPTION, call[2]))


def _called(name: str, blocks: list[list[_Piece]], options: list[str]) -> Prompt:
    join = Join.BLEND if name == "blend" else Join.CHAIN
    if join is Join.BLEND and options[-1:] == ["no_normalize"]:
        join = Join.SUM
        options.pop()
    _check_blocks(len(blocks))
    weights = _call_weights(options) or [1.0] * len(blocks)
    if len(weights) != len(blocks) or not all(map(math.isfinite, weights)):
        raise ValueError(f".{name}(…) has {len(blocks)} parts: give it as many numbers, or none")
    if join is Join.CHAIN:
        weights = [_clamp(weight) for weight in weights]
    elif not max(map(abs, weights)) <= MAX_BLEND * (abs(sum(weights)) if join is Join.BLEND else 1.0) > 0:
        raise ValueError(f".blend(…) has a weight of more than {MAX_BLEND:g} times their sum. Change the weights")
    plain = " ".join(text for block, weight in zip(blocks, weights, strict=True) if weight > 0 for text, _ in block)
    return Prompt(tuple(map(_fragments, blocks)), plain, tuple(weights), join)


def _call_weights(options: list[str]) -> list[float]:
    try:
        return [float(option) for option in options]
    except ValueError:
        return [math.nan]


class _Reader:
    """A text and the events read from it. Its methods take a position and return the one after what they read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.events: list[_Event] = []
        self._unclosed: set[int] = set()  # brackets known to be amiss: looked at once, not once for each around them

    def prompt(self) -> list[_Event]:
        """Everything; what is not well-formed is taken word by word."""
        position = _skip(self.text, 0)
        while position < len(self.text):
            end = self._weighted(position, bare_words=False)
            if end is None:
                end = _end(_FREE_WORD, self.text, position)
                self.events.append(self.text[position:end])
            position = _skip(self.text, end)
        return self.events

    def target(self, position: int) -> int | None:
        """What may have a weight: a bracket, a quote or a word. None, and no event, if there is none."""
        start = len(self.events)
        if self.text.startswith("(", position):
            end = None if position in self._unclosed else self._inside([(position, -1)])
        elif match := _QUOTED.match(self.text, position):
            end = match.end() if self._quoted(match[1]) else None
        elif match := _WORD.match(self.text, position):
            self.events.append(match[0])
            end = match.end()
        else:
            return None
        if end is None:
            del self.events[start:]
        return end

    def _weighted(self, position: int, *, bare_words: bool) -> int | None:
        start = len(self.events)
        self.events.append(1.0)
        end = self.target(position)
        if end is not None:
            word = self.text[position] not in '("'
            after = self._weigh(start, end, _AFTER_WORD if word else _AFTER_BRACKET)
            if after > end or bare_words or not word:
                return after
        del self.events[start:]
        return None

    def _weigh(self, start: int, position: int, pattern: re.Pattern[str]) -> int:
        """Close what opened at event `start`, with the weight that stands here, if any."""
        self.events.append(None)
        if not (match := pattern.match(self.text, position)):
            return position
        weight = match[1] or match[2]
        base = {"+": 1.1, "-": 0.9}.get(weight[0])
        self.events[start] = base ** min(len(weight), 999) if base else _factor(weight)
        return match.end()

    def _inside(self, opened: list[tuple[int, int]]) -> int | None:
        """Read to the end of the first of the `opened` (position, event), or of the text if there is none.

        None if anything is amiss.
        """
        position = opened[0][0] + 1 if opened else 0
        while (position := _skip(self.text, position)) < len(self.text):
            character = self.text[position]
            if character in ",.":
                self.events.append(character)
                position += 1
            elif character == "(":
                opened.append((position, len(self.events)))
                self.events.append(1.0)
                position += 1
            elif character == ")" and opened:
                position, start = position + 1, opened.pop()[1]
                if start < 0:
                    return position
                position = self._weigh(start, position, _AFTER_BRACKET)
            elif (end := self._weighted(position, bare_words=True)) is not None:
                position = end
            else:
                break
        self._unclosed.update(start for start, _ in opened)
        return None if opened or position < len(self.text) else position

    def _quoted(self, content: str) -> bool:
        reader = _Reader(_unquoted(content))
        well_formed = reader._inside([]) is not None
        self.events += reader.events if content.strip() else [""]
        return well_formed


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _skip(text: str, position: int) -> int:
    return _end(_SPACE, text, position)


def _unquoted(content: str) -> str:
    return re.sub(r"\\[tnfr]", " ", content).replace('\\"', '"').replace('"', '\\"')


def _scaled(events: Iterable[_Event]) -> Iterator[_Piece]:
    scales = [1.0]
    for event in events:
        if event is None:
            scales.pop()
        elif isinstance(event, str):
            yield event, scales[-1]
        else:
            scales.append(scales[-1] * event)


def _one_text(texts: list[str]) -> str:
    """Compel takes a backslash off every escape each time it copies a fragment: so do we, as often."""
    if not any("\\" in text for text in texts):
        return " ".join(texts)
    copies = [2 + len(texts) - max(i, 1) for i in range(len(texts))]
    return " ".join(
        _ESCAPED.sub(lambda match, times=times: match[1][times:] + match[2], text)  # type: ignore[misc]
        for text, times in zip(texts, copies, strict=True)
    )
