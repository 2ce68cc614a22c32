"""What a worker shows beside the truth: files that are not as told, and files that nobody asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from fakes import paint

from imagend.manifest import Artifact

Shown = tuple[Artifact, ...]


def _one(context: Any, **told: Any) -> Shown:
    return (paint(context.folder, 0, 0).model_copy(update=told),)


def _instead(context: Any) -> tuple[Shown, Path]:
    """A picture that is told of, and its place, now empty."""
    (artifact,) = _one(context)
    place: Path = context.folder / artifact.file
    place.unlink()
    return (artifact,), place


def lie_about_a_path(spec: dict[str, Any], context: Any) -> Shown:
    return _one(context, file="../../../../../../etc/hostname")


def lie_about_a_folder(spec: dict[str, Any], context: Any) -> Shown:
    (context.folder / "deep").mkdir()
    paint(context.folder / "deep", 0, 0)
    return _one(context, file="deep/0000.png")


def lie_about_a_file(spec: dict[str, Any], context: Any) -> Shown:
    return _one(context, file="0001.png")


def lie_about_its_name(spec: dict[str, Any], context: Any) -> Shown:
    (context.folder / "manifest.json").write_bytes(b"{}")
    return _one(context, file="manifest.json", sha256=hashlib.sha256(b"{}").hexdigest(), size=2)


def lie_about_bytes(spec: dict[str, Any], context: Any) -> Shown:
    shown, place = _instead(context)
    place.write_bytes(b"x" * shown[0].size)
    return shown


def lie_about_size(spec: dict[str, Any], context: Any) -> Shown:
    return _one(context, size=1)


def lie_about_the_seed(spec: dict[str, Any], context: Any) -> Shown:
    return _one(context, seed=spec["seeds"][0] + 1)


def show_nothing(spec: dict[str, Any], context: Any) -> Shown:
    paint(context.folder, 0, 0)
    return ()


def show_too_much(spec: dict[str, Any], context: Any) -> Shown:
    return paint(context.folder, 0, 0), paint(context.folder, 1, 1)


def show_one_twice(spec: dict[str, Any], context: Any) -> Shown:
    return _one(context) * 2


def show_a_link(spec: dict[str, Any], context: Any) -> Shown:
    """To a file whose digest it knows."""
    shown, place = _instead(context)
    place.symlink_to("/etc/passwd")
    data = Path("/etc/passwd").read_bytes()
    return (shown[0].model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}),)


def show_a_link_within(spec: dict[str, Any], context: Any) -> Shown:
    shown = _one(context)
    (context.folder / "0000.png").rename(context.folder / "elsewhere")
    (context.folder / "0000.png").symlink_to("elsewhere")
    return shown


def show_a_hard_link(spec: dict[str, Any], context: Any) -> Shown:
    """Whoever has the other name could change the picture after it was published."""
    shown = _one(context)
    os.link(context.folder / "0000.png", context.folder.parent / "other name")
    return shown


def show_a_pipe(spec: dict[str, Any], context: Any) -> Shown:
    shown, place = _instead(context)
    os.mkfifo(place)
    return shown


def show_a_folder(spec: dict[str, Any], context: Any) -> Shown:
    shown, place = _instead(context)
    place.mkdir()
    return shown


def show_a_huge_file(spec: dict[str, Any], context: Any) -> Shown:
    """A hole of 8 TiB."""
    shown, place = _instead(context)
    with place.open("wb") as file:
        file.truncate(1 << 43)
    return (shown[0].model_copy(update={"size": 1 << 43}),)


def remove_the_draft(spec: dict[str, Any], context: Any) -> Shown:
    shown = _one(context)
    shutil.rmtree(context.folder)
    return shown


def replace_the_draft_by_a_file(spec: dict[str, Any], context: Any) -> Shown:
    shown = remove_the_draft(spec, context)
    context.folder.write_bytes(b"no folder")
    return shown


def replace_the_draft_by_a_link(spec: dict[str, Any], context: Any) -> Shown:
    """To the folder that `negative_prompt` names."""
    shown = remove_the_draft(spec, context)
    context.folder.symlink_to(spec["negative_prompt"])
    paint(context.folder, 0, 0)
    return shown


def strew_strays(spec: dict[str, Any], context: Any) -> None:
    """And paint as asked for."""
    folder: Path = context.folder
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "file").write_bytes(b"stray")
    (folder / ".hidden").write_bytes(b"stray")
    (folder / "manifest.json").write_bytes(b'{"outcome": "succeeded"}')
    (folder / "0099.png").write_bytes(b"stray")
    (folder / "link").symlink_to("/etc")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
