"""models/: which models there are, their digests and native size. Names are keys into a listing, never paths.

A job's text is compared with what the listing found, so it cannot lead anywhere. Links are followed: models/ is the
operator's, who keeps models on other disks, and the Hugging Face cache is made of links.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagend import files, weights
from imagend.errors import BrokenModel, UnknownModel

EMBEDDED = "shapes-xl"
_PIPELINES = ("StableDiffusionXLPipeline",)


@dataclass(frozen=True)
class Model:
    """A diffusers-format folder. `native_size` in pixels: what width and height are when a job gives none."""

    name: str
    path: Path
    native_size: int


@dataclass
class Models:
    root: Path
    _digests: dict[tuple[int, int, int, int], str] = field(default_factory=dict)

    def list(self) -> list[str]:
        """Names of the folders under models/diffusers/ that hold an SDXL pipeline, sorted."""
        found = (path.parent for path in (self.root / "diffusers").glob("*/model_index.json"))
        return sorted(
            path.name
            for path in found
            if not path.name.startswith(".") and _read(path / "model_index.json").get("_class_name") in _PIPELINES
        )

    def find(self, name: str) -> Model:
        """Raises UnknownModel, which lists the known ones, or BrokenModel."""
        known = self.list()
        if name not in known:
            raise UnknownModel(name, ", ".join(known) or "none")
        path = self.root / "diffusers" / name
        sample_size = _read(path / "unet" / "config.json").get("sample_size")
        channels = _read(path / "vae" / "config.json").get("block_out_channels")
        if type(sample_size) is not int or sample_size < 1:
            raise BrokenModel(name, "unet/config.json has no whole number `sample_size`")
        if not isinstance(channels, list) or not channels:
            raise BrokenModel(name, "vae/config.json has no list `block_out_channels`")
        return Model(name, path, sample_size * 2 ** (len(channels) - 1))

    def digests(self, model: Model) -> dict[str, str]:
        """SHA-256 of each weight file by its path in the model's folder; hashed once while it is unchanged."""
        found = {}
        for path in _weight_files(model):
            status = path.stat()
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if key not in self._digests:
                with path.open("rb") as file:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(model.path).as_posix()] = self._digests[key]
        return found

    def check(self, model: Model) -> None:
        """The gate before a library opens the model: its weights are what they say, and nothing in it is unpickled.

        Raises BrokenModel, BrokenWeights.
        """
        for path in _weight_files(model):
            weights.read_header(path, f"{model.name}/{path.relative_to(model.path).as_posix()}")
        for path in sorted(model.path.glob("*/*.index.json")):  # which file each tensor of a split model is in
            places = _read(path).get("weight_map")
            for place in places.values() if isinstance(places, dict) else (places,):
                if not (isinstance(place, str) and place.endswith(".safetensors") and "/" not in place):
                    where = path.relative_to(model.path).as_posix()
                    raise BrokenModel(model.name, f"{where} names {ascii(place)[:60]}, no safetensors file beside it")
        for path in sorted(model.path.glob("*/config.json")):
            if "transformers_weights" in _read(path):  # it would send the library to a file that was not judged here
                raise BrokenModel(model.name, f"{path.parent.name}/config.json has the setting `transformers_weights`")
        for path in sorted(model.path.glob("*/adapter_config.json")):  # its weights may be a pickle
            raise BrokenModel(model.name, f"{path.parent.name} has an adapter, which is not supported")

    def install_embedded(self) -> bool:
        """Put the model that imagend carries under models/diffusers/, where it is missing; True if it was."""
        target = self.root / "diffusers" / EMBEDDED
        package = Path(__file__).parent
        carried = (package / EMBEDDED, package.parent / "models" / "diffusers" / EMBEDDED)  # a wheel's, a checkout's
        source = next((path for path in carried if (path / "model_index.json").exists()), None)
        if (target / "model_index.json").exists() or source is None:
            return False
        temporary = target.with_name(f".{EMBEDDED}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        files.make_folder(target.parent)
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("__pycache__"))
        files.move(temporary, target)
        return True


def digest(digests: dict[str, str]) -> str:
    """One SHA-256 for a model of several files: of its lines "<sha256>  <path>", as `sha256sum` prints them."""
    return hashlib.sha256("".join(f"{value}  {name}\n" for name, value in sorted(digests.items())).encode()).hexdigest()


def _weight_files(model: Model) -> list[Path]:
    """Those that diffusers may load: it looks no deeper. Unlike rglob(), glob() looks into folders that are links."""
    return sorted((*model.path.glob("*.safetensors"), *model.path.glob("*/*.safetensors")))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # ours is the shortage, not the model's
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
