"""What a folder in diffusers' format is, from its configuration files. Pure: they are handed in, parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagend.architecture import BOXES, MASKS, Architecture, ModelKind
from imagend.errors import BrokenModel
from imagend.widths import TURN_DOWN, UNION

_PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
_CLASSES = {
    ModelKind.VAE: ("AutoencoderKL",),
    ModelKind.CONTROLNET: ("ControlNetModel",),
    ModelKind.CLIP_VISION: ("CLIPVisionModelWithProjection", "CLIPVisionModel"),
    ModelKind.PREPROCESSOR: ("DepthAnythingForDepthEstimation", "DPTForDepthEstimation", "VitPoseForPoseEstimation"),
    ModelKind.DETECTOR: ("GroundingDinoForObjectDetection", "SamModel"),
    ModelKind.CLIP: ("CLIPModel", "CLIPTextModelWithProjection"),
    ModelKind.SAFETY: ("ViTForImageClassification", "CLIPForImageClassification", "SiglipForImageClassification"),
}
_MAX_SAMPLE_SIZE, _MAX_BLOCKS = 4096, 16
Configs = Mapping[str, Mapping[str, Any]]
"""Parsed configuration files by their path in the model's folder; empty where there is none"""


def recognise_folder(name: str, kind: ModelKind, configs: Configs) -> Architecture:
    """Raises BrokenModel, or ValueError: "it is …"."""
    return _base(name, configs) if kind is ModelKind.BASE else _part(kind, configs.get("config.json", {}))


def _base(name: str, configs: Configs) -> Architecture:
    index, unet, vae = (configs.get(file, {}) for file in ("model_index.json", "unet/config.json", "vae/config.json"))
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise BrokenModel(name, "model_index.json has no text `_class_name`")
    if pipeline not in _PIPELINES:
        raise ValueError(f"a model for {ascii(pipeline)[1:61]}: {TURN_DOWN}")
    sample_size, channels = unet.get("sample_size"), vae.get("block_out_channels")
    if type(sample_size) is not int or not 1 <= sample_size <= _MAX_SAMPLE_SIZE:
        raise BrokenModel(name, "unet/config.json has no whole number `sample_size`")
    if not isinstance(channels, list) or not 1 <= len(channels) <= _MAX_BLOCKS:
        raise BrokenModel(name, "vae/config.json has no list `block_out_channels`")
    cross, in_channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    if cross == 1280:
        raise ValueError("SDXL's refiner, which only finishes pictures: name a base model")
    if in_channels not in (4, 9):
        raise ValueError("an SDXL model with other input channels than 4 (painting) or 9 (inpainting)")
    scheduler = configs.get("scheduler/scheduler_config.json", {})
    blocks = unet.get("block_out_channels")
    return Architecture(
        ModelKind.BASE,
        "diffusers",
        base="sdxl",
        prediction_type=_text(scheduler.get("prediction_type")),
        zero_snr=scheduler.get("rescale_betas_zero_snr") is True,
        native_size=sample_size * 2 ** (len(channels) - 1),
        has_vae=True,
        has_text_encoders=True,
        inpainting=in_channels == 9,
        channels=_whole(blocks[0]) if isinstance(blocks, list) and blocks else 0,
        cross_attention_dim=_whole(cross),
    )


def _part(kind: ModelKind, config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("_class_name")
    if name == "ControlNetUnionModel":
        raise ValueError(UNION)
    if name not in _CLASSES[kind]:
        raise ValueError(f"no {kind.noun} that imagend knows: config.json says {ascii(name)[:60]}")
    if kind is ModelKind.PREPROCESSOR:
        return Architecture(kind, "pose" if name == "VitPoseForPoseEstimation" else "depth")
    if kind is ModelKind.DETECTOR:
        return Architecture(kind, MASKS if name == "SamModel" else BOXES)
    if kind in (ModelKind.SAFETY, ModelKind.CLIP):
        return Architecture(kind, name)
    if kind is ModelKind.VAE and config.get("latent_channels", 4) != 4:
        raise ValueError(f"a VAE of {ascii(config['latent_channels'])[:20]} latent channels: SDXL's has 4")
    if kind is ModelKind.VAE and config.get("scaling_factor") == 0.18215:  # the only thing that tells them apart
        raise ValueError(f"a VAE for SD 1.5 or SD 2 (scaling_factor 0.18215): {TURN_DOWN}")
    cross = _whole(config.get("cross_attention_dim"))
    if kind is ModelKind.CONTROLNET and cross in (768, 1024):
        raise ValueError(f"a ControlNet for SD 1.5 or SD 2 (cross-attention of {cross}): {TURN_DOWN}")
    base = "" if kind is ModelKind.CLIP_VISION else "sdxl"
    return Architecture(kind, "diffusers", base=base, has_vae=kind is ModelKind.VAE, cross_attention_dim=cross)


def _whole(value: object) -> int:
    return value if type(value) is int and 0 < value < 2**31 else 0


def _text(value: object) -> str | None:
    return value if value in ("epsilon", "v_prediction") and isinstance(value, str) else None
