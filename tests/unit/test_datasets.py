"""Datasets: which pictures and captions there are, in whatever layout, and what a look at them finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagend import buckets, datasets, references
from imagend.errors import BadDataset, UnknownDataset

pytest.importorskip("PIL", reason="needs the engine: pip install 'imagend[engine]'")
from PIL import Image

from imagend.worker import dataset as looking


def put(
    root: Path, file: str, caption: str | None = None, size: tuple[int, int] = (64, 64), colour: str = "red"
) -> Path:
    path = root / "datasets" / "hats" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def entries(root: Path) -> dict[str, tuple[str | None, int]]:
    return {entry.file: (entry.caption, entry.repeats) for entry in datasets.look(root, "hats").entries}


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a red hat\nwith a band\n")
    put(tmp_path, "b.JPG").with_suffix(".caption").write_text("\ufeffanother")
    put(tmp_path, "c.webp")
    assert entries(tmp_path) == {"a.png": ("a red hat with a band", 1), "b.JPG": ("another", 1), "c.webp": (None, 1)}


def test_metadata_comes_first_and_reaches_into_folders(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "of the file")
    put(tmp_path, "more/b.png")
    rows = [{"file_name": "a.png", "text": "of the table"}, {"file_name": "more/b.png", "text": "b"}]
    (tmp_path / "datasets/hats/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert entries(tmp_path) == {"a.png": ("of the table", 1), "more/b.png": ("b", 1)}


def test_kohyas_folders_repeat_and_name_their_pictures(tmp_path: Path) -> None:
    put(tmp_path, "10_my hat/a.png")
    put(tmp_path, "10_my hat/b.png", "its own")
    put(tmp_path, "5000_x/c.png")
    found = datasets.look(tmp_path, "hats")
    assert entries(tmp_path) == {
        "10_my hat/a.png": ("my hat", 10),
        "10_my hat/b.png": ("its own", 10),
        "5000_x/c.png": ("x", 1),
    }
    assert found.mistakes == ("5000_x/ says 5000 repeats; possible are 1 to 1000, and it counts once",)


def test_mistakes_are_told(tmp_path: Path) -> None:
    put(tmp_path, "a.png").with_suffix(".txt").write_bytes(b"\xff\xff")
    put(tmp_path, "b.png").with_suffix(".txt").write_bytes(b"x" * (datasets.MAX_CAPTION_BYTES + 1))
    put(tmp_path, "c.png").with_suffix(".txt").symlink_to("/etc/passwd")
    (tmp_path / "datasets/hats/metadata.jsonl").write_text('{"file_name": "z.png", "text": "z"}\n[]\n' + "[" * 100_000)
    found = datasets.look(tmp_path, "hats")
    assert [entry.caption for entry in found.entries] == [None] * 3
    like = 'not like {"file_name": "hat.png", "text": "a hat"}'
    assert found.mistakes == (
        f"metadata.jsonl, line 2: {like}",
        f"metadata.jsonl, line 3: {like}",
        "a.txt is not UTF-8",
        "b.txt has more than 16384 bytes",
        "c.txt cannot be read (not a regular file)",
        "metadata.jsonl names z.png, which is not there",
    )


def test_links_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = put(tmp_path, ".hidden.png")
    path.with_name("link.png").symlink_to(path)
    (path.parent / "folder").symlink_to(tmp_path)
    assert entries(tmp_path) == {}


def test_an_unknown_dataset_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(UnknownDataset, match=r"'caps' in reference/datasets/\. Known are: hats"):
        datasets.look(tmp_path, "caps")
    with pytest.raises(UnknownDataset):
        datasets.look(tmp_path, "..")


def test_one_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_PICTURES", 1)
    put(tmp_path, "a.png")
    put(tmp_path, "b.png")
    with pytest.raises(BadDataset, match="more than 1 pictures"):
        datasets.look(tmp_path, "hats")


def test_datasets_is_no_entity_of_reference(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "datasets" / "a.png")
    assert references.look(tmp_path).pictures == {}


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (128, 8), (512, 64), (1024, 64), (1000, 64)])
def test_buckets_have_the_area_and_the_steps(resolution: int, step: int) -> None:
    found = buckets.sizes(resolution)
    assert all(size.width % step == 0 == size.height % step for size in found)
    assert all(size.width * size.height <= resolution**2 for size in found)
    assert {buckets.Size(size.height, size.width) for size in found} == set(found)
    assert len(found) > 5


def test_a_picture_goes_to_the_bucket_of_its_shape() -> None:
    assert buckets.nearest(3000, 3000, 1024) == (1024, 1024)
    assert buckets.nearest(1920, 1080, 1024) == (1344, 768)
    assert buckets.nearest(832, 1216, 1024) == (832, 1216)
    assert buckets.nearest(4000, 10, 1024) == (2048, 512)
    assert buckets.nearest(100, 100, 128) == (128, 128)


def test_a_look_counts_and_finds_what_is_wrong(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a hat", size=(300, 200))
    put(tmp_path, "b.png", "a hat", size=(300, 200))
    put(tmp_path, "c.png", size=(100, 100))
    put(tmp_path, "3_x/d.png", "another", size=(200, 300), colour="blue")
    put(tmp_path, "e.png").write_bytes(b"no picture")
    told: list[tuple[int, int]] = []
    report, examples = looking.look(tmp_path, "hats", 128, lambda done, of: told.append((done, of)))
    assert (report.pictures, report.per_epoch, report.captions) == (4, 6, 2)
    assert report.buckets == {"104x152": 1, "128x128": 1, "152x104": 2}
    assert (report.smallest, report.largest) == ("100x100", "300x200")
    assert report.enlarged == report.missing_captions == ("c.png",)
    assert report.duplicates == (("a.png", "b.png"),)
    assert [one.file for one in report.unreadable] == ["e.png"]
    assert not report.is_fit
    assert [one.entry.file for one in examples] == ["3_x/d.png", "a.png", "b.png", "c.png"]
    assert told == [(n, 5) for n in range(5)]


def test_the_digest_is_of_pixels_files_captions_and_repeats(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a hat")
    digests = [looking.look(tmp_path, "hats", 128)[0].sha256, looking.look(tmp_path, "hats", 64)[0].sha256]
    assert digests[0] == digests[1]
    put(tmp_path, "a.png", "another hat")
    digests.append(looking.look(tmp_path, "hats", 128)[0].sha256)
    put(tmp_path, "a.png", "another hat", colour="blue")
    digests.append(looking.look(tmp_path, "hats", 128)[0].sha256)
    put(tmp_path, "2_x/a.png", "another hat", colour="blue")
    digests.append(looking.look(tmp_path, "hats", 128)[0].sha256)
    assert len(set(digests)) == 4
