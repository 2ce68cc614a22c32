"""One text encoder with its tokenizer: tokens to weighted embeddings, as compel weighs them. Knows no prompt syntax.

Of compel we use what encodes and weighs (EmbeddingsProvider), not its grammar (see imagend.prompt), nor its loop over
weights below 1: for each such passage that encodes the whole prompt again and keeps it (2,000 passages in 4,096 tokens:
40 GB). Here only the chunks that hold the passage are encoded again. That gives compel's bits where the prompt is one
chunk or no weight is below 1, else its numbers up to rounding.

The vectors of textual inversions are put in where the encoder looks up its tokens. Tokenizer and encoder stay
as they are: nothing grows, nothing has to be taken out again, and the pooled embedding is still found at the end of the
text. (diffusers adds tokens; in SDXL's own configuration, eos_token_id 2, the highest token passes for the end.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
    from diffusers.utils.torch_utils import get_module_execution_device

from imagend.prompt_tree import Fragment, Join, Prompt

execution_device = get_module_execution_device

_FIRST_VECTOR = 1 << 30  # ids from here on are no tokens: they count through the vectors of a text's inversions
_ANY_TOKEN = 0
_SENTENCE_ENDS = frozenset({".</w>"})
_PHRASE_ENDS = _SENTENCE_ENDS | {",</w>", ";</w>", ":</w>"}
_WORD_END = "</w>"


@dataclass(frozen=True, eq=False)
class Inversion:
    """A textual inversion. `vectors`: rows for the one and the other text encoder, of its width, and as many."""

    name: str
    sha256: str
    vectors: tuple[torch.Tensor, ...]


Text = list[str | Inversion]


class TextEncoder(EmbeddingsProvider):  # type: ignore[misc]
    """Made anew for each text: what it keeps goes stale when a LoRA is loaded. `number` is 0 or 1, as in SDXL."""

    def __init__(self, number: int, tokenizer: Any, text_encoder: Any, layer: int) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            split_long_text_mode=SplitLongTextMode.SENTENCES,
            device=execution_device(text_encoder),
        )
        self.number, self.layer = number, layer
        self._vectors: list[torch.Tensor] = []
        self._last_of_its_inversion: list[bool] = []

    def tokenize(self, texts: Sequence[Text]) -> list[list[int]]:
        """The ids of each text, without begin and end."""
        pieces = [piece for text in texts for piece in text if isinstance(piece, str)]
        ids = iter(self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else ())
        return [
            [number for piece in text for number in (next(ids) if isinstance(piece, str) else self._ids_of(piece))]
            for text in texts
        ]

    def _ids_of(self, inversion: Inversion) -> range:
        vectors = inversion.vectors[self.number]
        first = _FIRST_VECTOR + len(self._vectors)
        self._vectors += vectors.unbind()
        self._last_of_its_inversion += [False] * (len(vectors) - 1) + [True]
        return range(first, first + len(vectors))

    def pooled(self, ids: Sequence[int]) -> torch.Tensor:
        """As diffusers has it: of no more than one chunk. Only the second text encoder has it."""
        room = self.max_token_count - len(self.bos_sequence) - len(self.eos_sequence)
        chunk = [*self.bos_sequence, *ids[:room], *self.eos_sequence]
        chunk += [self.tokenizer.pad_token_id] * (self.max_token_count - len(chunk))
        pooled: torch.Tensor = self._run(torch.tensor([chunk], device=self.device))[0]
        return pooled

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

    def _find_next_best_split_point(self, token_ids: list[int], max_length: int, *_: Any) -> int:
        """Where compel splits: it looks at all that is left each time, which takes long where much is."""
        if len(token_ids) <= max_length:
            return max_length
        texts = [self._text(token) for token in token_ids[:max_length]]
        for ends in (_SENTENCE_ENDS, _PHRASE_ENDS):
            if found := [index for index, text in enumerate(texts) if text in ends]:
                return found[-1] + 1
        return max((index for index, text in enumerate(texts, 1) if text.endswith(_WORD_END)), default=max_length)

    def _text(self, token: int) -> str:
        if token < _FIRST_VECTOR:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return _WORD_END if self._last_of_its_inversion[token - _FIRST_VECTOR] else ""  # not split if it can be helped

    def _encode_token_ids_to_embeddings(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # as diffusers calls it; with a mask that hides nothing a GPU may pick another kernel
        hidden: torch.Tensor = self._run(token_ids, attention_mask).hidden_states[self.layer]
        return hidden

    def _run(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        with self._inverted(ids) as tokens:
            return self.text_encoder(tokens, attention_mask=attention_mask, output_hidden_states=True)

    @contextmanager
    def _inverted(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """While it lasts, the encoder finds the vectors of the ids' inversions instead of tokens'."""
        where = ids >= _FIRST_VECTOR
        if not self._vectors or not bool(where.any()):
            yield ids
            return
        rows = torch.stack([self._vectors[index - _FIRST_VECTOR] for index in ids[where].tolist()])

        def place(_: Any, __: Any, looked_up: torch.Tensor) -> torch.Tensor:
            changed = looked_up.clone()
            changed[where] = rows.to(looked_up)
            return changed

        hook = self.text_encoder.get_input_embeddings().register_forward_hook(place)
        try:
            yield ids.masked_fill(where, _ANY_TOKEN)
        finally:
            hook.remove()
