"""Pictures that are painted and saved, but not published: what another attempt at the job need not paint again.

One that is withheld is never written: its note alone says that it need not be painted again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from imagend.errors import NoSpace
from imagend.fields import Planned
from imagend.generate_spec import Generate
from imagend.manifest import Artifact, Verdict, Withheld
from imagend.worker import images


class Drafts:
    """The pictures of a job in its draft folder: NAME.png, and beside it .NAME.json, which says what it is."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self._folder, self._recipe = folder, recipe

    def find(self, file: str) -> tuple[Artifact, bool] | None:
        """The picture that an earlier attempt painted, if it is whole and of this recipe, and whether it is exact
        (Climb.exact)."""
        path = self._folder / file
        try:
            note = json.loads(self._note(file).read_bytes())
            artifact = Artifact.model_validate_json(json.dumps(note["artifact"]))
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256
            return (artifact, bool(note["exact"])) if whole and note["recipe"] == self._recipe else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def find_withheld(self, file: str) -> Withheld | None:
        """What is told of a picture of this recipe that an earlier attempt painted and withheld."""
        try:
            note = json.loads(self._note(file).read_bytes())
            withheld = Withheld.model_validate_json(json.dumps(note["withheld"]))
            return withheld if note["recipe"] == self._recipe else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def withhold(self, index: int, plan: Planned, verdict: Verdict) -> Withheld:
        """Note that a picture is withheld. Raises NoSpace."""
        withheld = Withheld(**verdict.model_dump(), index=index, seed=plan.seed, item=plan.item)
        note = {"recipe": self._recipe, "withheld": withheld.model_dump(mode="json")}
        try:
            self._note(plan.file).write_text(json.dumps(note))
        except OSError as error:
            raise NoSpace(error.strerror) from None
        return withheld

    def save(
        self,
        image: Image.Image,
        index: int,
        plan: Planned,
        seconds: float,
        spec: Generate,
        engine: dict[str, Any],
        exact: bool,
        verdict: Verdict | None = None,
    ) -> Artifact:
        """Write a picture durably, and a note of what it is. Raises NoSpace."""
        try:
            artifact = self._save(image, index, plan, seconds, spec, engine).model_copy(update={"safety": verdict})
            note = {"recipe": self._recipe, "artifact": artifact.model_dump(mode="json"), "exact": exact}
            self._note(plan.file).write_text(json.dumps(note))  # torn by a power cut, it only costs painting again
            return artifact
        except OSError as error:
            raise NoSpace(error.strerror) from None

    def _save(
        self, image: Image.Image, index: int, plan: Planned, seconds: float, spec: Generate, engine: dict[str, Any]
    ) -> Artifact:
        path, seed = self._folder / plan.file, plan.seed
        assert seed is not None
        pixels = images.pixels_sha256(image)
        item = {
            "spec": spec.model_dump(mode="json", exclude_none=True, exclude={"seeds"}) | {"seed": seed},
            "index": index,
            "pixels_sha256": pixels,
            "engine": engine,
        }
        data = images.save_png(image, path, images.png_text(spec, seed, engine, item))
        artifact = images.describe(image, path.name, data, pixels, index, seed, seconds)
        return artifact.model_copy(update={"item": plan.item})

    def _note(self, file: str) -> Path:
        return self._folder / f".{file.removesuffix('.png')}.json"
