"""A pipeline whose UNet, and perhaps text encoders, learn: peft's adapter goes in, and comes out without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

from imagend.errors import UnsupportedSetting
from imagend.lora import PARTS
from imagend.train_spec import Train
from imagend.worker.batches import generator

ADAPTER = "trained"
OF_TEXT_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Trainee:
    """The adapter while it is in place. Its weights are in float32, whatever those of the base are in."""

    def __init__(self, pipe: Any, parts: tuple[str, ...]) -> None:
        self.modules = {part: getattr(pipe, part) for part in parts}
        self.weights: dict[str, torch.nn.Parameter] = {}
        for part, module in self.modules.items():
            for name, weight in module.named_parameters():
                if weight.requires_grad:
                    weight.data = weight.data.to(torch.float32)
                    self.weights[f"{part}.{name}"] = weight

    def checkpoint_gradients(self) -> None:
        for module in self.modules.values():
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What it has learned, by part and by peft's name of a layer's piece: PATH.lora_A.weight."""
        return {part: get_peft_model_state_dict(module, adapter_name=ADAPTER) for part, module in self.modules.items()}


@contextmanager
def learning(pipe: Any, spec: Train) -> Iterator[Trainee]:
    """A block in which the adapter is in place. Afterwards the base is what it was, bit for bit.

    No memory mode and no LoRA may be on the pipeline. Raises UnsupportedSetting where nothing of it could learn.
    """
    parts = PARTS if spec.train_text_encoder else ("unet",)
    before = [(weight, weight.requires_grad) for module in _modules(pipe) for weight in module.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        for part in parts:
            _add(getattr(pipe, part), part, spec)
        yield Trainee(pipe, parts)
    finally:
        for part in parts:
            strip(getattr(pipe, part))
        for weight, required in before:
            weight.requires_grad_(required)
            weight.grad = None
        pipe.unet.disable_gradient_checkpointing()


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _add(module: Any, part: str, spec: Train) -> None:
    targets = [*(spec.targets if part == "unet" else OF_TEXT_ENCODERS)]
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha or spec.rank, init_lora_weights="gaussian", target_modules=targets
    )
    assert spec.seed is not None
    seed = generator(spec.seed, "adapter", part).initial_seed()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            module.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise UnsupportedSetting(f"targets: this model has none of {', '.join(targets)}") from error


def strip(module: Any) -> None:
    """Take all of peft's layers out, and every mark of it."""
    layers = dict(module.named_modules())
    for path, layer in layers.items():
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = path.rpartition(".")
            setattr(layers[parent], child, layer.get_base_layer())
    module.__dict__.pop("peft_config", None)
    module._hf_peft_config_loaded = False
