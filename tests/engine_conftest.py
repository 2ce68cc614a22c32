"""The real pipelines on the embedded model, loaded once; and a plain diffusers pipeline to compare with."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")
torch.set_num_threads(1)  # bits depend on it: as the workers of these tests have it

from conftest import REPOSITORY  # noqa: E402

from imagend.config import Config  # noqa: E402
from imagend.daemon.recipe import complete  # noqa: E402
from imagend.generate_spec import Generate  # noqa: E402
from imagend.job import SPECS, Ref  # noqa: E402
from imagend.messages import Known, Message, Run  # noqa: E402
from imagend.model_names import wanted  # noqa: E402
from imagend.models import Models  # noqa: E402
from imagend.worker.main import Worker  # noqa: E402
from imagend.worker.pipelines import Pipelines, StableDiffusionXLPipeline  # noqa: E402

REF = Ref("alice", "0123456789abcdef0123")
EMBEDDED = REPOSITORY / "models" / "diffusers" / "shapes-xl"


class Painter:
    """A worker in this process. Tests paint with it as the daemon does: by Run messages."""

    def __init__(self, root: Path = REPOSITORY / "models") -> None:
        self.models = Models(root)
        self.pipelines = Pipelines("cpu", self.models)
        self.said: list[Message] = []
        self.hear: Any = None
        self.known = Known()
        self.worker = Worker(self.pipelines, self._say, interval_s=0.0)

    def _say(self, message: Message) -> None:
        self.said.append(message)
        if self.hear:
            self.hear(message)

    def run(self, folder: Path, pictures: dict[str, Path] | None = None, kind: str = "generate", **fields: Any) -> Any:
        """Paint a job into a folder; the worker's Ended. `pictures` are where the pictures are that it names."""
        self.said = []
        asked = SPECS[kind].model_validate_json(json.dumps(fields))
        assert isinstance(asked, Generate)
        spec = complete(asked, REF, Config(), self.models.find(wanted(asked.model or "shapes-xl").name))
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            job=REF,
            kind=kind,
            spec=spec.model_dump(mode="json"),
            folder=str(folder),
            pictures={name: str(path) for name, path in (pictures or {}).items()},
            known=self.known,
        )
        return self.worker.attempt(run, self.worker.expect(run))


@pytest.fixture(scope="session")
def painter() -> Painter:
    return Painter()


@pytest.fixture(autouse=True)
def _fresh(painter: Painter) -> None:
    painter.hear = None
    assert threading.active_count() < 20


@pytest.fixture(scope="session")
def plain() -> Any:
    """diffusers alone, as a user would load it."""
    return load_plain()


def load_plain(folder: Path = EMBEDDED, dtype: Any = torch.float32) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
