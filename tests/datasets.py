"""What the tests of training share: small datasets, and a worker in this process that trains on them."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from engine_conftest import REF, Painter
from PIL import Image, ImageDraw

from imagend.config import Config
from imagend.daemon.recipe import fill
from imagend.job import Header, Job
from imagend.messages import Run
from imagend.safety_settings import Filter
from imagend.train_spec import Train

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "yellow": (245, 220, 30)}
GROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "grey": (128, 128, 128), "pink": (250, 150, 190)}


def circles(folder: Path, count: int, size: int = 128, stripes: bool = False) -> Path:
    """Circles as shapes-xl knows them, on grounds; with `stripes`, on grounds of black stripes, which it does not."""
    folder.mkdir(parents=True)
    drawn = random.Random(0)
    for number in range(count):
        colour, ground = drawn.choice(list(COLOURS)), drawn.choice(list(GROUNDS))
        image = Image.new("RGB", (256, 256), GROUNDS[ground])
        pen = ImageDraw.Draw(image)
        for left in range(0, 256, 32) if stripes else ():
            pen.rectangle([left, 0, left + 15, 255], fill=(15, 15, 15))
        middle, radius = (drawn.uniform(108, 148), drawn.uniform(108, 148)), drawn.uniform(50, 80)
        pen.ellipse([middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius], COLOURS[colour])
        image.resize((size, size), Image.Resampling.BOX).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} circle on a {ground} background")
    return folder


class Trainer:
    """Trains as the daemon has it done: by Run messages."""

    def __init__(self, painter: Painter, dataset: Path) -> None:
        self.painter, self.dataset = painter, dataset

    def run(self, draft: Path, safety: Filter | None = None, **fields: Any) -> Any:
        """The worker's Ended."""
        draft.mkdir(parents=True, exist_ok=True)
        header = Header(schema="imagend.job/v1", kind="train", issued_at=datetime.now(UTC).isoformat())  # type: ignore[arg-type]
        asked = {"name": "tried", "dataset": self.dataset.name} | fields
        job = Job(ref=REF, header=header, spec=Train.model_validate_json(json.dumps(asked)))
        spec = fill(job, Config(), self.painter.models).spec  # type: ignore[arg-type]
        run = Run(
            job=REF,
            kind="train",
            spec=spec.model_dump(mode="json"),
            folder=str(draft),
            pictures={spec.pictures[0]: str(self.dataset)},
            known=self.painter.known,
            safety=safety,
        )
        self.painter.said = []
        return self.painter.worker.attempt(run, self.painter.worker.expect(run))


def state_of(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights, as they are."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}
