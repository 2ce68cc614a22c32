"""What a training has made gets into models/loras/: whole, once, recorded; whoever dies when, whatever lies."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Home, run_until
from disk import KILLED, Recorder, watched
from fakes import FakeExecutor
from scene import dies_at
from weightfiles import LORA, VAE, weights

from imagend import config as configuration
from imagend import records
from imagend.daemon.executor import Heard, StopRequested
from imagend.daemon.loop import Daemon
from imagend.job import Outcome, Ref
from imagend.manifest import Artifact, Safety, Withheld
from imagend.messages import Ended, Run
from imagend.train_spec import Train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
DATA = weights(LORA)
SHA256 = hashlib.sha256(DATA).hexdigest()
TRAIN: dict[str, Any] = {"kind": "train", "prompt": ..., "name": "styles/ink", "dataset": "ink"}
TRAIN |= {"trigger_words": ["ohwx"]}


class Trainer(FakeExecutor):
    """Has trained at once. `lie` may change what lies in the draft then."""

    data = DATA
    lie: Callable[[Path], object] = staticmethod(lambda draft: None)

    def attempt(self, worker: str, run: Run) -> None:
        draft = Path(run.folder)
        (draft / ".checkpoint.safetensors").write_bytes(b"as it was")
        artifacts = []
        for index, plan in enumerate(Train.model_validate(run.spec, strict=False).planned):
            data = self.data if plan.file == "lora.safetensors" else plan.file.encode()
            (draft / plan.file).write_bytes(data)
            told = {"index": index, "file": plan.file, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            artifacts.append(Artifact(**told, seed=None, seconds=0.0, role=plan.role))  # type: ignore[arg-type]
        engine = {"dataset": {"sha256": "d" * 64}, "model": {"name": "shapes-xl", "sha256": "b" * 64}}
        self.lie(draft)
        ended = Ended(job=run.job, outcome=Outcome.SUCCEEDED, artifacts=tuple(artifacts), engine=engine)
        self.mailbox.put(Heard(worker, ended))


@pytest.fixture
def hall(home: Home, tmp_path: Path) -> Home:
    """A home with models of its own, whose client may train."""
    shutil.copytree(REPOSITORY / "models" / "diffusers" / "shapes-xl", tmp_path / "models" / "diffusers" / "shapes-xl")
    (home.config.reference / "datasets" / "ink").mkdir(parents=True)
    path = home.root / "config.yaml"
    text = path.read_text().replace(f"models: {REPOSITORY / 'models'}", "models: models")
    path.write_text(f"{text}reserve_mb: 0\nclients: {{{home.client}: {{train: true}}}}\n")
    return replace(home, config=configuration.load(path))


def train(home: Home, **fields: Any) -> Ref:
    return home.drop_body(home.body(**TRAIN | fields))


def live(home: Home, *refs: Ref, executor: Any = Trainer, **settings: Any) -> None:
    """One life of the daemon, until these have ended."""
    daemon: Daemon = home.daemon(executor, **settings)
    daemon.librarian.look()

    def ended() -> bool:
        if daemon.aftermath.unlisted:
            daemon.librarian.look()
        return all(home.where(ref) == "done" for ref in refs)

    run_until(daemon, ended)
    daemon.mailbox.put(StopRequested())
    daemon.run()
    daemon.spool.close()


def loras(home: Home) -> list[str]:
    """All that lies there, hidden or not."""
    root = home.config.models / "loras"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_it_is_installed_with_its_record_and_can_be_named(hall: Home) -> None:
    live(hall, ref := train(hall, notes="a try"))
    manifest = hall.manifest(ref)
    assert manifest["installed"] == {
        "kind": "lora",
        "name": "styles/ink",
        "sha256": SHA256,
        "files": {"ink.safetensors": SHA256},
        "size": len(DATA),
        "base": "shapes-xl",
    }
    assert "not_installed" not in manifest
    target = hall.config.models / "loras" / "styles" / "ink.safetensors"
    assert target.read_bytes() == DATA
    record = records.read(target)
    assert record is not None
    assert record.trained is not None
    assert (record.trained.job, record.trained.dataset, record.trained.dataset_sha256) == (str(ref), "ink", "d" * 64)
    assert (record.sha256, record.base, record.trigger_words, record.notes) == (SHA256, "shapes-xl", ("ohwx",), "a try")
    assert loras(hall) == ["styles/ink.safetensors", "styles/ink.safetensors.record.json"]
    published = hall.config.outputs / ref.client / ref.id / "lora.safetensors"
    assert published.read_bytes() == DATA
    assert published.stat().st_ino != target.stat().st_ino  # what becomes of one is no matter of the other
    assert not (published.parent / ".checkpoint.safetensors").exists()


def test_it_is_installed_although_a_sample_picture_was_withheld(hall: Home) -> None:
    class Guarded(Trainer):
        def attempt(self, worker: str, run: Run) -> None:
            super().attempt(worker, run)
            told = self.mailbox.get_nowait().message  # type: ignore[union-attr]
            withheld = Withheld(label="nsfw", score=0.9, unsafe=True, index=4, seed=1)
            judged = {"mode": "block", "classifier": "one", "sha256": "0" * 64, "labels": ("nsfw",), "threshold": 0.5}
            safety = Safety(**judged, withheld=(withheld,))  # type: ignore[arg-type]
            (Path(run.folder) / "sample-000010-0.png").unlink()
            update = {"outcome": Outcome.PARTIAL, "artifacts": told.artifacts[:4], "safety": safety}
            self.mailbox.put(Heard(worker, told.model_copy(update=update)))

    live(hall, ref := train(hall, validation_prompts=["a hat"], max_train_steps=10), executor=Guarded)
    manifest = hall.manifest(ref)
    assert (manifest["outcome"], manifest["installed"]["name"]) == ("partial", "styles/ink")


def test_where_the_name_was_taken_meanwhile_it_gets_the_jobs_id(hall: Home) -> None:
    other = hall.config.models / "loras" / "styles" / "ink.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(weights(LORA, {"of": "another"}))
    live(hall, ref := train(hall))
    assert hall.manifest(ref)["installed"]["name"] == f"styles/ink-{ref.id[:8]}"
    assert (other.with_name(f"ink-{ref.id[:8]}.safetensors")).read_bytes() == DATA
    assert other.read_bytes() != DATA
    assert records.read(other) is None


def test_a_full_store_publishes_it_and_says_why_it_is_not_installed(hall: Home) -> None:
    path = hall.root / "config.yaml"
    path.write_text(f"{path.read_text()}train: {{lora_store_gb: 0.000000001}}\n")
    hall = replace(hall, config=configuration.load(path))
    live(hall, ref := train(hall))
    manifest = hall.manifest(ref)
    assert (manifest["outcome"], manifest.get("installed")) == ("succeeded", None)
    assert "train.lora_store_gb" in manifest["not_installed"]
    assert (hall.config.outputs / ref.client / ref.id / "lora.safetensors").read_bytes() == DATA
    assert loras(hall) == []


def test_what_is_no_lora_is_not_installed(hall: Home) -> None:
    class Liar(Trainer):
        data = weights(VAE)

    live(hall, ref := train(hall), executor=Liar)
    assert hall.manifest(ref)["not_installed"] == "it is no LoRA"
    assert loras(hall) == []


@pytest.mark.parametrize("lie", ["other bytes", "a link", "missing"])
def test_what_is_not_as_told_fails_the_job_and_installs_nothing(hall: Home, tmp_path: Path, lie: str) -> None:
    def change(draft: Path) -> None:
        path = draft / "lora.safetensors"
        path.unlink()
        if lie == "other bytes":
            path.write_bytes(DATA[:-1] + b"x")
        elif lie == "a link":
            (tmp_path / "secret").write_bytes(DATA)
            path.symlink_to(tmp_path / "secret")

    class Liar(Trainer):
        pass

    Liar.lie = staticmethod(change)
    live(hall, ref := train(hall), executor=Liar)
    assert hall.manifest(ref)["error"]["message"].startswith("The worker named the output 'lora.safetensors'")
    assert loras(hall) == []


def test_a_models_folder_that_refuses_does_not_fail_the_job(hall: Home) -> None:
    (hall.config.models / "loras").write_text("no folder")
    live(hall, ref := train(hall))
    manifest = hall.manifest(ref)
    assert manifest["outcome"] == "succeeded"
    assert str(hall.config.models / "loras") in manifest["not_installed"]


def test_killed_at_every_operation_it_is_installed_whole_and_once(hall: Home, tmp_path: Path) -> None:
    """Each death is followed by a life that nothing disturbs."""
    kept = tmp_path / "kept"
    live(hall)  # what a first start makes is not of interest
    ref = train(hall)
    recorder = Recorder()
    before = {name: tmp_path / name for name in ("spool", "outputs", "models")}
    kept.mkdir()
    for name, folder in before.items():
        shutil.copytree(folder, kept / name, symlinks=True)

    def restore() -> None:
        for name, folder in before.items():
            shutil.rmtree(folder)
            shutil.copytree(kept / name, folder, symlinks=True)

    with watched(recorder):
        live(hall, ref)
    deaths = 0
    for point in range(0, 3 * len(recorder.ops), 2):
        restore()
        status = dies_at(point, lambda: live(hall, ref))
        assert status in (0, KILLED)
        if status == 0:
            break
        deaths += 1
        live(hall, ref)
        manifest = hall.manifest(ref)
        assert (manifest["outcome"], manifest["installed"]["name"]) == ("succeeded", "styles/ink"), point
        assert loras(hall) == ["styles/ink.safetensors", "styles/ink.safetensors.record.json"], point
        assert (hall.config.models / "loras" / "styles" / "ink.safetensors").read_bytes() == DATA, point
        assert [line["id"] for line in hall.feed()] == [ref.id], point
    assert deaths > 20
    assert os.listdir(kept)  # noqa: PTH208
