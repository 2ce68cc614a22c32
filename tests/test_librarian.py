"""The librarian: what it writes, what it finds again after a restart, and that a folder that hangs stops nobody."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home, run_until_idle, step
from weightfiles import LORA, SDXL, VAE, put, weights

from imagend import hashes as hashing
from imagend.architecture import ModelKind
from imagend.catalog import Catalog
from imagend.daemon import librarian as module
from imagend.daemon.librarian import LIMIT_S, Librarian
from imagend.errors import BrokenModel, BrokenWeights, ModelArriving, UnknownModel, UnusableModel
from imagend.hashes import hash_file
from imagend.models import Models
from imagend.survey import Survey

SHAPES_XL = REPOSITORY / "models" / "diffusers" / "shapes-xl"


class Place:
    """A models folder, a spool and a clock that a test sets."""

    def __init__(self, root: Path) -> None:
        self.models, self.spool, self.now = root / "models", root / "spool", 1000.0
        self.reference = root / "reference"
        for folder in (self.models, self.spool, self.reference):
            folder.mkdir()
        self.told = 0

    def librarian(self, settle_s: float = 0.0) -> Librarian:
        survey = Survey(Models(self.models), settle_s, lambda: self.now)
        return Librarian(survey, self.reference, self.spool, self._tell, lambda: self.now)

    def _tell(self) -> None:
        self.told += 1

    def document(self) -> dict[str, Any]:
        return json.loads((self.spool / "catalog.json").read_text())

    def listed(self) -> dict[str, Any]:
        return {one["name"]: one for one in self.document()["models"]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# catalog.json


def test_the_catalogue_says_what_a_model_is_and_has_its_hashes(place: Place) -> None:
    tags = {"10_red": {"red hat": 30, "1girl": 9}, "5_x": {"1girl": 10, "bad": -1, "worse": "x"}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_sd_model_name": "ponyDiffusionV6XL.safetensors"}
    path = put(place.models, "loras/a/hat.safetensors", LORA, metadata)
    librarian = place.librarian()
    librarian.look()
    assert place.listed()["a/hat"]["sha256"] is None
    librarian.hash_all()
    raw = path.read_bytes()
    weights_at = 8 + int.from_bytes(raw[:8], "little")
    sha256, after = (hashlib.sha256(data).hexdigest() for data in (raw, raw[weights_at:]))
    assert place.listed()["a/hat"] == {
        "kind": "lora",
        "name": "a/hat",
        "base": "sdxl",
        "family": "Pony",
        "format": "kohya",
        "size": len(raw),
        "sha256": sha256,
        "autov2": sha256[:10],
        "autov3": after[:12],
        "trigger_words": ["red hat", "1girl"],
        "trained_on": "ponyDiffusionV6XL",
        "prediction_type": None,
        "zero_snr": False,
        "preset": None,
        "native_size": None,
        "has_vae": False,
        "inpainting": False,
        "record": None,
    }
    assert str(place.models) not in (place.spool / "catalog.json").read_text()


def test_a_folder_has_one_digest_of_all_its_files(place: Place) -> None:
    shutil.copytree(SHAPES_XL, place.models / "diffusers" / "shapes-xl")
    librarian = place.librarian()
    librarian.look()
    librarian.hash_all()
    model = Models(place.models).find("shapes-xl")
    parts = sorted(path.relative_to(model.path) for path in model.path.glob("*/*.safetensors"))
    lines = "".join(f"{hashlib.sha256((model.path / path).read_bytes()).hexdigest()}  {path}\n" for path in parts)
    one = place.listed()["shapes-xl"]
    assert one["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (one["native_size"], one["autov3"], one["prediction_type"], one["preset"]) == (128, None, "epsilon", "none")
    assert librarian.known({"model": "shapes-xl"}).keys() == set(model.version)


def test_what_is_refused_says_why_and_jobs_get_that_answer(place: Place) -> None:
    put(place.models, "checkpoints/lora.safetensors", LORA)
    put(place.models, "checkpoints/half.safetensors", SDXL_SMALL).write_bytes(weights(SDXL_SMALL)[:-1])
    put(place.models, "checkpoints/old.ckpt", {})
    shutil.copytree(SHAPES_XL, place.models / "diffusers" / "part")
    (place.models / "diffusers" / "part" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    os.mkfifo(place.models / "checkpoints" / "pipe.safetensors")
    librarian = place.librarian()
    librarian.look()
    why = {one["name"]: one["why"] for one in place.document()["refused"]}
    assert "it is a LoRA: it belongs in loras/" in why["lora"]
    assert "its tensors need" in why["half"]
    assert "it is a pickle" in why["old.ckpt"]
    assert "vae has no weights" in why["part"]
    assert "not a regular file" in why["pipe"]
    for name, error in (("lora", UnusableModel), ("half", BrokenWeights), ("part", BrokenModel), ("no", UnknownModel)):
        with pytest.raises(error):
            librarian.find(name)
    assert place.document()["models"] == []


def test_a_refusal_keeps_nothing_of_the_jobs_that_got_it(place: Place) -> None:
    put(place.models, "checkpoints/lora.safetensors", LORA)
    librarian = place.librarian()
    librarian.look()
    depths = set()
    for _ in range(3):
        with pytest.raises(UnusableModel) as refusal:
            librarian.find("lora")
        depths.add(len(traceback.extract_tb(refusal.value.__traceback__)))
    assert len(depths) == 1


SDXL_SMALL = SDXL | {
    "model.diffusion_model.input_blocks.0.0.weight": [8, 4, 3, 3],
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [8, 160],
    "model.diffusion_model.label_emb.0.0.weight": [1, 1],
}


# Comes, changes, goes


def test_a_file_shows_when_it_has_not_changed_for_some_seconds(place: Place) -> None:
    librarian = place.librarian(settle_s=3.0)
    librarian.look()
    path = put(place.models, "vae/x.safetensors", VAE)
    os.utime(path, (2**33, 2**33))  # a clock that goes wrong: ours counts
    whole = path.read_bytes()
    for cut in (9, len(whole) // 2, len(whole)):
        place.now += 10
        path.write_bytes(whole[:cut])
        os.utime(path, (2**33, 2**33))
        librarian.look()
        assert place.document()["models"] == place.document()["refused"] == []
        assert place.document()["arriving"] == [{"kind": "vae", "name": "x"}]
        with pytest.raises(ModelArriving, match="still being copied"):
            librarian.find("x", ModelKind.VAE)
    place.now += 2.9
    librarian.look()
    assert place.listed() == {}
    place.now += 0.2
    librarian.look()
    assert librarian.find("x", ModelKind.VAE).path == path
    assert place.document()["arriving"] == []


def test_a_file_that_was_moved_in_whole_shows_at_once(place: Place) -> None:
    path = put(place.models, "vae/x.safetensors", VAE)
    os.utime(path, (1e9, 1e9))
    librarian = place.librarian(settle_s=3.0)
    librarian.look()
    assert "x" in place.listed()


def test_a_replaced_file_is_hashed_again_and_a_removed_one_is_gone(place: Place) -> None:
    path = put(place.models, "vae/x.safetensors", VAE)
    librarian = place.librarian()
    librarian.look()
    librarian.hash_all()
    first, model = place.listed()["x"]["sha256"], librarian.find("x", ModelKind.VAE)
    put(place.models, "new", VAE, {"title": "another"}).rename(path)
    librarian.look()
    assert place.listed()["x"]["sha256"] is None
    assert librarian.find("x", ModelKind.VAE) != model
    librarian.hash_all()
    assert place.listed()["x"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() != first
    path.unlink()
    librarian.look()
    assert place.listed() == {}
    with pytest.raises(UnknownModel):
        librarian.find("x", ModelKind.VAE)


def test_a_catalogue_in_which_nothing_has_changed_is_not_written_again(place: Place) -> None:
    put(place.models, "vae/x.safetensors", VAE)
    librarian = place.librarian()
    librarian.look()
    before = (place.spool / "catalog.json").stat().st_ino
    librarian.look()
    assert (place.spool / "catalog.json").stat().st_ino == before


def test_what_cannot_be_written_is_told_and_written_later(place: Place) -> None:
    put(place.models, "vae/x.safetensors", VAE)
    librarian = place.librarian()
    place.spool.rename(place.spool.with_name("away"))
    for work in (librarian.look, librarian.hash_all):
        librarian._try(work)
        assert "cannot be kept" in (librarian.trouble(place.now) or "")
    place.spool.with_name("away").rename(place.spool)
    for work in (librarian.look, librarian.hash_all):
        librarian._try(work)
        assert librarian.trouble(place.now) is None
    assert place.listed()["x"]["sha256"] is not None
    assert place.librarian()._hashes.of(librarian.find("x", ModelKind.VAE).version)


# Hashes


def test_hashes_survive_a_restart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(place.models, "vae/x.safetensors", VAE)
    first = place.librarian()
    first.look()
    first.hash_all()
    hashed: list[Path] = []
    monkeypatch.setattr(module, "hash_file", lambda path, pause: hashed.append(path) or hash_file(path, pause))
    again = place.librarian()
    again.look()
    assert place.listed()["x"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    again.hash_all()
    assert hashed == []


@pytest.mark.parametrize("damage", [b"", b"[", b"[]", b'{"schema":"imagend.hashes/v1","files":{"a":["x","y"]}}'])
def test_damaged_hashes_are_made_anew(place: Place, damage: bytes) -> None:
    path = put(place.models, "vae/x.safetensors", VAE)
    (place.spool / "hashes.json").write_bytes(damage)
    librarian = place.librarian()
    librarian.look()
    librarian.hash_all()
    assert place.listed()["x"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_hashed_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 4)
    path = tmp_path / "x"
    path.write_bytes(bytes(64))
    assert hash_file(path, lambda: None) is not None
    assert hash_file(path, lambda: os.utime(path, (5, 5))) is None


def test_a_worker_is_told_the_digests_of_what_a_job_names_and_no_others(place: Place) -> None:
    for path, shapes in (("vae/v", VAE), ("loras/l", LORA), ("loras/other", LORA)):
        put(place.models, f"{path}.safetensors", shapes)
    librarian = place.librarian()
    librarian.look()
    librarian.hash_all()
    spec = {"model": "none", "vae": "v", "loras": [{"name": "l"}]}
    digests = librarian.known(spec)
    fresh = Models(place.models)
    fresh.learn(digests)
    named = [fresh.find("v", ModelKind.VAE), fresh.find("l", ModelKind.LORA)]
    assert digests.keys() == {stamp for model in named for stamp in model.version}
    for model in named:
        assert list(fresh.digests(model).values()) == [hashlib.sha256(model.path.read_bytes()).hexdigest()]


def test_between_two_chunks_new_files_are_noticed_and_a_loading_worker_has_the_disk(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 64)
    put(place.models, "vae/x.safetensors", VAE)
    librarian = place.librarian()
    librarian.look()
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        librarian.yielding = len(naps) < 3

    monkeypatch.setattr(module.time, "sleep", nap)
    librarian.yielding = True
    put(place.models, "vae/y.safetensors", VAE)
    librarian.hint.set()
    place.now += 5.0
    librarian.hash_all()
    assert len(naps) == 3
    assert {name: one["sha256"] is not None for name, one in place.listed().items()} == {"x": True, "y": True}


# In a daemon


def test_jobs_wait_until_the_base_models_are_known(home: Home) -> None:
    ref = home.drop()
    daemon = home.daemon()
    known, daemon.librarian.ready = daemon.librarian.catalog, False
    daemon.librarian.catalog = Catalog()
    for _ in range(5):
        step(daemon)
    assert home.where(ref) == "pending"
    daemon.librarian.catalog, daemon.librarian.ready = known, True
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"


class Hanging(Models):
    """A file system that answers when it is let."""

    answer = threading.Event()

    def judge(self, *arguments: Any) -> Any:
        self.answer.wait()
        return super().judge(*arguments)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    Hanging.answer.clear()
    yield Hanging
    Hanging.answer.set()


def test_a_models_folder_that_hangs_stops_neither_loop_nor_painting(home: Home, hanging: type[Hanging]) -> None:
    daemon = home.daemon()
    librarian = daemon.librarian
    librarian._survey.models = hanging(home.config.models)
    librarian._survey._judged.clear()
    thread = threading.Thread(target=librarian.look, daemon=True)
    thread.start()
    ref = home.drop()
    run_until_idle(daemon)
    assert home.outcome(ref) == "succeeded"
    assert thread.is_alive()
    assert librarian.trouble(librarian._clock() + LIMIT_S + 1) is not None
    late = daemon.clock
    daemon.clock = lambda: late() + LIMIT_S + 1
    daemon.look_around()
    assert any("does not answer" in reason for reason in daemon.health.reasons.values())
    hanging.answer.set()
    thread.join()
    daemon.look_around()
    assert librarian.trouble(librarian._clock()) is None


def wait_for(condition: Callable[[], bool], told: threading.Event) -> None:
    while not condition():
        assert told.wait(30)
        told.clear()


def test_a_new_file_shows_without_a_restart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the librarian's own thread, by a hint or at its next look."""
    monkeypatch.setattr(module, "INTERVAL_S", 0.5)
    written = threading.Event()
    replace = module.files.replace_hint

    def tell(path: Path, data: bytes) -> None:
        replace(path, data)
        written.set()

    monkeypatch.setattr(module.files, "replace_hint", tell)
    survey = Survey(Models(place.models), 0.0)
    librarian = Librarian(survey, place.reference, place.spool, lambda: None, module.time.monotonic)
    threading.Thread(target=librarian.serve, daemon=True).start()
    wait_for(lambda: (place.spool / "catalog.json").exists(), written)
    put(place.models, "vae/late.safetensors", VAE)
    wait_for(lambda: bool(place.listed().get("late", {}).get("sha256")), written)


def test_reference_pictures_stand_in_the_catalogue_and_new_ones_show(place: Place) -> None:
    librarian = place.librarian()
    librarian.look()
    assert place.document()["references"] == []
    (place.reference / "leona").mkdir()
    (place.reference / "leona" / "front.png").touch()
    librarian.look()
    assert place.document()["references"] == [{"name": "leona", "views": ["front"]}]
    assert librarian.pictures(("leona/front",)) == {"leona/front": str(place.reference / "leona" / "front.png")}
