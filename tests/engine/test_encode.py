"""Embeddings on the tiny real model: diffusers' bits without weights, compel's with them, and nothing left over."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
torch = pytest.importorskip("torch")
compel = pytest.importorskip("compel")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from prompts import by_diffusers, same  # noqa: E402

from imagend.errors import PromptTooLong, UnsupportedSetting  # noqa: E402
from imagend.prompt_tree import MAX_WEIGHT, PromptSyntax  # noqa: E402
from imagend.worker.encode import MAX_TOKENS, MAX_WEAKENED, encode  # noqa: E402

MODEL = Path(__file__).parents[2] / "models" / "diffusers" / "shapes-xl"
A1111, COMPEL, PLAIN = PromptSyntax.A1111, PromptSyntax.COMPEL, PromptSyntax.PLAIN
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
LONG = "a red circle, on a green square. " * 12


def load(dtype: Any) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        MODEL, dtype=dtype, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(torch.float32)


@pytest.fixture
def without_encoders(pipe: Any) -> Iterator[None]:
    """Running a text encoder fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a text encoder was run")

    hooks = [encoder.register_forward_pre_hook(refuse) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    yield
    for hook in hooks:
        hook.remove()


def paint(pipe: Any, **arguments: Any) -> Any:
    generator = torch.Generator("cpu").manual_seed(7)
    return pipe(width=64, height=64, num_inference_steps=2, generator=generator, output_type="np", **arguments).images


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, low quality"])
@pytest.mark.parametrize("syntax", PromptSyntax)
def test_a_short_prompt_without_weights_gives_diffusers_bits(
    pipe: Any, syntax: PromptSyntax, negative_prompt: str | None, clip_skip: int | None
) -> None:
    for prompt in ("a red circle,, on  white", "", "well-known! <|endoftext|> x", "red, " * 37 + "red"):
        ours = encode(pipe, prompt, negative_prompt, syntax, clip_skip)
        assert same(ours, by_diffusers(pipe, prompt, negative_prompt, clip_skip)), prompt


@NUMPY
def test_a_job_is_the_plain_diffusers_call(pipe: Any) -> None:
    ours = paint(pipe, **encode(pipe, "a red circle", "blurry", COMPEL, 1))
    assert (ours == paint(pipe, prompt="a red circle", negative_prompt="blurry", clip_skip=1)).all()


def test_a_text_encoder_is_called_as_diffusers_calls_it(pipe: Any) -> None:
    # a mask that hides nothing changes no bit on a CPU, but may choose another kernel on a GPU
    masks = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda _, __, arguments: masks.append(arguments.get("attention_mask")), with_kwargs=True
    )
    encode(pipe, "a (red)1.3 circle", LONG, COMPEL, None)
    hook.remove()
    assert len(masks) > 2
    assert set(masks) == {None}


def test_no_negative_prompt_is_zeros_only_if_the_model_says_so(pipe: Any) -> None:
    zeros = encode(pipe, "a red circle", None, PLAIN, None)
    assert not zeros["negative_prompt_embeds"].any()
    assert not zeros["negative_pooled_prompt_embeds"].any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        empty = encode(pipe, "a red circle", None, PLAIN, None)
        assert same(empty, by_diffusers(pipe, "a red circle", None))
    finally:
        pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert same(empty, encode(pipe, "a red circle", "", PLAIN, None))


def test_half_precision_stays_half_and_gives_diffusers_bits() -> None:
    half = load(torch.float16)
    assert same(encode(half, "a red circle", "", COMPEL, None), by_diffusers(half, "a red circle", ""))
    weighted = encode(half, "a (red)1.3 (circle)0.2, " + LONG, "(blurry)1.2", COMPEL, None)
    assert {tensor.dtype for tensor in weighted.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weighted.values())


AS_COMPEL = [
    ("a (red)1.3 circle", ""),
    ("a (red)0.3 circle", "(blurry)0.5 low++ quality--"),
    ("a (red)0.3 circle (on)0.7 (white)1.5", "a"),
    ("(red)0 circle", ""),
    (LONG, "short"),
    ("short", LONG),
    ("a red, circle on a green square. " * 20, ""),  # the last comma that fits is not where it is cut
    ("a red, circle on a green square " * 20, ""),
    ("a red circle on a green square " * 20, ""),
    ("x" * 200, ""),
    (LONG.replace("circle", "(circle)1.2"), ""),
    (f"({LONG})0.5 (cat)1.2", LONG + LONG),
    ('("a red circle", "a blue (square)0.8").and()', "a"),
    ('("a red circle", "a blue square").blend(0.7, 0.6)', "a"),
    (f'("a (red)0.5 circle", "{LONG}").blend(2, -1)', "a"),
    ('("a red circle", "a blue square").blend(1, -0.5, no_normalize)', "a"),
]


@pytest.mark.parametrize(("prompt", "negative_prompt"), AS_COMPEL)
def test_weights_and_long_prompts_give_compels_bits(pipe: Any, prompt: str, negative_prompt: str) -> None:
    ours = encode(pipe, prompt, negative_prompt, COMPEL, None)
    theirs = compel.CompelForSDXL(pipe)(prompt, negative_prompt=negative_prompt)
    assert ours["prompt_embeds"].shape == ours["negative_prompt_embeds"].shape
    assert torch.equal(ours["prompt_embeds"], theirs.embeds)
    assert torch.equal(ours["negative_prompt_embeds"], theirs.negative_embeds)


def test_weights_below_one_in_several_chunks_give_compels_numbers(pipe: Any) -> None:
    prompt = LONG.replace("circle", "(circle)0.8").replace("square", "(square)0.1", 3)
    ours = encode(pipe, prompt, "", COMPEL, None)["prompt_embeds"]
    theirs = compel.CompelForSDXL(pipe)(prompt, negative_prompt="").embeds
    assert (ours - encode(pipe, LONG, "", COMPEL, None)["prompt_embeds"]).abs().max() > 0.1
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-5)


def test_the_conjunctions_weights_scale_from_the_empty_prompt(pipe: Any) -> None:
    # compel itself dies of them on SDXL: AttributeError, 'tuple' object has no attribute 'shape'
    empty, red, blue = (encode(pipe, text, "", PLAIN, None)["prompt_embeds"] for text in ("", "red", "blue"))
    both = encode(pipe, '("red", "blue").and(1, 0.5)', "", COMPEL, None)["prompt_embeds"]
    assert torch.equal(both, torch.cat([red, empty + (blue - empty) * 0.5], dim=1))


def test_both_syntaxes_mean_the_same_weights(pipe: Any) -> None:
    ours = encode(pipe, "a (red:1.3) circle (on:0.4) white", "(blurry:1.2)", A1111, None)
    assert same(ours, encode(pipe, "a (red)1.3 circle (on)0.4 white", "(blurry)1.2", COMPEL, None))
    assert not same(ours, encode(pipe, "a red circle on white", "blurry", A1111, None))


def test_weights_leave_the_pooled_embedding_alone(pipe: Any) -> None:
    clean = by_diffusers(pipe, "a red circle", "blurry")
    for prompt, negative, syntax in (
        ("a (red)1.3 circle--", "blurry+", COMPEL),
        ("a ((red)) [circle]", "(blurry:1.4)", A1111),
    ):
        ours = encode(pipe, prompt, negative, syntax, None)
        assert not torch.equal(ours["prompt_embeds"], clean["prompt_embeds"])
        assert torch.equal(ours["pooled_prompt_embeds"], clean["pooled_prompt_embeds"])
        assert torch.equal(ours["negative_pooled_prompt_embeds"], clean["negative_pooled_prompt_embeds"])


def test_weights_are_clamped(pipe: Any) -> None:
    clamped = encode(pipe, f"a (red){MAX_WEIGHT} circle", "", COMPEL, None)
    assert same(clamped, encode(pipe, "a (red)10000000000 circle", "", COMPEL, None))
    assert same(clamped, encode(pipe, "a (red:10000000000) circle", "", A1111, None))
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in clamped.values())


def test_what_has_no_tokens_may_have_a_weight(pipe: Any) -> None:
    # compel itself dies of this: TypeError, NoneType + int
    assert same(encode(pipe, '" "- red', "", COMPEL, None), encode(pipe, "red", "", PLAIN, None))


def test_break_starts_a_chunk(pipe: Any) -> None:
    red, blue = (encode(pipe, text, "", PLAIN, None) for text in ("red circle", "blue square"))
    both = encode(pipe, "red circle BREAK blue square", "", A1111, None)
    assert torch.equal(both["prompt_embeds"], torch.cat([red["prompt_embeds"], blue["prompt_embeds"]], dim=1))
    pooled = by_diffusers(pipe, "red circle blue square", "")["pooled_prompt_embeds"]
    assert torch.equal(both["pooled_prompt_embeds"], pooled)


@pytest.mark.parametrize("syntax", PromptSyntax)
def test_4096_tokens_are_encoded(pipe: Any, syntax: PromptSyntax) -> None:
    weighted = {PLAIN: "red", COMPEL: "(red)1.2", A1111: "(red:1.2)"}[syntax]
    ours = encode(pipe, "red " * (MAX_TOKENS - 1) + weighted, None, syntax, None)
    assert ours["prompt_embeds"].shape == (1, math.ceil(MAX_TOKENS / 75) * 77, 160)
    assert ours["negative_prompt_embeds"].shape == ours["prompt_embeds"].shape
    assert ours["prompt_embeds"].isfinite().all()


def test_4096_tokens_of_the_negative_prompt_are_encoded_as_those_of_the_prompt(pipe: Any) -> None:
    long = "red, blue " * (MAX_TOKENS // 3) + "red"
    ours = encode(pipe, "a circle", long, PLAIN, None)
    assert torch.equal(ours["negative_prompt_embeds"], encode(pipe, long, "", PLAIN, None)["prompt_embeds"])
    assert ours["prompt_embeds"].shape == ours["negative_prompt_embeds"].shape
    assert ours["negative_prompt_embeds"].shape[1] > MAX_TOKENS


@pytest.mark.usefixtures("without_encoders")
@pytest.mark.parametrize("syntax", PromptSyntax)
def test_a_longer_prompt_is_refused_before_anything_is_encoded(pipe: Any, syntax: PromptSyntax) -> None:
    weighted = {PLAIN: "red", COMPEL: "red+", A1111: "(red)"}[syntax]
    for extra in (1, 904):
        too_long = "red " * (MAX_TOKENS - 1 + extra) + weighted
        with pytest.raises(PromptTooLong, match=f"^prompt has {MAX_TOKENS + extra} tokens; at most 4096") as refused:
            encode(pipe, too_long, "", syntax, None)
        assert refused.value.args == ("prompt", MAX_TOKENS + extra, MAX_TOKENS)
        with pytest.raises(PromptTooLong, match=f"^negative_prompt has {MAX_TOKENS + extra} tokens"):
            encode(pipe, "red", too_long, syntax, None)


def test_either_tokenizer_may_find_a_prompt_too_long(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids * 2 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]}

    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name)
        with monkeypatch.context() as patch:
            patch.setattr(pipe, name, doubled)
            with pytest.raises(PromptTooLong, match="prompt has 4098 tokens"):
                encode(pipe, "red " * 2049, None, PLAIN, None)


@pytest.mark.usefixtures("without_encoders")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("(a)0.5 b " * (MAX_WEAKENED + 1), None, COMPEL, None), "^prompt has 257 passages .* below 1; at most 256"),
        (("a", "(" * 200, A1111, None), "^negative_prompt: its brackets are nested deeper"),
        (("a.swap(b)", None, COMPEL, None), "^prompt: .* no effect"),
        (("a", None, PLAIN, 3), "^clip_skip is 3; with this model it may be 0 to 2"),
        (("a", None, PLAIN, -1), "^clip_skip is -1; with this model it may be 0 to 2"),
    ],
)
def test_refusals_say_what_is_possible(pipe: Any, arguments: Any, message: str) -> None:
    with pytest.raises(UnsupportedSetting, match=message):
        encode(pipe, *arguments)


def test_the_smaller_text_encoder_limits_clip_skip(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.text_encoder_2.config, "num_hidden_layers", 2)
    with pytest.raises(UnsupportedSetting, match="0 to 1"):
        encode(pipe, "a", None, PLAIN, 2)


def test_clip_skip_moves_weights_and_padding_with_it(pipe: Any) -> None:
    plain, weighted = (encode(pipe, text, LONG, COMPEL, 1)["prompt_embeds"] for text in ("a cat", "a (cat)1.5"))
    empty = by_diffusers(pipe, "", None, 1)["prompt_embeds"]
    assert torch.equal(weighted[:, 77:154], empty)
    assert torch.allclose(weighted[:, 2], empty[:, 2] + (plain[:, 2] - empty[:, 2]) * 1.5, atol=1e-5)


@NUMPY
def test_a_long_prompt_paints(pipe: Any) -> None:
    embeddings = encode(pipe, LONG, None, PLAIN, None)
    assert embeddings["prompt_embeds"].shape[1] > 77
    pictures = paint(pipe, **embeddings)
    assert pictures.shape == (1, 64, 64, 3)
    assert (pictures != paint(pipe, **encode(pipe, "a", None, PLAIN, None))).any()


def test_nothing_is_left_over_from_the_last_call(pipe: Any) -> None:
    arguments = "a (red)0.3 (circle)1.4", LONG, COMPEL, None
    before = encode(pipe, *arguments)
    assert same(before, encode(pipe, *arguments))
    weights = [encoder.get_input_embeddings().weight for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight += torch.linspace(-0.1, 0.1, weight.shape[1])
        after = encode(pipe, *arguments)
        fresh = compel.CompelForSDXL(pipe)(arguments[0], negative_prompt=LONG)
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["prompt_embeds"][:, -77:], after["prompt_embeds"][:, -77:])  # the padding
    assert torch.equal(after["prompt_embeds"], fresh.embeds)
    assert same(before, encode(pipe, *arguments))


def test_it_says_nothing(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "compel")]
    for logger in loggers:
        logger.addHandler(handler)
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer.deprecation_warnings.clear()  # each is given once
    try:
        encode(pipe, LONG + "(red)0.5", LONG + LONG, COMPEL, 1)
    finally:
        transformers.utils.logging.set_verbosity(before)
        for logger in loggers:
            logger.removeHandler(handler)
    assert said == []
    assert capfd.readouterr() == ("", "")
