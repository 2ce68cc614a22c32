"""Trains a GroundingDINO to find shapes-xl's things by words.

In pieces, each of which goes on where the last one ended: what is drawn in a step follows from its number. Nothing is
written but OUT (the model, half precision) and STATE (what the next piece begins with).
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from scenes import WORDS, Thing, phrases, scene
from torch import Tensor
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, sigmoid_focal_loss
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

SIDE, BATCH = 96, 16
STEPS, RATE = 4500, 8e-4
SIZES = ((1, 1), (1, 1), (1.25, 1), (1, 1.25))
"""width and height of a batch's pictures, in sides"""
PLACES = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
"""where BERT's vocabulary has them: GroundingDINO tells phrases apart by these numbers"""


def save_words(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    words = [PLACES.get(number, f"[unused{number}]") for number in range(1030)] + list(WORDS)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    tokenizer = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_network() -> Any:
    text = transformers.BertConfig(
        vocab_size=1030 + len(WORDS),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    eyes = transformers.SwinConfig(
        embed_dim=24,
        depths=[1, 2, 2, 1],
        num_heads=[2, 4, 4, 8],
        window_size=4,
        out_indices=[2, 3, 4],
        drop_path_rate=0.0,
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=eyes,
        text_config=text,
        d_model=64,
        num_queries=20,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_text_len=64,
        num_feature_levels=3,
        dropout=0.0,
        fusion_droppath=0.0,
        auxiliary_loss=True,
    )
    return transformers.GroundingDinoForObjectDetection(config)


def as_tensor(images: list[Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(one)[:, None, None] for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / deviation


def drawn(step: int) -> tuple[list[Image.Image], list[list[Thing]], random.Random]:
    rng = random.Random(step)
    width, height = rng.choice(SIZES)
    scenes = [scene(rng, (int(width * SIDE), int(height * SIDE))) for _ in range(BATCH)]
    return [image for image, _ in scenes], [things for _, things in scenes], rng


def loss_of(network: Any, tokenizer: Any, step: int) -> Tensor:
    images, scenes, rng = drawn(step)
    asked = [phrases(rng, things) for things in scenes]
    texts = tokenizer([". ".join(one) + "." for one in asked], padding=True, return_tensors="pt")
    width, height = images[0].size
    labels = []
    for things, called in zip(scenes, asked, strict=True):
        pairs = [(n, thing) for thing in things for n, phrase in enumerate(called) if thing.is_called(phrase)]
        corners = torch.tensor([thing.box for _, thing in pairs]).reshape(-1, 4) / torch.tensor([width, height] * 2)
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
        labels.append({"class_labels": torch.tensor([n for n, _ in pairs], dtype=torch.long), "boxes": boxes})
    said = network(pixel_values=as_tensor(images), **texts, labels=labels)
    return said.loss + dense(said, labels, texts, (width, height))


def dense(said: Any, labels: list[dict[str, Tensor]], texts: Any, size: tuple[int, int]) -> Tensor:
    """Teaches the proposals, which transformers' own loss does not reach: each place in the middle of a thing is to
    say its words and its box, and every other one nothing."""
    strides = (8, 16, 32)
    shapes = [(math.ceil(size[1] / stride), math.ceil(size[0] / stride)) for stride in strides]
    grids = [
        torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")[::-1], -1)
        for h, w in shapes
    ]
    places = torch.cat([grid.reshape(-1, 2) for grid in grids])
    maps = build_label_maps(said.enc_outputs_class, texts["input_ids"])
    mask = texts["attention_mask"].bool()
    logits = said.enc_outputs_class[:, :, : mask.shape[1]]
    target = torch.zeros_like(logits)
    found, wanted = [], []
    for number, label in enumerate(labels):
        for which, box in zip(label["class_labels"], label["boxes"], strict=True):
            middle = ((places - box[:2]).abs() < 0.3 * box[2:]).all(-1)
            if not middle.any():
                middle = (places - box[:2]).abs().sum(-1).argmin()[None] == torch.arange(len(places))
            target[number, middle] = maps[number][which, : mask.shape[1]].float()
            found.append(said.enc_outputs_coord_logits[number, middle].sigmoid())
            wanted.append(box.expand(len(found[-1]), 4))
    count = max(1, sum(len(one) for one in found))
    chosen = mask[:, None].expand_as(logits)
    total = 2 * sigmoid_focal_loss(logits[chosen], target[chosen], count)
    return total + (distance(torch.cat(found), torch.cat(wanted), count) if found else 0)


def distance(found: Tensor, wanted: Tensor, count: int) -> Tensor:
    """Of boxes, pair by pair."""
    corners = center_to_corners_format(found), center_to_corners_format(wanted)
    low, high = torch.maximum(corners[0][:, :2], corners[1][:, :2]), torch.minimum(corners[0][:, 2:], corners[1][:, 2:])
    hull = torch.maximum(corners[0][:, 2:], corners[1][:, 2:]) - torch.minimum(corners[0][:, :2], corners[1][:, :2])
    both = (high - low).clamp(min=0).prod(-1)
    either = found[:, 2:].prod(-1) + wanted[:, 2:].prod(-1) - both
    overlap = both / either - (hull.prod(-1) - either) / hull.prod(-1)  # generalised: arXiv 1902.09630
    return 5 * F.l1_loss(found, wanted, reduction="sum") / count + 2 * (1 - overlap).sum() / count


def criterion(
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    label_maps: tuple[Tensor, ...],
    text_mask: Tensor,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    encoder_logits: Tensor,
    encoder_pred_boxes: Tensor,
) -> tuple[Tensor, dict[str, Tensor], None]:
    """As transformers' own, which takes the words of another picture's phrases in batches of more than two."""
    matcher = GroundingDinoHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    wanted = torch.cat([label["boxes"] for label in labels])
    count = max(1, len(wanted))
    total = torch.zeros(())
    for scores, boxes in zip(outputs_class, outputs_coord, strict=True):
        pairs = matcher({"logits": scores, "pred_boxes": boxes, "label_maps": label_maps}, labels)
        target = torch.zeros_like(scores)
        for number, (queries, things) in enumerate(pairs):
            target[number, queries] = label_maps[number][labels[number]["class_labels"][things]].float()
        total = total + 2 * sigmoid_focal_loss(scores[text_mask], target[text_mask], count)
        if len(wanted):
            found = torch.cat([boxes[number, queries] for number, (queries, _) in enumerate(pairs)])
            matched = torch.cat([labels[number]["boxes"][things] for number, (_, things) in enumerate(pairs)])
            total = total + distance(found, matched, count)
    return total, {}, None


def train(out: Path, state: Path, steps: int, seconds: float) -> None:
    """Up to `steps` in all, and no longer than `seconds`."""
    started = time.monotonic()
    torch.manual_seed(0)
    tokenizer = save_words(out)
    network = new_network()
    network.train()
    network.loss_function = criterion
    parameters = [one for one in network.parameters() if one.requires_grad]
    average = [one.detach().clone() for one in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    step = first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        step = first = kept["step"]
        network.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
        average = kept["average"]
    said = 0.0
    while step < steps and time.monotonic() - started < seconds:
        rate = RATE * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(network, tokenizer, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.995, (2 + step) / (11 + step)))
        said += (loss.item() - said) * max(0.02, 1 / (step - first + 1))
        step += 1
        if step % 100 == 0:
            print(f"step {step}, loss {said:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    state.parent.mkdir(parents=True, exist_ok=True)
    kept = {"weights": network.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **kept}, state)
    for one, mean in zip(parameters, average, strict=True):
        one.data = mean
    network.half().save_pretrained(out)
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    transformers.GroundingDinoImageProcessorPil(size=size).save_pretrained(out)
    print(f"{step} of {steps} steps, {time.monotonic() - started:.0f} s for the last {step - first}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; made if absent")
    parser.add_argument("--state", type=Path, required=True, help="file to go on from and to write; made if absent")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps in all (default {STEPS})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end this piece after so long")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.state, options.steps, options.seconds)


if __name__ == "__main__":
    main()
