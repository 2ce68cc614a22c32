"""A control picture from a plain one, as a generate job would make it: to be looked at, or to be used as it is."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from imagend import __version__
from imagend.control import Preprocess
from imagend.manifest import Artifact
from imagend.worker.pictures import describe, open_pictures
from imagend.worker.preprocessors import Preprocessors
from imagend.worker.worked_on import save

if TYPE_CHECKING:
    from imagend.worker.main import Context

STAGE = "preprocessing"
_DECIDING = ("torch", "transformers", "opencv-python-headless")


def run(spec_fields: dict[str, Any], context: Context) -> tuple[Artifact, ...]:
    """Make it into the draft, on the CPU. Raises BadPicture, NoPreprocessor, BrokenModel, NoSpace, Interrupt."""
    spec = Preprocess.model_validate_json(json.dumps(spec_fields))
    context.progress(STAGE, 0, 1, 0, 1)
    start = time.perf_counter()
    pictures = open_pictures(spec.pictures, context.pictures)
    picture = pictures[spec.image]
    image = picture.sized(spec.width, spec.height) if spec.width and spec.height else picture.image
    preprocessors = Preprocessors(context.pipelines.models)
    with context.timed(STAGE):
        made = preprocessors.make(spec.type, image)
    context.progress(STAGE, 0, 1, 1, 1)
    context.engine |= {
        "versions": {"imagend": __version__, **{name: version(name) for name in _DECIDING}},
        "threads": torch.get_num_threads(),
        "pictures": describe(pictures),
        "preprocessors": preprocessors.used,
    }
    return (save(made, picture, spec, context, start),)
