"""The registry of models: records, pins, and what imagend models show, verify, retire and remove do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home, run_until_idle
from test_cli import imagend
from test_librarian import Place
from weightfiles import LORA, VAE, put

from imagend import records
from imagend.architecture import ModelKind
from imagend.config import Config
from imagend.daemon import limits
from imagend.daemon.recipe import complete
from imagend.errors import Forbidden, ModelReplaced, OtherWeights, RetiredModel, UnknownModel, UnusableModel
from imagend.generate_spec import Generate
from imagend.job import Job, Ref
from imagend.jobfile import parse
from imagend.model_names import wanted
from imagend.model_settings import ModelSettings
from imagend.models import Models
from imagend.record import Record
from imagend.rights import Limits

SHAPES_XL = REPOSITORY / "models" / "diffusers" / "shapes-xl"
MASK = REPOSITORY / "models" / "controlnet" / "shapes-xl-mask"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def shop(home: Home) -> Home:
    """A home with models of its own, among them a base that jobs take by default."""
    models = home.root / "models"
    put(models, "loras/styles/ink.safetensors", LORA)
    put(models, "vae/fix.safetensors", VAE)
    shutil.copytree(SHAPES_XL, models / "diffusers" / "shapes-xl", ignore=shutil.ignore_patterns("*.py"))
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace(str(REPOSITORY / "models"), str(models)))
    home.config = home.config.model_copy(update={"models": models})
    return home


# Pins


@pytest.mark.parametrize(
    ("text", "name", "pin"),
    [
        ("pony", "pony", ""),
        ("pony@67ab2fd8ec", "pony", "67ab2fd8ec"),
        ("styles/a@b@67AB2FD8EC00", "styles/a@b", "67ab2fd8ec00"),
        (f"pony@{'0' * 64}", "pony", "0" * 64),
        ("pony@67ab2fd8e", "pony@67ab2fd8e", ""),
        (f"pony@{'0' * 65}", f"pony@{'0' * 65}", ""),
        ("art@home", "art@home", ""),
        ("@67ab2fd8ec", "@67ab2fd8ec", ""),
    ],
)
def test_a_pin_is_ten_or_more_digits_of_a_sha256(text: str, name: str, pin: str) -> None:
    assert wanted(text) == (name, pin)


@pytest.mark.parametrize("length", [10, 11, 64])
def test_a_pinned_model_is_found_by_name_and_digest(tmp_path: Path, length: int) -> None:
    path = put(tmp_path, "loras/styles/ink.safetensors", LORA)
    models = Models(tmp_path)
    assert models.find(f"ink@{sha256(path)[:length].upper()}", ModelKind.LORA).path == path
    with pytest.raises(UnknownModel, match=r"No LoRA named 'inc'.*Known are: styles/ink"):
        models.find(f"inc@{sha256(path)[:length]}", ModelKind.LORA)


def test_a_replaced_file_is_refused_to_those_who_pinned_the_other(tmp_path: Path) -> None:
    path = put(tmp_path, "vae/fix.safetensors", VAE)
    old = sha256(path)
    models = Models(tmp_path)
    models.find(f"fix@{old[:10]}", ModelKind.VAE)
    put(tmp_path, "vae/fix.safetensors", VAE, {"another": "one"})
    with pytest.raises(OtherWeights, match=rf"must begin with {old[:10]}.* is {sha256(path)}.*@{sha256(path)[:10]}"):
        models.find(f"fix@{old[:10]}", ModelKind.VAE)
    assert models.find("fix", ModelKind.VAE).path == path


def test_a_name_that_looks_like_a_pin_does_not_get_round_it(place: Place) -> None:
    """Who may put files into models/ cannot answer for another model's digest by a file's name."""
    put(place.models, "vae/fix.safetensors", VAE)
    put(place.models, "vae/fix@0123456789.safetensors", VAE)
    with pytest.raises(OtherWeights, match="must begin with 0123456789"):
        Models(place.models).find("fix@0123456789", ModelKind.VAE)
    librarian = place.librarian()
    librarian.look()
    assert librarian.find("fix@0123456789", ModelKind.VAE).name == "fix"
    assert Models(place.models).find("fix@0123456789.safetensors", ModelKind.VAE).name == "fix@0123456789"


def test_a_digest_that_was_learned_is_of_the_file_that_was_judged(tmp_path: Path) -> None:
    """Swapped between the two looks: neither digest may stand for the other file."""
    path = put(tmp_path, "vae/fix.safetensors", VAE)
    other = put(tmp_path, "other/fix.safetensors", VAE, {"another": "one"})

    class Swapping(Models):
        def digests(self, model: Any) -> dict[str, str]:
            other.replace(path)
            return super().digests(model)

    with pytest.raises(ModelReplaced):
        Swapping(tmp_path).find(f"fix@{sha256(other)[:10]}", ModelKind.VAE)


def test_a_folder_is_pinned_by_the_digest_that_the_catalogue_shows(place: Place) -> None:
    shutil.copytree(SHAPES_XL, place.models / "diffusers" / "shapes-xl")
    librarian = place.librarian()
    librarian.look()
    librarian.hash_all()
    pin = place.listed()["shapes-xl"]["autov2"]
    models = Models(place.models)
    models.learn(librarian.known({"model": f"shapes-xl@{pin}"}))
    assert models.find(f"shapes-xl@{pin}").name == "shapes-xl"
    with pytest.raises(OtherWeights):
        models.find("shapes-xl@0000000000")


def test_the_pin_stays_in_the_recipe_and_the_models_settings_are_found() -> None:
    model = Models(REPOSITORY / "models").find("shapes-xl")
    config = Config(model_settings={"shapes-xl": ModelSettings(vae="fix@0123456789")})
    spec = complete(Generate(prompt="x", model="shapes-xl@0123456789"), Ref("a", "0" * 20), config, model)
    assert (spec.model, spec.vae) == ("shapes-xl@0123456789", "fix@0123456789")
    config = config.model_copy(update={"default_model": "shapes-xl@0123456789"})
    assert complete(Generate(prompt="x"), Ref("a", "0" * 20), config, model).model == "shapes-xl@0123456789"


def test_who_may_use_a_model_may_pin_it_and_no_other(home: Home) -> None:
    config = home.config.model_copy(update={"limits": Limits(models=("pony",))})

    def job(model: str) -> Job:
        item = parse("alice", home.body(model=model))
        assert isinstance(item, Job)
        return item

    limits.check(job("pony@0123456789"), config)
    with pytest.raises(Forbidden):
        limits.check(job("other@0123456789"), config)


# Records


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = put(tmp_path, "loras/ink.safetensors", LORA)
    assert records.read(path) is None
    record = Record(
        kind=ModelKind.LORA,
        sha256=sha256(path),
        size=3,
        source="https://example.org/ink",
        version="v2",
        base="Pony",
        license="Do no evil.\nNever.",
        trigger_words=("ink", "drawing"),
        fetched_by="bob",
        fetched_at=NOW,
        notes="good",
    ).retire("bob", NOW, "ugly")
    records.write(path, record)
    assert records.read(path) == record
    assert json.loads((path.parent / "ink.safetensors.record.json").read_text())["schema"] == "imagend.model/v1"


def test_the_catalogue_tells_what_a_record_says(place: Place) -> None:
    path = put(place.models, "loras/ink.safetensors", LORA)
    records.write(path, Record(kind=ModelKind.LORA, source="https://example.org/ink", trigger_words=("ink",)))
    librarian = place.librarian()
    librarian.look()
    one = place.listed()["ink"]
    assert one["trigger_words"] == ["ink"]
    assert one["record"] == {
        "source": "https://example.org/ink",
        "version": None,
        "base": None,
        "license": None,
        "retired": None,
    }


def test_a_broken_record_is_no_licence_to_use_the_model(place: Place) -> None:
    """It may have been retired."""
    path = put(place.models, "loras/ink.safetensors", LORA)
    librarian = place.librarian()
    librarian.look()
    for broken in ('{"schema": "imagend.model/v1"', '{"schema": "imagend.model/v1", "kind": "lora", "sha256": "x"}'):
        records.place(path).write_text(broken)
        librarian.look()
        with pytest.raises(UnusableModel, match=r"whose record ink.safetensors.record.json is no record"):
            librarian.find("ink", ModelKind.LORA)
    records.place(path).unlink()
    librarian.look()
    assert librarian.find("ink", ModelKind.LORA).name == "ink"


def test_a_record_that_is_a_link_is_not_followed(place: Place, tmp_path: Path) -> None:
    path = put(place.models, "loras/ink.safetensors", LORA)
    (tmp_path / "elsewhere").write_text('{"schema": "imagend.model/v1", "kind": "lora"}')
    records.place(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be read"):
        records.read(path)


# Retired


@pytest.mark.parametrize("kind", [ModelKind.BASE, ModelKind.VAE, ModelKind.LORA, ModelKind.CONTROLNET])
def test_a_retired_model_is_refused_to_jobs_that_came_later(place: Place, kind: ModelKind) -> None:
    folders = {ModelKind.VAE: ("vae/m.safetensors", VAE), ModelKind.LORA: ("loras/m.safetensors", LORA)}
    if kind in (ModelKind.BASE, ModelKind.CONTROLNET):
        path = place.models / kind.folders[0] / "m"
        shutil.copytree(SHAPES_XL if kind is ModelKind.BASE else MASK, path)
    else:
        path = put(place.models, *folders[kind])
    librarian = place.librarian()
    records.write(path, Record(kind=kind).retire("bob", NOW, "it was stolen"))
    librarian.look()
    names: dict[ModelKind, Any] = {ModelKind.BASE: {"model": "m"}, ModelKind.VAE: {"vae": "m@0123456789"}}
    names[ModelKind.CONTROLNET] = {"control": [{"model": "m", "image": "a/b"}]}
    spec: dict[str, Any] = names.get(kind, {"loras": [{"name": "m.safetensors"}]})
    librarian.check_active(spec, NOW - timedelta(seconds=1))
    with pytest.raises(RetiredModel, match=rf"The {kind.noun} 'm' is retired: it was stolen"):
        librarian.check_active(spec, NOW)
    records.write(path, Record(kind=kind))
    librarian.look()
    librarian.check_active(spec, NOW)


def test_a_retired_controlnet_is_not_chosen_by_its_type(place: Place) -> None:
    path = place.models / "controlnet" / "open pose"
    shutil.copytree(MASK, path)
    librarian = place.librarian()
    records.write(path, Record(kind=ModelKind.CONTROLNET).retire("bob", NOW, "worn"))
    librarian.look()
    with pytest.raises(RetiredModel, match="The ControlNet 'open pose' is retired: worn"):
        librarian.check_active({"control": [{"type": "pose", "model": None, "image": "a/b"}]}, NOW)
    librarian.check_active({"control": [{"type": "depth", "model": None, "image": "a/b"}]}, NOW)


def test_jobs_that_name_a_retired_model_fail_and_those_that_waited_are_painted(shop: Home) -> None:
    daemon = shop.daemon()
    before = shop.drop(label="before")
    for door in daemon.doors:
        arrivals = door.look(daemon.clock())
        for arrival, verdict in zip(arrivals, daemon.reception.take_in(arrivals), strict=True):
            door.settle(arrival, verdict)
    done = imagend("models", "retire", "shapes-xl", "--reason", "of  no\nuse", cwd=shop.root)
    assert done.returncode == 0, done.stderr
    daemon.librarian.look()
    after = shop.drop(label="after")
    run_until_idle(daemon)
    assert shop.outcome(before) == "succeeded"
    error = shop.manifest(after)["error"]
    assert (error["code"], error["status"]) == ("MODEL_RETIRED", 410)
    assert "The model 'shapes-xl' is retired: of no use. Name another one" in error["message"]
    assert imagend("models", "retire", "shapes-xl", "--undo", cwd=shop.root).returncode == 0
    daemon.librarian.look()
    again = shop.drop(label="again")
    run_until_idle(daemon)
    assert shop.outcome(again) == "succeeded"


# imagend models …


def test_show_tells_the_record(shop: Home) -> None:
    path = shop.config.models / "loras" / "styles" / "ink.safetensors"
    records.write(path, Record(kind=ModelKind.LORA, license="CC0", trigger_words=("ink", "pen"), fetched_by="bob"))
    done = imagend("models", "show", "ink", cwd=shop.root)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line[:22].strip(): line[23:] for line in done.stdout.splitlines()}
    assert (told["name"], told["state"], told["record: license"]) == ("styles/ink", "active", "CC0")
    assert told["record: trigger_words"] == "ink, pen"
    shown = json.loads(imagend("models", "show", "ink", "--json", cwd=shop.root).stdout)
    assert shown["record"]["fetched_by"] == "bob"
    assert "there are none" not in imagend("models", "list", cwd=shop.root).stdout
    assert imagend("models", "--kind", "vae", "list", cwd=shop.root).stdout.split()[:2] == ["vae", "fix"]


def test_a_name_that_two_kinds_have_is_asked_back(shop: Home) -> None:
    put(shop.config.models, "loras/fix.safetensors", LORA)
    done = imagend("models", "show", "fix", cwd=shop.root)
    assert done.returncode == 64
    assert "There are a LoRA fix and a VAE fix. Say which with --kind." in done.stderr
    assert imagend("models", "show", "fix", "--kind", "vae", cwd=shop.root).returncode == 0
    missing = imagend("models", "show", "nothing", cwd=shop.root)
    assert missing.returncode == 64
    assert "No model of any kind is named 'nothing'" in missing.stderr


def test_verify_hashes_anew_and_finds_what_was_replaced(shop: Home) -> None:
    path = shop.config.models / "loras" / "styles" / "ink.safetensors"
    assert "No model has a record" in imagend("models", "verify", cwd=shop.root).stdout
    records.write(path, Record(kind=ModelKind.LORA, sha256=sha256(path)))
    done = imagend("models", "verify", cwd=shop.root)
    assert (done.returncode, done.stdout.split()[0]) == (0, "ok")
    (unknown,) = json.loads(imagend("models", "verify", "fix", "--json", cwd=shop.root).stdout)
    assert (unknown["same"], unknown["sha256"]) == (None, sha256(shop.config.models / "vae" / "fix.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    status = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = imagend("models", "verify", cwd=shop.root)
    assert done.returncode == 1
    assert done.stdout.startswith("differs  LoRA styles/ink: was ")
    path.write_bytes(raw[:-1])
    assert "cannot be used" in imagend("models", "verify", cwd=shop.root).stdout


def test_remove_moves_a_model_away_with_its_record(shop: Home) -> None:
    path = shop.config.models / "loras" / "styles" / "ink.safetensors"
    whole = path.read_bytes()
    records.write(path, Record(kind=ModelKind.LORA))
    done = imagend("models", "remove", "ink", cwd=shop.root)
    assert done.returncode == 0, done.stderr
    target = Path(done.stdout.split()[-1])
    assert (target.name, target.parents[1].name, target.read_bytes()) == (path.name, ".removed", whole)
    assert records.place(target).exists()
    assert not list(path.parent.glob("*.safetensors*"))
    assert "ink" not in imagend("models", cwd=shop.root).stdout


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "shapes-xl"),
        ({"model": "shapes-xl@0123456789"}, "shapes-xl"),
        ({"vae": "fix.safetensors"}, "fix"),
        ({"loras": [{"name": "ink"}]}, "ink"),
        ({"prompt": "a <lora:styles/ink:0.5>", "prompt_syntax": "a1111"}, "ink"),
        ({"model": "shapes-xl"}, "set"),
        ({"negative_prompt": "embedding:worst"}, "worst"),
        ({"control": [{"type": "pose", "image": "a/b"}]}, "pose"),
        ({"control": [{"model": "pose", "image": "a/b"}]}, "pose"),
    ],
)
def test_remove_takes_nothing_that_a_queued_job_needs_without_saying_so(
    shop: Home, fields: dict[str, Any], name: str
) -> None:
    put(shop.config.models, "vae/set.safetensors", VAE)
    put(shop.config.models, "embeddings/worst.safetensors", {"clip_l": [1, 768], "clip_g": [1, 1280]})
    shutil.copytree(MASK, shop.config.models / "controlnet" / "pose")
    with (shop.root / "config.yaml").open("a") as config:
        config.write("model_settings: {shapes-xl: {vae: set}}\n")
    ref = shop.drop(**fields)
    daemon = shop.daemon()
    for door in daemon.doors:
        daemon.reception.take_in(door.look(daemon.clock()))
    done = imagend("models", "remove", name, cwd=shop.root)
    assert done.returncode == 64
    assert f"1 queued jobs need the {done.stderr.split(' need the ')[1].split(':')[0]}: {ref}" in done.stderr
    done = imagend("models", "remove", name, "--force", cwd=shop.root)
    assert "1 queued jobs that need it will fail" in done.stdout
    assert imagend("models", "show", name, cwd=shop.root).returncode == 64


def test_a_comfyui_users_folders_are_left_alone(shop: Home) -> None:
    put(shop.root, "comfy/theirs.safetensors", VAE)
    (shop.root / "extra.yaml").write_text("comfy:\n  vae: comfy\n")
    config = shop.root / "config.yaml"
    config.write_text(config.read_text() + "extra_model_paths: extra.yaml\n")
    for action in (("retire", "theirs", "--reason", "x"), ("remove", "theirs")):
        done = imagend("models", *action, cwd=shop.root)
        assert done.returncode == 64
        assert "where imagend only reads" in done.stderr
    assert sorted(path.name for path in (shop.root / "comfy").iterdir()) == ["theirs.safetensors"]
    for reason in ([], ["--reason", " "], ["--reason", "x" * 2001]):
        assert "Say why" in imagend("models", "retire", "fix", *reason, cwd=shop.root).stderr


def test_what_no_field_names_cannot_be_retired(shop: Home) -> None:
    put(shop.config.models, "embeddings/worst.safetensors", {"clip_l": [1, 768], "clip_g": [1, 1280]})
    done = imagend("models", "retire", "worst", "--reason", "x", cwd=shop.root)
    assert (done.returncode, "it cannot be retired" in done.stderr) == (64, True)


def test_what_was_fetched_is_whole_when_it_comes(place: Place) -> None:
    """It shows at once; what has changed since its record was written waits, as every file does."""
    for name, fetched_at in (("whole", 2.0**33), ("changed", 2.0**33 - 1.0), ("copied", None)):
        path = put(place.models, f"loras/{name}.safetensors", LORA)
        os.utime(path, (2**33, 2**33))
        if fetched_at is not None:
            when = datetime.fromtimestamp(fetched_at, UTC)
            records.write(path, Record(kind=ModelKind.LORA, fetched_at=when))
    librarian = place.librarian(settle_s=3.0)
    librarian.look()
    assert {name for kind, name in librarian.catalog.entries if kind is ModelKind.LORA} == {"whole"}
    assert {name for _, name in librarian.catalog.arriving} == {"changed", "copied"}
