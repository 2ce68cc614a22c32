"""Memory modes on a pipeline: puts its weights where a mode wants them, and takes everything back. It decides nothing.

All modes but fp8 only move weights, so that the bits stay. Taking back is exact, too: while a mode moves weights, the
originals stay in the computer's memory (`home`) and are put back, not copied back; no hook is left.

Of diffusers' own ways we use group offloading by leaves, on the UNet, and layerwise casting. Their hooks are removed
here, because the latter's refuse to be. Not enable_model_cpu_offload(): it copies each component back from the device
after each picture (5 GB for SDXL's UNet), looks for a device by itself when a LoRA is loaded, and forgets the VAE on
it. Nor enable_sequential_cpu_offload(): it leaves weights on `meta`, where compel does not find them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device

from imagend.memory_plan import FACTOR, STREAMED, Mode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DConditionModel
    from diffusers.hooks import apply_group_offloading
    from diffusers.models.embeddings import MultiIPAdapterImageProjection
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

_CPU = torch.device("cpu")
_TOGETHER = {"unet", "controlnet"}
"""what runs at each denoising step"""


class Placement:
    """Where the weights of one pipeline are."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.mode: Mode | None = None
        self._pipe: Any = None
        self._anatomy: dict[str, Any] = {}
        self._home: list[tuple[torch.Tensor, torch.Tensor]] = []

    def holds(self, pipe: Any, mode: Mode) -> bool:
        return self._pipe is pipe and self.mode is mode

    def apply(self, pipe: Any, mode: Mode) -> None:
        """Bring a pipeline into a mode, from whichever it is in. What fails leaves it in none, unharmed."""
        if self.holds(pipe, mode):
            return
        anatomy = self.anatomy(pipe)
        self.release()
        self._pipe, self._anatomy = pipe, anatomy
        if mode is Mode.RESIDENT:
            for module in modules(pipe).values():
                module.to(self.device)
        else:
            self._offload(pipe, mode)
        self.mode = mode

    def release(self) -> None:
        """Take the mode back: no hooks, the original weights; in the computer's memory, unless the mode was resident.

        To be called before anything is loaded into the pipeline or taken out of it.
        """
        if self._pipe is None:
            return
        if self.device.type == "cuda" and self._home:
            torch.cuda.synchronize(self.device)  # a layer may still be on its way
        for module in modules(self._pipe).values():
            unhook(module)
        for tensor, data in self._home:
            tensor.data = data
        self._pipe, self.mode, self._home = None, None, []

    def leave(self) -> None:
        """Take the mode back, and all weights off the device. The next mode brings them where it wants them."""
        pipe = self._pipe
        self.release()
        for module in modules(pipe).values() if pipe is not None else ():
            module.to(_CPU)

    def anatomy(self, pipe: Any) -> dict[str, Any]:
        """What memory_plan.Work says of a pipeline: bytes and widths of its parts, as they are without a mode."""
        return self._anatomy if self._pipe is pipe else _anatomy(pipe)

    def _offload(self, pipe: Any, mode: Mode) -> None:
        parts = modules(pipe)
        for module in parts.values():
            module.to(_CPU)
        self._home = [(tensor, tensor.data) for module in parts.values() for tensor in _tensors(module)]
        if mode in STREAMED:
            for name in parts.keys() & _TOGETHER:
                self._stream(parts.pop(name), mode)
        team: list[Onload] = []
        if mode is Mode.MODEL_OFFLOAD and parts.keys() >= _TOGETHER:  # they take turns at each step
            pair = [parts.pop(name) for name in sorted(_TOGETHER)]
            hook = Onload(self.device, [tensor for module in pair for tensor in _tensors(module)], team)
            for module in pair:
                add_hook_to_module(module, hook)
        for module in parts.values():
            if mode is Mode.SEQUENTIAL:
                for unit, tensors in _units(module):
                    add_hook_to_module(unit, Onload(self.device, tensors))
            else:
                add_hook_to_module(module, Onload(self.device, list(_tensors(module)), team))

    def _stream(self, module: Any, mode: Mode) -> None:
        if mode is Mode.FP8 and isinstance(module, UNet2DConditionModel):
            module.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn,
                compute_dtype=module.dtype,
                skip_modules_classes=(MultiIPAdapterImageProjection,),  # which casts what it is given as it is stored
            )
        on_cuda = self.device.type == "cuda"
        if on_cuda:  # into memory from which the device can fetch while it works
            tensors = list(_tensors(module))
            for tensor in tensors:
                tensor.data = tensor.data.pin_memory()
            if mode is Mode.GROUP_OFFLOAD:  # the same bits: no need to keep both
                pinned = {id(tensor) for tensor in tensors}
                self._home = [(tensor, tensor.data if id(tensor) in pinned else data) for tensor, data in self._home]
        apply_group_offloading(
            module,
            onload_device=self.device,
            offload_device=_CPU,
            offload_type="leaf_level",
            use_stream=on_cuda,
            low_cpu_mem_usage=on_cuda,  # pinned already, and not to be copied once more
        )


class Onload(ModelHook):  # type: ignore[misc]
    """Brings tensors to the device when their module is to run. They leave when it has run, or, in a team (one is on
    the device at a time), when another one is to run; to leave costs nothing, because the copy is dropped.

    Also works for `vae.decode` and `vae.encode`, where diffusers calls pre_forward. `execution_device` is where
    diffusers looks for the device of an offloaded pipeline.
    """

    def __init__(self, device: torch.device, tensors: list[torch.Tensor], team: list[Onload] | None = None) -> None:
        self.execution_device = device
        self._tensors, self._team = tensors, team
        self._home: list[torch.Tensor] = []
        if team is not None:
            team.append(self)

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self._home:
            for other in self._team or ():
                other.leave()
            self._home = [tensor.data for tensor in self._tensors]
            arrived = False
            try:
                for tensor in self._tensors:
                    tensor.data = self._fetch(tensor.data)
                arrived = True
            finally:
                if not arrived:  # no room: half a component must not be taken for a whole one
                    self.leave()
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def post_forward(self, module: Any, output: Any) -> Any:
        if self._team is None:
            self.leave()
        return output

    def _fetch(self, data: torch.Tensor) -> torch.Tensor:
        return data.to(self.execution_device)

    def leave(self) -> None:
        for tensor, data in zip(self._tensors, self._home, strict=False):
            tensor.data = data
        self._home = []

    def detach_hook(self, module: Any) -> Any:
        self.leave()
        return module


def modules(pipe: Any) -> dict[str, Any]:
    """The components of a pipeline that have weights."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def unhook(module: Any) -> None:
    """Remove accelerate's and diffusers' hooks from a module and all below it; forward is what it was before them."""
    remove_hook_from_module(module, recurse=True)
    for part in module.modules():
        if (registry := part.__dict__.pop("_diffusers_hook", None)) is not None and registry._fn_refs:
            first = registry._fn_refs[0]
            part.forward = first.original_forward or first.forward
        forward = part.__dict__.get("forward")
        if getattr(forward, "__func__", None) is getattr(type(part), "forward", None):
            del part.forward  # found in its class again


def is_hooked(module: Any) -> bool:
    """Whether a mode has left something in a module."""
    return any("_hf_hook" in part.__dict__ or "_diffusers_hook" in part.__dict__ for part in module.modules())


def _anatomy(pipe: Any) -> dict[str, Any]:
    parts = {name: sum(tensor.nbytes for tensor in part.parameters()) for name, part in modules(pipe).items()}
    layers = (layer for part in modules(pipe).values() for layer in part.modules())
    return {
        "text_encoder_bytes": tuple(size for name, size in parts.items() if name.startswith("text_encoder")),
        "unet_bytes": parts["unet"],
        "controlnet_bytes": parts.get("controlnet", 0),
        "controlnets": len(getattr(pipe.controlnet, "nets", [None])) if "controlnet" in parts else 0,
        "vae_bytes": parts["vae"],
        "layer_bytes": max(sum(tensor.nbytes for tensor in layer.parameters(recurse=False)) for layer in layers),
        "unet_channels": pipe.unet.config.block_out_channels[0],
        "unet_itemsize": pipe.unet.dtype.itemsize,
        "vae_channels": pipe.vae.config.block_out_channels[1],
        "vae_itemsize": pipe.vae.dtype.itemsize,
    }


def can_stream(pipe: Any) -> bool:
    """Whether the UNet can be brought to the device layer by layer: not with adapters that use another layer's weights
    (DoRA) or weights that belong to no layer (LoHa, LoKr)."""
    tuners = [part for part in pipe.unet.modules() if isinstance(part, BaseTunerLayer)]
    return all(isinstance(part, LoraLayer) and not any(part.use_dora.values()) for part in tuners)


def _units(module: Any) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """What can run by itself, with its tensors: the module itself, each layer, and each adapted layer as a whole."""
    inside: set[int] = set()
    for part in module.modules():
        if id(part) in inside:
            continue
        whole = isinstance(part, BaseTunerLayer)
        if whole:
            inside |= {id(child) for child in part.modules()}
        tensors = list(_tensors(part, recurse=whole))
        if tensors or part is module:
            yield part, tensors


def _tensors(module: Any, recurse: bool = True) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


@contextmanager
def tiled(vae: Any, tile: int | None) -> Iterator[None]:
    """Let a VAE decode and encode in tiles of `tile` x `tile` pixels, or whole (None), within the block.

    Slicing is not used: it splits batches, and ours are of one picture. diffusers' own tile is the VAE's sample_size:
    for SDXL 1024, so that a picture of 1024x1024 would not be tiled at all.
    """
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    if tile is not None:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, tile, tile // FACTOR
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
