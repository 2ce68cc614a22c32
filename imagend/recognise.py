"""What a weight file is, from its tensors' names and shapes, never from its own name. Pure.

A refusal is a ValueError that completes "it is …". Names of tensors: LDM's (single files, https://github.com/CompVis),
diffusers'; those of ControlNets, IP-Adapters and upscalers as their authors publish them. Marks of v-prediction and of
EDM as in ComfyUI, comfy/supported_models.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from imagend.architecture import Architecture, ModelKind
from imagend.header import Header, Tensor
from imagend.recognise_lora import LORA, recognise_lora
from imagend.widths import TURN_DOWN, UNION, cross_attention, width_of

SDXL_SIZE = 1024
_UNET = "model.diffusion_model."
Tensors = Mapping[str, Tensor]


def recognise(header: Header, kind: ModelKind) -> Architecture:
    """What a weight file is that shall be of a kind. Raises ValueError: "it is …"."""
    found = identify(header)
    if found is None and kind is ModelKind.UPSCALER:
        found = Architecture(kind, "other")  # there are dozens of architectures; the library knows them
    if found is None:
        raise ValueError("nothing that imagend knows, by its tensors' names")
    if found.kind is not kind:
        raise ValueError(f"{found.kind.a_noun}: it belongs in {found.kind.folders[-1]}/")
    return found


def identify(header: Header) -> Architecture | None:
    """What a weight file is; None if it is unlike all that we know. Raises ValueError where it is known and no use."""
    tensors = header.tensors
    for is_one, judge in _JUDGES:
        if is_one(tensors):
            return judge(header)
    return None


# Checkpoints


def _checkpoint(header: Header) -> Architecture:
    tensors = header.tensors
    if _any(tensors, f"{_UNET}double_blocks.", f"{_UNET}single_blocks."):
        raise ValueError(f"a Flux checkpoint: {TURN_DOWN}")
    if _any(tensors, f"{_UNET}joint_blocks."):
        raise ValueError(f"an SD 3 checkpoint: {TURN_DOWN}")
    first = tensors.get(f"{_UNET}input_blocks.0.0.weight")
    if first is None or len(first.shape) != 4:
        raise ValueError(f"a checkpoint without the UNet of Stable Diffusion: {TURN_DOWN}")
    channels, in_channels, *_ = first.shape
    cross = cross_attention(tensors)
    _check_is_sdxl(tensors, channels, cross)
    if in_channels not in (4, 9):
        raise ValueError(f"an SDXL checkpoint with {in_channels} input channels: 4 are for painting, 9 for inpainting")
    if _any(tensors, "edm_mean", "edm_std", "edm_vpred."):
        raise ValueError("an SDXL checkpoint with EDM's noise schedule (Playground 2.5, CosXL), which imagend has not")
    if any(".quant_state." in name or name.endswith(".scale_weight") for name in tensors):
        raise ValueError("a quantised checkpoint: get it in fp16")
    return Architecture(
        ModelKind.BASE,
        "single_file",
        base="sdxl",
        prediction_type=_prediction_type(header),
        zero_snr="ztsnr" in tensors or header.metadata.get("ss_zero_terminal_snr") == "True",
        native_size=SDXL_SIZE,
        has_vae=_any(tensors, "first_stage_model.decoder."),
        has_text_encoders=True,
        inpainting=in_channels == 9,
        channels=channels,
        cross_attention_dim=cross,
    )


def _check_is_sdxl(tensors: Tensors, channels: int, cross: int) -> None:
    """By what only SDXL has: two text encoders and an embedding of the picture's size."""
    one = _any(tensors, "conditioner.embedders.0.")
    two = _any(tensors, "conditioner.embedders.1.")
    if not _any(tensors, f"{_UNET}label_emb.") or _any(tensors, "cond_stage_model."):
        raise ValueError(f"an {width_of(cross)} checkpoint (cross-attention of {cross}): {TURN_DOWN}")
    if cross == 1280 or (one and not two):
        raise ValueError("SDXL's refiner, which only finishes pictures: name a base model")
    if not (one and two):
        raise ValueError("a checkpoint without its text encoders: get the whole one")
    if channels == 320 and cross == 2048 and not _any(tensors, f"{_UNET}middle_block.1.transformer_blocks.9."):
        raise ValueError("a smaller relative of SDXL (SSD-1B, Vega): get it as a folder in diffusers' format")


def _prediction_type(header: Header) -> str | None:
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in header.tensors or said in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    return "epsilon" if said in ("epsilon", "eps") else None


# Parts of a pipeline, and what goes beside it


def _vae(header: Header) -> Architecture:
    tensors = header.tensors
    (name,) = [name for name in tensors if name.endswith("decoder.conv_in.weight")][:1]
    shape = tensors[name].shape
    if len(shape) != 4:
        raise ValueError(f"a VAE for video: {TURN_DOWN}")
    if shape[1] != 4:
        raise ValueError(f"a VAE of {shape[1]} latent channels (Flux, SD 3 and others): SDXL's has 4")
    diffusers = _any(tensors, "decoder.up_blocks.")
    return Architecture(ModelKind.VAE, "diffusers" if diffusers else "single_file", has_vae=True)


def _controlnet(header: Header) -> Architecture:
    tensors = header.tensors
    if "lora_controlnet" in tensors:
        raise ValueError("a Control-LoRA, which only ComfyUI has: get the whole ControlNet")
    if _any(tensors, "control_add_embedding.", "task_embedding"):
        raise ValueError(UNION)
    form = "single_file" if _any(tensors, "control_model.") else "diffusers"
    return Architecture(
        ModelKind.CONTROLNET, form, base="sdxl", cross_attention_dim=_width(tensors, ModelKind.CONTROLNET)
    )


def _ip_adapter(header: Header) -> Architecture:
    tensors = header.tensors
    width = next((one.shape[-1] for name, one in tensors.items() if name.endswith("to_k_ip.weight") and one.shape), 0)
    _check_width(width, ModelKind.IP_ADAPTER)
    for form, name in (("plain", "image_proj.proj.weight"), ("plus", "image_proj.proj_in.weight")):
        if name in tensors and len(tensors[name].shape) == 2:
            reads = tensors[name].shape[-1]
            return Architecture(ModelKind.IP_ADAPTER, form, base="sdxl", cross_attention_dim=width, image_width=reads)
    raise ValueError("an IP-Adapter of another kind (for faces?): get a plain one or a Plus")


def _clip_vision(header: Header) -> Architecture:
    return Architecture(ModelKind.CLIP_VISION, "openclip" if _any(header.tensors, "visual.") else "transformers")


_EMBEDDINGS = ({"clip_l", "clip_g"}, {"text_encoders_0", "text_encoders_1"})


def _embedding(header: Header) -> Architecture:
    """Textual inversion: one matrix of tokens per text encoder. SDXL has two encoders."""
    tensors = header.tensors
    for names in _EMBEDDINGS:
        if names <= tensors.keys():
            return Architecture(ModelKind.EMBEDDING, "single_file" if "clip_l" in names else "diffusers", base="sdxl")
    width = next((one.shape[-1] for one in tensors.values() if one.shape), 0)
    known = {768: "for SD 1.5", 1024: "for SD 2"}.get(width, "for one text encoder alone")
    raise ValueError(f"an embedding {known} ({width} wide): SDXL's have two, clip_l and clip_g")


def _is_embedding(tensors: Tensors) -> bool:
    known = {"emb_params", "clip_l", "clip_g", "text_encoders_0", "text_encoders_1"}
    alone = len(tensors) == 1 and all(len(one.shape) == 2 and one.shape[0] <= 75 for one in tensors.values())
    return bool(known & tensors.keys()) or alone


def _upscaler(header: Header) -> Architecture:
    tensors = header.tensors
    if _any(tensors, "model.1.sub."):
        return Architecture(ModelKind.UPSCALER, "esrgan")
    return Architecture(ModelKind.UPSCALER, "realesrgan" if "conv_first.weight" in tensors else "compact")


def _is_upscaler(tensors: Tensors) -> bool:
    if {"model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"} <= tensors.keys():
        return True
    if {"conv_first.weight", "body.0.rdb1.conv1.weight"} <= tensors.keys():
        return True
    return {"body.0.weight", "body.1.weight"} <= tensors.keys() and len(tensors["body.0.weight"].shape) == 4


def _useless(what: str) -> Callable[[Header], Architecture]:
    def judge(_: Header) -> Architecture:
        raise ValueError(what)

    return judge


def _width(tensors: Tensors, kind: ModelKind) -> int:
    width = cross_attention(tensors)
    _check_width(width, kind)
    return width


def _check_width(width: int, kind: ModelKind) -> None:
    if width in (768, 1024):
        raise ValueError(f"{kind.a_noun} for {width_of(width)} (cross-attention of {width}): {TURN_DOWN}")


# In which order they are asked: the more telling names first


def _any(names: Iterable[str], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)


def _starts(*starts: str) -> Callable[[Tensors], bool]:
    return lambda tensors: _any(tensors, *starts)


def _is_vae(tensors: Tensors) -> bool:
    return any(re.fullmatch(r"(first_stage_model\.|vae\.)?decoder\.conv_in\.weight", name) for name in tensors)


_JUDGES: tuple[tuple[Callable[[Tensors], bool], Callable[[Header], Architecture]], ...] = (
    (lambda tensors: "lora_controlnet" in tensors, _controlnet),
    (lambda tensors: any(LORA.search(name) for name in tensors), recognise_lora),
    (_starts("ip_adapter."), _ip_adapter),
    (_starts("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks."), _controlnet),
    (_starts("adapter.body.", "body.0.resnets."), _useless("a T2I-Adapter, which imagend has not: get a ControlNet")),
    (_starts(_UNET), _checkpoint),
    (_is_vae, _vae),
    (_starts("vision_model.", "visual."), _clip_vision),
    (_is_upscaler, _upscaler),
    (
        _starts("double_blocks.", "joint_blocks.", "transformer_blocks.", "single_transformer_blocks."),
        _useless(f"a diffusion transformer (Flux, SD 3 and their like): {TURN_DOWN}"),
    ),
    (_starts("text_model.", "transformer.text_model."), _useless("a text encoder alone: get the whole checkpoint")),
    (_starts("input_blocks.", "down_blocks."), _useless("a UNet alone: get the whole checkpoint")),
    (_is_embedding, _embedding),
)
