"""Textual-inversion embeddings: from a name in a prompt to the vectors that stand for it. It changes no model.

SDXL's files hold vectors for both text encoders, one a row: `clip_l` and `clip_g`, as kohya and ComfyUI have them. A
bare word is text, unless there is an embedding of that name for SDXL; after `embedding:` there must be one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from imagend.architecture import ModelKind
from imagend.errors import AmbiguousModel, BrokenWeights, ImagendError, JobFailed, UnfitEmbedding, UnusableModel
from imagend.generate_spec import Generate
from imagend.mentions import Mention, Names
from imagend.models import Models
from imagend.prompt import parse
from imagend.worker.text_encoder import Inversion, Text

MAX_BYTES = 64 * 2**20
_SHOWN = 20
_KEYS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))


class Inversions:
    """Those that a job's prompts name. They are small: read for each job, they are always what lies in the folder."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._listed: tuple[str, ...] = ()
        self._names = Names(())
        self._used: dict[Mention, Inversion] = {}
        self._of: dict[str | None, set[Mention]] = {}

    def apply(self, pipe: Any, spec: Generate, failed: dict[str, ImagendError]) -> None:
        """From now on split() and describe() are about this job. What goes wrong with an item of a set stands in
        `failed` then.

        Raises UnknownModel, AmbiguousModel, UnusableModel, BrokenWeights, UnfitEmbedding.
        """
        listed = tuple(self._models.list(ModelKind.EMBEDDING))
        if listed != self._listed:
            self._listed, self._names = listed, Names(listed)
        used: dict[Mention, Inversion | None] = {}
        self._of = {}
        for item, part in spec.parts.items():
            try:
                mentioned = self._mentioned(part, pipe, used)
            except JobFailed as error:
                if item is None:
                    raise
                failed[item] = error
            else:
                used |= mentioned
                self._of[item] = set(mentioned)
        self._used = {mention: inversion for mention, inversion in used.items() if inversion}

    def _mentioned(
        self, spec: Generate, pipe: Any, known: Mapping[Mention, Inversion | None]
    ) -> dict[Mention, Inversion | None]:
        used: dict[Mention, Inversion | None] = {}
        for text in (spec.prompt, spec.negative_prompt or ""):
            prompt = parse(text, spec.prompt_syntax)
            for piece in (prompt.plain, *(fragment.text for block in prompt.blocks for fragment in block)):
                for mention in self._names.split(piece):
                    if isinstance(mention, Mention) and mention not in used:
                        used[mention] = known[mention] if mention in known else self._inversion(mention, pipe)
        return used

    def split(self, text: str) -> Text:
        """A text of this job, as its words and the inversions between them."""
        found: Text = []
        for piece in self._names.split(text):
            here = self._used.get(piece, piece.text) if isinstance(piece, Mention) else piece
            if isinstance(here, str) and found and isinstance(found[-1], str):
                found[-1] += here
            else:
                found.append(here)
        return found

    def describe(self, item: str | None = None) -> list[dict[str, str]]:
        """For the manifest; or for the pictures of an item of a set."""
        mentioned = self._used.keys() if item is None else self._used.keys() & self._of[item]
        used = {self._used[mention].name: self._used[mention].sha256 for mention in mentioned}
        return [{"name": name, "sha256": sha256} for name, sha256 in sorted(used.items())]

    def _inversion(self, mention: Mention, pipe: Any) -> Inversion | None:
        if len(mention.names) > 1:
            raise AmbiguousModel(ModelKind.EMBEDDING.noun, mention.written, ", ".join(mention.names[:_SHOWN]))
        name = mention.names[0] if mention.names else mention.written
        try:
            model = self._models.find(name, ModelKind.EMBEDDING)
        except UnusableModel:  # for another Stable Diffusion: to this one its name is a word, as in AUTOMATIC1111
            if mention.asked:
                raise
            return None
        self._models.check(model)
        try:
            data = model.path.read_bytes() if model.size <= MAX_BYTES else b""
            tensors = load(data)
        except OSError as error:
            raise BrokenWeights(model.name, error.strerror or "it cannot be read") from None
        except SafetensorError:
            raise BrokenWeights(
                model.name, f"it has more than {MAX_BYTES} bytes, or changed while it was read"
            ) from None
        keys = next((keys for keys in _KEYS if keys[0] in tensors), ())
        vectors = tuple(tensors[key] for key in keys if key in tensors)
        return _fitting(Inversion(model.name, hashlib.sha256(data).hexdigest(), vectors), pipe)


def _fitting(inversion: Inversion, pipe: Any) -> Inversion:
    """As it is, if it goes with the pipeline's text encoders. Raises UnfitEmbedding."""
    widths = tuple(encoder.get_input_embeddings().embedding_dim for encoder in (pipe.text_encoder, pipe.text_encoder_2))
    shapes = tuple(tuple(vectors.shape) for vectors in inversion.vectors)
    if not all(len(shape) == 2 and shape[0] for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise UnfitEmbedding(
            inversion.name, f"its vectors are {_listed(shapes)}, and not as many for both text encoders"
        )
    found = tuple(shape[1] for shape in shapes)
    if found != widths:
        raise UnfitEmbedding(
            inversion.name,
            f"its vectors are {_listed(found)} wide, and those of the model's text encoders {_listed(widths)}",
        )
    dtype = pipe.text_encoder_2.dtype
    if not all(vectors.to(dtype).isfinite().all() for vectors in inversion.vectors):
        name = str(dtype).removeprefix("torch.")
        raise UnfitEmbedding(inversion.name, f"its vectors hold what is no number, or too large a one for {name}")
    return inversion


def _listed(values: tuple[object, ...]) -> str:
    return " and ".join(map(str, values))
