"""Sets: the field `items` of a job, for each of which its prompts, as templates, are filled in. Pure.

`{colour}` in prompt or negative_prompt stands for an item's value of that name, `{name}` for the item's own name, `{{`
and `}}` for braces. Values are put in as they are written: what weights something in a prompt does so in a value, too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from imagend import lora, prompt
from imagend.fields import MAX_SEED, Frozen, Seed, numbered
from imagend.fields import Planned as Planned
from imagend.lora_field import Lora, with_tags
from imagend.prompt_tree import MAX_CHARACTERS, PromptSyntax

MAX_ITEMS = 64
MAX_VALUES = 32
MAX_VALUE_CHARACTERS = 4_000
MAX_SET_CHARACTERS = 200_000
"""Of all prompts of a set, filled in: they are read when its job comes in."""
ITEM_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$"
VALUE_NAME = r"^[A-Za-z][A-Za-z0-9_]{0,31}$"
TABLE = r"^sha256:[0-9a-f]{64}$"
CONTACT_SHEET = "contact.png"
_OWN_NAME = "name"
_TOKEN = re.compile(r"\{\{|\}\}|\{([A-Za-z][A-Za-z0-9_]{0,31})\}|[{}]|[^{}]+")

ValueName = Annotated[str, Field(pattern=VALUE_NAME)]
Value = Annotated[str, Field(max_length=MAX_VALUE_CHARACTERS)]


class Item(Frozen):
    """One of a set."""

    name: str = Field(
        pattern=ITEM_NAME, description="Its pictures' files are called so: `NAME.png`, or `NAME-0000.png` of several."
    )
    values: dict[ValueName, Value] = Field(
        default_factory=dict,
        max_length=MAX_VALUES,
        description="What stands in the prompts in place of `{…}`, by name.",
    )
    seed: Seed | None = Field(None, description="Of its first picture; the job's if left out.")


class _Piece(NamedTuple):
    text: str
    is_name: bool


def escaped(text: str) -> str:
    """As a template that means this text."""
    return text.replace("{", "{{").replace("}", "}}")


def check_seeds(
    seed: int | None, seeds: tuple[int, ...] | None, count: int | None, items: tuple[Item, ...], max_pictures: int
) -> None:
    """Whether seeds and numbers of a job go together. Raises ValueError, the field first."""
    if seeds is not None and (seed is not None or count not in (None, len(seeds))):
        raise ValueError("seeds: replaces seed and count; give either seeds, or seed and count")
    if items and seeds is not None:
        raise ValueError("seeds: does not go with items; give seed and count, or items seeds of their own")
    largest = MAX_SEED - (count or 1) + 1
    for field, first in (("seed", seed), *(("items", item.seed) for item in items)):
        if (first or 0) > largest:
            raise ValueError(f"{field}: goes beyond the largest seed, {MAX_SEED}, within count; use a smaller one")
    if (pictures := len(items) * (count or 1)) > max_pictures:
        raise ValueError(f"count: makes {pictures} pictures of all items, and at most {max_pictures} are possible")


def filled_in(template: str, negative: str | None, items: tuple[Item, ...]) -> dict[str | None, dict[str, Any]]:
    """The prompts of each item, by its name."""
    return {
        item.name: {
            "prompt": fill_in(template, item),
            "negative_prompt": None if negative is None else fill_in(negative, item),
        }
        for item in items
    }


def fill_in(template: str, item: Item) -> str:
    """The text that a template becomes for an item, which has all that it names."""
    return _joined(_read(template), item)


def _joined(pieces: list[_Piece], item: Item) -> str:
    values = item.values | {_OWN_NAME: item.name}
    return "".join(values[piece.text] if piece.is_name else piece.text for piece in pieces)


def _read(template: str) -> list[_Piece]:
    pieces = []
    for match in _TOKEN.finditer(template):
        token, name = match.group(0, 1)
        if token in ("{", "}"):
            raise ValueError(
                f"has a {token} that belongs to no placeholder such as {{colour}}; write it twice: {token * 2}"
            )
        pieces.append(_Piece(name or (token[0] if token in ("{{", "}}") else token), name is not None))
    return pieces


def check_prompts(
    template: str,
    negative: str | None,
    syntax: PromptSyntax,
    loras: tuple[Lora, ...],
    items: tuple[Item, ...],
    table: str | None = None,
) -> None:
    """Whether the prompts of a job can be read, for each item if it is a set. Those in a table are not known here: then
    this is asked again. Raises ValueError, the field first."""
    if table is not None:
        if items:
            raise ValueError("table: replaces items; give either")
        return
    template, _ = with_tags(template, syntax, loras)
    if not items:
        _check("prompt", template, syntax, may_have_loras=True)
        _check("negative_prompt", negative or "", syntax)
        return
    templates = {"prompt": template, "negative_prompt": negative or ""}
    _check_names(items)
    pieces = {field: _named(field, text) for field, text in templates.items()}
    _check_values(pieces, items)
    for item in items:
        for field, found in pieces.items():
            try:
                _check(field, _joined(found, item), syntax)
            except ValueError as error:
                raise ValueError(f"{error} (of item {item.name})") from None


def _check(field: str, text: str, syntax: PromptSyntax, may_have_loras: bool = False) -> None:
    try:
        if syntax is PromptSyntax.A1111 and not may_have_loras and lora.tags(text)[1]:
            raise ValueError("has a LoRA; name it in the prompt, with a weight below 0 for the opposite")
        prompt.parse(text, syntax)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _check_names(items: tuple[Item, ...]) -> None:
    seen = set[str]()
    for item in items:
        name = item.name.lower()
        if f"{name}.png" == CONTACT_SHEET:
            raise ValueError(f"items: one cannot be called {item.name}, as the contact sheet is; give it another name")
        if name in seen:
            raise ValueError(f"items: {item.name} stands there twice, whatever its case; give one another name")
        seen.add(name)


def _check_values(pieces: dict[str, list[_Piece]], items: tuple[Item, ...]) -> None:
    """That each item has just what the templates name; and that all together is not too long, before it is made."""
    wanted = {piece.text: field for field, found in pieces.items() for piece in found if piece.is_name}
    whole = 0
    for item in items:
        if _OWN_NAME in item.values:
            raise ValueError("items: a value cannot be called name: {name} is the name of the item; call it otherwise")
        values = item.values | {_OWN_NAME: item.name}
        if missing := [name for name in wanted if name not in values]:
            raise ValueError(
                f"items: {item.name} has no value for the {{{missing[0]}}} in {wanted[missing[0]]}; add it to its "
                "values, or write {{ and }} where braces are meant"
            )
        if unused := [name for name in item.values if name not in wanted]:
            raise ValueError(
                f"items: {item.name} has a value that no prompt uses; write {{{unused[0]}}} in prompt or "
                "negative_prompt, or leave the value out"
            )
        for field, found in pieces.items():
            length = sum(len(values[piece.text]) if piece.is_name else len(piece.text) for piece in found)
            whole += length
            if length > MAX_CHARACTERS:
                raise ValueError(
                    f"{field}: it has {length} characters, filled in for {item.name}; at most {MAX_CHARACTERS} are "
                    "possible. Shorten it"
                )
    if whole > MAX_SET_CHARACTERS:
        raise ValueError(
            f"items: their prompts have {whole} characters in all, filled in; at most {MAX_SET_CHARACTERS} are "
            "possible. Make several jobs of it"
        )


def _named(field: str, template: str) -> list[_Piece]:
    try:
        return _read(template)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def planned(seeds: tuple[int, ...] | None, count: int | None, items: tuple[Item, ...]) -> tuple[Planned, ...]:
    """What a job is to publish, in order; each item has its seed."""
    if not items:
        return numbered(seeds or ())
    several = count or 1
    pictures = [
        Planned(f"{item.name}-{i:04d}.png" if several > 1 else f"{item.name}.png", (item.seed or 0) + i, item.name)
        for item in items
        for i in range(several)
    ]
    return (*pictures, Planned(CONTACT_SHEET, None, None, "contact_sheet"))
