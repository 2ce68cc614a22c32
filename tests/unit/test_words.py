"""The pure modules as tables: when to try again, what is painted, names, messages, errors."""

from __future__ import annotations

import json
import os
import string
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import errors, jobfile, messages, schedulers
from imagend.architecture import Architecture, ModelKind
from imagend.config import Config
from imagend.daemon.recipe import complete, seeds
from imagend.daemon.retry import MAX_DELAY_S, restart_delay_s, worth_another_attempt
from imagend.daemon.settings import KeyFile
from imagend.errors import (
    BadKeys,
    DaemonDied,
    ImagendError,
    Interrupt,
    JobFailed,
    OutOfMemory,
    PromptTooLong,
    Unsigned,
    WorkerDied,
    WorkerSilent,
)
from imagend.generate_spec import MAX_PICTURES, Generate
from imagend.job import MAX_SEED, Outcome, Ref
from imagend.manifest import Artifact
from imagend.messages import Cancel, Ended, Failure, Progress, Ready, Run, Stop, decode, encode
from imagend.model_settings import ImageType
from imagend.models import Model
from imagend.signing import Key

REF = Ref("alice", "0123456789abcdef0123")


def model(name: str, native_size: int) -> Model:
    architecture = Architecture(ModelKind.BASE, "diffusers", base="sdxl", native_size=native_size)
    return Model(ModelKind.BASE, name, Path(name), 0, architecture, is_file=False, version=())


# retry.py

DIED, SILENT, DOWN = WorkerDied("gpu0", "SIGSEGV", 1), WorkerSilent("gpu0", 600.0, "silence_limit_s"), DaemonDied(1)
PAINTED_OVER, NO_MEMORY = (
    PromptTooLong("prompt", 5000, 4096),
    OutOfMemory("cuda:0", 2048, 2048, "resident", "None fits"),
)


@pytest.mark.parametrize(
    ("error", "attempt", "max_attempts", "again"),
    [
        (DIED, 1, 3, True),
        (DIED, 2, 3, True),
        (DIED, 3, 3, False),
        (DIED, 4, 3, False),  # max_attempts was lowered meanwhile
        (DIED, 1, 1, False),
        (SILENT, 1, 3, True),
        (DOWN, 2, 3, True),
        (DOWN, 3, 3, False),
        (PAINTED_OVER, 1, 3, False),  # would end the same
        (NO_MEMORY, 1, 3, False),  # the worker has climbed its ladder already
        (errors.Bug("ZeroDivisionError"), 1, 3, False),
    ],
)
def test_only_what_nobody_can_help_is_worth_another_attempt(
    error: ImagendError, attempt: int, max_attempts: int, again: bool
) -> None:
    assert worth_another_attempt(Failure.of(error), attempt, max_attempts) is again


@pytest.mark.parametrize(
    ("deaths", "delay_s"),
    [(0, 0.0), (1, 0.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, MAX_DELAY_S), (100, 60.0), (1000, 60.0)],
)
def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(deaths: int, delay_s: float) -> None:
    assert restart_delay_s(deaths) == delay_s


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_no_restart_waits_longer_than_a_minute_nor_shorter_than_the_one_before(deaths: int) -> None:
    assert 0.0 <= restart_delay_s(deaths) <= restart_delay_s(deaths + 1) <= MAX_DELAY_S


# settings.py: the keys


def test_keys_are_read_when_the_file_is_another_than_last_time(tmp_path: Path) -> None:
    path, key = tmp_path / "allowed_signers", Key.generate().public_line("c")
    keys = KeyFile(path)
    with pytest.raises(BadKeys, match="no such file; `imagend init` writes one"):
        keys.changed()
    assert keys.changed() is None  # said once
    path.write_text(f"alice {key}\n")
    table = keys.changed()
    assert table is not None
    assert table.clients() == {"alice"}
    assert keys.changed() is None
    path.write_text("alice this is no key\n")
    with pytest.raises(BadKeys, match="line 1"):
        keys.changed()
    assert keys.changed() is None
    fresh = tmp_path / "fresh"
    fresh.write_text(f"bobby {key}\n")
    fresh.rename(path)
    table = keys.changed()
    assert table is not None
    assert table.clients() == {"bobby"}
    path.unlink()
    with pytest.raises(BadKeys, match="no such file"):
        keys.changed()


@pytest.mark.parametrize("fault", ["not UTF-8", "a folder", "below a file"])
def test_keys_that_cannot_be_read_are_bad_keys_and_no_crash(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "allowed_signers"
    if fault == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe")
    keys = KeyFile(path / "x" if fault == "below a file" else path)
    with pytest.raises(BadKeys) as caught:
        keys.changed()
    assert str(keys.path) in str(caught.value)
    assert keys.changed() is None  # said once


def test_a_change_that_keeps_inode_size_and_time_is_noticed(tmp_path: Path) -> None:
    """As by `rsync --times --inplace`, or by the chmod that makes an unreadable file readable."""
    path, line = tmp_path / "allowed_signers", f"alice {Key.generate().public_line('c')}\n"
    path.write_bytes(b"\xff" * len(line))
    before, keys = path.stat(), KeyFile(path)
    with pytest.raises(BadKeys):
        keys.changed()
    path.write_text(line)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(keys.changed() or ()) == 1


# recipe.py

XL, SMALL = model("xl", 1024), model("shapes-xl", 128)
TALL = ImageType(width=832, height=1216, prompt_prefix="pre, ", prompt_suffix=", post", negative_prompt="blurry")
CONFIG = Config(image_types={"tall": TALL, "plain": ImageType()})


@pytest.mark.parametrize(
    ("fields", "model", "size"),
    [
        ({}, XL, (1024, 1024)),
        ({}, SMALL, (128, 128)),
        ({"width": 512}, XL, (512, 1024)),
        ({"width": 512, "height": 256}, SMALL, (512, 256)),
        ({"image_type": "tall"}, XL, (832, 1216)),
        ({"image_type": "tall"}, SMALL, (104, 152)),  # the same shape at the model's own scale
        ({"image_type": "tall", "width": 640}, XL, (640, 1216)),
        ({"image_type": "tall"}, model("tiny", 32), (64, 64)),
        ({"image_type": "tall"}, model("huge", 4096), (2048, 2048)),
        ({"image_type": "plain"}, SMALL, (128, 128)),
    ],
)
def test_the_size_is_the_jobs_or_the_presets_or_the_models(
    fields: dict[str, Any], model: Model, size: tuple[int, int]
) -> None:
    spec = complete(Generate(prompt="p", **fields), REF, CONFIG, model)
    assert (spec.width, spec.height) == size


@pytest.mark.parametrize(
    ("fields", "prompt", "negative_prompt"),
    [
        ({}, "p", None),
        ({"image_type": "plain"}, "p", None),
        ({"image_type": "tall"}, "pre, p, post", "blurry"),
        ({"image_type": "tall", "negative_prompt": "red"}, "pre, p, post", "red"),
        ({"image_type": "tall", "negative_prompt": ""}, "pre, p, post", ""),  # said, and empty
        ({"image_type": "gone"}, "p", None),  # config.yaml has changed since the job was accepted
    ],
)
def test_a_preset_goes_around_the_prompt(fields: dict[str, Any], prompt: str, negative_prompt: str | None) -> None:
    spec = complete(Generate(prompt="p", **fields), REF, CONFIG, XL)
    assert (spec.prompt, spec.negative_prompt) == (prompt, negative_prompt)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, (0x01234567,)),  # from the job's id, the same at every attempt
        ({"count": 3}, (0x01234567, 0x01234568, 0x01234569)),
        ({"seed": 0}, (0,)),
        ({"seed": 7, "count": 3}, (7, 8, 9)),
        ({"seeds": (9, 9, 1)}, (9, 9, 1)),
        ({"seeds": (9, 1), "count": 2}, (9, 1)),
        ({"seed": MAX_SEED}, (MAX_SEED,)),
        ({"seed": MAX_SEED - 1, "count": 2}, (MAX_SEED - 1, MAX_SEED)),
    ],
)
def test_one_seed_per_picture(fields: dict[str, Any], found: tuple[int, ...]) -> None:
    assert seeds(Generate(prompt="p", **fields), REF) == found


def test_a_recipe_leaves_nothing_open_and_is_its_own_recipe() -> None:
    spec = Generate(prompt="p", seed=7, count=2, image_type="tall", scheduler="Euler", clip_skip=1)
    full = complete(spec, REF, CONFIG, SMALL)
    assert (full.model, full.seeds, full.seed, full.count, full.image_type) == ("shapes-xl", (7, 8), None, None, None)
    assert (full.scheduler, full.clip_skip, full.num_inference_steps) == ("Euler", 1, 30)
    assert complete(full, REF, CONFIG, SMALL) == full


@given(st.integers(0, 2**32 - 1), st.integers(1, MAX_PICTURES))
@settings(deadline=None)
def test_a_recipe_is_a_job_that_can_be_sent_again(first: int, count: int) -> None:
    """A manifest's spec holds what was painted: put into a job, it must paint the same."""
    full = complete(Generate(prompt="p", count=count), Ref("alice", f"{first:08x}" + "0" * 12), CONFIG, XL)
    now = datetime.now(UTC).isoformat()
    job = {"schema": "imagend.job/v1", "kind": "generate", "issued_at": now, **full.model_dump(mode="json")}
    assert jobfile.parse("alice", json.dumps(job).encode()).spec == full  # type: ignore[union-attr]


# schedulers.py


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_every_name_stands_for_a_class(name: str) -> None:
    choice = schedulers.choose(name)
    assert choice.class_name in schedulers.CLASSES
    assert schedulers.choose(name.upper()) == schedulers.choose(name.lower()) == choice
    with pytest.raises(TypeError):
        choice.overrides["algorithm_type"] = "changed"  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "class_name", "overrides"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("DDIMScheduler", "DDIMScheduler", {}),
        ("DPM++ 2M", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        (
            "DPM++ 2M SDE Karras",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        ("LMS Karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_a_name_means_what_a1111_means(name: str, class_name: str, overrides: dict[str, Any]) -> None:
    for _ in range(2):  # the first leaves no trace
        choice = schedulers.choose(name)
        assert (choice.class_name, dict(choice.overrides)) == (class_name, overrides)


@pytest.mark.parametrize("name", ["", "Euler b", "Euler a Karras", "DDIM Karras", "Karras", "DPM fast", " Euler"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(KeyError):
        schedulers.choose(name)


@pytest.mark.parametrize("name", [name for name in schedulers.NAMES if name not in schedulers.CLASSES])
def test_infotext_names_the_sampler_that_was_asked_for(name: str) -> None:
    choice = schedulers.choose(name)
    config = {"beta_start": 0.1, **choice.overrides}
    assert schedulers.sampler_name(choice.class_name, config) == name.removesuffix(" Karras")


def test_infotext_names_the_class_where_a1111_has_no_name() -> None:
    assert schedulers.sampler_name("DEISMultistepScheduler", {}) == "DEISMultistepScheduler"


# messages.py

ARTIFACT = Artifact(
    index=0, file="0000.png", width=8, height=8, size=3, sha256="a", pixels_sha256="b", seed=MAX_SEED, seconds=0.5
)
MESSAGES = [
    Run(job=REF, kind="generate", spec={"prompt": "é\n\u2028🔴", "seeds": [1]}, folder="/tmp/x"),
    Cancel(job=REF),
    Stop(),
    Ready(device="cuda:0", versions={"torch": "2"}),
    Progress(job=REF, stage="denoise", picture=1, pictures=2, step=3, steps=30),
    Ended(job=REF, outcome=Outcome.SUCCEEDED, artifacts=(ARTIFACT,), timings={"denoise": 1.5}, engine={"a": [1]}),
    Ended(job=REF, outcome=Outcome.FAILED, failure=Failure.of(NO_MEMORY)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_a_message_is_one_line_and_comes_back_as_it_was(message: messages.Message) -> None:
    line = encode(message)
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    back = decode(line)
    assert back == message
    assert type(back) is type(message)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b'{"type":"shutdown"}',
        b'{"type":"stop","now":true}',
        b'{"type":"cancel"}',
        b'{"type":"cancel","job":["alice"]}',
        b'{"type":"cancel","job":["alice",7]}',
        b'{"type":"ready","device":"cpu","versions":{"torch":2}}',
        b'{"type":"progress","job":["a","b"],"stage":"x","step":"1"}',
        b'{"type":"ended","job":["a","b"],"outcome":"tired"}',
        b'{"type":"ended","job":["a","b"],"outcome":"failed","timings":{"x":NaN}}',
        b'{"type":"ended","job":["a","b"],"outcome":"failed","timings":{"x":1e999}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_what_is_no_message_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="validation error"):
        decode(line)


@given(st.binary())
@settings(deadline=None)
def test_any_bytes_are_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="validation error"):
        decode(line)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MESSAGES[1].job = Ref("bob", "x")  # type: ignore[union-attr, misc]


@pytest.mark.parametrize(("error", "again"), [(DIED, True), (DOWN, True), (NO_MEMORY, False), (PAINTED_OVER, False)])
def test_a_failure_is_an_error_without_the_exception(error: ImagendError, again: bool) -> None:
    failure = Failure.of(error)
    assert failure.error.model_dump() == error.envelope()
    assert failure.try_again is again


# errors.py


def every_error() -> list[type[ImagendError]]:
    found, waiting = [], [ImagendError]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting += cls.__subclasses__()
    return sorted(found, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_an_error_fills_its_docstring_and_shows_what_clients_expect(cls: type[ImagendError]) -> None:
    fields = [name for _, name, _, _ in string.Formatter().parse(" ".join((cls.__doc__ or "").split())) if name == ""]
    error = cls(*range(7, 7 + len(fields)), detail={"a": 1})
    assert all(str(number) in str(error) for number in range(7, 7 + len(fields)))
    assert str(error) == " ".join(str(error).split())  # one line
    envelope = {"code": cls.code, "message": str(error), "detail": {"a": 1}, "status": cls.status}
    assert error.envelope() == envelope
    assert isinstance(json.dumps(envelope), str)


def test_strangers_text_in_an_error_is_not_a_format() -> None:
    assert str(errors.InvalidJob("{0.__class__} {} {x}")) == "{0.__class__} {} {x}"
    assert "{y}" in str(errors.UnknownModel("model", "{y}", "none"))


def test_unsigned_shows_the_ending_that_is_missing() -> None:
    assert ',"signature":"<base64>"} as `imagend submit` writes them' in str(Unsigned())


def test_an_interrupt_passes_those_who_catch_errors() -> None:
    assert not issubclass(Interrupt, Exception)
    assert not issubclass(JobFailed, errors.TryAgain)
