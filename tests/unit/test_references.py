"""The library of reference pictures: what is listed, what is passed over, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagend import references
from imagend.errors import UnknownReference


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no picture: nobody looks")
    return root


def test_an_entity_per_folder_and_a_view_per_file(tmp_path: Path) -> None:
    fill(tmp_path, "leona/front.png", "leona/3 of 4 back.JPG", "Élan (old)/background.webp", "README.md")
    library = references.look(tmp_path)
    assert library.find("leona/front") == tmp_path / "leona" / "front.png"
    assert library.find("Élan (old)/background") == tmp_path / "Élan (old)" / "background.webp"
    assert library.document() == [
        {"name": "leona", "views": ["3 of 4 back", "front"]},
        {"name": "Élan (old)", "views": ["background"]},
    ]


def test_of_two_files_with_one_name_the_png_is_meant(tmp_path: Path) -> None:
    fill(tmp_path, "a/x.jpg", "a/x.png", "a/x.webp", "b/x.webp", "b/x.jpeg")
    library = references.look(tmp_path)
    assert library.find("a/x").suffix == ".png"
    assert library.find("b/x").suffix == ".jpeg"


def test_what_no_job_can_name_is_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, "a/.hidden.png", ".b/x.png", "a/notes.txt", "a/new\nline.png", "a/c:d.png")
    fill(tmp_path, "a/deep/er.png", "top.png")
    (tmp_path / "a" / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "away").symlink_to("/")
    (tmp_path / "a" / "folder.png").mkdir()
    assert references.look(tmp_path).pictures == {}


def test_without_a_folder_there_is_nothing(tmp_path: Path) -> None:
    assert references.look(tmp_path / "none").pictures == {}


def test_a_refusal_lists_the_views_or_else_the_entities(tmp_path: Path) -> None:
    fill(tmp_path, "leona/front.png", "leona/side.png", *(f"e{number:02}/x.png" for number in range(30)))
    library = references.look(tmp_path)
    with pytest.raises(UnknownReference, match=r"'leona/back' in reference/\. Of leona there are: front, side\."):
        library.find("leona/back")
    with pytest.raises(UnknownReference, match=r"of: leona, e00, .* and 11 more \(imagend references lists them\)"):
        library.find("leone/front")
    with pytest.raises(UnknownReference, match="views of: none"):
        references.Library().find("a/b")


def test_more_than_can_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MAX_PICTURES", 3)
    fill(tmp_path, *(f"a/{number}.png" for number in range(5)))
    library = references.look(tmp_path)
    assert library.full
    assert len(library.pictures) == 3
