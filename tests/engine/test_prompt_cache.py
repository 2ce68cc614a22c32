"""The prompt cache: a hit is the same bits without running a text encoder; anything that changes them is no hit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_conftest import Painter
from prompts import BOTH, LONG, made, same, splitter

from imagend.errors import PromptTooLong
from imagend.prompt_tree import PromptSyntax
from imagend.worker.encode import encode
from imagend.worker.prompt_cache import PromptCache

A1111, COMPEL, PLAIN = PromptSyntax.A1111, PromptSyntax.COMPEL, PromptSyntax.PLAIN
ROOM = 64 * 2**20


@pytest.fixture(scope="module")
def pipe(painter: Painter) -> Any:
    return painter.pipelines.get("shapes-xl", lambda: None)


@pytest.fixture
def runs(pipe: Any) -> Iterator[list[str]]:
    """A text encoder's name for each time that it runs."""
    run: list[str] = []
    encoders = {"one": pipe.text_encoder, "two": pipe.text_encoder_2}
    hooks = [
        encoder.register_forward_pre_hook(lambda *_, name=name: run.append(name)) for name, encoder in encoders.items()
    ]
    yield run
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("negative", [None, "", "blurry", LONG])
@pytest.mark.parametrize("prompt", ["a (red)1.3 circle", "a (red)0.3 circle", LONG + "zorp"])
def test_a_hit_has_the_bits_of_a_miss(pipe: Any, runs: list[str], prompt: str, negative: str | None) -> None:
    cache = PromptCache(ROOM)
    arguments = pipe, prompt, negative, COMPEL, 1
    without = encode(*arguments, split=BOTH)
    assert same(without, encode(*arguments, split=BOTH, cache=cache))
    runs.clear()
    hit = encode(*arguments, split=BOTH, cache=cache)
    assert same(without, hit)
    assert runs == []


def test_the_negative_prompt_of_many_jobs_is_encoded_once(pipe: Any, runs: list[str]) -> None:
    cache = PromptCache(ROOM)
    encode(pipe, "a red circle", LONG, PLAIN, None, cache=cache)
    runs.clear()
    encode(pipe, "a blue circle", LONG, PLAIN, None, cache=cache)
    assert runs == ["one", "two", "two"]  # the new prompt, and its pooled embedding; not even the filling


def test_what_is_given_out_may_be_changed(pipe: Any) -> None:
    cache = PromptCache(ROOM)
    arguments = pipe, "a red circle", "", PLAIN, None
    before = encode(*arguments)
    for _ in range(3):
        made = encode(*arguments, cache=cache)
        assert same(before, made)
        for tensor in made.values():
            tensor.zero_()


def test_the_filling_is_of_the_layer_of_what_it_fills(pipe: Any) -> None:
    cache = PromptCache(ROOM)
    for prompt, negative in (("a red circle", LONG), (LONG, "a red circle")):
        arguments = pipe, prompt, negative, PLAIN, 1
        assert same(encode(*arguments), encode(*arguments, cache=cache))


OTHERS: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({}, ("a zorp circle", "", COMPEL, None)),
    ({}, ("a (red)1.2 circle", "", A1111, None)),
    ({}, ("a (red)1.2 circle", "", COMPEL, 1)),
    ({"encoders": "other"}, ("a (red)1.2 circle", "", COMPEL, None)),
    ({"split": splitter(made("red", 1, 5))}, ("a (red)1.2 circle", "", COMPEL, None)),
    ({"split": splitter(made("red", 1, 6))}, ("a (red)1.2 circle", "", COMPEL, None)),
    ({}, ("red", "", COMPEL, None)),
    ({"split": splitter(made("red", 1, 5))}, ("red", "", COMPEL, None)),
    ({"split": splitter(made("red", 1, 6))}, ("red", "", COMPEL, None)),
    ({"split": splitter(made("circle", 1, 5))}, ("a (red)1.2 circle", "", COMPEL, None)),
]


def test_whatever_changes_the_bits_is_no_hit(pipe: Any, runs: list[str]) -> None:
    cache = PromptCache(ROOM)
    encode(pipe, "a (red)1.2 circle", "", COMPEL, None, cache=cache)
    for options, arguments in OTHERS:
        runs.clear()
        ours = encode(pipe, *arguments, cache=cache, **options)
        assert runs, (options, arguments)
        assert same(ours, encode(pipe, *arguments, **options))


def test_a_refusal_is_not_kept(pipe: Any) -> None:
    cache = PromptCache(ROOM)
    for _ in range(2):
        with pytest.raises(PromptTooLong):
            encode(pipe, "a", "red " * 5000, PLAIN, None, cache=cache)
        assert cache.bytes == 0


def test_it_stays_within_its_limit_and_forgets_the_longest_unused() -> None:
    cache = PromptCache(1000)
    for name in "abc":
        cache.keep(name, (torch.ones(40), torch.ones(40)))  # 320 bytes
    assert cache.find("a") is not None
    cache.keep("d", (torch.ones(80),))
    assert [name for name in "abcd" if name in cache] == ["a", "c", "d"]
    assert cache.bytes == 960
    cache.keep("d", (torch.ones(10),))
    assert cache.bytes == 680
    cache.keep("e", (torch.ones(251),))  # larger than all of it
    assert [name for name in "abcde" if name in cache] == ["a", "c", "d"]
    cache.keep("f", (torch.ones(250),))
    assert [name for name in "abcdef" if name in cache] == ["f"]
    assert cache.bytes == 1000


def test_a_limit_of_nothing_keeps_nothing(pipe: Any) -> None:
    cache = PromptCache(0)
    encode(pipe, "a red circle", LONG, PLAIN, None, cache=cache)
    assert cache.bytes == 0


def test_jobs_share_it(painter: Painter, runs: list[str], tmp_path: Path) -> None:
    job = {"prompt": "a red circle on a yellow background", "negative_prompt": LONG, "num_inference_steps": 1}
    first = painter.run(tmp_path / "a", **job, seed=3)
    assert "two" in runs
    runs.clear()
    second = painter.run(tmp_path / "b", **job, seed=3)
    assert runs == []
    assert first.artifacts[0].pixels_sha256 == second.artifacts[0].pixels_sha256


def test_a_base_whose_text_encoder_has_changed_is_another_one(
    painter: Painter, runs: list[str], tmp_path: Path
) -> None:
    """Also where all of it is one file: then no name says what in it is a text encoder."""
    pipelines = painter.pipelines
    painter.run(tmp_path, prompt="a red circle", num_inference_steps=1)
    before = pipelines.encoders()
    base = pipelines.switch.base
    assert base is not None
    model = base.model
    try:
        for changed in (replace(model, version=("other",)), replace(model, path=tmp_path / "one.safetensors")):
            pipelines.switch.base = replace(base, model=changed)
            assert pipelines.encoders() != before
    finally:
        pipelines.switch.base = base
    assert pipelines.encoders() == before
