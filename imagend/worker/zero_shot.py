"""Which way an edit goes where the rules on words say nothing: CLIP's opinion, by how its text encoder places the
request among sentences that say what each way is for (zero-shot classification, https://arxiv.org/abs/2103.00020).
On the CPU always.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from imagend.architecture import ModelKind
from imagend.edit_rules import Path
from imagend.models import Model, Models
from imagend.router import Route
from imagend.worker.bases import errors_of, network_of, reading

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

SENTENCES: tuple[tuple[Path, str, str], ...] = (
    ("simple", "it changes a colour", "change the color of something"),
    ("simple", "it changes what something is made of", "change the material or the texture of something"),
    ("simple", "it changes the background", "change the background, the weather or the light"),
    ("simple", "it removes something", "remove something from the picture"),
    ("simple", "it makes the picture nicer", "make the whole picture look better"),
    ("complex", "it dresses somebody", "put other clothes on a person"),
    ("complex", "it changes a pose", "change the pose or the posture of a person"),
    ("complex", "it replaces one thing by another", "replace one object with another object"),
)
"""What each way is for, and how people say it."""
_SCALE = 100.0
"""CLIP's logit scale, as it was trained"""


class ZeroShot:
    """The first CLIP by name, loaded when it is first asked."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._loaded: tuple[Model, Any, Any] | None = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def opinion(self, prompt: str) -> Route:
        """Raises BrokenModel and its like, UnknownModel where there is none."""
        name = next(iter(self._models.list(ModelKind.CLIP)), "")
        model = self._models.find(name, ModelKind.CLIP)
        network, tokenizer = self._load(model)
        with errors_of(model):
            texts = [prompt, *(sentence for _, _, sentence in SENTENCES)]
            found = network(**tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt"))
        places = torch.nn.functional.normalize(found.text_embeds, dim=-1)
        chances = (_SCALE * places[1:] @ places[0]).softmax(-1).tolist()
        way: Path = max(("simple", "complex"), key=lambda path: _of(path, chances))
        reason = max((chance, why) for chance, (path, why, _) in zip(chances, SENTENCES, strict=True) if path == way)[1]
        said = f"no rule says more; to the CLIP {model.name} {reason}"
        return Route(path=way, reason=said, confidence=round(_of(way, chances), 2))

    def _load(self, model: Model) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != model:
            with reading(model, self._models, with_processor=False):
                network = network_of(CLIPTextModelWithProjection, model)
                tokenizer = CLIPTokenizer.from_pretrained(model.path, local_files_only=True)
            self._loaded = model, network, tokenizer
        return self._loaded[1], self._loaded[2]


def _of(path: str, chances: list[float]) -> float:
    return sum(chance for chance, (way, _, _) in zip(chances, SENTENCES, strict=True) if way == path)
