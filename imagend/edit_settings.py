"""How edits are told apart, as config.yaml says it under `edit`. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from imagend.edit_rules import Path, Rule
from imagend.fields import Frozen

_PATTERN = re.compile(r"(?:\*|[a-z0-9-]+(?:\|[a-z0-9-]+)*)(?: (?:\*|[a-z0-9-]+(?:\|[a-z0-9-]+)*)){0,15}")


def _pattern(text: str) -> str:
    if not _PATTERN.fullmatch(text) or text.startswith("*") or text.endswith("*"):
        raise ValueError("must be words in small letters, without accents, such as paint|draw * portrait")
    return text


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of patterns, such as [paint|draw * portrait]")
    return tuple(value)


Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_pattern)], ...], Field(max_length=100), BeforeValidator(_list)
]


class Edit(Frozen):
    """The keys under `edit`; a description here is the comment in config.yaml."""

    complex: Patterns = Field(
        (),
        description="Edits whose words match one of these go the complex way: words in a row, `a|b` is either, `*` is "
        "up to six words, as in [restyle|redo * hairstyle]. These come before imagend's own rules (imagend route).",
    )
    simple: Patterns = Field((), description="The same for the simple way; `complex` comes before it.")

    @property
    def rules(self) -> tuple[Rule, ...]:
        paths: tuple[tuple[Path, Patterns], ...] = (("complex", self.complex), ("simple", self.simple))
        return tuple(Rule(path, "a rule of config.yaml", 1.0, (pattern,)) for path, found in paths for pattern in found)
