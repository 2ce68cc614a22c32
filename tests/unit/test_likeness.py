"""Manifests compared: the pictures, and the component that differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from imagend.likeness import compare

MANIFEST: dict[str, Any] = {
    "spec": {"prompt": "a red circle", "negative_prompt": None, "seeds": [7, 8]},
    "artifacts": [
        {"file": "0000.png", "seed": 7, "pixels_sha256": "a", "sha256": "x", "seconds": 1.0},
        {"file": "0001.png", "seed": 8, "pixels_sha256": "b", "sha256": "y", "seconds": 1.0},
    ],
    "engine": {
        "device": "cuda:0",
        "device_name": "NVIDIA L4",
        "dtype": "float16",
        "threads": 8,
        "versions": {"imagend": "0.1.0", "torch": "2.13.0"},
        "model": {"name": "m", "sha256": "c", "files": {"unet/x.safetensors": "d"}},
        "vae": {"name": "fix", "sha256": "e"},
        "loras": [{"name": "ink", "sha256": "f", "weight": 0.5}],
        "embeddings": [],
        "scheduler": {"class": "Euler", "config": {"a": 1}},
    },
    "memory": {"mode": "resident", "vae_tile": None, "exact": True, "peak_bytes": 5, "retries": []},
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return manifest


def components(manifest: dict[str, Any], was: dict[str, Any] = MANIFEST) -> list[tuple[str, Any, Any]]:
    return [(one.component, one.was, one.is_) for one in compare(was, manifest).differences]


def test_the_same_is_the_same() -> None:
    found = compare(MANIFEST, copy.deepcopy(MANIFEST))
    assert found.equal
    assert (found.differences, found.unrecorded) == ((), ())
    assert [(picture.file, picture.seed, picture.equal) for picture in found.pictures] == [
        ("0000.png", 7, True),
        ("0001.png", 8, True),
    ]


def test_pixels_count_and_nothing_else_of_a_picture() -> None:
    assert compare(MANIFEST, changed("artifacts", 0, "sha256", to="other")).equal  # its metadata
    assert compare(MANIFEST, changed("artifacts", 0, "seconds", to=9.0)).equal
    found = compare(MANIFEST, changed("artifacts", 1, "pixels_sha256", to="other"))
    assert not found.equal
    assert [picture.equal for picture in found.pictures] == [True, False]


def test_of_a_set_a_picture_may_be_missing_and_another_be_more() -> None:
    fewer = compare(MANIFEST, MANIFEST | {"artifacts": MANIFEST["artifacts"][:1]})
    assert [(picture.file, picture.equal) for picture in fewer.pictures] == [("0000.png", True), ("0001.png", False)]
    assert compare(MANIFEST | {"artifacts": MANIFEST["artifacts"][:1]}, MANIFEST).equal


@pytest.mark.parametrize(
    ("path", "to", "expected"),
    [
        (("engine", "model", "sha256"), "z", [("model.sha256", "c", "z")]),
        (("engine", "model", "files", "unet/x.safetensors"), "z", [("model.files.unet/x.safetensors", "d", "z")]),
        (("engine", "model", "files"), {}, [("model.files.unet/x.safetensors", "d", None)]),
        (("engine", "vae", "sha256"), "z", [("vae.sha256", "e", "z")]),
        (("engine", "vae"), None, [("vae", {"name": "fix", "sha256": "e"}, None)]),
        (("engine", "loras", 0, "sha256"), "z", [("loras.ink.sha256", "f", "z")]),
        (("engine", "loras"), [], [("loras.ink", MANIFEST["engine"]["loras"][0], None)]),
        (("engine", "embeddings"), [{"name": "n"}], [("embeddings.n", None, {"name": "n"})]),
        (("engine", "versions", "torch"), "2.14", [("versions.torch", "2.13.0", "2.14")]),
        (("engine", "versions", "peft"), "0.21", [("versions.peft", None, "0.21")]),
        (("engine", "device_name"), "NVIDIA H100", [("device_name", "NVIDIA L4", "NVIDIA H100")]),
        (("engine", "device"), "cuda:3", []),
        (("engine", "device"), "cpu", [("device", "cuda", "cpu")]),
        (("engine", "threads"), 2, [("threads", 8, 2)]),
        (("engine", "scheduler", "config", "a"), 2, [("scheduler.config.a", 1, 2)]),
        (("memory", "mode"), "fp8", [("memory.mode", "resident", "fp8")]),
        (("memory", "vae_tile"), 256, [("memory.vae_tile", None, 256)]),
        (("memory", "peak_bytes"), 9, []),
        (("spec", "prompt"), "a star", [("spec.prompt", "a red circle", "a star")]),
        (("spec", "negative_prompt"), "blurry", []),
    ],
)
def test_the_component_that_differs_is_named(path: Any, to: Any, expected: list[tuple[str, Any, Any]]) -> None:
    assert components(changed(*path, to=to)) == expected


def test_likely_causes_come_first() -> None:
    other = changed("engine", "threads", to=1)
    other["engine"]["model"] = {"name": "m", "sha256": "z", "files": {}}
    other["engine"]["versions"]["imagend"] = "0.2"
    other["spec"]["seeds"] = [1, 2]
    assert [component for component, _, _ in components(other)] == [
        "spec.seeds",
        "model.sha256",
        "model.files.unet/x.safetensors",
        "versions.imagend",
        "threads",
    ]


def test_what_an_older_version_did_not_record_is_no_difference() -> None:
    old = copy.deepcopy(MANIFEST)
    del old["engine"]["vae"], old["engine"]["loras"], old["memory"], old["spec"]["negative_prompt"]
    found = compare(old, MANIFEST)
    assert found.differences == ()
    assert found.unrecorded == ("loras", "memory", "vae")
    assert compare(old, changed("spec", "eta", to=0.3)).unrecorded == ("loras", "memory", "spec.eta", "vae")
    assert compare({**old, "engine": None}, MANIFEST).differences == ()
    assert compare(MANIFEST, old).differences == ()
    assert compare(MANIFEST, old).unrecorded == found.unrecorded


def test_another_input_picture_is_told_by_its_name() -> None:
    def of(sha256: str) -> dict[str, Any]:
        picture = {"name": "leona/front", "sha256": sha256, "width": 8, "height": 8}
        return {"artifacts": [], "spec": {"image": "leona/front"}, "engine": {"pictures": [picture]}}

    (found,) = compare(of("00"), of("ff")).differences
    assert (found.component, found.was, found.is_) == ("pictures.leona/front.sha256", "00", "ff")
