"""Where a text names textual-inversion embeddings: bare, as in AUTOMATIC1111, or `embedding:name`, as in ComfyUI. Pure.

Compared are words and signs, not characters: a name within a word is no mention, spaces and case make no difference
(compel's syntax puts spaces around dots). Where several names fit, the longest is meant. Linear in the text, however
many embeddings there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_PART = re.compile(r"\w+|[^\w\s]")
_PREFIX = "embedding:"
_EXTENSIONS = frozenset({"safetensors", "sft", "pt", "bin"})


@dataclass(frozen=True)
class Mention:
    """Where a text names an embedding. `names` are those it may mean: none if unknown, several if vague."""

    text: str
    """all of it, as it stands there"""
    written: str
    """without `embedding:` and ending"""
    names: tuple[str, ...]

    @property
    def asked(self) -> bool:
        """Whether it must be an embedding. A bare word may be nothing but a word."""
        return self.text.startswith(_PREFIX)


@dataclass
class _Node:
    """A place in the tree of all names' parts."""

    after: dict[str, _Node] = field(default_factory=dict)
    names: list[tuple[str, str]] = field(default_factory=list)
    """each with the form of it that ends here: itself, or what follows its last /"""


class Names:
    """The embeddings there are, by name; `folder/name` is also known as `name`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._root = _Node()
        for name in names:
            for form in {name, name.rpartition("/")[2]}:
                node = self._root
                for part in _PART.findall(form.lower()):
                    node = node.after.setdefault(part, _Node())
                node.names.append((name, form))

    def split(self, text: str) -> list[str | Mention]:
        """The text between its mentions, and these, in order."""
        if not self._root.after and _PREFIX not in text:
            return [text]
        found: list[str | Mention] = []
        done = 0
        for start, end, mention in self._mentions(text):
            found += [text[done:start], mention]
            done = end
        return [piece for piece in [*found, text[done:]] if piece] or [""]

    def _mentions(self, text: str) -> Iterator[tuple[int, int, Mention]]:
        parts = [(match[0], match.start(), match.end()) for match in _PART.finditer(text)]
        position = 0
        while position < len(parts):
            start = parts[position][1]
            first = position + (2 if (asked := _is_prefix(parts[position : position + 3])) else 0)
            last, node = self._longest(parts, first)
            if node is not None:
                written = text[parts[first][1] : parts[last - 1][2]]
                last += 2 * _has_extension(parts[last - 1 : last + 2])
                end = parts[last - 1][2]
                yield start, end, Mention(text[start:end], written, _meant(written, node.names))
            elif asked:
                written = re.split(r"[\s,]", text[parts[first][1] :], maxsplit=1)[0]
                end = parts[first][1] + len(written)
                yield start, end, Mention(text[start:end], written, ())
                last = next((i for i in range(first, len(parts)) if parts[i][1] >= end), len(parts))
            position = max(last, first + 1)

    def _longest(self, parts: list[tuple[str, int, int]], first: int) -> tuple[int, _Node | None]:
        node: _Node | None = self._root
        best: tuple[int, _Node | None] = (first, None)
        for position in range(first, len(parts)):
            node = node.after.get(parts[position][0].lower()) if node else None
            if node is None:
                break
            if node.names:
                best = position + 1, node
        return best


def _is_prefix(parts: list[tuple[str, int, int]]) -> bool:
    """embedding:x, in one piece."""
    return (
        len(parts) == 3
        and (parts[0][0], parts[1][0]) == ("embedding", ":")
        and (parts[0][2], parts[1][2]) == (parts[1][1], parts[2][1])
    )


def _has_extension(parts: list[tuple[str, int, int]]) -> bool:
    """name.pt, or name . pt as compel's syntax leaves it; but not the end of a sentence."""
    if len(parts) < 3 or parts[1][0] != "." or parts[2][0].lower() not in _EXTENSIONS:
        return False
    (_, _, name_end), (_, dot, dot_end), (_, extension, _) = parts
    return (dot == name_end) == (extension == dot_end)


def _meant(written: str, names: list[tuple[str, str]]) -> tuple[str, ...]:
    """Of names alike but for case and folder: as it is written, first in full, then without its folder."""
    parts = _PART.findall(written)
    for exact in (True, False):
        for full in (True, False):
            found = sorted(
                name for name, form in names if (name == form) == full and (not exact or _PART.findall(form) == parts)
            )
            if found:
                return tuple(found)
    return ()
