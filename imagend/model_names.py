"""How a job's text names a model: a key that is compared with what a listing found, and never a path. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from imagend.architecture import ModelKind
from imagend.errors import AmbiguousModel, UnknownModel

EXTENSIONS = (".safetensors", ".sft")
MAX_NAME = 200
MODEL_NAME = r"^[^/.][^/]*(/[^/.][^/]*)*$"  # folders and a file, none hidden; those that are listed are printable, too
_SHOWN = 20
_COMPARED = 500  # names that are alike are looked for among so many: comparing takes 20 µs each


def match(name: str, kind: ModelKind, known: Collection[str]) -> str:
    """The one of the `known` names that `name` means: that name itself, with or without its extension, or the last part
    of just one of them. Raises UnknownModel, which lists the near matches first, or AmbiguousModel."""
    bare = stem(name)
    for exact in (name, bare):
        if exact in known:
            return exact
    found = [one for one in known if one.rpartition("/")[2] in (name, bare)] if "/" not in name else []
    if len(found) > 1:
        raise AmbiguousModel(kind.noun, name, ", ".join(sorted(found)[:_SHOWN]))
    if not found:
        raise UnknownModel(kind.noun, name, _listed(bare, kind, sorted(known)))
    return found[0]


def stem(name: str) -> str:
    """Without the extension of a weight file, if it has one."""
    return next((name.removesuffix(extension) for extension in EXTENSIONS if name.endswith(extension)), name)


def _listed(name: str, kind: ModelKind, known: list[str]) -> str:
    """The near matches, then the others, as far as a message has room for."""
    asked = name.casefold().rpartition("/")[2]
    folded = {one.casefold().rpartition("/")[2]: one for one in reversed(known)}
    near = [one for key, one in sorted(folded.items()) if asked and (asked in key or key in asked)]
    near += [folded[key] for key in difflib.get_close_matches(asked, list(folded)[:_COMPARED], n=5)]
    ordered = list(dict.fromkeys((*near, *known)))
    rest = len(ordered) - _SHOWN
    more = f" and {rest} more (imagend models --kind {kind} lists them)" if rest > 0 else ""
    return (", ".join(ordered[:_SHOWN]) or "none") + more
