"""imagend models, and what imagend check says of models: with a daemon and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Home, run_until
from test_cli import imagend
from weightfiles import LORA, VAE, put

from imagend.spool import STATUS


@pytest.fixture
def place(home: Home) -> Home:
    """A home with models of its own."""
    models = home.root / "models"
    put(models, "loras/styles/ink [v2].safetensors", LORA, {"modelspec.trigger_phrase": "ink drawing, bold"})
    put(models, "vae/fix.safetensors", VAE)
    put(models, "vae/wrong.safetensors", LORA)
    (models / "checkpoints").mkdir()
    (models / "checkpoints" / "old.ckpt").touch()
    (home.root / "config.yaml").write_text(f"models: {models}\n")
    return home


def test_models_are_listed_without_a_daemon(place: Home) -> None:
    done = imagend("models", cwd=place.root)
    assert (done.returncode, done.stderr) == (0, "")
    lora, vae, empty, head, *refused = done.stdout.splitlines()
    assert lora.split()[:4] == ["lora", "styles/ink", "[v2]", "SDXL,"]
    assert lora.endswith("trigger words: ink drawing, bold")
    assert vae.split()[:2] == ["vae", "fix"]
    assert (empty, head) == ("", "cannot be used:")
    assert "it is a pickle" in refused[0]
    assert "it is a LoRA: it belongs in loras/" in refused[1]


def test_one_kind_as_json(place: Home) -> None:
    catalog = json.loads(imagend("models", "--kind", "vae", "--json", cwd=place.root).stdout)
    assert catalog["schema"] == "imagend.catalog/v1"
    assert [one["name"] for one in catalog["models"]] == ["fix"]
    assert [one["name"] for one in catalog["refused"]] == ["wrong"]
    assert imagend("models", "--kind", "brush", cwd=place.root).returncode == 64


def test_a_running_daemons_catalogue_is_shown(home: Home) -> None:
    daemon = home.daemon(heartbeat_s=60.0)
    run_until(daemon, lambda: (home.config.spool / STATUS).exists())
    daemon.librarian.hash_all()
    (one,) = json.loads(imagend("models", "--kind", "base", "--json", cwd=home.root).stdout)["models"]
    assert (one["name"], len(one["sha256"])) == ("shapes-xl", 64)
    assert one["autov2"] in imagend("models", cwd=home.root).stdout
    (home.config.spool / "catalog.json").unlink()  # not yet written: it looks itself
    (one,) = json.loads(imagend("models", "--kind", "base", "--json", cwd=home.root).stdout)["models"]
    assert (one["name"], one["sha256"]) == ("shapes-xl", None)


def test_no_models_names_the_next_step(home: Home, tmp_path: Path) -> None:
    (home.root / "config.yaml").write_text("models: none\n")
    assert "imagend init" in imagend("models", cwd=home.root).stdout


def test_check_judges_every_model_and_the_extra_paths(place: Home) -> None:
    for folder in (place.config.spool, place.config.outputs):
        folder.mkdir(exist_ok=True)
    extra = place.root / "extra.yaml"
    extra.write_text("a: 3\n")
    config = place.root / "config.yaml"
    config.write_text(config.read_text() + f"extra_model_paths: {extra}\ndefault_model: wrong\n")
    done = imagend("check", cwd=place.root)
    assert done.returncode == 78
    for words in (
        "ok       LoRA styles/ink [v2]",
        "ok       VAE fix",
        "warning  The VAE 'wrong' cannot be used: it is a LoRA: it belongs in loras/",
        f"error    extra_model_paths: {extra}: a: must hold keys and paths",
        "error    default_model wrong: No model named 'wrong' under models/. Known are: none",
    ):
        assert words in done.stdout
