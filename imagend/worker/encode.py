"""Prompts to embeddings for StableDiffusionXLPipeline. Paints nothing; keeps nothing but in the cache it is given.

A short prompt without weights gives what `pipe.encode_prompt` gives, bit for bit. A longer one is cut as compel cuts it
into chunks of up to 75 tokens (where a sentence, a phrase or a word ends), to MAX_TOKENS in all; of prompt and negative
prompt, the shorter is filled up with empty chunks. Pooled embeddings come from the text without its syntax, from its
first 75 tokens as in diffusers. clip_skip moves the prompt's layer only: diffusers never moves the negative prompt's.

All that is not a text encoder's own work takes 1 ms of a CPU core for a usual prompt, and 60 ms for 4,096 tokens with
weights (12 to read it, 30 to tokenize it twice, 16 to cut it): nothing that a thread ahead of its time would save.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import torch

from imagend.errors import PromptTooLong, UnsupportedSetting
from imagend.prompt import parse
from imagend.prompt_tree import PromptSyntax
from imagend.worker.prompt_cache import Encoded, PromptCache
from imagend.worker.text_encoder import Inversion, Text, TextEncoder, execution_device

MAX_TOKENS = 4096
MAX_WEAKENED = 256  # passages of weight below 1: each costs another run of both text encoders
PENULTIMATE = -2  # the hidden state that SDXL was trained with


def encode(
    pipe: Any,
    prompt: str,
    negative_prompt: str | None,
    syntax: PromptSyntax,
    clip_skip: int | None,
    *,
    split: Callable[[str], Text] = lambda text: [text],
    cache: PromptCache | None = None,
    encoders: Hashable = None,
) -> dict[str, torch.Tensor]:
    """The four embeddings that the pipeline's call takes instead of the prompts, on its device and in its dtype.

    As in diffusers, a negative prompt of None is zeros if the model wants it so; "" never is.
    `split` finds the textual inversions in a text. `encoders` is all that decides, beside the text, what the text
    encoders make of it: the cache tells one state of theirs from another by it.
    Raises PromptTooLong, UnsupportedSetting.
    """
    recall = _Recall(cache or PromptCache(0), encoders, pipe)
    sides = [_Side(pipe, "prompt", prompt, syntax, _layer(pipe, clip_skip), split)]
    if negative_prompt is not None or not pipe.config.force_zeros_for_empty_prompt:
        sides.append(_Side(pipe, "negative_prompt", negative_prompt or "", syntax, PENULTIMATE, split))
    for side in sides:
        if not recall.knows(side.key):
            side.check()  # nothing is encoded before all of it is known to be possible
    with torch.no_grad():
        parts = [recall(side.key, side.encode) for side in sides]
        length = max(part.shape[1] for *embeds, _ in parts for part in embeds)
        embeds = [side.joined(part, length, recall) for side, part in zip(sides, parts, strict=True)]
        pooled = [part[-1] for part in parts]
    return {
        "prompt_embeds": embeds[0],
        "pooled_prompt_embeds": pooled[0],
        "negative_prompt_embeds": embeds[1] if len(embeds) > 1 else torch.zeros_like(embeds[0]),
        "negative_pooled_prompt_embeds": pooled[1] if len(pooled) > 1 else torch.zeros_like(pooled[0]),
    }


def _layer(pipe: Any, clip_skip: int | None) -> int:
    if clip_skip is None:
        return PENULTIMATE
    largest = min(encoder.config.num_hidden_layers for encoder in (pipe.text_encoder, pipe.text_encoder_2)) - 1
    if not 0 <= clip_skip <= largest:
        raise UnsupportedSetting(f"clip_skip is {clip_skip}; with this model it may be 0 to {largest}")
    return -(clip_skip + 2)


class _Recall:
    """What the text encoders make of a text: from the cache, or else made now; as the pipeline's call takes it."""

    def __init__(self, cache: PromptCache, encoders: Hashable, pipe: Any) -> None:
        self._cache, self._encoders = cache, encoders
        self._to = {"device": execution_device(pipe.text_encoder_2), "dtype": pipe.text_encoder_2.dtype}

    def knows(self, key: Hashable) -> bool:
        return (self._encoders, key) in self._cache

    def __call__(self, key: Hashable, make: Callable[[], Encoded]) -> Encoded:
        if (kept := self._cache.find((self._encoders, key))) is not None:
            return tuple(tensor.to(**self._to, copy=True) for tensor in kept)
        made = tuple(tensor.to(**self._to) for tensor in make())
        self._cache.keep((self._encoders, key), made)
        return made


class _Side:
    """The prompt or the negative prompt, read: which text has which weight, and where a textual inversion stands."""

    def __init__(
        self, pipe: Any, field: str, text: str, syntax: PromptSyntax, layer: int, split: Callable[[str], Text]
    ) -> None:
        try:
            self.prompt = parse(text, syntax)
        except ValueError as error:
            raise UnsupportedSetting(f"{field}: {error}") from None
        self.pipe, self.field, self.layer = pipe, field, layer
        self.texts = [[split(fragment.text) for fragment in block] for block in self.prompt.blocks]
        self.plain = split(self.prompt.plain)
        pieces = [*self.plain, *(piece for block in self.texts for text in block for piece in text)]
        inverted = (piece.sha256 if isinstance(piece, Inversion) else piece for piece in pieces)
        self.key = (text, syntax, layer, *inverted)

    @cached_property
    def encoders(self) -> list[TextEncoder]:
        pairs = (self.pipe.tokenizer, self.pipe.text_encoder), (self.pipe.tokenizer_2, self.pipe.text_encoder_2)
        return [TextEncoder(number, *pair, self.layer) for number, pair in enumerate(pairs)]

    @cached_property
    def tokens(self) -> list[list[list[list[int]]]]:
        """By text encoder, block and fragment."""
        return [[encoder.tokenize(block) for block in self.texts] for encoder in self.encoders]

    def check(self) -> None:
        count = max(sum(len(ids) for block in tokens for ids in block) for tokens in self.tokens)
        if count > MAX_TOKENS:
            raise PromptTooLong(self.field, count, MAX_TOKENS)
        weakened = sum(fragment.weight < 1 for block in self.prompt.blocks for fragment in block)
        if weakened > MAX_WEAKENED:
            raise UnsupportedSetting(
                f"{self.field} has {weakened} passages of a weight below 1; at most {MAX_WEAKENED} are possible. "
                "Join some"
            )

    def encode(self) -> Encoded:
        """Of each text encoder a sequence of whole chunks, and the second one's pooled embedding."""
        pairs = zip(self.encoders, self.tokens, strict=True)
        embeds = [encoder.embed(self.prompt, tokens) for encoder, tokens in pairs]
        last = self.encoders[-1]
        return (*embeds, last.pooled(last.tokenize([self.plain])[0]))

    def joined(self, parts: Encoded, length: int, recall: _Recall) -> torch.Tensor:
        """Both sequences side by side, filled up to `length` with chunks of the empty prompt."""
        embeds: Encoded = parts[:2]
        if any(part.shape[1] < length for part in embeds):
            empties = recall(("", self.layer), lambda: tuple(encoder.empty_z for encoder in self.encoders))
            pairs = zip(embeds, empties, strict=True)
            embeds = tuple(
                torch.cat([one, *[empty] * ((length - one.shape[1]) // empty.shape[1])], 1) for one, empty in pairs
            )
        return torch.cat(embeds, dim=-1)
