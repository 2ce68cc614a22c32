"""models/: which models there are, what they are, and their digests. Names are keys into a listing, never paths.

A job's text is compared with what the listing found, so it cannot lead anywhere. What a model is, its tensors say
(recognise.py), which are read once for as long as its files are unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imagend import files, weights
from imagend.architecture import Architecture, ModelKind, family
from imagend.errors import BrokenModel, JobFailed, ModelReplaced, OtherWeights, UnusableModel
from imagend.hashes import stamp
from imagend.header import Header
from imagend.model_folders import Found, ModelFolders
from imagend.model_names import match, wanted
from imagend.recognise import recognise
from imagend.recognise_folder import recognise_folder

EMBEDDED = "shapes-xl"
_PACKAGE = Path(__file__).parent
_CARRIED = (_PACKAGE / EMBEDDED, _PACKAGE.parent / "models" / "diffusers" / EMBEDDED)  # a wheel's, a checkout's
SDXL = _PACKAGE / "sdxl"
_SDXL_SHAPE = (320, 2048)
_MAX_JSON_BYTES = 4 * 2**20
_CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "config.json")


@dataclass(frozen=True)
class Model:
    """A weight file, or a folder in diffusers' format. Another `version` means that its files have changed."""

    kind: ModelKind
    name: str
    path: Path
    size: int
    """bytes of its weight files"""
    architecture: Architecture
    is_file: bool
    version: tuple[str, ...]
    """the stamp() of each weight file"""

    @property
    def native_size(self) -> int:
        """Pixels: what width and height are when a job gives none."""
        return self.architecture.native_size


@dataclass
class Models:
    root: Path
    extra: Path | None = None
    """a ComfyUI extra_model_paths.yaml"""
    _digests: dict[str, str] = field(default_factory=dict)
    _judged: dict[tuple[ModelKind, Path], tuple[tuple[str, ...], Architecture | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folders = ModelFolders(self.root, self.extra)

    def list(self, kind: ModelKind = ModelKind.BASE) -> list[str]:
        """Names of what lies in the folders of a kind, sorted. Whether each can be used, find() says."""
        return sorted(self.folders.list(kind).found)

    def find(self, name: str, kind: ModelKind = ModelKind.BASE) -> Model:
        """Of a pinned name, only what has that digest; hashed for it if need be. Raises UnknownModel, with the known
        ones, AmbiguousModel, UnusableModel, BrokenModel, BrokenWeights, OtherWeights, ModelReplaced."""
        name, pin = wanted(name)
        listing = self.folders.list(kind)
        model = self.judge(listing.found[match(name, kind, listing.found)], kind)
        if pin:
            self._check_pin(model, pin)
        return model

    def _check_pin(self, model: Model, pin: str) -> None:
        try:
            now = digest(self.digests(model))
        except OSError as error:
            raise BrokenModel(model.name, error.strerror or "it cannot be read") from None
        self.check_unchanged(model)  # else the digest may be of other files than those that were judged
        if not now.startswith(pin):
            raise OtherWeights(model.kind.noun, model.name, pin, now, now[:10], detail={"sha256": now, "pin": pin})

    def check_unchanged(self, model: Model) -> None:
        """That its weight files are still those that were judged: asked once they are read. Raises ModelReplaced."""
        try:
            version = tuple(stamp(path.stat()) for path in self.weight_files(model))
        except OSError:
            version = ()
        if version != model.version:
            raise ModelReplaced(model.kind.noun, model.name)

    def judge(self, found: Found, kind: ModelKind) -> Model:
        """What something that was listed is. Raises UnusableModel, BrokenModel, BrokenWeights."""
        paths = (found.path,) if found.is_file else _weight_files(found.path)
        try:
            states = [path.stat() for path in paths]
        except OSError as error:
            raise BrokenModel(found.name, error.strerror or "it cannot be read") from None
        version = tuple(stamp(status) for status in states)
        architecture = self._architecture(found, kind, version)
        size = sum(status.st_size for status in states)
        model = Model(kind, found.name, found.path, size, architecture, found.is_file, version)
        if kind is ModelKind.BASE and found.is_file and _shape(model) != _SDXL_SHAPE:  # its size is its sibling's
            native_size = self._sibling(model).native_size
            model = replace(model, architecture=replace(architecture, native_size=native_size))
        return model

    def config_folder(self, model: Model) -> Path:
        """Where the configuration of a base model is, which a single file lacks: of SDXL we carry it; of a sibling of
        another size it is that of a folder in diffusers' format of the same shape. Raises UnusableModel."""
        if not model.is_file:
            return model.path
        return SDXL if _shape(model) == _SDXL_SHAPE else self._sibling(model).path

    def _sibling(self, model: Model) -> Model:
        carried = [Found(EMBEDDED, path, is_file=False) for path in _CARRIED if path.is_dir()]
        for found in (*carried, *self.folders.list(ModelKind.BASE).found.values()):
            with contextlib.suppress(JobFailed):
                if not found.is_file and _shape(other := self.judge(found, ModelKind.BASE)) == _shape(model):
                    return other
        what = f"a relative of SDXL of another size {_shape(model)}: get it as a folder in diffusers' format"
        raise UnusableModel("model", model.name, what)

    def _architecture(self, found: Found, kind: ModelKind, version: tuple[str, ...]) -> Architecture:
        if not found.is_file:  # a folder's weights do not tell when its configuration has changed
            version += tuple(_stamp_of(f"{found.path}/{name}") for name in _CONFIGS)
        known, judged = self._judged.get((kind, found.path), (None, ""))
        if known != version:
            try:
                judged = self._recognise(found, kind)
            except ValueError as error:
                judged = str(error)
            self._judged[kind, found.path] = (version, judged)
        if isinstance(judged, str):
            raise UnusableModel(kind.noun, found.name, judged)
        return judged

    def _recognise(self, found: Found, kind: ModelKind) -> Architecture:
        metadata: Mapping[str, str] = {}
        if found.is_file:
            header = weights.read_header(found.path, found.path.name)
            judged, metadata = recognise(header, kind), header.metadata
        else:
            judged = recognise_folder(found.name, kind, {file: read_json(found.path / file) for file in _CONFIGS})
        return replace(judged, family=family(metadata, found.name)) if judged.base else judged

    def header(self, model: Model) -> Header:
        """What a single weight file says of itself. Raises BrokenWeights."""
        return weights.read_header(model.path, model.path.name)

    def digests(self, model: Model) -> dict[str, str]:
        """SHA-256 of each weight file by its path in the model's folder; hashed once while it is unchanged."""
        found = {}
        for path in self.weight_files(model):
            key = stamp(path.stat())
            if key not in self._digests:
                key = self._hash(path)
            name = path.name if model.is_file else path.relative_to(model.path).as_posix()
            found[name] = self._digests[key]
        return found

    def _hash(self, path: Path) -> str:
        with path.open("rb") as file:
            key = stamp(os.fstat(file.fileno()))
            self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return key

    def learn(self, digests: Mapping[str, str]) -> None:
        """Take over what another has hashed: SHA-256 of files by their stamp()."""
        self._digests.update(digests)

    def weight_files(self, model: Model) -> tuple[Path, ...]:
        """Those that a library may load."""
        return (model.path,) if model.is_file else _weight_files(model.path)

    def check(self, model: Model) -> None:
        """The gate before a library opens the model: its weights are what they say, and nothing in it is unpickled.

        Raises BrokenModel, BrokenWeights.
        """
        for path in self.weight_files(model):
            where = path.name if model.is_file else f"{model.name}/{path.relative_to(model.path).as_posix()}"
            weights.read_header(path, where)
        if not model.is_file:
            _check_folder(model)

    def install_embedded(self) -> bool:
        """Put the model that imagend carries under models/diffusers/, where it is missing; True if it was."""
        target = self.root / "diffusers" / EMBEDDED
        source = next((path for path in _CARRIED if (path / "model_index.json").exists()), None)
        if (target / "model_index.json").exists() or source is None:
            return False
        temporary = target.with_name(f".{EMBEDDED}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        files.make_folder(target.parent)
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("__pycache__"))
        files.move(temporary, target)
        return True


def _shape(model: Model) -> tuple[int, int]:
    """What tells siblings of other sizes apart: the UNet's channels and the width of the text it reads."""
    return model.architecture.channels, model.architecture.cross_attention_dim


def digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 for a model: its file's own; of several, that of the lines "<sha256>  <path>" as sha256sum prints."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{value}  {name}\n" for name, value in sorted(digests.items())).encode()).hexdigest()


def _stamp_of(path: str) -> str:
    """Of a file that may not be there, which is a state, too."""
    try:
        return stamp(os.stat(path))  # noqa: PTH116 - for each job
    except OSError:
        return ""


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Those that diffusers may load: it looks no deeper, but into folders that are links."""
    top = _entries(str(folder))
    entries = top + [entry for within in top if os.path.isdir(within) for entry in _entries(within)]  # noqa: PTH112
    return tuple(sorted(Path(entry) for entry in entries if entry.endswith(".safetensors")))


def _entries(folder: str) -> list[str]:
    """Paths; by os, because each job asks and glob() takes five times as long."""
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def check_whole(model: Model) -> None:
    """That a folder's parts are all there; while it is being copied they are not. Raises BrokenModel."""
    if model.is_file:
        return
    parts = ("unet", "vae", "text_encoder", "text_encoder_2") if model.kind is ModelKind.BASE else (".",)
    for part in parts:
        if not any((model.path / part).glob("*.safetensors")):
            raise BrokenModel(model.name, f"{part} has no weights (*.safetensors)")
    for path in sorted(model.path.glob("*/*.safetensors.index.json")):
        places = read_json(path).get("weight_map")
        for place in sorted(set(map(str, places.values()))) if isinstance(places, dict) else ():
            if not (path.parent / place).is_file():
                raise BrokenModel(model.name, f"{path.parent.name} lacks {ascii(place)[:60]}")


def _check_folder(model: Model) -> None:
    indexes = (*model.path.glob("*.index.json"), *model.path.glob("*/*.index.json"))
    for path in sorted(indexes):  # which file each tensor of a split model is in
        places = read_json(path).get("weight_map")
        for place in places.values() if isinstance(places, dict) else (places,):
            if not (isinstance(place, str) and place.endswith(".safetensors") and "/" not in place):
                where = path.relative_to(model.path).as_posix()
                raise BrokenModel(model.name, f"{where} names {ascii(place)[:60]}, no safetensors file beside it")
    for path in sorted((*model.path.glob("config.json"), *model.path.glob("*/config.json"))):
        if "transformers_weights" in read_json(path):  # it would send the library to a file that was not judged here
            where = path.relative_to(model.path).as_posix()
            raise BrokenModel(model.name, f"{where} has the setting `transformers_weights`")
    adapters = (*model.path.glob("adapter_config.json"), *model.path.glob("*/adapter_config.json"))
    for path in sorted(adapters):  # its weights may be a pickle
        raise BrokenModel(model.name, f"{path.parent.name} has an adapter, which is not supported")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size, or nothing. No pipe is waited for."""
    try:
        with open(path, "rb", opener=files.no_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return {}
            text = file.read(_MAX_JSON_BYTES + 1)
        value = json.loads(text) if len(text) <= _MAX_JSON_BYTES else {}
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # ours is the shortage, not the model's
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
