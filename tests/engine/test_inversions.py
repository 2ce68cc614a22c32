"""Textual inversions: the bits of diffusers' load_textual_inversion, however it is written, and nothing left over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_conftest import EMBEDDED, StableDiffusionXLPipeline
from prompts import BOTH, LONG, ONE, THREE, WIDTHS, by_diffusers, made, same, splitter

from imagend.prompt_tree import PromptSyntax
from imagend.worker.encode import encode

A1111, COMPEL, PLAIN = PromptSyntax.A1111, PromptSyntax.COMPEL, PromptSyntax.PLAIN


def load() -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load()


@pytest.fixture(scope="module")
def inverted() -> Any:
    """diffusers, with both of them loaded as its documentation says for SDXL."""
    pipe = load()
    for inversion in (ONE, THREE):
        for number, (encoder, tokenizer) in enumerate(
            [(pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)]
        ):
            pipe.load_textual_inversion(
                inversion.vectors[number], token=inversion.name, text_encoder=encoder, tokenizer=tokenizer
            )
    return pipe


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("syntax", PromptSyntax)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("zorp", "zorp"),
        ("a zorp circle", "a zorp circle"),
        ("a Zorp, red", "a zorp, red"),
        ("a embedding:zorp, red", "a zorp, red"),
        ("glimb", "glimb"),
        ("red glimb on zorp, zorp blue embedding:glimb.pt", "red glimb on zorp, zorp blue glimb"),
        ("red, " * 36 + "glimb", "red, " * 36 + "glimb"),
    ],
)
def test_a_name_gives_diffusers_bits(
    pipe: Any, inverted: Any, ours: str, theirs: str, syntax: PromptSyntax, clip_skip: int | None
) -> None:
    found = encode(pipe, ours, "glimb, zorp", syntax, clip_skip, split=BOTH)
    assert same(found, by_diffusers(inverted, theirs, "glimb, zorp", clip_skip))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_diffusers_bits(dtype: torch.dtype) -> None:
    half, theirs = load().to(dtype=dtype), load().to(dtype=dtype)
    theirs.load_textual_inversion(THREE.vectors[0], token="glimb")
    theirs.load_textual_inversion(
        THREE.vectors[1], token="glimb", text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2
    )
    assert same(encode(half, "a glimb", "", PLAIN, None, split=BOTH), by_diffusers(theirs, "a glimb", ""))


def test_within_a_word_it_is_no_name(pipe: Any) -> None:
    # diffusers would put the vector into the middle of the word
    assert same(
        encode(pipe, "zorpy unglimb", "", PLAIN, None, split=BOTH),
        encode(pipe, "zorpy unglimb", "", PLAIN, None),
    )


@pytest.mark.parametrize("eos_token_id", [2, 710])
def test_the_pooled_embedding_is_found_at_the_end_of_the_text(
    pipe: Any, inverted: Any, monkeypatch: pytest.MonkeyPatch, eos_token_id: int
) -> None:
    """SDXL's own configuration says 2: then the highest token counts as the end, which diffusers' added ones are."""
    expected = by_diffusers(inverted, "a zorp circle")["pooled_prompt_embeds"]
    model = pipe.text_encoder_2.text_model
    model = getattr(model, "text_model", model)
    monkeypatch.setattr(model, "eos_token_id", eos_token_id)
    ours = encode(pipe, "a zorp circle", None, PLAIN, None, split=BOTH)
    assert torch.equal(ours["pooled_prompt_embeds"], expected)


def test_weights_are_for_inversions_too(pipe: Any) -> None:
    empty, plain = (encode(pipe, text, "", PLAIN, None, split=BOTH)["prompt_embeds"] for text in ("", "a glimb"))
    for weighted, syntax in (("a (glimb)1.5", COMPEL), ("a (embedding:glimb:1.5)", A1111)):
        ours = encode(pipe, weighted, "", syntax, None, split=BOTH)
        assert torch.allclose(ours["prompt_embeds"][:, 2:5], empty[:, 2:5] + (plain - empty)[:, 2:5] * 1.5, atol=1e-5)
        assert torch.equal(ours["prompt_embeds"][:, :2], plain[:, :2])
        clean = encode(pipe, "a glimb", "", PLAIN, None, split=BOTH)
        assert torch.equal(ours["pooled_prompt_embeds"], clean["pooled_prompt_embeds"])
    less = encode(pipe, "a (glimb:0.5)", "", A1111, None, split=BOTH)["prompt_embeds"]
    assert not torch.equal(less, plain)
    assert same(
        encode(pipe, "a (glimb:0.5)", "", A1111, None, split=BOTH),
        encode(pipe, "a (glimb)0.5", "", COMPEL, None, split=BOTH),
    )


def test_in_a_long_prompt_it_stands_in_one_chunk(pipe: Any, inverted: Any) -> None:
    """73 tokens stand before it: what does not fit behind them goes to the next chunk as a whole."""
    ours = encode(pipe, "red " * 73 + "glimb blue", None, PLAIN, None, split=BOTH)["prompt_embeds"]
    first, second = (by_diffusers(inverted, text)["prompt_embeds"] for text in ("red " * 73, "glimb blue"))
    assert torch.equal(ours, torch.cat([first, second], dim=1))


def test_one_longer_than_a_chunk_is_encoded_all_the_same(pipe: Any) -> None:
    long = made("lang", 200, 3)
    ours = encode(pipe, "a lang", LONG, PLAIN, None, split=splitter(long))
    assert ours["prompt_embeds"].shape == (1, 4 * 77, sum(WIDTHS))  # what stands before it, and 75, 75, 50
    assert ours["prompt_embeds"].isfinite().all()


def test_tokenizers_and_text_encoders_stay_as_they_are(pipe: Any) -> None:
    encoders, tokenizers = (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2)

    def state() -> list[Any]:
        modules = [module for encoder in encoders for module in encoder.modules()]
        return [*map(len, tokenizers), *[dict(module._forward_hooks) for module in modules]]

    without = encode(pipe, "a zorp glimb", LONG, A1111, None)
    before, weights = state(), [encoder.get_input_embeddings().weight.clone() for encoder in encoders]
    encode(pipe, "a zorp glimb", LONG, A1111, None, split=BOTH)
    assert same(without, encode(pipe, "a zorp glimb", LONG, A1111, None))
    assert state() == before
    for encoder, weight in zip(encoders, weights, strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight, weight)


@pytest.fixture
def failing(pipe: Any) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    hook = pipe.text_encoder.register_forward_hook(fail)
    yield
    hook.remove()


@pytest.mark.usefixtures("failing")
def test_after_an_error_nothing_is_left(pipe: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        encode(pipe, "a zorp", None, PLAIN, None, split=BOTH)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
