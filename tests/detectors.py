"""A GroundingDINO and a SAM, tiny and untrained, as folders in models/detection/: of transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

SIDE = 64
SEED_OF_SAM = 9  # one that outlines some of a picture, and not all of it
WORDS = ("the", "a", "red", "blue", "circle", "square", "car", "dog")
_PLACES = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
"""where BERT has them; GroundingDINO tells texts apart by these numbers"""
VOCABULARY = tuple(_PLACES.get(number, f"[unused{number}]") for number in range(1030)) + WORDS


def save(root: Path) -> None:
    """boxes/ and masks/ in the folder detection/ of a models folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _grounding_dino(root / "detection" / "boxes")
        torch.manual_seed(SEED_OF_SAM)
        _sam(root / "detection" / "masks")


def _grounding_dino(folder: Path) -> None:
    text = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_indices=[2, 3, 4]
    )
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes = {"d_model": 64, "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "max_text_len": 32}
    config = transformers.GroundingDinoConfig(backbone_config=backbone, text_config=text, **heads, **sizes)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": SIDE, "longest_edge": 96}
    transformers.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    transformers.BertTokenizer.from_pretrained(folder, do_lower_case=True).save_pretrained(folder)


def _sam(folder: Path) -> None:
    both = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16}
    vision = transformers.SamVisionConfig(
        **both,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_dim=32,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=8,
        initializer_range=0.3,  # transformers begins with 1e-10, and such a SAM sees nothing
    )
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16, attention_downsample_rate=1
    )
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config=transformers.SamPromptEncoderConfig(**both, mask_input_channels=4),
        mask_decoder_config=decoder,
    )
    transformers.SamModel(config).save_pretrained(folder)
    processor = transformers.SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
