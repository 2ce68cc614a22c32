"""Prompts to embeddings for StableDiffusionXLPipeline, weighted as compel weighs them. Paints nothing, keeps nothing.

A short prompt without weights gives what `pipe.encode_prompt` gives, bit for bit. A longer one is cut by compel into
chunks of up to 75 tokens (where a sentence, a phrase or a word ends), to MAX_TOKENS in all; of prompt and negative
prompt, the shorter is filled up with empty chunks. Pooled embeddings come from the text without its syntax, from its
first 75 tokens as in diffusers. clip_skip moves the prompt's layer only: diffusers never moves the negative prompt's.

Of compel we use what encodes and weighs (EmbeddingsProvider), not its grammar (see imagend.prompt), nor its loop over
weights below 1: for each such passage that encodes the whole prompt again and keeps it (2,000 passages in 4,096 tokens:
40 GB). Here only the chunks that hold the passage are encoded again. That gives compel's bits where the prompt is one
chunk or no weight is below 1, else its numbers up to rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
    from diffusers.utils.torch_utils import get_module_execution_device

from imagend.errors import PromptTooLong, UnsupportedSetting
from imagend.prompt import parse
from imagend.prompt_tree import Fragment, Join, Prompt, PromptSyntax

MAX_TOKENS = 4096
MAX_WEAKENED = 256  # passages of weight below 1: each costs another run of both text encoders
PENULTIMATE = -2  # the hidden state that SDXL was trained with


def encode(
    pipe: Any, prompt: str, negative_prompt: str | None, syntax: PromptSyntax, clip_skip: int | None
) -> dict[str, torch.Tensor]:
    """The four embeddings that the pipeline's call takes instead of the prompts, on its device and in its dtype.

    As in diffusers, a negative prompt of None is zeros if the model wants it so; "" never is.
    Raises PromptTooLong, UnsupportedSetting.
    """
    positive = _Side(pipe, "prompt", prompt, syntax, _layer(pipe, clip_skip))
    zeros = negative_prompt is None and pipe.config.force_zeros_for_empty_prompt
    negative = None if zeros else _Side(pipe, "negative_prompt", negative_prompt or "", syntax, PENULTIMATE)
    with torch.no_grad():
        parts = [side.embed() for side in (positive, negative) if side]
        length = max(part.shape[1] for side in parts for part in side)
        embeds, pooled = positive.joined(parts[0], length), positive.pooled()
        tensors = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative.joined(parts[1], length) if negative else torch.zeros_like(embeds),
            "negative_pooled_prompt_embeds": negative.pooled() if negative else torch.zeros_like(pooled),
        }
    device, dtype = get_module_execution_device(pipe.text_encoder_2), pipe.text_encoder_2.dtype
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


def _layer(pipe: Any, clip_skip: int | None) -> int:
    if clip_skip is None:
        return PENULTIMATE
    largest = min(encoder.config.num_hidden_layers for encoder in (pipe.text_encoder, pipe.text_encoder_2)) - 1
    if not 0 <= clip_skip <= largest:
        raise UnsupportedSetting(f"clip_skip is {clip_skip}; with this model it may be 0 to {largest}")
    return -(clip_skip + 2)


class _Side:
    """The prompt or the negative prompt: parsed once, in the tokens of both text encoders, and not too long."""

    def __init__(self, pipe: Any, field: str, text: str, syntax: PromptSyntax, layer: int) -> None:
        try:
            self.prompt = parse(text, syntax)
        except ValueError as error:
            raise UnsupportedSetting(f"{field}: {error}") from None
        self.pipe = pipe
        pairs = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
        self.encoders = [_Encoder(tokenizer, text_encoder, layer) for tokenizer, text_encoder in pairs]
        self.tokens = [encoder.tokenize(self.prompt) for encoder in self.encoders]
        count = max(sum(len(ids) for block in tokens for ids in block) for tokens in self.tokens)
        if count > MAX_TOKENS:
            raise PromptTooLong(field, count, MAX_TOKENS)
        weakened = sum(fragment.weight < 1 for block in self.prompt.blocks for fragment in block)
        if weakened > MAX_WEAKENED:
            raise UnsupportedSetting(
                f"{field} has {weakened} passages of a weight below 1; at most {MAX_WEAKENED} are possible. Join some"
            )

    def embed(self) -> list[torch.Tensor]:
        return [encoder.embed(self.prompt, ids) for encoder, ids in zip(self.encoders, self.tokens, strict=True)]

    def joined(self, parts: list[torch.Tensor], length: int) -> torch.Tensor:
        padded = [encoder.pad(part, length) for encoder, part in zip(self.encoders, parts, strict=True)]
        return torch.cat([part.to(padded[-1].device) for part in padded], dim=-1)

    def pooled(self) -> torch.Tensor:
        """As diffusers has it: of the second text encoder, and of no more than one chunk."""
        tokenizer, text_encoder = self.pipe.tokenizer_2, self.pipe.text_encoder_2
        ids = tokenizer(
            self.prompt.plain,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = text_encoder(ids.to(get_module_execution_device(text_encoder)), output_hidden_states=True)
        pooled: torch.Tensor = output[0]
        return pooled


class _Encoder(EmbeddingsProvider):  # type: ignore[misc]
    """One text encoder with its tokenizer. Made anew for each call: what it keeps goes stale when a LoRA is loaded."""

    def __init__(self, tokenizer: Any, text_encoder: Any, layer: int) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            split_long_text_mode=SplitLongTextMode.SENTENCES,
            device=get_module_execution_device(text_encoder),
        )
        self.layer = layer

    def tokenize(self, prompt: Prompt) -> list[list[list[int]]]:
        """The token ids of each fragment of each block."""
        return [
            self.tokenizer([fragment.text for fragment in block], add_special_tokens=False, verbose=False)["input_ids"]
            for block in prompt.blocks
        ]

    def embed(self, prompt: Prompt, tokens: Sequence[list[list[int]]]) -> torch.Tensor:
        blocks = [self._block(fragments, ids) for fragments, ids in zip(prompt.blocks, tokens, strict=True)]
        if prompt.join is Join.CHAIN:
            pairs = zip(blocks, prompt.weights, strict=True)
            return torch.cat([block if weight == 1 else self._scaled(block, weight) for block, weight in pairs], dim=1)
        length = max(block.shape[1] for block in blocks)
        stacked = torch.stack([self.pad(block, length) for block in blocks], dim=1)
        return self._mixed(stacked, prompt.weights, normalize=prompt.join is Join.BLEND)

    def pad(self, embedding: torch.Tensor, length: int) -> torch.Tensor:
        missing = (length - embedding.shape[1]) // self.max_token_count
        return torch.cat([embedding] + [self.empty_z] * missing, dim=1) if missing else embedding

    def _scaled(self, block: torch.Tensor, weight: float) -> torch.Tensor:
        empty = self.pad(self.empty_z, block.shape[1])
        return empty + (block - empty) * weight

    def _mixed(self, stacked: torch.Tensor, weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
        mixed: torch.Tensor = self.apply_embedding_weights(stacked, list(weights), normalize=normalize)
        return mixed

    def _block(self, fragments: Sequence[Fragment], ids: list[list[int]]) -> torch.Tensor:
        flat = [token for fragment in ids for token in fragment]
        owners = [float(number) for number, fragment in enumerate(ids, 2) for _ in fragment]
        # compel carries a number beside each token into the chunks, and 1 beside what it adds
        tokens, owner, mask = self._chunk_and_pad_token_ids(flat, owners, device="cpu")
        weights = torch.tensor([1.0, 1.0, *(fragment.weight for fragment in fragments)])[owner.long()]
        holes = [
            (int(where[0]), int(where[-1]) + 1, math.tan((1 - max(1e-5, fragment.weight)) * math.pi / 2))
            for number, fragment in enumerate(fragments, 2)
            if fragment.weight < 1 and len(where := (owner == number).nonzero())
        ]
        size = self.max_token_count
        chunks = [
            self._chunk(
                tokens[start : start + size],
                weights[start : start + size],
                mask[start : start + size],
                [(first - start, last - start, share) for first, last, share in holes],
            )
            for start in range(0, len(tokens), size)
        ]
        return torch.cat(chunks, dim=1)

    def _chunk(
        self, tokens: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, holes: Sequence[tuple[int, int, float]]
    ) -> torch.Tensor:
        """Mixed, in shares, from the chunk as it is and, for each weakened passage, from the chunk without it."""
        variants, shares = [self._weighted(tokens, weights, mask)], [1.0]
        for first, last, share in holes:
            if last <= 0 or first >= len(mask):  # the passage is elsewhere: this chunk without it is this chunk
                shares[0] += share
                continue
            without = mask.clone()
            without[max(0, first) : last] = 0
            without[[0, -1]] = 1
            variants.append(self._weighted(tokens, weights, without))
            shares.append(share)
        return self._mixed(torch.stack(variants, dim=1), shares, normalize=True) if len(variants) > 1 else variants[0]

    def _weighted(self, *token_weight_mask: torch.Tensor) -> torch.Tensor:
        placed = [tensor.to(self.device) for tensor in token_weight_mask]
        weighted: torch.Tensor = self.build_weighted_embedding_tensor(*placed, device=self.device)
        return weighted

    def _encode_token_ids_to_embeddings(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # as diffusers calls it; with a mask that hides nothing a GPU may pick another kernel
        output = self.text_encoder(token_ids, attention_mask=attention_mask, output_hidden_states=True)
        hidden: torch.Tensor = output.hidden_states[self.layer]
        return hidden
