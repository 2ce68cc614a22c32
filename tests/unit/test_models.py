"""models/: names are keys into a listing, broken models are told apart from unknown ones, weights are hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import safetensors

from imagend import models as module
from imagend.errors import BrokenModel, BrokenWeights, UnknownModel, UnusableModel
from imagend.models import EMBEDDED, Model, Models, digest


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def make(models: Models, name: str, pipeline: str = "StableDiffusionXLPipeline", **parts: Any) -> Path:
    """A model's folder; `parts` replace its configuration files: a dict, or the text of the file."""
    folder = models.root / "diffusers" / name
    contents = {
        "model_index": {"_class_name": pipeline},
        "unet": {"sample_size": 128},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    } | parts
    for part, content in contents.items():
        path = folder / "model_index.json" if part == "model_index" else folder / part / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


# list and find


def test_a_model_is_found_with_its_native_size(models: Models) -> None:
    folder = make(models, "xl")
    assert models.list() == ["xl"]
    found = models.find("xl")
    assert (found.kind, found.name, found.path, found.is_file, found.native_size) == ("base", "xl", folder, False, 1024)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_folder_is_judged_again_when_its_configuration_has_changed(models: Models, part: str) -> None:
    folder = make(models, "xl")
    assert models.find("xl").native_size == 1024
    changed = {"unet": {"sample_size": 64}, "vae": {"block_out_channels": [128, 512]}}[part]
    (folder / part / "config.json").write_text(json.dumps(changed))
    assert models.find("xl").native_size < 1024
    make(models, "xl", pipeline="StableDiffusionPipeline")
    with pytest.raises(UnusableModel):
        models.find("xl")


def test_the_carried_model_is_of_a_native_size_of_128() -> None:
    models = Models(Path(__file__).parents[2] / "models")
    assert models.find(EMBEDDED).native_size == 128


def test_no_models_folder_is_no_models(models: Models) -> None:
    assert models.list() == []
    with pytest.raises(UnknownModel, match="Known are: none"):
        models.find("xl")


def test_folders_that_are_models_and_not_hidden_are_listed(models: Models) -> None:
    for name in ("b", "a", ".hidden", ".shapes-xl.tmp"):
        make(models, name)
    (models.root / "diffusers" / "empty").mkdir()
    (models.root / "diffusers" / "a-file").touch()
    assert models.list() == ["a", "b"]


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, UnusableModel, "it is a model for StableDiffusionPipeline"),
        ("{", BrokenModel, "model_index.json has no text `_class_name`"),
        ("[]", BrokenModel, "model_index.json has no text `_class_name`"),
        ("[" * 100_000, BrokenModel, "model_index.json has no text `_class_name`"),
        ({}, BrokenModel, "model_index.json has no text `_class_name`"),
    ],
)
def test_a_folder_that_is_no_sdxl_says_so(models: Models, index: Any, error: type[Exception], says: str) -> None:
    make(models, "odd", model_index=index)
    with pytest.raises(error) as caught:
        models.find("odd")
    assert says in str(caught.value)
    assert "'odd'" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no", "../x", "../../diffusers/x", "../diffusers/xl", "xl/", "./xl", ".hidden", "", ".", "..", "/etc"]
)
def test_an_unknown_name_is_answered_with_the_known_ones(models: Models, name: str) -> None:
    for known in ("xl", "anime", ".hidden"):
        make(models, known)
    make(Models(models.root / ".."), "x")  # there is something at diffusers/../../diffusers/x
    with pytest.raises(UnknownModel) as caught:
        models.find(name)
    for part in (repr(name), "Known are: ", "anime", "xl", "correct its name in the job"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "file", "key"),
    [
        ({"unet": {}}, "unet/config.json", "sample_size"),
        ({"unet": "{"}, "unet/config.json", "sample_size"),
        ({"unet": "[]"}, "unet/config.json", "sample_size"),
        ({"unet": {"sample_size": None}}, "unet/config.json", "sample_size"),
        ({"unet": {"sample_size": "large"}}, "unet/config.json", "sample_size"),
        ({"unet": {"sample_size": [128, 128]}}, "unet/config.json", "sample_size"),
        ({"unet": {"sample_size": 0}}, "unet/config.json", "sample_size"),
        ({"unet": {"sample_size": 10**9}}, "unet/config.json", "sample_size"),
        ({"vae": {}}, "vae/config.json", "block_out_channels"),
        ({"vae": {"block_out_channels": [1] * 20_000}}, "vae/config.json", "block_out_channels"),
        ({"vae": {"block_out_channels": 4}}, "vae/config.json", "block_out_channels"),
        ({"vae": {"block_out_channels": []}}, "vae/config.json", "block_out_channels"),
    ],
)
def test_a_broken_model_names_the_file_and_the_key(models: Models, parts: dict[str, Any], file: str, key: str) -> None:
    make(models, "xl", **parts)
    with pytest.raises(BrokenModel) as caught:
        models.find("xl")
    for part in ("'xl'", file, key, "Install its files again"):
        assert part in str(caught.value)
    assert caught.value.code == "MODEL_UNUSABLE"


def test_a_model_without_its_parts_is_broken(models: Models) -> None:
    (make(models, "xl") / "unet" / "config.json").unlink()
    with pytest.raises(BrokenModel):
        models.find("xl")


def test_a_model_that_is_put_there_later_is_found(models: Models) -> None:
    make(models, "one")
    assert models.list() == ["one"]
    make(models, "two")
    assert models.find("two").name == "two"


# Digests


def test_each_weight_file_has_its_sha_256(models: Models) -> None:
    folder = make(models, "xl")
    for name in ("unet/a.safetensors", "vae/b.safetensors"):
        (folder / name).write_bytes(name.encode())
    (folder / "unet" / "b.bin").write_bytes(b"never read")
    assert models.digests(models.find("xl")) == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("unet/a.safetensors", "vae/b.safetensors")
    }


def test_a_weight_file_is_hashed_once_until_it_changes(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(models, "xl") / "unet" / "a.safetensors"
    path.write_bytes(b"one")
    model, hashed = models.find("xl"), []
    file_digest = hashlib.file_digest

    def count(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return file_digest(file, name)

    monkeypatch.setattr(module.hashlib, "file_digest", count)
    first = models.digests(model)
    assert models.digests(model) == first
    assert len(hashed) == 1
    path.write_bytes(b"two")  # of one size; the time is another
    os.utime(path, ns=(0, 1))
    assert models.digests(model) == {"unet/a.safetensors": hashlib.sha256(b"two").hexdigest()}
    fresh = path.with_name("fresh")
    fresh.write_bytes(b"six")
    os.utime(fresh, ns=(0, 1))
    fresh.rename(path)  # of one size and time; the inode is another
    assert models.digests(model) == {"unet/a.safetensors": hashlib.sha256(b"six").hexdigest()}
    assert len(hashed) == 3


# check: the gate before a library opens a model


WEIGHTS = safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(4))


@pytest.fixture
def whole(models: Models) -> Model:
    """A model with a split unet, all in order."""
    folder = make(models, "xl")
    (folder / "unet" / "x-1.safetensors").write_bytes(WEIGHTS)
    (folder / "vae" / "x.safetensors").write_bytes(WEIGHTS)
    (folder / "vae" / "x.bin").write_bytes(b"never looked at")
    (folder / "unet" / "x.safetensors.index.json").write_text('{"weight_map": {"a": "x-1.safetensors"}}')
    models.check(models.find("xl"))
    return models.find("xl")


@pytest.mark.parametrize("folder", ["unet", "vae", "a component nobody knows", "."])
def test_every_weight_file_is_judged_and_named(models: Models, whole: Model, folder: str) -> None:
    (whole.path / folder).mkdir(exist_ok=True)
    (whole.path / folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    with pytest.raises(BrokenWeights) as caught:
        models.check(whole)
    where = Path("xl", folder, "model.safetensors")
    assert str(caught.value).startswith(
        f"The weight file {where} cannot be used: its tensors need 4 bytes, but 3 follow"
    )


def test_a_component_on_another_disk_is_judged_and_hashed(models: Models, whole: Model, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x.safetensors").write_bytes(WEIGHTS)
    (whole.path / "linked").symlink_to(tmp_path / "disk")
    models.check(whole)
    assert models.digests(whole)["linked/x.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    (tmp_path / "disk" / "x.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(BrokenWeights, match=r"xl/linked/x\.safetensors cannot be used"):
        models.check(whole)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("unet/x.safetensors.index.json", '{"weight_map": {"a": "x.bin"}}', "names 'x.bin'"),
        ("unet/x.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}', "names '../../x.safet"),
        ("unet/x.safetensors.index.json", '{"weight_map": {"a": 1}}', "names 1"),
        ("unet/x.safetensors.index.json", '{"weight_map": []}', "names []"),
        ("unet/x.safetensors.index.json", "[" * 100_000, "names None"),
        ("vae/config.json", '{"transformers_weights": "x/y.safetensors"}', "the setting `transformers_weights`"),
        ("vae/adapter_config.json", "{}", "vae has an adapter"),
    ],
)
def test_nothing_that_was_not_judged_is_loaded(
    models: Models, whole: Model, file: str, content: str, says: str
) -> None:
    (whole.path / file).write_text(content)
    with pytest.raises(BrokenModel) as caught:
        models.check(whole)
    assert says in str(caught.value)
    assert "'xl'" in str(caught.value)


def test_one_digest_for_all_is_that_of_sha256sums_lines() -> None:
    """sha256sum */*.safetensors | sha256sum"""
    lines = b"aa  unet/a.safetensors\nbb  vae/b.safetensors\n"
    found = digest({"vae/b.safetensors": "bb", "unet/a.safetensors": "aa"})
    assert found == hashlib.sha256(lines).hexdigest()


# The model that imagend carries


def test_the_carried_model_is_installed_where_it_is_missing(models: Models) -> None:
    assert models.install_embedded()
    assert models.list() == [EMBEDDED]
    assert models.digests(models.find(EMBEDDED))
    assert not models.install_embedded()
    assert [path.name for path in (models.root / "diffusers").iterdir()] == [EMBEDDED]


def test_what_an_installation_left_half_done_is_no_obstacle(models: Models) -> None:
    half = models.root / "diffusers" / f".{EMBEDDED}.tmp" / "unet"
    half.mkdir(parents=True)
    (half / "rest").touch()
    assert models.install_embedded()
    assert models.list() == [EMBEDDED]
    assert not (models.root / "diffusers" / EMBEDDED / "unet" / "rest").exists()


def test_a_changed_copy_of_the_carried_model_is_left_alone(models: Models) -> None:
    folder = make(models, EMBEDDED)
    assert not models.install_embedded()
    assert models.find(EMBEDDED).native_size == 1024
    assert not list(folder.rglob("*.safetensors"))
