"""Where models lie: ComfyUI's extra_model_paths.yaml as its users have it, and folders of every sort."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightfiles import VAE, put

from imagend import model_folders as module
from imagend.architecture import ModelKind
from imagend.model_folders import ModelFolders, extra_paths
from imagend.models import Models

EXAMPLE = """
#comment
a111:
    base_path: webui/
    is_default: true

    checkpoints: models/Stable-diffusion
    vae: models/VAE
    loras: |
         models/Lora
         models/LyCORIS
    embeddings: embeddings
    hypernetworks: models/hypernetworks

comfyui:
    base_path: /srv/comfy
    loras: models/loras/
    diffusers: /abs/diffusers
other:
nobase:
    loras: more
"""


def test_a_comfyui_users_file_is_understood_as_comfyui_does() -> None:
    found = extra_paths(EXAMPLE, Path("/home/me"))
    assert found["checkpoints"] == (Path("/home/me/webui/models/Stable-diffusion"),)
    assert found["loras"] == (
        Path("/home/me/webui/models/Lora"),
        Path("/home/me/webui/models/LyCORIS"),
        Path("/srv/comfy/models/loras"),
        Path("/home/me/more"),
    )
    assert found["diffusers"] == (Path("/abs/diffusers"),)
    assert "is_default" not in found


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "disk")
    assert extra_paths("a: {base_path: ~/$WHERE, vae: x}", Path("/"))["vae"] == (Path("/home/me/disk/x"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "it must hold sections"),
        ("a: x", "a: must hold keys and paths"),
        ("a: {loras: [x, y]}", "a: loras: must be a path"),
        ("a: {loras: 3}", "a: loras: must be a path"),
        ('a: {loras: "x\\0y"}', "a: loras: a path cannot hold NUL"),
        ('a: {base_path: "\\0", loras: y}', "a: loras: a path cannot hold NUL"),
    ],
)
def test_what_is_no_such_file_says_why(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        extra_paths(text, Path("/"))


@given(st.text(max_size=60) | st.sampled_from(["&a [*a]", "a: &x {b: *x}", "!!python/object:os.system x", "a: {1: x}"]))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        found = extra_paths(text, Path("/"))
    except (ValueError, module.yaml.YAMLError, RecursionError):
        return
    assert all(path.is_absolute() for paths in found.values() for path in paths)


def test_models_of_both_are_listed_ours_first(tmp_path: Path) -> None:
    put(tmp_path, "models/vae/ours.safetensors", VAE)
    put(tmp_path, "webui/models/VAE/theirs.safetensors", VAE)
    put(tmp_path, "webui/models/VAE/ours.safetensors", VAE)
    extra = tmp_path / "extra_model_paths.yaml"
    extra.write_text(EXAMPLE)
    models = Models(tmp_path / "models", extra)
    assert models.list(ModelKind.VAE) == ["ours", "ours.safetensors", "theirs"]
    assert models.find("ours", ModelKind.VAE).path == tmp_path / "models/vae/ours.safetensors"
    assert tmp_path / "webui/models/VAE" in models.folders.all()
    extra.write_text("nothing: {vae: none}")
    assert models.list(ModelKind.VAE) == ["ours"]


def test_a_broken_file_leaves_what_was_known_and_is_told(tmp_path: Path) -> None:
    put(tmp_path, "disk/x.safetensors", VAE)
    extra = tmp_path / "extra.yaml"
    extra.write_text("a: {vae: disk}")
    models = Models(tmp_path / "models", extra)
    assert (models.list(ModelKind.VAE), models.folders.trouble) == (["x"], None)
    good = extra.read_text()
    for broken in ("a: [", "a: 3", "\0"):
        extra.write_text(broken)
        assert models.list(ModelKind.VAE) == ["x"]
        assert f"extra_model_paths: {extra}: " in (models.folders.trouble or "")
    extra.unlink()
    assert models.list(ModelKind.VAE) == ["x"]
    assert "No such file" in (models.folders.trouble or "")
    extra.write_text(good)
    assert (models.list(ModelKind.VAE), models.folders.trouble) == (["x"], None)


# Folders of every sort


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    put(tmp_path, "disk/a/x.safetensors", VAE)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "a" / "back").symlink_to(tmp_path / "vae")
    (tmp_path / "vae" / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    listing = ModelFolders(tmp_path).list(ModelKind.VAE)
    assert list(listing.found) == ["broken", "linked/a/x"]


def test_hidden_odd_and_too_long_names_are_no_models(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    deep = folder / "/".join("d" * 60 for _ in range(4))
    deep.mkdir(parents=True)
    for path in (folder / ".hidden.safetensors", folder / "a\nb.safetensors", deep / "x.safetensors", folder / "b.txt"):
        path.touch()
    (folder / b"\xff.safetensors".decode(errors="surrogateescape")).touch()
    listing = ModelFolders(tmp_path).list(ModelKind.VAE)
    assert listing.found == {}
    assert sorted(name[:9] for name in listing.refused) == ["'\\udcff'", "'a\\nb'", "dddddddddd"[:9]]
    assert all("printable" in why for why in listing.refused.values())


def test_a_folder_without_end_is_listed_as_far_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 5)
    (tmp_path / "vae" / "sub").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "vae" / f"{number}.safetensors").touch()
        (tmp_path / "vae" / "sub" / f"{number}.safetensors").touch()
    listing = ModelFolders(tmp_path).list(ModelKind.VAE)
    assert listing.full
    assert list(listing.found) == ["0", "1", "2", "3"]
    deep = tmp_path / "loras" / "/".join("d" for _ in range(12))
    deep.mkdir(parents=True)
    (deep / "x.safetensors").touch()
    assert ModelFolders(tmp_path).list(ModelKind.LORA).found == {}


def test_a_part_in_diffusers_format_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "vae" / "fp16-fix"
    put(folder, "diffusion_pytorch_model.safetensors", VAE)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}')
    models = Models(tmp_path)
    assert models.list(ModelKind.VAE) == ["fp16-fix"]
    found = models.find("fp16-fix", ModelKind.VAE)
    assert (found.is_file, found.architecture.format) == (False, "diffusers")
    models.check(found)
    assert list(models.digests(found)) == ["diffusion_pytorch_model.safetensors"]
