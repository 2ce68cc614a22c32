"""What a job of kind generate asks for: its fields and their ranges. Pure data: no disk, no clock."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from imagend import lora, reference_field, schedulers, set_field
from imagend.control import MAX_CONTROLS, Control
from imagend.fields import NAME, Frozen, ModelName, PictureName, SchedulerName, ScheduleType, Seed, Side
from imagend.lora_field import Lora
from imagend.prompt_tree import PromptSyntax
from imagend.reference_field import MAX_REFERENCES, Reference
from imagend.upscaling import Chain

MAX_PICTURES = 64


class Generate(Frozen):
    """Text to picture. Names and meanings are those of diffusers' StableDiffusionXLPipeline."""

    default_strength: ClassVar[float] = 0.3  # diffusers'

    prompt: str = Field(description="What to paint; to 4,096 tokens.")
    negative_prompt: str | None = Field(
        None, description="What not to paint; to 4,096 tokens. Left out, it is nothing at all (zeros), as in diffusers."
    )
    prompt_syntax: PromptSyntax = Field(
        PromptSyntax.COMPEL,
        description="How weights are written: compel `(red)1.3 hat++`, a1111 `(red:1.3) [hat] BREAK`, or plain (none).",
    )
    model: ModelName | None = Field(
        None,
        description="A base model: a file under models/checkpoints/, without its extension, or a folder under "
        "models/diffusers/, as `imagend models` lists them, perhaps pinned: name@sha256; "
        "default_model of config.yaml if left out.",
    )
    vae: ModelName | None = Field(
        None,
        description="A VAE: a file under models/vae/, without its extension, or a folder there. Left out, that of "
        "`model_settings` in config.yaml, or else the model's own.",
    )
    loras: tuple[Lora, ...] = Field(
        (),
        max_length=lora.MAX_LORAS,
        description="LoRAs, by name and weight (-2 to 2); `<lora:name:0.8>` in an a1111 prompt is joined with them.",
    )
    image: PictureName | None = Field(
        None,
        description="A picture to begin with (img2img): ENTITY/VIEW in reference/, or sha256:… of one that was sent "
        "along. It is scaled to cover width x height, and what is over is cut off around the middle.",
    )
    strength: float | None = Field(
        None,
        ge=0.01,
        le=1.0,
        description="How far to go from `image`: so much of the steps is done, as in diffusers; 0.3 if left out.",
    )
    control: tuple[Control, ...] = Field(
        (), max_length=MAX_CONTROLS, description="ControlNets, each with the picture that guides it."
    )
    references: tuple[Reference, ...] = Field(
        (), max_length=MAX_REFERENCES, description="Pictures to go by, each with its strength: an IP-Adapter sees them."
    )
    reference_strength: float = Field(
        1.0, ge=0.0, le=1.0, description="How strongly all references act together: each one's strength times this."
    )
    ip_adapter: ModelName | None = Field(
        None,
        description="An IP-Adapter: a file under models/ipadapter/, without its extension; the only one there is "
        "if left out.",
    )
    width: Side | None = Field(None, description="Pixels; the model's native size if left out.")
    height: Side | None = Field(None, description="Pixels; the model's native size if left out.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=150, description="Denoising steps; those of the model's preset if left out, else 30."
    )
    guidance_scale: float | None = Field(
        None,
        ge=0.0,
        le=30.0,
        description="How closely to follow the prompt; 1 or less: no guidance. The preset's if left out, else 5.",
    )
    scheduler: SchedulerName | None = Field(
        None,
        description="A diffusers class or an AUTOMATIC1111 sampler name; the preset's or the model's own if left out.",
    )
    schedule_type: ScheduleType | None = Field(
        None,
        description="How noise falls from step to step, as AUTOMATIC1111 has it: Karras, Exponential, Beta, SGM "
        "Uniform, Simple, or Automatic (what the sampler has there); the preset's or the model's own if left out.",
    )
    eta: float | None = Field(
        None, ge=0.0, le=1.0, description="Noise added at each step, by DDIM and TCD only; 0 if left out."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the model predicts: only where its files say it wrongly or not at all."
    )
    rescale_betas_zero_snr: bool | None = Field(
        None, description="Begin with nothing but noise, as some models of v_prediction are trained; as its files say."
    )
    seed: Seed | None = Field(
        None, description="Picture i is painted from seed + i. Left out, it follows from the job's id."
    )
    seeds: tuple[Seed, ...] | None = Field(
        None, min_length=1, max_length=MAX_PICTURES, description="One seed per picture, instead of seed and count."
    )
    count: int | None = Field(
        None, ge=1, le=MAX_PICTURES, description="How many pictures, of a set for each item; 1 if left out."
    )
    items: tuple[set_field.Item, ...] = Field(
        (),
        max_length=set_field.MAX_ITEMS,
        description="A set: pictures by name, for each of which what stands in `{…}` in the prompts is filled in.",
    )
    table: str | None = Field(None, pattern=set_field.TABLE, description="The items as a table (CSV), sent along.")
    clip_skip: int | None = Field(
        None,
        ge=0,
        le=30,
        description="Diffusers' meaning: how many more layers of the text encoders to skip. Left out, the penultimate "
        "layer is used, which A1111 calls 2; A1111's n is n - 2 here.",
    )
    image_type: str | None = Field(
        None, pattern=NAME, description="A preset of size and prompt affixes from config.yaml: character, background."
    )
    chain: Chain | None = Field(
        None, description='What is done with the pictures once they are painted: `{"upscale": {"scale": 2}}`.'
    )
    metadata: Literal["full", "none"] = Field(
        "full", description="Whether the PNG carries prompt and settings. It is marked as AI-made either way."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Generate:
        set_field.check_seeds(self.seed, self.seeds, self.count, self.items, MAX_PICTURES)
        if self.strength is not None and self.image is None:
            raise ValueError("strength: goes with image, the picture to begin with; name one, or leave strength out")
        if self.image is not None and self.num_inference_steps is not None and self.denoising_steps < 1:
            raise ValueError("strength: leaves less than one of num_inference_steps; raise one of the two")
        if self.num_inference_steps is not None and self.enlarged is not None and self.enlarged.denoising_steps < 1:
            raise ValueError("chain: its strength leaves less than one of num_inference_steps; raise one of the two")
        reference_field.check(self.references, self.ip_adapter)
        if self.chain is not None:
            self.chain.check(self.width, self.height, is_set=bool(self.items))
        if self.scheduler is not None:
            chosen = self.schedule_type, self.prediction_type, self.rescale_betas_zero_snr, self.eta
            schedulers.configure(self.scheduler, *chosen)
        set_field.check_prompts(
            self.prompt, self.negative_prompt, self.prompt_syntax, self.loras, self.items, self.table
        )
        return self

    @property
    def is_img2img(self) -> bool:
        """Whether it begins with a picture: one that the job names, or one that its chain has enlarged."""
        return self.image is not None or self.strength is not None

    @property
    def denoising_steps(self) -> int:
        """How many of num_inference_steps are done, as diffusers counts."""
        assert self.num_inference_steps is not None
        part = (self.strength or self.default_strength) if self.is_img2img else 1.0
        return min(int(self.num_inference_steps * part), self.num_inference_steps)

    @property
    def chain_steps(self) -> tuple[str, ...]:
        """The steps of a chain, in order; none of a job that is no chain."""
        return self.chain.steps if self.chain else ()

    @property
    def enlarged(self) -> Generate | None:
        """What a chain paints anew from its enlarged pictures: the same at their size; None if it does not."""
        if self.chain is None or self.chain.upscale.strength is None:
            return None
        step = self.chain.upscale
        width, height = (side and side * step.scale for side in (self.width, self.height))
        changed = {"width": width, "height": height, "image": None, "strength": step.strength}
        return self.model_copy(update=changed)

    @property
    def planned(self) -> tuple[set_field.Planned, ...]:
        """What a completed spec is to publish, in order; of a chain, in each step's folder."""
        return set_field.planned(self.seeds, self.count, self.items)

    @property
    def parts(self) -> dict[str | None, Generate]:
        """The plain job that each item is, by name; of a job that is no set: itself, by no name."""
        plain = {"items": (), "count": None}
        filled = set_field.filled_in(self.prompt, self.negative_prompt, self.items)
        return {name: self.model_copy(update=plain | texts) for name, texts in filled.items()} or {None: self}

    @property
    def pictures(self) -> tuple[str, ...]:
        """The input pictures that the job names, each once."""
        named = (self.image, *(control.image for control in self.control), *reference_field.pictures(self.references))
        return tuple(dict.fromkeys(name for name in named if name is not None))
