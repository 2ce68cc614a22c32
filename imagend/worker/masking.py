"""What a job's mask is made of: the picture that it names, or what detectors find in its own. masks.py goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image

from imagend.mask_field import TEXT_THRESHOLD, THRESHOLD, Mask
from imagend.worker.detect import Found
from imagend.worker.pictures import Picture

if TYPE_CHECKING:
    from imagend.worker.main import Context


def given(
    mask: Mask, image: Image.Image, pictures: Mapping[str, Picture], context: Context
) -> tuple[Image.Image | None, Found | None]:
    """A picture of the mask where it takes one, and what was found in `image` if words name it; told in the manifest.
    Raises what Detectors.find() does."""
    if mask.image is not None:
        return pictures[mask.image].image, None
    if not mask.texts:
        return None, None
    thresholds = (
        THRESHOLD if mask.threshold is None else mask.threshold,
        TEXT_THRESHOLD if mask.text_threshold is None else mask.text_threshold,
    )
    detectors = context.pipelines.detectors
    found = detectors.find(image, mask.texts, *thresholds, context)
    context.engine |= {"detectors": detectors.used, "found": found.describe()}
    if found.left_out:
        context.engine["left_out"] = found.left_out
    return found.mask, found
