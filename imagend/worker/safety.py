"""Is a picture fit to be shown? An image classifier says so, of each picture before it is saved. On the CPU always."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from imagend.architecture import ModelKind
from imagend.errors import BrokenModel, NoSafetyFilter
from imagend.fields import Planned
from imagend.manifest import Artifact, Safety, Verdict, Withheld
from imagend.models import Model, Models, digest
from imagend.safety_settings import Classifier, Filter
from imagend.worker.bases import network_of, reading
from imagend.worker.drafts import Drafts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

_PROCESSORS = {
    "ViTForImageClassification": "ViTImageProcessorPil",
    "CLIPForImageClassification": "CLIPImageProcessorPil",
    "SiglipForImageClassification": "SiglipImageProcessorPil",
}


class Judge:
    """For the pictures of one job; may be asked by any thread."""

    def __init__(self, network: Any, processor: Any, told: Safety) -> None:
        self._network, self._processor, self.told = network, processor, told
        names = {int(number): str(name) for number, name in network.config.id2label.items()}
        wanted = {label.casefold() for label in told.labels}
        self._unsafe = {number: name for number, name in names.items() if name.casefold() in wanted}
        if not self._unsafe:
            raise NoSafetyFilter(
                f"{told.classifier!r} in models/safety/ has none of the labels {', '.join(told.labels)}; it has "
                f"{', '.join(names.values())}: name those of them that are unsafe in safety_classifier.labels"
            )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(self, image: Image.Image) -> Verdict:
        """The likeliest of the labels that are unsafe, and the probability of all of them."""
        pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")
        probabilities = self._network(**pixels).logits[0].softmax(-1)
        label = max(self._unsafe, key=lambda number: float(probabilities[number]))
        score = float(sum(probabilities[number] for number in self._unsafe))
        if not math.isfinite(score):
            raise BrokenModel(self.told.classifier, "it gives values that are no numbers")
        unsafe = score >= self.told.threshold
        return Verdict(label=self._unsafe[label], score=round(score, 4), unsafe=unsafe)


def keep(
    judge: Judge | None,
    drafts: Drafts,
    image: Image.Image,
    index: int,
    plan: Planned,
    save: Callable[[Verdict | None], Artifact],
) -> Artifact | Withheld:
    """Save a picture, or withhold it. Raises NoSpace, BrokenModel."""
    verdict = judge(image) if judge else None
    if judge and verdict and verdict.unsafe and judge.told.mode == "block":
        return drafts.withhold(index, plan, verdict)
    return save(verdict)


class Classifiers:
    """The one that was used last stays loaded."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._loaded: tuple[Model, Any, Any] | None = None

    def judge(self, order: Filter | None) -> Judge | None:
        """Who looks at the pictures of a job; None where nobody is to. Raises NoSafetyFilter, BrokenModel."""
        if order is None:
            return None
        model = self._find(order.classifier)
        files = self._models.digests(model)
        told = Safety(
            mode=order.mode,
            classifier=model.name,
            sha256=digest(files),
            labels=order.classifier.labels,
            threshold=order.classifier.threshold,
        )
        return Judge(*self._load(model), told)

    def _find(self, wanted: Classifier) -> Model:
        if wanted.model is not None:
            return self._models.find(wanted.model, ModelKind.SAFETY)
        names = list(self._models.list(ModelKind.SAFETY))
        if len(names) != 1:
            what = (
                f"several classifiers ({', '.join(names)}): name one in safety_classifier.model"
                if names
                else (
                    "no classifier: fetch one, such as by `imagend fetch https://huggingface.co/Falconsai/nsfw_image_detection`"
                )
            )
            raise NoSafetyFilter(f"models/safety/ holds {what}")
        return self._models.find(names[0], ModelKind.SAFETY)

    def _load(self, model: Model) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != model:
            kind = model.architecture.format
            with reading(model, self._models):
                network = network_of(getattr(transformers, kind), model)
                processor = getattr(transformers, _PROCESSORS[kind]).from_pretrained(model.path, local_files_only=True)
            self._loaded = model, network, processor
        return self._loaded[1], self._loaded[2]
