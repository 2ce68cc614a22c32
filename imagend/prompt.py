"""Three prompt syntaxes, read into one tree: which text has which weight. Pure: no torch, no disk; it encodes nothing.

Strangers write what is read here: every parser is linear and none recurses. AUTOMATIC1111's syntax is read here,
compel's in compel_syntax.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

from imagend.compel_syntax import compel
from imagend.prompt_tree import (
    MAX_CHARACTERS,
    Piece,
    Prompt,
    PromptSyntax,
    check_blocks,
    check_depth,
    fragments,
    fuse,
    unweighted,
)


@lru_cache(maxsize=16)  # a prompt is read when its job is checked, and again by each who uses it
def parse(text: str, syntax: PromptSyntax) -> Prompt:
    """Read a prompt; raises ValueError, which says what to change. Unbalanced brackets are text, not an error."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARACTERS} are possible. Shorten it")
    if syntax is PromptSyntax.A1111:
        return _a1111(text)
    return compel(text) if syntax is PromptSyntax.COMPEL else unweighted(text)


# AUTOMATIC1111: what its parse_prompt_attention does, except that a BREAK between brackets is a BREAK, too.

_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*+([+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)|[^\\()\[\]:]++|:")
_BREAK = re.compile(r"(?<!\s)\s*+\bBREAK\b\s*+")
_OPENS, _CLOSES = {"(": ")", "[": "]"}, {")": 1.1, "]": 1 / 1.1}


def _a1111(text: str) -> Prompt:
    blocks: list[list[Piece]] = [[]]
    for piece, weight in _a1111_pieces(text):
        if piece is None:
            blocks.append([])
        else:
            blocks[-1].append((piece, weight))
    if len(blocks) > 1 and not any(piece.strip() for piece, _ in blocks[-1]):
        blocks.pop()  # nothing follows the last BREAK
    check_blocks(len(blocks))
    plain = " ".join("".join(piece for piece, _ in block) for block in blocks)
    return Prompt(tuple(fragments(fuse(block, "".join)) for block in blocks), plain, (1.0,) * len(blocks))


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
            check_depth(sum(map(len, opened.values())))
        elif opened.get(closer):
            multiply(opened[closer].pop(), float(number) if number else _CLOSES[token])
        else:
            first, *others = _BREAK.split(token)
            pieces.append((first, 1.0))
            for other in others:
                pieces += (None, 1.0), (other, 1.0)
    for closer, starts in opened.items():
        for start in starts:
            multiply(start, _CLOSES[closer])
    return pieces
