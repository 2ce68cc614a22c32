"""How a job's text names a model: a key that is compared with what a listing found, and never a path. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from imagend.architecture import ModelKind
from imagend.errors import AmbiguousModel, UnknownModel

EXTENSIONS = (".safetensors", ".sft")
MAX_NAME = 200
NAMED_KINDS = (
    *(ModelKind.BASE, ModelKind.VAE, ModelKind.LORA, ModelKind.CONTROLNET),
    *(ModelKind.IP_ADAPTER, ModelKind.UPSCALER),
)
"""What jobs name in fields of their own, and so may pin."""
MODEL_NAME = r"^[^/.][^/]*(/[^/.][^/]*)*$"  # folders and a file, none hidden; those that are listed are printable, too
_PIN = re.compile(r"(?s:(.+))@([0-9A-Fa-f]{10,64})")
_SHOWN = 20
_COMPARED = 500  # names that are alike are looked for among so many: comparing takes 20 µs each


class Wanted(NamedTuple):
    """What a job's text asks for: a name, and a prefix of the model's SHA-256, or nothing where any will do."""

    name: str
    pin: str = ""

    def of(self, name: str) -> str:
        """The same pin, on the full name of what was found."""
        return f"{name}@{self.pin}" if self.pin else name


def wanted(text: str) -> Wanted:
    """`pony@67ab2fd8ec`: the model pony, if its SHA-256 begins so. What looks like a pin is one, whatever files are
    called; a file of such a name is named with its extension."""
    found = _PIN.fullmatch(text)
    return Wanted(found[1], found[2].lower()) if found else Wanted(text)


def named(spec: Mapping[str, Any]) -> list[tuple[ModelKind, str]]:
    """The models that the fields of a job name: base, VAE, LoRAs, ControlNets, IP-Adapter and upscaler."""
    texts = [(ModelKind.BASE, spec.get("model")), (ModelKind.VAE, spec.get("vae"))]
    texts += [(ModelKind.IP_ADAPTER, spec.get("ip_adapter"))]
    texts += [(ModelKind.LORA, one.get("name")) for one in spec.get("loras") or ()]
    texts += [(ModelKind.CONTROLNET, one.get("model")) for one in spec.get("control") or ()]
    chained = (spec.get("chain") or {}).get("upscale") or {}
    texts += [(ModelKind.UPSCALER, one.get("upscaler")) for one in (spec, chained)]
    return [(kind, text) for kind, text in texts if isinstance(text, str)]


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
