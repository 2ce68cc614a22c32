"""Compel's prompt syntax, version 2.5, to the same fragments and weights as its own grammar gives; the tests compare.

Its grammar (pyparsing) is neither linear nor free of recursion: seven brackets around one word cost it 20 s, each
further one four times as much. On purpose different, because compel
- ignores what was asked for: `.swap()`, `withLora()`, text after `.and(…)`. Here: ValueError;
- breaks: on vertical tabs, form feeds, and prompts or parts of nothing but `()`. Here: spaces, and an empty text;
- rewrites text without any syntax (`a,b` to `a, b`; in quotes `\\0`, `\\x…`, `\\u…`). Here: left as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from imagend.prompt_tree import (
    MAX_BLEND,
    Join,
    Piece,
    Prompt,
    check_blocks,
    check_depth,
    clamp,
    fragments,
    fuse,
    unweighted,
)

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


def compel(text: str) -> Prompt:
    if _SYNTAX.isdisjoint(text):
        return unweighted(text)
    source = re.sub(r",(\S)", r", \1", re.sub(r"[\v\f]", " ", text))
    _check(source)
    if call := _call(source):
        return call
    pieces = fuse(_scaled(_Reader(source).prompt()), _one_text)
    plain = " ".join(piece for piece, _ in pieces)
    if all(weight == 1 for _, weight in pieces) and plain.split() == source.split():
        return unweighted(text)
    return Prompt((fragments(pieces),), plain)


def _check(source: str) -> None:
    if found := _NO_EFFECT.search(source):
        raise ValueError(f"`{found[0]}…)` has no effect on SDXL pictures, although compel reads it. Remove it")
    depth = 0
    for match in _BRACKET.finditer(source):
        depth = max(0, depth + {"(": 1, ")": -1}.get(match[0], 0))
        check_depth(depth)


def _call(source: str) -> Prompt | None:
    """`("a", "b").and(1, 0.5)` or `.blend(…)`; None when the text is no such call."""
    blocks: list[list[Piece]] = []
    position = _skip(source, 0)
    while source[position : position + 1] == ("," if blocks else "("):
        reader, position = _Reader(source), _skip(source, position + 1)
        end = reader.target(position)
        if end is None:  # in quotes, but not well-formed between brackets
            if not (match := _QUOTED.match(source, position)):
                return None
            reader, end = _Reader(_unquoted(match[1])), match.end()
            reader.prompt()
        blocks.append(fuse(_scaled(reader.events), _one_text))
        position = _skip(source, end)
    if not blocks or not (call := _CALL.match(source, position)):
        return None
    if source[call.end() :].strip():
        raise ValueError(f"text after .{call[1]}(…) has no effect. Move it into the brackets")
    return _called(call[1], blocks, re.findall(_OPTION, call[2]))


def _called(name: str, blocks: list[list[Piece]], options: list[str]) -> Prompt:
    join = Join.BLEND if name == "blend" else Join.CHAIN
    if join is Join.BLEND and options[-1:] == ["no_normalize"]:
        join = Join.SUM
        options.pop()
    check_blocks(len(blocks))
    weights = _call_weights(options) or [1.0] * len(blocks)
    if len(weights) != len(blocks) or not all(map(math.isfinite, weights)):
        raise ValueError(f".{name}(…) has {len(blocks)} parts: give it as many numbers, or none")
    if join is Join.CHAIN:
        weights = [clamp(weight) for weight in weights]
    elif not max(map(abs, weights)) <= MAX_BLEND * (abs(sum(weights)) if join is Join.BLEND else 1.0) > 0:
        raise ValueError(f".blend(…) has a weight of more than {MAX_BLEND:g} times their sum. Change the weights")
    plain = " ".join(text for block, weight in zip(blocks, weights, strict=True) if weight > 0 for text, _ in block)
    return Prompt(tuple(map(fragments, blocks)), plain, tuple(weights), join)


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
        """What may have a weight: a bracket, a quote or a word. None if there is none; its events are then void."""
        if self.text.startswith("(", position):
            return None if position in self._unclosed else self._inside([(position, -1)])
        if match := _QUOTED.match(self.text, position):
            return match.end() if self._quoted(match[1]) else None
        if match := _WORD.match(self.text, position):
            self.events.append(match[0])
            return match.end()
        return None

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
        self.events[start] = base ** min(len(weight), 999) if base else float(weight)
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
    return re.sub(r"\\[tnfr]", " ", content)


def _scaled(events: Iterable[_Event]) -> Iterator[Piece]:
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
