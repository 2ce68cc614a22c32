"""A kind that does what its prompt says: the function of that name in deaths, words or lies. Any other is painted."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from fakes import paint

from imagend.errors import NoSpace, OutOfMemory, UnsupportedSetting
from imagend.generate_spec import Generate
from imagend.manifest import Artifact
from kinds import deaths, lies, words

_leaked: list[bytes] = []


def run(spec: dict[str, Any], context: Any) -> tuple[Artifact, ...]:
    context.progress("painting", 0, 1, 0, spec["num_inference_steps"])
    name = spec["prompt"].replace(" ", "_")
    for module in (deaths, words, lies):
        way = getattr(module, name, None)
        if getattr(way, "__module__", None) == module.__name__:  # and not what it has imported
            shown: tuple[Artifact, ...] | None = way(spec, context)
            return painted(spec, context) if shown is None else shown
    match spec["prompt"]:
        case "raise":
            raise ValueError(f"boom {spec['negative_prompt']}")
        case "refuse":
            raise UnsupportedSetting(f"not with me: {spec['negative_prompt']}")
        case "run out of memory":
            raise OutOfMemory("cpu", spec["width"], spec["height"], "resident", "None fits")
        case "leak":
            _leaked.append(os.urandom(1 << 20) * 64)
        case "take time":
            for step in range(spec["num_inference_steps"]):
                context.progress("painting", 0, 1, step, spec["num_inference_steps"])
                time.sleep(0.01)  # stands for work
        case "wait for a file":
            for beat in itertools.count():
                context.progress("painting", 0, 1, beat % spec["num_inference_steps"], spec["num_inference_steps"])
                if Path(spec["negative_prompt"]).exists():
                    break
                time.sleep(0.01)
    return painted(spec, context)


def painted(spec: dict[str, Any], context: Any) -> tuple[Artifact, ...]:
    try:
        if not spec["items"]:
            return tuple(paint(context.folder, index, seed) for index, seed in enumerate(spec["seeds"]))
        planned = Generate.model_validate_json(json.dumps(spec)).planned
        return tuple(paint(context.folder, index, plan.seed, plan) for index, plan in enumerate(planned))
    except OSError as error:
        raise NoSpace(error.strerror) from None  # as the real one does
