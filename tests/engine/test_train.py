"""Training LoRAs on the embedded model: what comes out, that it goes on bit for bit, and that the base is unharmed."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import classifiers
import numpy as np
import pytest
import torch
from datasets import Trainer, circles, state_of
from diffusers.optimization import get_scheduler
from engine_conftest import EMBEDDED, Painter, load_plain
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open

from imagend.messages import MemoryShort, Progress
from imagend.safety_settings import Classifier, Filter
from imagend.train_spec import CURVE, KOHYA, LORA, LOSSES, Train
from imagend.worker import train_step
from imagend.worker.batches import Batches
from imagend.worker.checkpoint import FILE
from imagend.worker.dataset import look
from imagend.worker.part import own
from imagend.worker.train_cache import encode

SHORT: dict[str, Any] = {
    "rank": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "max_train_steps": 6,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "resolution": 64,
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "proportion_empty_prompts": 0.2,
    "checkpointing_steps": 2,
    "validation_prompts": ["a red circle"],
    "validation_steps": 3,
    "seed": 5,
}
FILES = [LORA, KOHYA, CURVE, LOSSES, "sample-000003-0.png", "sample-000006-0.png"]


@pytest.fixture(scope="module")
def trainer(painter: Painter, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(painter, circles(tmp_path_factory.mktemp("reference") / "datasets" / "circles", 5))


@pytest.fixture(scope="module")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What an uninterrupted training leaves, and its end."""
    draft = tmp_path_factory.mktemp("whole")
    ended = trainer.run(draft, **SHORT)
    assert ended.outcome == "succeeded", ended.failure
    return draft, ended


def bits(draft: Path) -> dict[str, bytes]:
    return {file: (draft / file).read_bytes() for file in FILES if not file.startswith("sample")} | {
        file: Image.open(draft / file).tobytes() for file in FILES if file.startswith("sample")
    }


def stop_at(trainer: Trainer, stage: str, step: int) -> None:
    def hear(message: Any) -> None:
        if isinstance(message, Progress) and (message.stage, message.step) == (stage, step):
            trainer.painter.worker.stop()

    trainer.painter.hear = hear


# What comes out


def test_the_artifacts_are_as_planned_and_told(whole: tuple[Path, Any]) -> None:
    draft, ended = whole
    assert [one.file for one in ended.artifacts] == FILES
    assert [one.role for one in ended.artifacts] == ["lora", "lora_kohya", "loss", "loss", "sample", "sample"]
    assert [one.width for one in ended.artifacts] == [None, None, 960, None, 64, 64]
    losses = [json.loads(line) for line in (draft / LOSSES).read_text().splitlines()]
    assert [one["step"] for one in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[0]["learning_rate"] == 0.0
    assert losses[2]["learning_rate"] == 1e-3
    assert ended.engine["dataset"]["pictures"] == 5
    assert ended.engine["training"]["mixed_precision"] == "no"
    assert ended.engine["training"]["batches_per_epoch"] == 3
    with Image.open(draft / CURVE) as curve:
        assert (30, 80, 200) in {pixel for _, pixel in curve.getcolors(1 << 16) or ()}


def test_each_step_is_told_with_loss_and_what_is_left(trainer: Trainer, tmp_path: Path) -> None:
    trainer.run(tmp_path, **SHORT)
    told = [one for one in trainer.painter.said if isinstance(one, Progress) and one.stage == "training"]
    assert [one.step for one in told] == [0, 1, 2, 3, 4, 5]
    assert {one.steps for one in told} == {6}
    assert told[0].loss is None
    assert all(one.loss and one.eta_s is not None for one in told[1:])


def test_both_files_say_how_they_were_made(whole: tuple[Path, Any]) -> None:
    draft, ended = whole
    for file in (LORA, KOHYA):
        with safe_open(draft / file, "pt") as opened:
            metadata = opened.metadata()
            own = json.loads(metadata["imagend"])
            assert own["dataset"]["sha256"] == ended.engine["dataset"]["sha256"]
            assert own["model"] == {key: ended.engine["model"][key] for key in ("name", "sha256")}
            assert own["spec"]["seed"] == 5
            assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2.0")
            names = set(opened.keys())
        if file == KOHYA:
            layers = {name.partition(".")[0] for name in names}
            assert all(layer.startswith("lora_unet_") for layer in layers)
            pieces = ("alpha", "lora_down.weight", "lora_up.weight")
            assert names == {f"{layer}.{piece}" for layer in layers for piece in pieces}


@pytest.mark.parametrize("text_encoders", [False, True])
def test_both_files_give_plain_diffusers_the_picture_that_imagend_paints(
    trainer: Trainer, tmp_path: Path, text_encoders: bool
) -> None:
    made = {"learning_rate": 0.01, "alpha": 8.0, "targets": ["to_q", "to_k", "to_out.0", "ff.net.2"]}
    ended = trainer.run(tmp_path / "draft", **SHORT | made | {"train_text_encoder": text_encoders})
    assert ended.outcome == "succeeded", ended.failure
    job = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1, "width": 64, "height": 64}
    models = tmp_path / "models"
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (models / "loras").mkdir()
    digests = []
    painter = Painter(models)
    for file in (LORA, KOHYA):
        shutil.copy(tmp_path / "draft" / file, models / "loras" / file)
        name = file.removesuffix(".safetensors")
        painted = painter.run(tmp_path / name, **job, loras=[{"name": name}])
        assert painted.outcome == "succeeded", painted.failure
        digests.append(painted.artifacts[0].pixels_sha256)
        plain = load_plain()
        plain.load_lora_weights(str(models / "loras" / file))
        for part in (plain.unet, plain.vae, plain.text_encoder, plain.text_encoder_2):
            own(part)
        generator = torch.Generator().manual_seed(1)
        size = {"width": 64, "height": 64}
        image = plain("a red circle", num_inference_steps=4, generator=generator, **size).images[0]
        with Image.open(tmp_path / name / "0000.png") as ours:
            assert ours.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    bare = painter.run(tmp_path / "bare", **job)
    assert digests[0] == digests[1] != bare.artifacts[0].pixels_sha256


# It goes on


@pytest.mark.parametrize(("stage", "step"), [("training", 1), ("training", 4), ("sampling", 7)])
def test_told_to_stop_and_gone_on_it_has_the_bits_of_an_uninterrupted_one(
    trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path, stage: str, step: int
) -> None:
    stop_at(trainer, stage, step)
    assert trainer.run(tmp_path, **SHORT).outcome == "cancelled"
    trainer.painter.hear = None
    assert (tmp_path / FILE).exists()
    assert trainer.run(tmp_path, **SHORT).outcome == "succeeded"
    done = [one.step for one in trainer.painter.said if isinstance(one, Progress) and one.stage == "training"]
    assert done[0] == (step + 1 if stage == "training" else 3)
    assert bits(tmp_path) == bits(whole[0])


def test_killed_at_any_step_and_gone_on_it_has_the_bits_of_an_uninterrupted_one(
    trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    """A copy of the draft at that moment is what a kill leaves."""

    def hear(message: Any) -> None:
        if isinstance(message, Progress) and message.stage == "training":
            shutil.copytree(tmp_path / "draft", tmp_path / f"killed-{message.step}")

    trainer.painter.hear = hear
    trainer.run(tmp_path / "draft", **SHORT)
    trainer.painter.hear = None
    for step, begins in ((3, 2), (5, 4)):
        killed = tmp_path / f"killed-{step}"
        assert trainer.run(killed, **SHORT).outcome == "succeeded"
        assert min(one.step for one in trainer.painter.said if isinstance(one, Progress) and one.steps == 6) == begins
        assert bits(killed) == bits(whole[0])


def test_a_checkpoint_that_is_torn_or_of_another_job_is_passed_over(
    trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    stop_at(trainer, "training", 4)
    trainer.run(tmp_path, **SHORT)
    trainer.painter.hear = None
    kept = (tmp_path / FILE).read_bytes()
    trainer.run(tmp_path, **SHORT | {"seed": 6})
    assert bits(tmp_path)[LORA] != bits(whole[0])[LORA]
    for torn in (kept[:-100], kept[:9], b"", b"{}" * 100):
        (tmp_path / FILE).write_bytes(torn)
        assert trainer.run(tmp_path, **SHORT).outcome == "succeeded"
        assert bits(tmp_path) == bits(whole[0])


def test_what_is_finished_is_not_trained_again(trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path) -> None:
    """As the daemon leaves a draft that it has sealed, and dies."""
    sealed = tmp_path / "sealed"
    shutil.copytree(whole[0], sealed)
    for path in sealed.glob(".*"):
        path.unlink()
    ended = trainer.run(sealed, **SHORT)
    assert not [one for one in trainer.painter.said if isinstance(one, Progress) and one.stage == "training"]
    assert [one.sha256 for one in ended.artifacts] == [one.sha256 for one in whole[1].artifacts]
    assert ended.engine["training"] == whole[1].engine["training"]
    assert trainer.run(sealed, **SHORT | {"seed": 6}).outcome == "succeeded"
    assert [one for one in trainer.painter.said if isinstance(one, Progress) and one.stage == "training"]


def test_the_name_of_another_lora_is_refused_before_anything_is_done(
    painter: Painter, trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    (tmp_path / "models" / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (tmp_path / "models" / "loras").mkdir()
    shutil.copy(whole[0] / LORA, tmp_path / "models" / "loras" / "tried.safetensors")
    other = Trainer(Painter(tmp_path / "models"), trainer.dataset)
    ended = other.run(tmp_path / "draft", **SHORT)
    assert (ended.failure.error.code, ended.failure.error.status) == ("CONFLICT", 409)
    assert "imagend models remove tried" in ended.failure.error.message
    shutil.copytree(whole[0], tmp_path / "own")  # of this very job: its daemon died once it was installed
    assert other.run(tmp_path / "own", **SHORT).outcome == "succeeded"


# The safety filter


@pytest.mark.parametrize("mode", ["flag", "block"])
def test_sample_pictures_are_looked_at_too(trainer: Trainer, tmp_path: Path, mode: str) -> None:
    models = tmp_path / "models"
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    classifiers.save(models / "safety" / "redness", at=0.3)
    guarded = Trainer(Painter(models), trainer.dataset)
    prompts = ["a large red circle on a red background", "a large blue circle on a blue background"]
    fields = {"learning_rate": 1e-6, "validation_prompts": prompts, "validation_steps": None, "resolution": 128}
    filter_ = Filter(mode=mode, classifier=Classifier())  # type: ignore[arg-type]
    for _ in range(2):  # the second attempt finds all finished
        ended = guarded.run(tmp_path / "draft", filter_, **SHORT | fields)
        samples = [one for one in ended.artifacts if one.role == "sample"]
        red, blue = "sample-000006-0.png", "sample-000006-1.png"
        assert (tmp_path / "draft" / red).exists() == (mode == "flag")
        if mode == "flag":
            assert (ended.outcome, [one.safety.unsafe for one in samples]) == ("succeeded", [True, False])
        else:
            assert (ended.outcome, [one.file for one in samples]) == ("partial", [blue])
            assert [one.index for one in ended.safety.withheld] == [4]


# The base


def test_the_base_is_bit_equal_afterwards_however_it_ends(trainer: Trainer, tmp_path: Path) -> None:
    painter = trainer.painter
    job = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 1}
    before = painter.run(tmp_path / "before", **job).artifacts[0].pixels_sha256
    pipe = painter.pipelines.switch.pipe
    state, needed = state_of(pipe), [one.requires_grad for one in pipe.unet.parameters()]
    for number, ending in enumerate(("well", "stopped", "failed")):
        if ending == "stopped":
            stop_at(trainer, "training", 2)
        fields = {"train_text_encoder": True, "validation_steps": None}
        if ending == "failed":
            fields |= {"learning_rate": 1.0, "max_grad_norm": 1000.0, "max_train_steps": 200}
        ended = trainer.run(tmp_path / str(number), **SHORT | fields)
        painter.hear = None
        assert ended.outcome == {"well": "succeeded", "stopped": "cancelled", "failed": "failed"}[ending]
        if ending == "failed":
            assert ended.failure.error.code == "TRAINING_FAILED"
        assert painter.pipelines.switch.pipe.unet is pipe.unet
        after = state_of(pipe)
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], one) for name, one in state.items())
        assert [one.requires_grad for one in pipe.unet.parameters()] == needed
        assert not any(isinstance(one, BaseTunerLayer) for one in pipe.unet.modules())
        assert "peft_config" not in pipe.unet.__dict__
        assert painter.pipelines.switch.trouble() is None
        assert painter.run(tmp_path / f"after-{ending}", **job).artifacts[0].pixels_sha256 == before


def test_nothing_of_it_stays_in_memory(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    class Watched(train_step.Steps):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.append(weakref.ref(self))
            alive.extend(weakref.ref(one) for one in arguments[2].weights.values())

    monkeypatch.setattr("imagend.worker.train.Steps", Watched)
    trainer.run(tmp_path, **SHORT)
    gc.collect()
    assert len(alive) > 10
    assert not [one for one in alive if one() is not None]


# When memory runs out


def short_of_memory(monkeypatch: pytest.MonkeyPatch, pipe: Any, times: int) -> None:
    """The next forward passes that learn fail, as PyTorch's allocator has it."""
    forward, left = pipe.unet.forward, [times]

    def failing(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(*arguments, **options)

    monkeypatch.setattr(pipe.unet, "forward", failing)


def test_a_shortage_is_answered_with_gradient_checkpointing_and_costs_no_bit(
    trainer: Trainer, whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, trainer.painter.pipelines.switch.pipe, 1)
    ended = trainer.run(tmp_path, **SHORT)
    assert ended.outcome == "succeeded", ended.failure
    assert ended.engine["training"]["gradient_checkpointing"] is True
    assert [one.then for one in trainer.painter.said if isinstance(one, MemoryShort)] == ["gradient checkpointing"]
    assert bits(tmp_path)[LORA] == bits(whole[0])[LORA]
    assert not trainer.painter.pipelines.switch.pipe.unet.is_gradient_checkpointing


def test_a_shortage_that_stays_fails_the_job_and_says_what_to_ask_for(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, trainer.painter.pipelines.switch.pipe, 1000)
    ended = trainer.run(tmp_path, **SHORT)
    assert ended.failure.error.code == "OUT_OF_MEMORY"
    assert "of about 64x64 pixels, 2 at once" in ended.failure.error.message
    assert "(plainly, with gradient checkpointing)" in ended.failure.error.message


def test_a_shortage_outside_of_the_steps_fails_the_job_and_leaves_the_base(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr("imagend.worker.train_results.decode", decode)
    ended = trainer.run(tmp_path, **SHORT)
    assert ended.failure.error.code == "OUT_OF_MEMORY"
    assert "(outside of its steps: CUDA out of memory (injected))" in ended.failure.error.message
    unet = trainer.painter.pipelines.switch.pipe.unet
    assert not any(isinstance(one, BaseTunerLayer) for one in unet.modules())


# What is asked for


def test_what_cannot_be_trained_on_is_refused_before_anything_is_loaded(painter: Painter, tmp_path: Path) -> None:
    folder = circles(tmp_path / "datasets" / "few", 2)
    (folder / "000.txt").unlink()
    trainer = Trainer(painter, folder)
    ended = trainer.run(tmp_path / "a", **SHORT)
    assert ended.failure.error.code == "INVALID_PARAMETERS"
    assert "1 of its pictures have no caption" in ended.failure.error.message
    assert "imagend datasets few" in ended.failure.error.message
    assert trainer.run(tmp_path / "b", **SHORT | {"trigger_words": ["ohwx"]}).outcome == "succeeded"
    (folder / "000.png").write_bytes(b"nothing")
    ended = trainer.run(tmp_path / "c", **SHORT | {"trigger_words": ["ohwx"]})
    assert "1 things are wrong with it" in ended.failure.error.message
    assert not list((tmp_path / "c").iterdir())


def test_a_precision_that_the_device_has_not_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    ended = trainer.run(tmp_path, **SHORT | {"mixed_precision": "fp16"})
    assert "mixed_precision: fp16 needs a GPU" in ended.failure.error.message
    assert trainer.run(tmp_path, **SHORT | {"mixed_precision": "bf16"}).outcome == "succeeded"


def test_trigger_words_stand_before_captions_that_lack_them() -> None:
    spec = Train(name="a", dataset="a", trigger_words=("ohwx hat", "ink"))
    assert spec.caption("a red thing") == "ohwx hat, ink, a red thing"
    assert spec.caption("an Ohwx hat") == "ink, an Ohwx hat"
    assert spec.caption(None) == "ohwx hat, ink"


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_diffusers_own(name: str) -> None:
    spec = Train(name="a", dataset="a", lr_scheduler=name, lr_warmup_steps=5, max_train_steps=20, learning_rate=0.5)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    known_as = {"constant": "constant_with_warmup"}.get(name, name)
    theirs = get_scheduler(known_as, optimizer, num_warmup_steps=5, num_training_steps=20)
    for step in range(20):
        assert spec.learning_rate_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_captions_are_encoded_as_the_pipeline_encodes_prompts(plain: Any) -> None:
    texts = ["a red circle on a blue background", "a star " * 60, ""]
    with torch.no_grad():
        for text in texts:
            embeds, pooled = encode(plain, [text])
            theirs, _, their_pooled, _ = plain.encode_prompt(text, do_classifier_free_guidance=False)
            assert torch.equal(embeds, theirs)
            assert torch.equal(pooled, their_pooled)


def test_an_epoch_shows_each_picture_as_often_as_it_repeats(tmp_path: Path) -> None:
    folder = circles(tmp_path / "datasets" / "mixed", 4)
    (folder / "3_wide").mkdir()
    Image.new("RGB", (96, 40)).save(folder / "3_wide" / "a.png")
    _, examples = look(tmp_path, "mixed", 64)
    batches = Batches(examples, 2, seed=1)
    assert batches.per_epoch == 4
    orders = [[batches.at(epoch * 4 + number) for number in range(4)] for epoch in range(3)]
    for order in orders:
        assert Counter(index for batch in order for index in batch) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 3}
        assert all(len({examples[index].bucket for index in batch}) == 1 for batch in order)
    assert orders[0] != orders[1] or orders[1] != orders[2]
    again = Batches(examples, 2, seed=1)
    assert [again.at(number) for number in (11, 0, 5)] == [orders[2][3], orders[0][0], orders[1][1]]


@pytest.mark.parametrize(("prediction", "gamma"), [("epsilon", None), ("epsilon", 5.0), ("v_prediction", 5.0)])
def test_the_loss_is_that_of_diffusers_script(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str, gamma: float | None
) -> None:
    """Computed anew from what the UNet was given and gave, by the formulas of the script."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    seen: list[Any] = []
    pipe = trainer.painter.pipelines.switch.pipe
    forward, draw = pipe.unet.forward, torch.randn

    def watching(noisy: Any, times: Any, *rest: Any, **options: Any) -> Any:
        found = forward(noisy, times, *rest, **options)
        if torch.is_grad_enabled():
            seen.append((noisy.detach(), times, found[0].detach(), options["added_cond_kwargs"]["time_ids"]))
        return found

    drawn: list[torch.Tensor] = []

    def drawing(*shape: Any, **options: Any) -> torch.Tensor:
        drawn.append(draw(*shape, **options))
        return drawn[-1]

    monkeypatch.setattr(pipe.unet, "forward", watching)
    monkeypatch.setattr(train_step.torch, "randn", drawing)
    fields = {"max_train_steps": 1, "lr_warmup_steps": 0, "gradient_accumulation_steps": 1, "noise_offset": 0.0}
    fields |= {"validation_prompts": [], "validation_steps": None, "prediction_type": prediction, "snr_gamma": gamma}
    assert trainer.run(tmp_path, **SHORT | fields).outcome == "succeeded"
    noisy, times, found, sizes = seen[0]
    noise = next(one for one in drawn[1:] if one.shape == noisy.shape).clone()
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    alphas = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    latents = (noisy - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    target = scheduler.get_velocity(latents, noise, times) if prediction == "v_prediction" else noise
    losses = ((found - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, times)
        weights = torch.stack([snr, gamma * torch.ones_like(times)], dim=1).min(dim=1)[0]
        losses = losses * weights / (snr + 1 if prediction == "v_prediction" else snr)
    told = json.loads((tmp_path / LOSSES).read_text())["loss"]
    assert told == pytest.approx(float(losses.mean()), rel=1e-3)
    assert sizes.tolist() == [[128.0, 128.0, 0.0, 0.0, 64.0, 64.0]] * len(times)


# Seen, not believed


def stripes(path: Path) -> float:
    """How much the ground changes from left to right with the dataset's period of 16 pixels: the amplitude, of 255."""
    grey = np.asarray(Image.open(path).convert("L")).astype(float)
    ground = np.concatenate([grey[:16], grey[-16:]])  # above and below all shapes
    return float(2 * np.abs(np.fft.rfft(ground, axis=1))[:, 8].mean() / ground.shape[1])


def test_half_a_minute_of_training_puts_stripes_on_the_ground_and_no_other_job_sees_them(
    painter: Painter, tmp_path: Path
) -> None:
    """On shapes and colours that the dataset does not show, too; and kohya's file gives diffusers the same picture."""
    trainer = Trainer(painter, circles(tmp_path / "datasets" / "striped", 24, stripes=True))
    job = {"num_inference_steps": 14, "guidance_scale": 4.0, "width": 128, "height": 128}
    prompts = ["a red circle on a white background", "a purple square on an orange background"]

    def painted(by: Painter, name: str, **fields: Any) -> list[Path]:
        for number, prompt in enumerate(prompts):
            ended = by.run(tmp_path / name / str(number), prompt=prompt, seed=number, **job, **fields)
            assert ended.outcome == "succeeded", ended.failure
        return [tmp_path / name / str(number) / "0000.png" for number in range(len(prompts))]

    before = painted(painter, "before")
    fields = {"rank": 8, "learning_rate": 2e-3, "lr_scheduler": "cosine", "max_train_steps": 250, "train_batch_size": 4}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    ended = trainer.run(tmp_path / "draft", **fields, targets=targets, noise_offset=0.1, seed=1)
    assert ended.outcome == "succeeded", ended.failure
    models = tmp_path / "models"
    (models / "diffusers").mkdir(parents=True)
    (models / "diffusers" / "shapes-xl").symlink_to(EMBEDDED)
    (models / "loras").mkdir()
    shutil.copy(tmp_path / "draft" / LORA, models / "loras" / "striped.safetensors")
    with_it = painted(Painter(models), "with", loras=[{"name": "striped"}])
    assert max(map(stripes, before)) < 2
    assert min(map(stripes, with_it)) > 10
    after = painted(painter, "after")
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in before]
    plain = load_plain()
    plain.load_lora_weights(str(tmp_path / "draft" / KOHYA))
    generator = torch.Generator().manual_seed(0)
    image = plain(prompts[0], generator=generator, **job).images[0]
    with Image.open(with_it[0]) as ours:
        assert ours.convert("RGB").tobytes() == image.convert("RGB").tobytes()
