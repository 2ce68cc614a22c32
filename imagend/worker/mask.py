"""A picture's mask, as an edit would paint in it: by a picture, boxes or words; as a PNG, and laid over the picture."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from imagend import __version__
from imagend.manifest import Artifact
from imagend.mask_spec import MASK, OVERLAY, MakeMask
from imagend.worker import masking, masks
from imagend.worker.overlay import Box, overlay
from imagend.worker.pictures import describe, open_pictures
from imagend.worker.worked_on import save

if TYPE_CHECKING:
    from imagend.worker.main import Context

STAGE = "masking"
_DECIDING = ("torch", "transformers", "tokenizers", "pillow", "opencv-python-headless")


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Make both into the draft. Raises BadPicture, BadMask, NoSpace, Interrupt, and what Detectors.find() does."""
    spec = MakeMask.model_validate_json(json.dumps(spec_fields))
    context.progress(STAGE, 0, 1, 0, 1)
    start = time.perf_counter()
    pictures = open_pictures(spec.pictures, context.pictures)
    picture = pictures[spec.image]
    context.engine |= {
        "versions": {"imagend": __version__, **{name: version(name) for name in _DECIDING}},
        "device": context.pipelines.device,
        "threads": torch.get_num_threads(),
        "pictures": describe(pictures),
    }
    given, found = masking.given(spec.mask, picture.image, pictures, context)
    boxes: list[tuple[Box, str]] = [(box, "") for box in spec.mask.boxes or ()]
    if found is not None:
        labels = (f"{text} {score:.2f}" for text, score in zip(found.texts, found.scores, strict=True))
        boxes = list(zip(found.boxes, labels, strict=True))
    with context.timed(STAGE):
        made = masks.combine(picture.image.size, spec.mask, given)
        shown = overlay(picture.image, made, boxes)
    context.progress(STAGE, 0, 1, 1, 1)
    artifact = save(made, picture, spec, context, start, MASK)
    beside = save(shown, picture, spec, context, start, OVERLAY)
    return artifact, beside.model_copy(update={"index": 1, "role": "overlay"})
