"""Masks by words, as transformers' GroundingDINO and SAM make them: tiny untrained ones, read once, in no one's way."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY
from engine_conftest import REF, Painter
from PIL import Image

from imagend.errors import BrokenModel, Interrupt, NoDetector, NothingFound, OutOfMemory, PromptTooLong
from imagend.messages import MemoryShort, Progress, Run
from imagend.worker import detect
from imagend.worker.main import Context

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
TEXTS = ("the car", "A dog")
TAUGHT = REPOSITORY / "models" / "detection" / "shapes-xl-find"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("models")
    detectors.save(root)
    return root


@pytest.fixture
def worker(root: Path) -> Painter:
    return Painter(root)


def context_of(worker: Painter) -> Context:
    run = Run(job=REF, kind="mask", spec={}, folder="/nowhere")
    return Context(run, worker.pipelines, worker._say, 0.0)


def find(worker: Painter, texts: tuple[str, ...] = TEXTS, threshold: float = 0.5, text_threshold: float = 0.5) -> Any:
    return worker.pipelines.detectors.find(NOISE, texts, threshold, text_threshold, context_of(worker))


def owned(kind: Any, folder: Path) -> Any:
    """Not mapped from its file, whose alignment decides bits."""
    network = kind.from_pretrained(folder, local_files_only=True).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


@torch.no_grad()
def plain(root: Path, text: str, threshold: float) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """What a user of transformers writes."""
    folder = root / "detection" / "boxes"
    images = transformers.GroundingDinoImageProcessorPil.from_pretrained(folder)
    processor = transformers.GroundingDinoProcessor(images, transformers.BertTokenizer.from_pretrained(folder))
    inputs = processor(images=NOISE, text=text, return_tensors="pt")
    said = owned(transformers.GroundingDinoForObjectDetection, folder)(**inputs)
    sizes = [NOISE.size[::-1]]
    (found,) = processor.post_process_grounded_object_detection(
        said, inputs.input_ids, threshold=threshold, text_threshold=0.5, target_sizes=sizes
    )
    words = [label.replace("[CLS]", "").replace("[SEP]", "").strip(" .") for label in found["text_labels"]]
    shows = torch.tensor([bool(label) for label in words])  # not of a full stop alone
    boxes, scores = found["boxes"][shows], found["scores"][shows]
    order = scores.argsort(descending=True, stable=True)
    found = {"boxes": boxes[order], "scores": scores[order]}
    folder = root / "detection" / "masks"
    sam = transformers.SamProcessor(transformers.SamImageProcessorPil.from_pretrained(folder))
    inputs = sam(NOISE, input_boxes=[found["boxes"].tolist()], return_tensors="pt")
    said = owned(transformers.SamModel, folder)(**inputs, multimask_output=False)
    (masks,) = sam.post_process_masks(said.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    return found, masks.any(dim=0)[0].numpy()


def test_it_finds_what_transformers_finds_bit_for_bit(worker: Painter, root: Path) -> None:
    found = find(worker)
    expected, mask = plain(root, "the car. a dog.", 0.5)
    assert len(found.boxes) > 1
    assert found.boxes == tuple(map(tuple, expected["boxes"].tolist()))
    assert found.scores == tuple(expected["scores"].tolist())
    assert set(found.texts) == {"the car", "a dog"}
    assert found.mask.size == NOISE.size
    assert (np.asarray(found.mask) == mask * np.uint8(255)).all()
    assert mask.any()
    assert not mask.all()
    assert [one["finds"] for one in worker.pipelines.detectors.used] == ["boxes", "masks"]
    assert [one["name"] for one in worker.pipelines.detectors.used] == ["boxes", "masks"]
    assert found.describe()[0]["box"] == [round(number, 2) for number in found.boxes[0]]


def test_the_outline_is_of_this_picture(worker: Painter) -> None:
    """Not of the boxes alone: untrained as it is, the SAM looks."""
    found, other = find(worker), NOISE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    outlining = worker.pipelines.detectors._kept["masks"]
    arguments = (torch.tensor(found.boxes), list(found.scores), list(found.texts), torch.device("cpu"))
    again, flipped = (detect._outlined(outlining, one, *arguments, context_of(worker)) for one in (NOISE, other))
    assert (np.asarray(again.mask) == np.asarray(found.mask)).all()
    assert (np.asarray(flipped.mask) != np.asarray(found.mask)).any()


def test_a_taught_one_finds_what_words_name(root: Path, tmp_path: Path) -> None:
    """shapes-xl-find, on drawn pictures that it was not trained on; its card has the figures."""
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection" / "boxes").symlink_to(TAUGHT)
    (tmp_path / "detection" / "masks").symlink_to(root / "detection" / "masks")
    sys.path.insert(0, str(TAUGHT))
    try:
        from score_find import overlap, questions
    finally:
        sys.path.remove(str(TAUGHT))
    worker, seen, total, right = Painter(tmp_path), 0, 0, 0
    for image, phrase, named in questions(40):
        boxes: tuple[Any, ...] = ()
        with contextlib.suppress(NothingFound):
            found = worker.pipelines.detectors.find(image, (phrase,), 0.25, 0.25, context_of(worker))
            assert set(found.texts) == {phrase}
            boxes = found.boxes
        hits = [[overlap(np.array(thing.box), np.array(box)) > 0.5 for box in boxes] for thing in named]
        seen, total = seen + sum(map(any, hits)), total + len(named)
        right += all(map(any, hits)) and all(any(one) for one in zip(*hits, strict=True)) and (bool(named) or not boxes)
    assert seen / total > 0.8
    assert right / 40 > 0.6


def test_one_text_may_name_several(worker: Painter) -> None:
    assert find(worker, ("the car. A dog.",)) == find(worker)


def test_of_many_boxes_the_best_are_taken_in_parts(worker: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    every = find(worker, threshold=0.01)
    monkeypatch.setattr(detect, "_AT_ONCE", 2)
    in_parts = find(worker, threshold=0.01)
    assert in_parts.boxes == every.boxes
    assert (np.asarray(in_parts.mask) == np.asarray(every.mask)).mean() > 0.999
    monkeypatch.setattr(detect, "MAX_BOXES", 3)
    best = find(worker, threshold=0.01)
    assert (best.boxes, best.scores) == (every.boxes[:3], every.scores[:3])
    assert best.left_out == len(every.boxes) - 3


def test_what_is_not_there_is_said_with_its_best_score(worker: Painter) -> None:
    """And what was tried."""
    with pytest.raises(NothingFound) as failed:
        find(worker, threshold=1.0)
    said = str(failed.value)
    assert "by 'the car' (best score " in said
    assert ", 'a dog' (best score " in said
    assert "threshold 1 and text_threshold 0.5" in said
    score = max(float(part.split(")")[0]) for part in said.split("score ")[1:])
    assert score == pytest.approx(max(find(worker).scores), abs=0.0051)


def test_a_box_of_which_no_word_is_sure_does_not_count(worker: Painter) -> None:
    with pytest.raises(NothingFound, match="text_threshold 1"):
        find(worker, text_threshold=1.0)


def test_more_words_than_fit(worker: Painter) -> None:
    with pytest.raises(PromptTooLong, match="find has 43 tokens; at most 32 are possible"):
        find(worker, ("the car " * 20,))


def test_they_are_read_once_for_all_jobs(worker: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(worker)
    monkeypatch.setattr(detect.Detectors, "_read", lambda *_: pytest.fail("they are read again"))
    assert find(worker) == first
    assert not any(getattr(message, "stage", "") == "loading" for message in worker.said[-4:])


def test_other_files_are_read_anew(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    worker = Painter(tmp_path)
    first = find(worker)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.SamConfig.from_pretrained(root / "detection" / "masks")
        transformers.SamModel(config).save_pretrained(tmp_path / "detection" / "masks")
    second = find(worker)
    assert second.boxes == first.boxes
    assert (np.asarray(second.mask) != np.asarray(first.mask)).any()


def test_where_memory_is_short_they_go_and_come_again(worker: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that spares work they are the first to leave."""
    expected = find(worker)
    worker.pipelines.free_caches()
    read: list[str] = []
    original = detect.Detectors._read
    monkeypatch.setattr(detect.Detectors, "_read", lambda self, model: read.append(model.name) or original(self, model))
    assert find(worker) == expected
    assert read == ["boxes", "masks"]


def test_a_shortage_while_looking_makes_room_first(worker: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find(worker)
    outlined, short = detect._outlined, [True]

    def scarce(*args: Any) -> Any:
        if short.pop() if short else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outlined(*args)

    monkeypatch.setattr(detect, "_outlined", scarce)
    context = context_of(worker)
    assert worker.pipelines.detectors.find(NOISE, TEXTS, 0.5, 0.5, context) == expected
    (told,) = [message for message in worker.said if isinstance(message, MemoryShort)]
    assert (told.stage, told.rung, told.then) == ("detecting", "beside the pipeline", "alone")
    stages = [message.stage for message in worker.said[worker.said.index(told) :] if isinstance(message, Progress)]
    assert stages[:2] == ["loading", "loading"]  # they had to go, too: on the CPU it is all one memory
    assert [retry["rung"] for retry in context.memory["retries"]] == ["beside the pipeline"]
    monkeypatch.setattr(detect, "_outlined", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match="ran out of memory at 64x48 pixels, in every way that was tried"):
        find(worker)


def test_what_made_room_paints_the_same_afterwards(painter: Painter, tmp_path: Path) -> None:
    job = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
    before = painter.run(tmp_path / "1", **job)
    placement = painter.pipelines.ladder.placement
    assert placement.mode is not None
    painter.pipelines.make_room()
    assert placement.mode is None
    after = painter.run(tmp_path / "2", **job)
    assert after.artifacts[0].pixels_sha256 == before.artifacts[0].pixels_sha256


def test_it_can_be_cancelled_between_its_parts(worker: Painter) -> None:
    for part in (1, 2, 1, 2):  # the first times they are read
        context = context_of(worker)
        told: list[object] = []

        def hear(message: object, told: list[object] = told, part: int = part, context: Context = context) -> None:
            told.append(message)
            if len(told) == part:
                context.interrupted.set()

        worker.hear = hear
        with pytest.raises(Interrupt):
            worker.pipelines.detectors.find(NOISE, TEXTS, 0.5, 0.5, context)
    worker.hear = None
    assert find(worker) == find(worker)


@pytest.mark.parametrize(
    ("missing", "repository"), [("boxes", "IDEA-Research/grounding-dino-tiny"), ("masks", "facebook/sam-vit-base")]
)
def test_without_a_detector_it_says_what_to_fetch(root: Path, tmp_path: Path, missing: str, repository: str) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(
        NoDetector, match=f"no detector of {missing} .*`imagend fetch https://huggingface.co/{repository}`"
    ):
        find(Painter(tmp_path))


@pytest.mark.parametrize(
    ("model", "lost", "says"),
    [
        ("boxes", "preprocessor_config.json", "it lacks preprocessor_config.json"),
        ("masks", "preprocessor_config.json", "it lacks preprocessor_config.json"),
        ("boxes", "*o*.txt tokenizer.json", "it lacks tokenizer.json and vocab.txt"),
    ],
)
def test_a_model_that_is_not_whole_fails_the_job(root: Path, tmp_path: Path, model: str, lost: str, says: str) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for pattern in lost.split():
        for path in (tmp_path / "detection" / model).glob(pattern):
            path.unlink()
    with pytest.raises(BrokenModel, match=says):
        find(Painter(tmp_path))
