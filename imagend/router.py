"""Which way an edit goes: the simple one (inpainting alone), or the complex one, guided by the original's pose or depth
and by reference pictures. Rules on words (imagend.edit_rules), those of config.yaml first. Pure.

It says why, and how sure it is: so that whoever reads the manifest can name `path` next time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from imagend.control import ControlType
from imagend.edit_rules import KEPT, RULES, Path, Rule
from imagend.fields import Frozen

MAX_LENGTH = 4000
"""So many characters of a prompt are looked at: some ten milliseconds at most."""
VAGUE = 0.5
"""How sure it is where no rule says anything."""
_DOUBT = 0.75
"""The part of a rule's confidence that is left where one of the other path matches, too."""
_CLAUSE = re.compile(r"[,;:.!?\n]| but | mais | aber ")
_ELISION = re.compile(r"\b([cdjlmnst]|qu)'")
_ARROW = re.compile(r"[-=]>|\u2192")
_WORD = re.compile(r"[\w-]+")
_GAP = r"(?:\S+ ){0,6}?"


class Route(Frozen):
    """As it stands in a manifest."""

    path: Path
    reason: str
    confidence: float


def route(prompt: str, *, references: bool = False, control: bool = False, rules: Iterable[Rule] = ()) -> Route:
    """`references`, `control`: whether the job names any. `rules` come before those of the table."""
    if references or control:
        what = "reference pictures" if references else "ControlNets"
        return Route(path="complex", reason=f"it names {what}", confidence=1.0)
    clauses = list(_clauses(prompt))
    found = [(rule, words) for rule in (*rules, *RULES) for words in _matches(rule, clauses)]
    if not found:
        return Route(path="simple", reason="no rule says more", confidence=VAGUE)
    rule, words = found[0]
    doubt = _DOUBT if any(other.path != rule.path for other, _ in found) else 1.0
    return Route(path=rule.path, reason=f"{rule.reason} ({words})", confidence=round(rule.confidence * doubt, 2))


def guides(prompt: str, rules: Iterable[Rule] = ()) -> tuple[ControlType, ...]:
    """What of the original may guide an edit that goes the complex way, by its words; where they say nothing, all."""
    clauses = list(_clauses(prompt))
    for rule in (*rules, *RULES):
        if rule.path == "complex" and next(_matches(rule, clauses), None):
            return rule.guides
    return ControlType.POSE, ControlType.DEPTH


def plain(text: str) -> str:
    """Small letters without accents and apostrophes: `l'œil`, `don't` become `l œil`, `dont`."""
    told = _ARROW.sub(" becomes ", text.casefold().replace("\u2019", "'"))
    decomposed = unicodedata.normalize("NFKD", told)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return _ELISION.sub(r"\1 ", letters).replace("'", "")


def _clauses(prompt: str) -> Iterable[str]:
    """The words of each clause, a space around each, but for those of what is to stay as it is."""
    for clause in _CLAUSE.split(plain(prompt[:MAX_LENGTH])):
        words = f" {' '.join(_WORD.findall(clause))} "
        ends = [match.start() for pattern in KEPT if (match := _pattern(pattern).search(words))]
        asked = words[: min(ends, default=len(words))]
        if asked.strip():
            yield f"{asked} "


def _matches(rule: Rule, clauses: Iterable[str]) -> Iterator[str]:
    """The words that a rule goes by."""
    for words in clauses:
        for pattern in rule.patterns:
            if match := _pattern(pattern).search(words):
                yield match[0].strip()


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """A gap is bounded, and so is the time for each place where a pattern may begin."""
    parts = [_GAP if part == "*" else f"(?:{re.escape(part).replace(chr(92) + '|', '|')}) " for part in text.split()]
    return re.compile(f"(?<= ){''.join(parts)}")
