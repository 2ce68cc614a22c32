"""The parts of shapes-xl, untrained: tokenizers, VAE with its start set by hand, text encoders, UNet."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

NATIVE_SIZE = 128
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WINDOW = 77
WIDTH_1, WIDTH_2 = 64, 96  # they must differ: a single-file loader tells the two encoders apart by their width

# Beside the captions, a little of what else people write; bytes spell out the rest.
OTHER_TEXTS = [
    "a red circle on a blue background",
    "a photo of a cat sitting on a bench in the park",
    "the quick brown fox jumps over the lazy dog",
    "masterpiece best quality portrait of a woman with long hair",
    "score_9 score_8_up score_7_up rating_safe 1girl solo",
    "a small green triangle and a large yellow square on black white purple orange cyan magenta grey pink",
]


def byte_alphabet() -> list[str]:
    """The 256 characters CLIP writes bytes with, so that any text at all can be tokenised."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(rest)]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one token; ties fall by the alphabet, not by hash."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merged(pieces, best) for word, pieces in words.items()}


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def train_tokenizers(out: Path, captions: list[str]) -> None:
    """Learn one CLIP-like vocabulary; the second tokenizer differs in its padding only, as SDXL's does."""
    merges = learn_merges([*captions, *OTHER_TEXTS])
    letters = byte_alphabet()
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "model_max_length": WINDOW}
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, **special).save_pretrained(out / name)


def new_vae() -> AutoencoderKL:
    """SDXL's geometry (factor 8, 4 latents). One norm group: with more, flat colours cannot pass."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        norm_num_groups=1,
        sample_size=NATIVE_SIZE,
        force_upcast=False,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def initialise_as_block_mean(vae: AutoencoderKL, level: float = 4.0) -> None:
    """Set weights by hand so that the VAE begins near an 8x8 block-mean codec; from random ones it learns no colours.

    Residual branches start at zero. Six channels carry (x, -x) for r, g, b, since silu(z) - silu(-z) = z exactly;
    two carry the constants (level, -level), which dominate the variance and so make the group norm nearly linear.
    Weights off this path stay random, for training to start from.
    """
    for module in vae.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                module.conv_shortcut.weight[:8, :8, 0, 0] = torch.eye(8)
                nn.init.zeros_(module.conv_shortcut.bias)
        elif kind == "Downsample2D":
            module.conv.weight[:8, :8, :2, :2] = 0.25 * torch.eye(8)[:, :, None, None]
            nn.init.zeros_(module.conv.bias)
        elif kind == "Upsample2D":
            module.conv.weight[:8, :8, 1, 1] = torch.eye(8)
            nn.init.zeros_(module.conv.bias)
    for half in (vae.encoder, vae.decoder):
        _initialise_ends(half, level)
    vae.encoder.conv_out.bias[4:] = -8  # no variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


def _initialise_ends(half: nn.Module, level: float) -> None:
    entry, exit_ = half.conv_in, half.conv_out
    nn.init.zeros_(entry.bias)
    entry.weight[:3, :3, 1, 1] = torch.eye(3)
    entry.weight[3:6, :3, 1, 1] = -torch.eye(3)
    entry.bias[6], entry.bias[7] = level, -level
    gain = (2 * (level**2 + 1) / exit_.in_channels) ** 0.5
    fourth_latent = exit_.weight[3].clone() if len(exit_.weight) > 3 else None
    nn.init.zeros_(exit_.weight)
    nn.init.zeros_(exit_.bias)
    exit_.weight[:3, :3, 1, 1] = gain * torch.eye(3)
    exit_.weight[:3, 3:6, 1, 1] = -gain * torch.eye(3)
    if fourth_latent is not None:  # only the encoder's: three latents carry colour, the last is free
        exit_.weight[3] = fourth_latent


class PromptEncoder(nn.Module):
    """Both tokenizers and text encoders: prompts in, what the UNet is conditioned on out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
        self.one = CLIPTextModel(self._config(0, WIDTH_1, "quick_gelu"))
        self.two = CLIPTextModelWithProjection(self._config(1, WIDTH_2, "gelu"))

    def _config(self, which: int, width: int, activation: str) -> CLIPTextConfig:
        tokenizer = self.tokenizers[which]
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=WINDOW,
            hidden_size=width,
            intermediate_size=3 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def load(self, folder: Path) -> None:
        """Take over the weights of a saved pipeline."""
        self.one.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").float().state_dict())
        two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        self.two.load_state_dict(two.float().state_dict())

    def forward(self, prompts: list[str], chunks: int = 1, nicely: bool = True) -> tuple[Tensor, Tensor]:
        """Both encoders' penultimate states side by side, and the second's pooled embedding.

        With several chunks each prompt is cut after every 75 tokens, or `nicely` at a full stop before that, as Compel
        does it, and each chunk is embedded by itself; the pooled embedding knows the first 75 tokens only.
        """
        count, states, pooled = len(prompts), [], None
        for tokenizer, encoder in zip(self.tokenizers, (self.one, self.two), strict=True):
            texts = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
            stop = tokenizer.convert_tokens_to_ids(".</w>") if nicely else None
            ids = torch.tensor([self._wrapped(tokenizer, part) for text in texts for part in cut(text, chunks, stop)])
            made = encoder(ids, output_hidden_states=True)
            states.append(made.hidden_states[-2].reshape(count, chunks * WINDOW, -1))
            if encoder is self.two:
                whole = torch.tensor([self._wrapped(tokenizer, text[: WINDOW - 2]) for text in texts])
                pooled = made.text_embeds if chunks == 1 else encoder(whole).text_embeds
        return torch.cat(states, -1), pooled

    @staticmethod
    def _wrapped(tokenizer: CLIPTokenizer, ids: list[int]) -> list[int]:
        padding = [tokenizer.pad_token_id] * (WINDOW - 2 - len(ids))
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]


def cut(ids: list[int], chunks: int, stop: int | None) -> list[list[int]]:
    """Exactly so many chunks of at most 75 tokens, the last ones perhaps empty; after a `stop` where there is one."""
    parts = []
    for _ in range(chunks):
        end = WINDOW - 2
        if chunks > 1 and stop in ids[:end]:
            end -= ids[:end][::-1].index(stop)
        parts.append(ids[:end])
        ids = ids[end:]
    return parts


def new_unet() -> UNet2DConditionModel:
    """SDXL's three blocks in small, with its text_time conditioning (pooled text, and sizes as time_ids)."""
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=[1, 1, 1],
        use_linear_projection=True,
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * 16,
    )
