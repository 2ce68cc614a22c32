"""From words to a mask: boxes around what they name by GroundingDINO (arXiv 2303.05499), outlines in them by SAM.

Both are read when they are first needed and stay in main memory, on a device only while they look: what paints has the
device's memory to itself, and is sent away for them only where both have no room. Bit for bit what transformers does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from imagend.architecture import BOXES, MASKS, ModelKind
from imagend.errors import BrokenModel, DeviceFailed, JobFailed, NoDetector, NothingFound, OutOfMemory, PromptTooLong
from imagend.messages import Known
from imagend.models import Model, Models, digest
from imagend.worker.bases import errors_of, network_of, reading
from imagend.worker.shortage import Catch, clean_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        BertTokenizer,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SamImageProcessorPil,
        SamModel,
        SamProcessor,
    )

STAGE = "detecting"
MAX_BOXES = 100
"""The best ones; a threshold that lets through more is too low to be meant."""
_AT_ONCE = 16
_EXAMPLES = {BOXES: "IDEA-Research/grounding-dino-tiny", MASKS: "facebook/sam-vit-base"}
_END = "."
"""Of a text: where GroundingDINO is asked for several at once."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """What was found, the best first; each box (x0, y0, x1, y1) in pixels, with its score and the text it goes with."""

    boxes: tuple[Box, ...]
    scores: tuple[float, ...]
    texts: tuple[str, ...]
    mask: Image.Image
    """mode L: 255 in what was found, else 0"""
    left_out: int
    """boxes beyond MAX_BOXES"""

    def describe(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [
            {"find": text, "score": round(score, 4), "box": [round(number, 2) for number in box]}
            for text, score, box in zip(self.texts, self.scores, self.boxes, strict=True)
        ]


class Context(Protocol):
    """Of a job (worker.main.Context), what is needed here."""

    known: Known
    memory: dict[str, Any]

    def progress(self, stage: str, picture: int = 0, pictures: int = 0, step: int = 0, steps: int = 0) -> None: ...
    def timed(self, stage: str) -> AbstractContextManager[None]: ...
    def short_of_memory(self, stage: str, rung: str, then: str | None) -> None: ...


@dataclass(frozen=True)
class _Kept:
    model: Model
    network: Any
    processor: Any


class Detectors:
    """Those of one worker. `used`: by which the last find() looked, for the manifest. `make_room` lets go of what else
    takes memory."""

    def __init__(self, models: Models, device: str, make_room: Callable[[], None]) -> None:
        self._models, self._device, self._make_room = models, torch.device(device), make_room
        self._kept: dict[str, _Kept] = {}
        self.used: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Let go of the networks, for main memory's sake."""
        self._kept.clear()

    def find(
        self, image: Image.Image, texts: Sequence[str], threshold: float, text_threshold: float, context: Context
    ) -> Found:
        """What `texts` name in an RGB picture. A text with full stops names several.

        Raises NoDetector, NothingFound, PromptTooLong, BrokenModel and its like, OutOfMemory, Interrupt.
        """
        texts = [one for text in texts for part in text.split(_END) if (one := part.strip().lower())]
        models = [self._find(what) for what in (BOXES, MASKS)]
        self._models.learn(context.known.digests)

        def look(device: torch.device) -> Found:
            with context.timed("model_loading"):
                seeing, outlining = (self._load(model, context) for model in models)
            with context.timed(STAGE):
                context.progress(STAGE, 0, 1, 0, 2)
                boxes, scores, names = _look(seeing, image, texts, threshold, text_threshold, device)
                context.progress(STAGE, 0, 1, 1, 2)
                made: Found = _outlined(outlining, image, boxes, scores, names, device, context)
                return made

        try:
            found = self._where_there_is_room(look, image, context)
        except torch.AcceleratorError as error:  # the device's context is lost, and this process with it
            raise DeviceFailed(self._device, str(error).splitlines()[0]) from None
        self.used = [self._describe(model) for model in models]
        return found

    def _where_there_is_room(
        self, look: Callable[[torch.device], Found], image: Image.Image, context: Context
    ) -> Found:
        """On the device; if memory runs out, once more when room was made; then on the CPU. Raises OutOfMemory."""
        rungs = [(self._device, "beside the pipeline"), (self._device, "alone")]
        if self._device.type != "cpu":
            rungs.append((torch.device("cpu"), "on the CPU"))
        for number, (device, rung) in enumerate(rungs):
            with Catch() as caught:
                return look(device)
            clean_up(self._device)
            self._make_room()
            then = rungs[number + 1][1] if number + 1 < len(rungs) else None
            context.memory.setdefault("retries", []).append({"stage": STAGE, "rung": rung, "said": caught.said})
            context.short_of_memory(STAGE, rung, then)
        tried = "; ".join(rung for _, rung in rungs)
        raise OutOfMemory(self._device, *image.size, tried, "Or give boxes or a picture as the mask")

    def _find(self, what: str) -> Model:
        """The first by name that can be used."""
        for name in self._models.list(ModelKind.DETECTOR):
            with contextlib.suppress(JobFailed):
                model = self._models.find(name, ModelKind.DETECTOR)
                if model.architecture.format == what:
                    return model
        raise NoDetector(what, _EXAMPLES[what])

    def _load(self, model: Model, context: Context) -> _Kept:
        what = model.architecture.format
        kept = self._kept.get(what)
        if kept is None or (kept.model.path, kept.model.version) != (model.path, model.version):
            self._kept.pop(what, None)
            context.progress("loading")
            kept = self._kept[what] = self._read(model)
        return kept

    def _read(self, model: Model) -> _Kept:
        kind = GroundingDinoForObjectDetection if model.architecture.format == BOXES else SamModel
        with reading(model, self._models):
            return _Kept(model, network_of(kind, model), _processor(model))

    def _describe(self, model: Model) -> dict[str, Any]:
        files = self._models.digests(model)
        return {"finds": model.architecture.format, "name": model.name, "sha256": digest(files), "files": files}


def _processor(model: Model) -> Any:
    """By the classes that need no torchvision, by name: whatever a folder's files ask for."""
    local = {"local_files_only": True}
    if model.architecture.format == MASKS:
        return SamProcessor(SamImageProcessorPil.from_pretrained(model.path, **local))
    if not any((model.path / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise BrokenModel(model.name, "it lacks tokenizer.json and vocab.txt")
    images = GroundingDinoImageProcessorPil.from_pretrained(model.path, **local)
    return GroundingDinoProcessor(images, BertTokenizer.from_pretrained(model.path, **local))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _look(
    seeing: _Kept, image: Image.Image, texts: list[str], threshold: float, text_threshold: float, device: torch.device
) -> tuple[torch.Tensor, list[float], list[str]]:
    """Boxes, scores and texts, the best first. Raises NothingFound, PromptTooLong."""
    processor, network = seeing.processor, seeing.network
    inputs = processor(images=image, text=[texts], return_tensors="pt")
    ids = inputs["input_ids"]
    if ids.shape[1] > network.config.max_text_len:
        raise PromptTooLong("find", ids.shape[1], network.config.max_text_len)
    with errors_of(seeing.model), _on(device, network):
        said = network(**inputs.to(device))
        said.logits, said.pred_boxes = said.logits.cpu(), said.pred_boxes.cpu()
    (found,) = processor.post_process_grounded_object_detection(
        said, ids, threshold=threshold, text_threshold=text_threshold, target_sizes=[(image.height, image.width)]
    )
    by_text = _scores(said.logits[0], ids[0], processor.tokenizer.convert_tokens_to_ids(_END), len(texts))
    best, which = by_text.max(dim=-1)
    kept = said.logits[0].sigmoid().max(dim=-1).values > threshold
    shows = best[kept] > text_threshold  # words, not the stops between them
    if not shows.any():
        raise NothingFound(_shown(texts, by_text.max(dim=0).values.tolist()), threshold, text_threshold)
    boxes, scores, which = found["boxes"][shows], found["scores"][shows], which[kept][shows]
    order = scores.argsort(descending=True, stable=True)
    return boxes[order], scores[order].tolist(), [texts[number] for number in which[order]]


def _scores(logits: torch.Tensor, ids: torch.Tensor, stop: int, texts: int) -> torch.Tensor:
    """Of each query, how well it goes with each text: as well as with the best of its words. (queries, texts)"""
    scores = torch.zeros(len(logits), texts)
    number = 0
    for position, token in enumerate(ids.tolist()[1:-1], 1):
        if token == stop:
            number += 1
        else:
            scores[:, number] = scores[:, number].maximum(logits[:, position].sigmoid())
    return scores


def _shown(texts: list[str], best: list[float]) -> str:
    return ", ".join(f"{text!r} (best score {score:.2f})" for text, score in zip(texts, best, strict=True))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _outlined(
    outlining: _Kept,
    image: Image.Image,
    boxes: torch.Tensor,
    scores: list[float],
    texts: list[str],
    device: torch.device,
    context: Context,
) -> Found:
    """What is in the boxes, in one mask."""
    left_out = max(0, len(boxes) - MAX_BOXES)
    boxes = boxes[:MAX_BOXES]
    processor, network = outlining.processor, outlining.network
    whole = torch.zeros(image.height, image.width, dtype=torch.bool)
    with errors_of(outlining.model), _on(device, network):
        inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        seen = network.get_image_embeddings(inputs["pixel_values"].to(device))
        for some in inputs["input_boxes"][0].split(_AT_ONCE):
            context.progress(STAGE, 0, 1, 1, 2)
            said = network(image_embeddings=seen, input_boxes=some[None].to(device), multimask_output=False)
            for mask in said.pred_masks.cpu()[0]:  # one by one: each becomes as large as the picture
                (outline,) = processor.post_process_masks(mask[None, None], *sizes)
                whole |= outline[0, 0]
    mask = Image.fromarray(whole.to(torch.uint8).numpy() * 255)
    told = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist())
    return Found(told, tuple(scores[:MAX_BOXES]), tuple(texts[:MAX_BOXES]), mask, left_out)


@contextmanager
def _on(device: torch.device, network: Any) -> Iterator[None]:
    """A network on a device, within the block; its own weights stay where they are."""
    home = [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())]
    try:
        for tensor, data in home:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data
