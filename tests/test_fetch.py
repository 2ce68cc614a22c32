"""imagend fetch, against servers like Civitai and Hugging Face as documented, and servers that misbehave."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home
from fetch_server import Handler, Server, git_blob, running, serve
from fuzz.targets import safetensors
from test_cli import imagend
from weightfiles import LORA, SDXL, VAE, weights

from imagend import installing, records
from imagend.architecture import ModelKind
from imagend.cli import run
from imagend.config import Config
from imagend.errors import DownloadFailed, UsageError
from imagend.fetch import download as downloading
from imagend.fetch import tokens as token_files
from imagend.fetch.addresses import Address, checked, is_public, resolve
from imagend.fetch.fetcher import Fetched, Fetcher, Wish
from imagend.fetch.tokens import Tokens
from imagend.fetch.web import Web
from imagend.fetch_settings import Fetch
from imagend.models import Models

SHAPES_XL = REPOSITORY / "models" / "diffusers" / "shapes-xl"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
TOKEN = "canary-0123456789"
DATA = weights(LORA)
SHA256 = hashlib.sha256(DATA).hexdigest()
PLAIN = "https://models.example.org/a/ink%20pen.safetensors"
DOWNLOAD = "https://civitai.com/api/download/models/20"
HOSTS = ("civitai.com", "b2.civitai.com", "huggingface.co", "*.hf.co", "models.example.org")


class Place:
    """A models folder and a server; `naps` are what was waited."""

    def __init__(self, root: Path, server: Server, trust: ssl.SSLContext) -> None:
        self.root, self.server, self.trust = root / "models", server, trust
        self.root.mkdir()
        self.naps: list[float] = []
        self.told: list[tuple[str, int, int | None]] = []
        self.settings = Fetch(hosts=HOSTS, tokens=root / "tokens")
        self.reserve_mb = 0

    def fetcher(self, **web: Any) -> Fetcher:
        options: dict[str, Any] = {"resolver": self.server.resolve, "allow_private": True, "trust": self.trust} | web
        config = Config(models=self.root, fetch=self.settings, reserve_mb=self.reserve_mb)
        spoken = Web(self.settings, Tokens({"civitai.com": TOKEN}), **options)
        return Fetcher(config, spoken, "bob", lambda: NOW, lambda *told: self.told.append(told), self.naps.append)

    def fetch(self, source: str, sha256: str | None = None, web: dict[str, Any] | None = None, **wish: Any) -> Fetched:
        return self.fetcher(**(web or {})).fetch(Wish(source, sha256, **wish))

    def refused(self, source: str, sha256: str | None = SHA256, web: dict[str, Any] | None = None, **wish: Any) -> str:
        """Why; nothing may be left of it."""
        with pytest.raises(DownloadFailed) as caught:
            self.fetch(source, sha256, web, **wish)
        assert (caught.value.code, caught.value.status) == ("DOWNLOAD_FAILED", 502)
        assert self.left() == []
        return str(caught.value)

    def left(self) -> list[str]:
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file() and path.name != ".lock"
        )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(downloading, "CHUNK_BYTES", 1000)  # of some kB
    with running(tmp_path) as (server, trust):
        yield Place(tmp_path, server, trust)


def civitai(server: Server, data: bytes = DATA, **file: Any) -> None:
    """Version 20 of model 10, as https://developer.civitai.com/site/reference/model-versions describes it."""
    digest = hashlib.sha256(data).hexdigest().upper()
    told = {
        "id": 20,
        "modelId": 10,
        "name": "v2.0",
        "baseModel": "Pony",
        "air": "urn:air:sdxl:lora:civitai:10@20",
        "usageControl": "Download",
        "trainedWords": ["ink drawing", "bold\nlines"],
        "model": {"name": "Ink & pen", "type": "LORA", "nsfw": False, "poi": False},
        "files": [
            {"name": "training.zip", "type": "Training Data", "downloadUrl": DOWNLOAD},
            {
                "id": 1,
                "name": "ink_pen v2.safetensors",
                "type": "Model",
                "sizeKB": len(data) / 1024,
                "metadata": {"format": "SafeTensor"},
                "pickleScanResult": "Success",
                "virusScanResult": "Success",
                "hashes": {"AutoV2": digest[:10], "SHA256": digest},
                "downloadUrl": DOWNLOAD,
                "primary": True,
            }
            | file,
        ],
        "downloadUrl": DOWNLOAD,
    }
    server.json("https://civitai.com/api/v1/model-versions/20", told)
    flags = {"allowNoCredit": False, "allowCommercialUse": ["Image"], "allowDerivatives": True}
    server.json("https://civitai.com/api/v1/models/10", {"id": 10, "modelVersions": [{"id": 20}, {"id": 19}]} | flags)
    server.redirect(DOWNLOAD, "https://b2.civitai.com/file/x?X-Amz-Signature=secret", 307)
    server.file("https://b2.civitai.com/file/x?X-Amz-Signature=secret", data)


# Civitai


@pytest.mark.parametrize(
    "source",
    [
        "20",
        "https://civitai.com/models/10/ink-and-pen?modelVersionId=20",
        "https://www.civitai.com/models/10?modelVersionId=20",
        "https://civitai.com/models/10",
        "https://civitai.com/api/download/models/20?type=Model&format=SafeTensor",
        "https://civitai.com/api/v1/model-versions/20",
        "urn:air:sdxl:lora:civitai:10@20",
        "civitai:10",
    ],
)
def test_a_lora_from_civitai_with_all_that_is_said_of_it(place: Place, source: str) -> None:
    civitai(place.server)
    fetched = place.fetch(source, notes="for tests")
    assert (fetched.kind, fetched.name, fetched.sha256) == (ModelKind.LORA, "ink_pen v2", SHA256)
    assert fetched.path == place.root / "loras" / "ink_pen v2.safetensors"
    assert fetched.path.read_bytes() == DATA
    assert place.left() == ["loras/ink_pen v2.safetensors", "loras/ink_pen v2.safetensors.record.json"]
    record = records.read(fetched.path)
    assert record is not None
    assert record.model_dump(exclude={"schema_"}) == {
        "kind": ModelKind.LORA,
        "sha256": SHA256,
        "size": len(DATA),
        "source": "https://civitai.com/models/10?modelVersionId=20",
        "version": "Ink & pen v2.0",
        "base": "Pony",
        "license": "allowNoCredit: False; allowCommercialUse: ['Image']; allowDerivatives: True",
        "trigger_words": ("ink drawing", "bold lines"),
        "fetched_by": "bob",
        "fetched_at": NOW,
        "trained": None,
        "notes": "for tests",
        "retired": None,
    }
    assert Models(place.root).find(f"ink_pen v2@{SHA256[:10]}", ModelKind.LORA).path == fetched.path
    assert place.told[-1] == ("ink_pen v2.safetensors", len(DATA), len(DATA))


def test_the_token_goes_to_its_host_and_no_further(place: Place) -> None:
    civitai(place.server)
    fetched = place.fetch("20")
    sent = {(host, "Authorization" in headers) for host, _, headers in place.server.asked}
    assert sent == {("civitai.com", True), ("b2.civitai.com", False)}
    for path in place.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert "secret" not in records.place(fetched.path).read_text()


def test_a_token_does_not_come_back_to_a_host_over_another(place: Place) -> None:
    place.server.redirect(DOWNLOAD, "https://b2.civitai.com/x")
    place.server.redirect("https://b2.civitai.com/x", "https://civitai.com/x.safetensors")
    place.server.file("https://civitai.com/x.safetensors", DATA)
    civitai_page = "https://civitai.com/api/v1/model-versions/20"
    civitai(place.server)
    place.server.redirect(DOWNLOAD, "https://b2.civitai.com/x")
    place.fetch(civitai_page)
    *_, (host, path, headers) = place.server.asked
    assert (host, path, "Authorization" in headers) == ("civitai.com", "/x.safetensors", False)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ({"name": "ink.ckpt"}, "has no .safetensors file, only: training.zip, ink.ckpt"),
        ({"hashes": {}}, "it has no SHA-256 of version 20"),
        ({"pickleScanResult": "Danger"}, "its own scan found version 20 to be dangerous"),
        ({"downloadUrl": "https://evil.example/x"}, "it is not among the hosts that may be fetched from"),
        ({"hashes": {"SHA256": "0" * 64}}, f"has the SHA-256 {SHA256}, and should have {'0' * 64}"),
    ],
)
def test_what_civitai_says_is_not_taken_on_trust(place: Place, file: dict[str, Any], why: str) -> None:
    civitai(place.server, **file)
    assert why in place.refused("20", None)


def test_a_digest_that_the_user_gives_must_be_the_sources_own(place: Place) -> None:
    civitai(place.server)
    assert "not 1111" in place.refused("20", "1" * 64)
    assert DOWNLOAD.removeprefix("https://civitai.com") not in place.server.paths()
    assert place.fetch("20", SHA256).sha256 == SHA256


@pytest.mark.parametrize("source", ["https://civitai.com/user/bob", "https://civitai.com/models/10?modelVersionId=x"])
def test_another_page_of_civitai_is_none_of_a_model(place: Place, source: str) -> None:
    assert "give the page of a model" in place.refused(source, None)


# Hugging Face


def hugging_face(server: Server, files: dict[str, bytes], commit: str = "c" * 40, **card: Any) -> None:
    """The repository org/repo, as https://huggingface.co/docs/hub/api describes it; weights lie in LFS, on a CDN."""
    siblings = []
    for name, data in files.items():
        url = f"https://huggingface.co/org/repo/resolve/{commit}/{name}"
        one: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            one["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            server.redirect(url, f"https://cdn.hf.co/{sha256}?Signature=secret")
            server.file(f"https://cdn.hf.co/{sha256}?Signature=secret", data)
        else:
            server.file(url, data)
        siblings.append(one)
    told = {"id": "org/repo", "sha": commit, "cardData": card, "siblings": siblings}
    server.json("https://huggingface.co/api/models/org/repo/revision/main?blobs=true", told)
    server.json(f"https://huggingface.co/api/models/org/repo/revision/{commit}?blobs=true", told)


def folder_of(source: Path) -> dict[str, bytes]:
    return {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_a_file_of_a_repository_at_its_commit(place: Place) -> None:
    hugging_face(place.server, {"sub/ink.safetensors": DATA}, license="openrail++", base_model=["org/pony"])
    fetched = place.fetch("https://huggingface.co/org/repo/blob/main/sub/ink.safetensors", name="styles/ink")
    assert fetched.path == place.root / "loras" / "styles" / "ink.safetensors"
    record = records.read(fetched.path)
    assert record is not None
    assert record.source == f"https://huggingface.co/org/repo/blob/{'c' * 40}/sub/ink.safetensors"
    assert (record.license, record.base, record.version) == ("openrail++", "org/pony", f"org/repo at {'c' * 40}")
    assert f"/org/repo/resolve/{'c' * 40}/sub/ink.safetensors" in place.server.paths()
    hugging_face(place.server, {"\x1b]0;evil\x07 ..safetensors": DATA})
    place.server.file(f"https://huggingface.co/org/repo/resolve/{'c' * 40}/%1B%5D0%3Bevil%07%20..safetensors", DATA)
    tamed = place.fetch("https://huggingface.co/org/repo/blob/main/%1B%5D0%3Bevil%07%20..safetensors")
    assert (tamed.name, place.told[-1][0]) == ("_]0_evil_", "_]0_evil_.safetensors")


def test_a_whole_pipeline_without_its_code_and_pickles(place: Place) -> None:
    files = folder_of(SHAPES_XL)
    strangers = {"unet/diffusion_pytorch_model.bin": b"\x80\x02", "pipeline.py": b"import os", "vae_1_0/x.txt": b""}
    strangers |= {"unet/diffusion_pytorch_model.fp16.safetensors": b"no", "../../evil.json": b"{}", "README.md": b"#"}
    hugging_face(place.server, files | strangers)
    fetched = place.fetch("https://huggingface.co/org/repo", name="shapes")
    assert (fetched.kind, fetched.path) == (ModelKind.BASE, place.root / "diffusers" / "shapes")
    model = Models(place.root).find("shapes")
    assert model.native_size == 128
    came = folder_of(fetched.path)
    assert came.keys() <= files.keys()
    assert not [name for name in came if name.endswith((".py", ".bin", ".md", ".lock"))]
    assert all(files[name] == data for name, data in came.items())
    lines = "".join(f"{sha}  {name}\n" for name, sha in sorted(Models(place.root).digests(model).items()))
    assert fetched.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_a_variant_lies_there_by_the_usual_names(place: Place) -> None:
    files = folder_of(SHAPES_XL)
    for name in [name for name in files if name.endswith(".safetensors")]:
        files[name.replace(".safetensors", ".fp16.safetensors")] = files.pop(name)
    hugging_face(place.server, files)
    assert "is no model in diffusers' format" in place.refused("https://huggingface.co/org/repo", None)
    fetched = place.fetch("https://huggingface.co/org/repo", variant="fp16")
    assert (fetched.path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    with pytest.raises(DownloadFailed, match="no files of the variant bf16"):
        place.fetch("https://huggingface.co/org/repo", variant="bf16", name="b")


def test_a_vae_in_a_repository_of_its_own(place: Place) -> None:
    vae = folder_of(SHAPES_XL / "vae")
    hugging_face(place.server, vae)
    fetched = place.fetch(f"https://huggingface.co/org/repo/tree/{'c' * 40}", name="fix")
    assert (fetched.kind, fetched.path) == (ModelKind.VAE, place.root / "vae" / "fix")


def test_a_detector_with_its_words_and_without_its_code(place: Place, tmp_path: Path) -> None:
    """Both halves, as the Hub has them: a repository in transformers' format, with what it may hold beside."""
    pytest.importorskip("transformers")
    import detectors

    detectors.save(tmp_path)
    for half, beside in (
        ("boxes", {"modeling_x.py": b"1", "pytorch_model.bin": b"2"}),
        ("masks", {"tf_model.h5": b"3"}),
    ):
        files = folder_of(tmp_path / "detection" / half)
        hugging_face(place.server, files | beside | {"README.md": b"#", "merges.txt": b""})
        fetched = place.fetch("https://huggingface.co/org/repo", name=half)
        assert (fetched.kind, fetched.path) == (ModelKind.DETECTOR, place.root / "detection" / half)
        assert folder_of(fetched.path) == files
        assert Models(place.root).find(half, ModelKind.DETECTOR).architecture.format == half


def test_a_safety_classifier_without_its_pickle(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import classifiers

    files = folder_of(classifiers.save(tmp_path / "made"))
    hugging_face(place.server, files | {"pytorch_model.bin": b"1", "optimizer.pt": b"2", "README.md": b"#"})
    fetched = place.fetch("https://huggingface.co/org/repo", name="nsfw")
    assert (fetched.kind, fetched.path) == (ModelKind.SAFETY, place.root / "safety" / "nsfw")
    assert folder_of(fetched.path) == files


def test_a_small_file_that_is_not_the_commits(place: Place) -> None:
    files = folder_of(SHAPES_XL)
    hugging_face(place.server, files)
    changed = files["model_index.json"].replace(b"0", b"1")
    place.server.file(f"https://huggingface.co/org/repo/resolve/{'c' * 40}/model_index.json", changed)
    assert "is not the file that the repository has" in place.refused("https://huggingface.co/org/repo", None)


def test_a_pipeline_that_would_load_a_pickle_is_not_installed(place: Place) -> None:
    files = folder_of(SHAPES_XL)
    config = json.loads(files["text_encoder/config.json"]) | {"transformers_weights": "evil.bin"}
    files["text_encoder/config.json"] = json.dumps(config).encode()
    hugging_face(place.server, files)
    assert "has the setting `transformers_weights`" in place.refused("https://huggingface.co/org/repo", None)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("https://huggingface.co/org", "give the URL of a repository"),
        ("https://huggingface.co/org/repo/tree/main/unet", "a part of a repository is not fetched"),
        ("https://huggingface.co/org/repo/resolve/main/none.safetensors", "has no .safetensors file of that name"),
        ("https://huggingface.co/org/other", "answers 404"),
    ],
)
def test_what_is_no_model_on_hugging_face(place: Place, source: str, why: str) -> None:
    hugging_face(place.server, {"a.txt": b"x"})
    assert why in place.refused(source, None)


# Other hosts, and what is no model


def test_a_file_of_an_allowed_host_by_its_digest(place: Place) -> None:
    place.server.file(f"{PLAIN}?key=secret", DATA)
    fetched = place.fetch(f"{PLAIN}?key=secret", SHA256)
    record = records.read(fetched.path)
    assert record is not None
    assert (fetched.name, record.source) == ("ink_20pen", PLAIN)
    with pytest.raises(UsageError, match="Give the file's SHA-256"):
        place.fetch(PLAIN)


@pytest.mark.parametrize(
    ("data", "why", "asked"),
    [
        (b"PK\x03\x04" + bytes(5000), "it is a zip archive, as torch.save() writes pickles", 1),
        (b"\x80\x02}q\x00" + bytes(5000), "it is a pickle", 1),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer", 1),
        (b"<!DOCTYPE html><html>log in</html>", "it is no safetensors file", 1),
        (struct.pack("<Q", 2**40) + b"{" + bytes(5000), "its header is longer than", 1),
        (safetensors({}, b""), "its tensors do not tell what it is", 2),
        (struct.pack("<Q", 10_000) + b"{" * 10_000, "nested deeper", 2),
        (DATA[:-1], "its tensors need", 2),
        (weights({"double_blocks.0.x": [1]}), "a diffusion transformer", 2),
        (
            weights({f"lora_unet_{number}.lora_up.weight": [1] for number in range(20_001)}),
            "that of 20000 tensors",
            2,
        ),
    ],
)
def test_what_is_no_model_of_use_is_not_installed(place: Place, data: bytes, why: str, asked: int) -> None:
    """A disguise is seen at its first bytes, whatever its digest; the rest when it is whole."""
    place.server.file(PLAIN, data)
    assert why in place.refused(PLAIN, hashlib.sha256(data).hexdigest())
    if asked == 1 and len(data) > 3000:
        assert max((size for _, size, _ in place.told), default=0) <= 1000


def test_the_kind_is_what_the_tensors_say(place: Place) -> None:
    for number, (shapes, folder) in enumerate(((SDXL, "checkpoints"), (VAE, "vae"), (LORA, "loras"))):
        data = weights(shapes)
        place.server.file(f"https://models.example.org/{number}.safetensors", data)
        digest = hashlib.sha256(data).hexdigest()
        fetched = place.fetch(f"https://models.example.org/{number}.safetensors", digest)
        assert fetched.path.parent == place.root / folder
    for path in list(place.root.iterdir()):
        shutil.rmtree(path)
    assert "it is a LoRA: it belongs in loras/" in place.refused(
        "https://models.example.org/2.safetensors", SHA256, kind=ModelKind.VAE
    )


def test_what_is_there_is_never_replaced(place: Place) -> None:
    civitai(place.server)
    place.fetch("20")
    before = place.left()
    asked = len(place.server.asked)
    with pytest.raises(UsageError, match=r"There is a LoRA ink_pen v2 already.*imagend models remove"):
        place.fetch("20")
    assert DOWNLOAD.removeprefix("https://civitai.com") not in place.server.paths()[asked:]
    assert place.left() == before
    assert place.fetch("20", name="other").name == "other"
    place.server.file(PLAIN, DATA)
    with pytest.raises(UsageError, match="There is a LoRA other already"):
        place.fetch(PLAIN, SHA256, name="other")  # its kind is known only when it has come
    assert [path for path in place.left() if path.startswith(".fetch")] == []
    (place.root / "loras" / "third.sft").write_bytes(DATA)
    with pytest.raises(UsageError, match=r"There is a LoRA third already: .*third\.sft"):
        place.fetch("20", name="third")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", ".x", "x@0123456789", "a\nb", "", "x" * 201])
def test_a_name_leads_nowhere_else(place: Place, name: str) -> None:
    civitai(place.server, name=f"{name or 'x'}.safetensors")
    with pytest.raises(UsageError, match="is no model's name"):
        place.fetch("20", name=name or ".")
    fetched = place.fetch("20")  # a stranger's name is tamed
    assert fetched.path.parent == place.root / "loras"


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_on_another_disk(place: Place, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """A rename cannot go there, so a copy is made beside and renamed: never half a model under its name."""
    rename = installing.files.rename

    def across(source: Path, target: Path) -> None:
        if ".fetch" in source.parts and ".fetch" not in target.parts:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)

    monkeypatch.setattr(installing.files, "rename", across)
    if whole:
        hugging_face(place.server, folder_of(SHAPES_XL))
        fetched = place.fetch("https://huggingface.co/org/repo", name="shapes")
        assert Models(place.root).find(f"shapes@{fetched.sha256}").path == fetched.path
    else:
        civitai(place.server)
        fetched = place.fetch("20")
        assert fetched.path.read_bytes() == DATA
    hidden = [path for path in place.left() if "/." in f"/{path}"]
    assert hidden == []


def test_a_disk_that_refuses_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    civitai(place.server)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(installing.files, "move", refuse)
    assert "the disk refused" in place.refused("20", None)


# Limits


def test_limits_of_size_store_and_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    civitai(place.server)
    place.settings = Fetch(hosts=HOSTS, max_lora_gb=(len(DATA) - 1) / 1e9)
    assert "is larger than" in place.refused("20", None)
    place.server.file(PLAIN, DATA)
    assert "max_lora_gb allows" in place.refused(PLAIN)  # that it is a LoRA is known only when it has come
    place.settings = Fetch(hosts=HOSTS, max_model_gb=(len(DATA) - 1) / 1e9)
    assert "is larger than" in place.refused(PLAIN)
    place.settings = Fetch(hosts=HOSTS, lora_store_gb=(len(DATA) * 1.5) / 1e9)
    assert place.fetch("20", name="one").name == "one"
    with pytest.raises(DownloadFailed, match=r"lora_store_gb.*imagend models remove NAME"):
        place.fetch("20", name="two")
    removed = place.root / "loras" / ".removed" / "one.safetensors"
    removed.parent.mkdir()
    (place.root / "loras" / "one.safetensors").rename(removed)
    assert place.fetch("20", name="two").name == "two"  # what was removed counts no more
    shutil.rmtree(place.root / "loras")
    monkeypatch.setattr(downloading.files, "free_bytes", lambda _: 5000)
    assert "GB of disk are free for it" in place.refused("20", None)
    monkeypatch.setattr(downloading.files, "free_bytes", lambda _: len(DATA) + 2**20 - 1)
    place.reserve_mb = 1
    assert "GB of disk are free for it" in place.refused("20", None)


def test_an_endless_body_is_left_at_the_limit(place: Place) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"400\r\n" + DATA[:1024] + b"\r\n")
        while not handler.server.release.is_set():
            handler.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")

    place.settings = Fetch(hosts=HOSTS, max_model_gb=1e-4)
    place.server.on(PLAIN, endless)
    assert "is larger than" in place.refused(PLAIN)
    assert max(size for _, size, _ in place.told) <= 100_000


def test_an_api_that_answers_without_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagend.fetch.web.MAX_JSON_BYTES", 10_000)
    place.server.on("https://civitai.com/api/v1/model-versions/20", lambda handler: handler.answer(b"[" * 20_000))
    assert "its API answers without end" in place.refused("20", None)
    for body, why in ((b"<html>", "what is no JSON"), (b"[1]", "something else than is documented")):
        place.server.on("https://civitai.com/api/v1/model-versions/20", lambda handler, body=body: handler.answer(body))
        assert why in place.refused("20", None)


# Cut, resumed


def test_a_cut_is_gone_on_with_where_it_was(place: Place) -> None:
    cuts = iter((2500, 2600, None))
    place.server.on(PLAIN, lambda handler: serve(handler, DATA, '"1"', next(cuts)))
    assert place.fetch(PLAIN, SHA256).path.read_bytes() == DATA
    ranges = [(headers.get("Range"), headers.get("If-Range")) for _, _, headers in place.server.asked]
    assert ranges == [(None, None), ("bytes=2500-", '"1"'), ("bytes=2600-", '"1"')]


def test_a_file_that_changes_between_two_parts_is_begun_anew(place: Place) -> None:
    """By its ETag; and where there is none, by its digest."""
    answers: Iterator[Callable[[Handler], None]] = iter(
        (
            lambda handler: serve(handler, bytes(8) + DATA[8:], '"old"', 2500),
            lambda handler: serve(handler, DATA, '"new"'),
        )
    )
    old = DATA[:9] + b"x" * (len(DATA) - 9)
    answers = iter((lambda handler: serve(handler, old, '"old"', 2500), lambda handler: serve(handler, DATA, '"new"')))
    place.server.on(PLAIN, lambda handler: next(answers)(handler))
    assert place.fetch(PLAIN, SHA256).path.read_bytes() == DATA
    answers = iter((lambda handler: serve(handler, old, None, 2500), lambda handler: serve(handler, DATA, None)))
    shutil.rmtree(place.root / "loras")
    assert "and should have" in place.refused(PLAIN)


def test_who_answers_with_another_part_is_asked_for_the_whole(place: Place) -> None:
    def wrong(handler: Handler) -> None:
        handler.answer(DATA[9:], status=206, Content_Range=f"bytes 9-{len(DATA) - 1}/{len(DATA)}")

    answers: Iterator[Callable[[Handler], None]] = iter(
        (
            lambda handler: serve(handler, DATA, '"1"', 2500),
            wrong,
            lambda handler: serve(handler, DATA, '"1"'),
        )
    )
    place.server.on(PLAIN, lambda handler: next(answers)(handler))
    assert place.fetch(PLAIN, SHA256).sha256 == SHA256
    assert [headers.get("Range") for _, _, headers in place.server.asked] == [None, "bytes=2500-", None]


def test_who_cuts_for_ever_is_given_up(place: Place) -> None:
    place.server.on(PLAIN, lambda handler: serve(handler, DATA, '"1"', 500))
    assert "5 times in a row. Try again later" in place.refused(PLAIN)
    assert place.naps == [1.0, 2.0, 4.0, 8.0]


def test_a_wrong_length(place: Place) -> None:
    """Longer than it says, it is what it says: the rest is of another answer. Shorter, it is a cut."""
    place.server.on(PLAIN, lambda handler: handler.answer(DATA + b"more", length=len(DATA) - 100))
    assert "and should have" in place.refused(PLAIN)
    place.server.on(PLAIN, lambda handler: (handler.answer(DATA, length=len(DATA) + 100), handler.hang_up())[0])
    assert "the connection was cut" in place.refused(PLAIN)
    hugging_face(place.server, {"a.safetensors": DATA})
    place.server.file(f"https://cdn.hf.co/{SHA256}?Signature=secret", DATA + b"x")
    why = place.refused("https://huggingface.co/org/repo/resolve/main/a.safetensors", None)
    assert f"has {len(DATA) + 1} bytes there, and should have {len(DATA)}" in why


def test_a_wrong_digest(place: Place) -> None:
    place.server.file(PLAIN, DATA)
    assert f"has the SHA-256 {SHA256}, and should have {'0' * 64}" in place.refused(PLAIN, "0" * 64)


CRASHING = """
import hashlib, os, sys
from pathlib import Path
sys.path[:0] = {path!r}
import ssl
from test_fetch import HOSTS, NOW, PLAIN, SHA256, downloading
from imagend.config import Config
from imagend.fetch.addresses import Address
from imagend.fetch.fetcher import Fetcher, Wish
from imagend.fetch.tokens import Tokens
from imagend.fetch.web import Web
from imagend.fetch_settings import Fetch
downloading.CHUNK_BYTES = 1000
settings = Fetch(hosts=HOSTS)
trust = ssl.create_default_context(cafile={pem!r})
web = Web(settings, Tokens({{}}), lambda _: [Address("127.0.0.1", {port})], True, trust)
def tell(path, size, total):
    if size >= 3000:
        os.kill(os.getpid(), 9)
config = Config(models=Path({models!r}), fetch=settings, reserve_mb=0)
Fetcher(config, web, "bob", lambda: NOW, tell).fetch(Wish(PLAIN, SHA256))
"""


@pytest.mark.parametrize("harmed", [False, True])
def test_a_death_of_ours_is_gone_on_with(place: Place, tmp_path: Path, harmed: bool) -> None:
    """And where the disk has lost what was written last, it is begun anew."""
    place.server.file(PLAIN, DATA)
    program = CRASHING.format(
        path=sys.path,
        pem=str(tmp_path / "server.pem"),
        port=place.server.server_address[1],
        models=str(place.root),
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    (part,) = place.root.glob(".fetch/*/tree/*.safetensors")
    held = part.stat().st_size
    assert 3000 <= held < len(DATA)
    if harmed:
        part.write_bytes(DATA[:9] + bytes(held - 9))
    asked = len(place.server.asked)
    assert place.fetch(PLAIN, SHA256).path.read_bytes() == DATA
    ranges = [headers.get("Range") for _, _, headers in place.server.asked[asked:]]
    assert ranges == [f"bytes={held}-", None][: 1 + harmed]
    assert [path for path in place.left() if path.startswith(".fetch")] == []


def test_an_interrupt_keeps_what_has_come_and_an_old_part_is_swept(place: Place) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    place.server.file(PLAIN, DATA)
    fetcher = place.fetcher()
    fetcher._tell = stop
    with pytest.raises(Stop):
        fetcher.fetch(Wish(PLAIN, SHA256))
    (folder,) = (path for path in (place.root / ".fetch").iterdir() if path.is_dir())
    civitai(place.server)
    place.fetch("20")
    assert folder.exists()
    os.utime(folder, (0, 0))
    place.fetch("20", name="another")
    assert not folder.exists()


def test_files_that_had_come_whole_do_not_come_again(place: Place) -> None:
    class Stop(BaseException):
        pass

    begun: list[str] = []

    def stop(path: str, *_: Any) -> None:
        if path.endswith(".safetensors") and path not in begun:
            begun.append(path)
        if len(begun) == 3:
            raise Stop

    files = folder_of(SHAPES_XL)
    hugging_face(place.server, files)
    fetcher = place.fetcher()
    fetcher._tell = stop
    with pytest.raises(Stop):
        fetcher.fetch(Wish("https://huggingface.co/org/repo", name="shapes"))
    (lost,) = place.root.glob(f".fetch/*/tree/{begun[1]}")
    lost.write_bytes(bytes(lost.stat().st_size))  # by a disk that has died, too
    asked = len(place.server.asked)
    fetched = place.fetch("https://huggingface.co/org/repo", name="shapes")
    came = {path.partition("?")[0][1:] for host, path, _ in place.server.asked[asked:] if host == "cdn.hf.co"}
    digests = [hashlib.sha256(files[path]).hexdigest() for path in begun]
    assert [digest in came for digest in digests] == [False, True, True]
    assert all((fetched.path / path).read_bytes() == files[path] for path in begun)


# Slow, hostile or busy servers


def test_who_sends_no_end_of_its_headers(place: Place) -> None:
    def drip(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not handler.server.release.wait(0.02):
            handler.wfile.write(b"X-A: b\r\n")

    place.server.on(PLAIN, drip)
    assert "it sends nothing, or too slowly" in place.refused(PLAIN, web={"head_s": 0.2})


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"\x00" * 100_000,
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"",
    ],
    ids=lambda junk: repr(junk[:40]),
)
def test_who_breaks_the_protocol(place: Place, junk: bytes) -> None:
    place.server.on(PLAIN, lambda handler: (handler.wfile.write(junk), handler.hang_up())[1])
    place.refused(PLAIN)


def test_a_body_that_drips(place: Place) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        for byte in DATA:
            handler.wfile.write(bytes([byte]))
            if handler.server.release.wait(0.02):
                return

    place.server.on(PLAIN, drip)
    assert "it sends nothing, or too slowly" in place.refused(PLAIN, web={"window_s": 0.2})


@pytest.mark.parametrize("status", [429, 503])
def test_who_asks_to_be_left_alone_is_left_so_long(place: Place, status: int) -> None:
    answers = iter((lambda handler: handler.answer(b"", status=status, Retry_After="7"), None))

    def answer(handler: Handler) -> None:
        behave = next(answers)
        behave(handler) if behave else serve(handler, DATA, '"1"')

    place.server.on(PLAIN, answer)
    assert place.fetch(PLAIN, SHA256).sha256 == SHA256
    assert place.naps == [7.0]


def test_who_asks_for_too_long_is_given_up(place: Place) -> None:
    place.server.on(PLAIN, lambda handler: handler.answer(b"", status=429, Retry_After="3600"))
    assert "asks to be left alone for 3600 s" in place.refused(PLAIN)
    assert place.naps == []
    place.server.on(PLAIN, lambda handler: handler.answer(b"", status=429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"))
    assert "asks to be left alone for" in place.refused(PLAIN)
    place.server.on(PLAIN, lambda handler: handler.answer(b"", status=429, Retry_After="soon"))
    assert "5 times in a row" in place.refused(PLAIN)


@pytest.mark.parametrize(
    ("status", "why"), [(401, "wants a token"), (403, "wants a token"), (404, "there is nothing"), (418, "answers 418")]
)
def test_an_answer_that_is_final(place: Place, status: int, why: str) -> None:
    place.server.on(PLAIN, lambda handler: handler.answer(b"", status=status))
    assert why in place.refused(PLAIN)
    assert len(place.server.asked) == 1


def test_what_comes_compressed_is_refused(place: Place) -> None:
    place.server.on(PLAIN, lambda handler: handler.answer(DATA, Content_Encoding="gzip"))
    assert "compressed" in place.refused(PLAIN)


# Where one may go


@pytest.mark.parametrize(
    "to",
    [
        "https://169.254.169.254/latest/meta-data/",
        "https://127.0.0.1/x.safetensors",
        "https://[::1]/x.safetensors",
        "https://localhost/x.safetensors",
        "https://evil.example/x.safetensors",
        "https://evilhf.co/x.safetensors",
        "https://hf.co/x.safetensors",
        "https://huggingface.co.evil.example/x",
        "https://huggingface.co@evil.example/x",
        "https://user:pass@huggingface.co/x",
        "https://huggingface.co:8443/x.safetensors",
        "http://models.example.org/x.safetensors",
        "file:///etc/passwd",
        "//evil.example/x",
        "https://[",
        "https://models.example.org/a b",
    ],
)
def test_a_redirect_leads_only_to_allowed_hosts(place: Place, to: str) -> None:
    place.server.on(PLAIN, lambda handler: handler.answer(b"", status=302, Location=to))
    place.refused(PLAIN)
    assert len(place.server.asked) == 1
    place.refused(to)  # nor does the user
    assert len(place.server.asked) == 1


def test_redirects_end(place: Place) -> None:
    place.server.redirect(PLAIN, PLAIN)
    assert "it redirects more than 3 times" in place.refused(PLAIN)
    assert len(place.server.asked) == 4


@pytest.mark.parametrize(
    "ip",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
        *("fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("2001:db8::1", "64:ff9b::a9fe:a9fe", "2001:0:7f00:1::80ff:fffe"),
    ],
)
def test_addresses_that_are_not_of_the_internet(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize("ip", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_of_the_internet(ip: str) -> None:
    assert is_public(ip)


def test_one_private_address_among_public_ones_is_one_too_many(place: Place) -> None:
    found = [Address("1.1.1.1"), Address("10.0.0.1")]
    with pytest.raises(DownloadFailed, match=r"10\.0\.0\.1 is of this machine, of a private network"):
        checked("models.example.org", lambda _: found)
    assert checked("models.example.org", lambda _: found[:1]) == found[:1]
    assert not is_public(resolve("localhost")[0].ip)


def test_a_name_that_changes_its_address_is_asked_once_and_the_answer_is_used(place: Place) -> None:
    """DNS rebinding: public when it is judged, ours when it is connected to."""
    civitai(place.server)
    asked: list[str] = []

    def rebinding(host: str) -> list[Address]:
        asked.append(host)
        return [Address("1.1.1.1") if asked.count(host) % 2 else Address("127.0.0.1", place.server.server_address[1])]

    def connected(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        went.append(address[0])
        raise OSError("no network in tests")

    went: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("urllib3.util.connection.create_connection", connected)
        with pytest.raises(DownloadFailed):
            place.fetch("20", web={"resolver": rebinding, "allow_private": False})
    assert went == ["1.1.1.1"]  # then it answers with our own, and is left
    assert place.server.asked == []


def test_loopback_is_refused_where_no_test_allows_it(place: Place) -> None:
    assert "127.0.0.1 is of this machine" in place.refused(PLAIN, web={"allow_private": False})
    assert place.server.asked == []


def test_a_certificate_is_checked_by_the_name_that_was_asked(place: Place, tmp_path: Path) -> None:
    assert "its certificate is not to be trusted" in place.refused(PLAIN, web={"trust": ssl.create_default_context()})
    place.settings = Fetch(hosts=("other.example.org",))
    assert "its certificate is not to be trusted" in place.refused("https://other.example.org/x.safetensors")


# Tokens


def test_tokens_of_a_file_and_of_credentials(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert token_files.load(path, None).of("civitai.com") is None
    path.write_text("# mine\ncivitai.com one\nHuggingFace.co two # read only\n")
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others may read it"):
        token_files.load(path, None)
    path.chmod(0o600)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "token.civitai.com").write_text("three\n")
    (credentials / "other").write_text("x y z")
    found = token_files.load(path, credentials)
    assert (found.of("civitai.com"), found.of("huggingface.co"), found.of("x")) == ("three", "two", None)
    assert "two" not in repr(found)
    for text in ("civitai.com four five", "four", "civitai.com foür"):
        path.write_text(text)
        with pytest.raises(UsageError, match="line 1 is not HOST TOKEN") as caught:
            token_files.load(path, None)
        assert "four" not in str(caught.value)
    path.unlink()
    path.symlink_to(credentials / "token.civitai.com")
    with pytest.raises(UsageError):
        token_files.load(path, None)


# The command


def test_the_command_refuses_with_reason_and_status(home: Home) -> None:
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace(str(REPOSITORY / "models"), "models"))
    done = imagend("fetch", "https://evil.example/x.safetensors", "--sha256", "0" * 64, cwd=home.root)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Nothing was fetched from evil.example: it is not among the hosts that may be fetched from" in done.stderr
    assert imagend("fetch", "https://civitai.com/x", "--sha256", "abc", cwd=home.root).returncode == 64
    with config.open("a") as file:
        file.write("fetch: {hosts: [127.0.0.1]}\n")
    assert imagend("fetch", "20", cwd=home.root).returncode == 78


def test_the_command_says_what_it_fetched(
    home: Home, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself, but for where names lead and which certificates are trusted."""
    local = functools.partial(Web, resolver=place.server.resolve, allow_private=True, trust=place.trust)
    monkeypatch.setattr("imagend.cli.fetch.Web", local)
    config = home.root / "config.yaml"
    config.write_text(config.read_text().replace(str(REPOSITORY / "models"), "fetched"))
    (home.root / "keys" / "fetch_tokens").write_text(f"civitai.com {TOKEN}\n")
    (home.root / "keys" / "fetch_tokens").chmod(0o600)
    civitai(place.server)
    assert run(["fetch", "20", "--config", str(config), "--name", "styles/ink", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "kind": "lora",
        "name": "styles/ink",
        "path": str(home.root / "fetched" / "loras" / "styles" / "ink.safetensors"),
        "sha256": SHA256,
    }
    assert "100 %" in said.err
    assert {headers.get("Authorization") for host, _, headers in place.server.asked if host == "civitai.com"} == {
        f"Bearer {TOKEN}"
    }
    assert run(["fetch", "20", "--config", str(config)]) == 0
    said = capsys.readouterr()
    assert f"pin it as ink_pen v2@{SHA256[:10]}" in said.out
    assert run(["fetch", "20", "--config", str(config)]) == 64
    said = capsys.readouterr()
    assert "There is a LoRA ink_pen v2 already" in said.err
    assert TOKEN not in said.out + said.err
