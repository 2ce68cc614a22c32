"""What a model is: its kind, and what must be known of it before it is loaded. Pure; recognise.py finds it out."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

BOXES, MASKS = "boxes", "masks"
"""What detectors find: boxes around what words name (GroundingDINO), or what is in a box (SAM)"""


class ModelKind(enum.StrEnum):
    BASE = "base"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"
    CONTROLNET = "controlnet"
    UPSCALER = "upscaler"
    CLIP_VISION = "clip_vision"
    IP_ADAPTER = "ip_adapter"
    PREPROCESSOR = "preprocessor"
    DETECTOR = "detector"
    SAFETY = "safety"
    CLIP = "clip"

    @property
    def folders(self) -> tuple[str, ...]:
        """Where such models lie under models/, in ComfyUI's names; the last is where a file of the kind belongs."""
        return _FOLDERS[self]

    @property
    def noun(self) -> str:
        return _NOUNS.get(self, self.value)

    @property
    def a_noun(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiouI' else 'a'} {self.noun}"


_FOLDERS = {
    ModelKind.BASE: ("diffusers", "checkpoints"),
    ModelKind.LORA: ("loras",),
    ModelKind.VAE: ("vae",),
    ModelKind.EMBEDDING: ("embeddings",),
    ModelKind.CONTROLNET: ("controlnet",),
    ModelKind.UPSCALER: ("upscale_models",),
    ModelKind.CLIP_VISION: ("clip_vision",),
    ModelKind.IP_ADAPTER: ("ipadapter",),
    ModelKind.PREPROCESSOR: ("preprocessors",),
    ModelKind.DETECTOR: ("detection",),
    ModelKind.SAFETY: ("safety",),
    ModelKind.CLIP: ("clip_text",),
}
_NOUNS = {
    ModelKind.BASE: "model",
    ModelKind.LORA: "LoRA",
    ModelKind.VAE: "VAE",
    ModelKind.CONTROLNET: "ControlNet",
    ModelKind.CLIP_VISION: "CLIP vision encoder",
    ModelKind.IP_ADAPTER: "IP-Adapter",
    ModelKind.SAFETY: "safety classifier",
    ModelKind.CLIP: "CLIP text encoder",
}


@dataclass(frozen=True)
class Architecture:
    """`native_size` in pixels, of bases only. `channels` and `cross_attention_dim` tell SDXL (320, 2048) from its small
    siblings; 0 where the file does not say."""

    kind: ModelKind
    format: str
    """diffusers, single_file, kohya, lycoris …: how its tensors are called; of a preprocessor, what it makes;
    of a detector, what it finds: boxes or masks; of a safety classifier, its class in transformers"""
    base: str = ""
    """sdxl, or nothing where it goes with any (upscalers), or does not say"""
    family: str = ""
    """SDXL, Pony, Illustrious, NoobAI …: a guess from metadata and name, of which nothing depends but what is shown"""
    prediction_type: str | None = None
    """epsilon or v_prediction, as diffusers has it; None where it does not say, which means epsilon"""
    zero_snr: bool = False
    """whether it was trained to zero terminal signal-to-noise ratio (https://arxiv.org/abs/2305.08891)"""
    native_size: int = 0
    has_vae: bool = False
    has_text_encoders: bool = False
    inpainting: bool = False
    channels: int = 0
    cross_attention_dim: int = 0
    image_width: int = 0
    """how wide the embeddings of pictures are that an IP-Adapter reads"""


_FAMILIES = (  # the younger first: NoobAI's files speak of Illustrious, on which it was trained
    ("NoobAI", r"noob"),
    ("Illustrious", r"illustrious|(?<![a-z])il(xl)?(?![a-z])"),
    ("Pony", r"pony|(?<![a-z])pdxl|score_9"),
    ("Animagine", r"animagine"),
)
_TELLING = ("modelspec.title", "modelspec.merged_from", "ss_sd_model_name", "ss_base_model_version")


def family(metadata: Mapping[str, str], name: str) -> str:
    """Which family of SDXL models, to the best of our guess."""
    for text in (*(metadata.get(key, "") for key in _TELLING), name):
        for found, pattern in _FAMILIES:
            if re.search(pattern, text[:1000].lower()):
                return found
    return "SDXL"
