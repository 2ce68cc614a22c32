"""What a prompt is once it is read, whatever its syntax: which text has which weight. And the limits."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
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


Piece = tuple[str, float]


def unweighted(text: str) -> Prompt:
    return Prompt(((Fragment(text),),), text)


def clamp(weight: float) -> float:
    return max(MIN_WEIGHT, min(weight, MAX_WEIGHT))  # in this order, NaN (zero times infinity) becomes the least


def fragments(pieces: Iterable[Piece]) -> tuple[Fragment, ...]:
    return tuple(Fragment(text, clamp(weight)) for text, weight in pieces) or (Fragment(""),)


def fuse(pieces: Iterable[Piece], join: Callable[[list[str]], str]) -> list[Piece]:
    """Neighbours of equal weight become one."""
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [(join([text for text, _ in run]), weight) for weight, run in runs]


def check_depth(depth: int) -> None:
    if depth > MAX_NESTING:
        raise ValueError(f"its brackets are nested deeper than {MAX_NESTING}: close them, or put \\ before each")


def check_blocks(count: int) -> None:
    if count > MAX_BLOCKS:
        raise ValueError(f"it has {count} parts (BREAK, .and, .blend); at most {MAX_BLOCKS} are possible. Join some")
