"""What a job of kind train asks for: a LoRA, from a dataset. Names are those of diffusers'
train_text_to_image_lora_sdxl.py, where it has them. Pure.
"""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from imagend.fields import NAME, Frozen, ModelName, Planned, Seed, Side, printable
from imagend.model_names import wanted

MAX_STEPS = 100_000
MAX_SAMPLES = 64
"""Sample pictures of one job."""
DATASET = "dataset:"
"""Begins what a dataset is called among the pictures of a job (Run.pictures); no picture can be called so."""
LORA, KOHYA, CURVE, LOSSES = "lora.safetensors", "lora-kohya.safetensors", "loss.png", "loss.jsonl"
Target = Literal["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
Words = Annotated[str, Field(pattern=r"\S", max_length=200), AfterValidator(printable)]
Prompt = Annotated[str, Field(max_length=2000)]


class Train(Frozen):
    """A LoRA, into models/loras/. For clients with the right `train` only."""

    name: ModelName = Field(description="What the LoRA is called in models/loras/; folders/may/precede. A new name.")
    dataset: str = Field(
        pattern=NAME, description="A folder in reference/datasets/, as `imagend datasets` lists them: docs/train.md."
    )
    model: ModelName | None = Field(
        None, description="The base to train on, perhaps pinned: name@sha256; default_model of config.yaml if left out."
    )
    vae: ModelName | None = Field(
        None, description="A VAE; that of `model_settings` in config.yaml, or else the model's own, if left out."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the model predicts: only where its files say it wrongly or not at all."
    )
    rescale_betas_zero_snr: bool | None = Field(
        None, description="Begin with nothing but noise, as some models of v_prediction are trained; as its files say."
    )
    rank: int = Field(16, ge=1, le=128, description="Of the LoRA: how much it can hold, and how large it is.")
    alpha: float | None = Field(
        None, ge=0.001, le=1024.0, description="It acts with alpha / rank; the rank if left out, which is 1."
    )
    targets: tuple[Target, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        max_length=8,
        description="Which layers of the UNet's attention blocks it changes.",
    )
    train_text_encoder: bool = Field(False, description="Whether it changes the attention of both text encoders, too.")
    learning_rate: float = Field(1e-4, ge=1e-9, le=1.0, description="The highest, after the warm-up.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How it falls from step to step: not at all, or to 0."
    )
    lr_warmup_steps: int = Field(0, ge=0, le=MAX_STEPS, description="Steps in which it rises from 0.")
    max_train_steps: int = Field(1000, ge=1, le=MAX_STEPS, description="Steps of the optimizer.")
    train_batch_size: int = Field(1, ge=1, le=64, description="Pictures at once, of one bucket.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=64, description="Batches to a step.")
    resolution: Side | None = Field(
        None,
        description="Pictures are trained at about so many pixels, squared; the native size if left out.",
    )
    snr_gamma: float | None = Field(
        None,
        ge=0.1,
        le=100.0,
        description="Min-SNR weighting of the loss (arXiv 2303.09556); 5 is usual, none if left out.",
    )
    noise_offset: float = Field(0.0, ge=0.0, le=1.0, description="Noise that is the same all over a picture, added.")
    proportion_empty_prompts: float = Field(
        0.0, ge=0.0, le=1.0, description="How many of the captions are dropped, by chance: 0.1 is every tenth."
    )
    trigger_words: tuple[Words, ...] = Field(
        (), max_length=16, description="Put before each caption that does not hold them; kept in the LoRA's record."
    )
    max_grad_norm: float = Field(1.0, ge=0.001, le=1000.0, description="Longer gradients are cut to this length.")
    adam_weight_decay: float = Field(0.01, ge=0.0, le=1.0, description="Of AdamW.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None, description="What is computed in half precision; bf16 or fp16 on a GPU, no on the CPU if left out."
    )
    gradient_checkpointing: bool = Field(
        False, description="Less memory, more time. Done in any case once memory has run out."
    )
    checkpointing_steps: int = Field(
        100, ge=1, le=MAX_STEPS, description="So often is noted what an attempt that goes on needs."
    )
    validation_prompts: tuple[Prompt, ...] = Field(
        (), max_length=8, description="Painted at every validation_steps, and at the end, from the seed."
    )
    validation_steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="So often sample pictures are painted; only at the end if left out."
    )
    seed: Seed | None = Field(None, description="All that is drawn follows from it; from the job's id if left out.")
    notes: Annotated[str, AfterValidator(printable)] | None = Field(
        None, max_length=2000, description="For the LoRA's record."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if wanted(self.name).pin:
            raise ValueError("name: must not end in @ and a digest, which would pin it; leave that out")
        if self.lr_warmup_steps >= self.max_train_steps and self.lr_warmup_steps:
            raise ValueError("lr_warmup_steps: must be less than max_train_steps")
        if self.validation_steps is not None and not self.validation_prompts:
            raise ValueError("validation_steps: goes with validation_prompts; give some, or leave it out")
        if (count := len(self.sampled) * len(self.validation_prompts)) > MAX_SAMPLES:
            raise ValueError(f"validation_steps: would make {count} pictures, and {MAX_SAMPLES} are possible; raise it")
        return self

    @property
    def sampled(self) -> tuple[int, ...]:
        """After how many steps sample pictures are painted."""
        every = self.validation_steps or self.max_train_steps
        return (*range(every, self.max_train_steps, every), self.max_train_steps) if self.validation_prompts else ()

    @property
    def samples(self) -> dict[str, tuple[int, str]]:
        """Step and prompt of each, by file."""
        return {
            f"sample-{step:06d}-{number}.png": (step, prompt)
            for step in self.sampled
            for number, prompt in enumerate(self.validation_prompts)
        }

    @property
    def presented(self) -> int:
        """How many pictures are trained on in all, repeats counted."""
        return self.max_train_steps * self.train_batch_size * self.gradient_accumulation_steps

    def learning_rate_at(self, step: int) -> float:
        """Of a step from 0 on; as diffusers.optimization.get_scheduler has it."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * step / self.lr_warmup_steps
        done = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        match self.lr_scheduler:
            case "linear":
                return self.learning_rate * max(0.0, 1.0 - done)
            case "cosine":
                return self.learning_rate * max(0.0, 0.5 * (1.0 + cos(pi * done)))
            case _:
                return self.learning_rate

    def caption(self, text: str | None) -> str:
        """As it is trained: with the trigger words that it lacks."""
        lacking = [word for word in self.trigger_words if word.casefold() not in (text or "").casefold()]
        return ", ".join((*lacking, text) if text else lacking)

    @property
    def pictures(self) -> tuple[str, ...]:
        """What the worker is told the place of."""
        return (f"{DATASET}{self.dataset}",)

    @property
    def planned(self) -> tuple[Planned, ...]:
        files = (Planned(LORA, None, role="lora"), Planned(KOHYA, None, role="lora_kohya"))
        told = (Planned(CURVE, None, role="loss"), Planned(LOSSES, None, role="loss"))
        return (*files, *told, *(Planned(file, self.seed, role="sample") for file in self.samples))

    @property
    def chain_steps(self) -> tuple[str, ...]:
        """It is no chain."""
        return ()
