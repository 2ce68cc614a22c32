"""The field `loras` of a job, and the tags in its prompt that are joined with it. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from imagend import lora
from imagend.fields import Frozen, ModelName
from imagend.model_names import stem
from imagend.prompt_tree import PromptSyntax


def _blocks(blocks: dict[str, Any]) -> dict[str, Any]:
    lora.check_blocks(blocks)
    return blocks


class Lora(Frozen):
    """A LoRA of models/loras/ and how strongly it acts."""

    name: ModelName = Field(description="A file under models/loras/, without its extension.")
    weight: float = Field(
        1.0, ge=-lora.MAX_WEIGHT, le=lora.MAX_WEIGHT, description="How strongly: 0 is not at all, less is the opposite."
    )
    blocks: Annotated[dict[str, Any], AfterValidator(_blocks)] | None = Field(
        None, description="Weights of their own for parts and blocks, as diffusers' set_adapters takes them."
    )


def with_tags(prompt: str, syntax: PromptSyntax, loras: tuple[Lora, ...]) -> tuple[str, tuple[Lora, ...]]:
    """A prompt without its LoRA tags, which only a1111 has, and all LoRAs. Raises ValueError, the field first."""
    if syntax is PromptSyntax.A1111 and "<lora:" in prompt:
        try:
            prompt, found = lora.tags(prompt)
            loras += tuple(Lora(name=one.name, weight=one.weight, blocks=one.blocks) for one in found)
        except ValidationError:
            raise ValueError("prompt: has a <lora:…> without the name of a LoRA; `imagend models` lists them") from None
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
    names = [stem(one.name) for one in loras]
    if len(set(names)) < len(names):
        raise ValueError("loras: name one twice, with those in the prompt; name it once, with the sum of the weights")
    if len(loras) > lora.MAX_LORAS:
        raise ValueError(f"loras: are {len(loras)}, with those in the prompt; at most {lora.MAX_LORAS} are possible")
    return prompt, loras
