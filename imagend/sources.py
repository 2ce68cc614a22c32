"""Where a model may be fetched from, as a text names it: Civitai, Hugging Face or an https URL. Pure."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

CIVITAI = "civitai.com"
HUGGING_FACE = "huggingface.co"
AIR = re.compile(r"(?:urn:)?(?:air:)?(?:[a-z0-9_]+:[a-z0-9_]+:)?civitai:(\d{1,12})(?:@(\d{1,12}))?(?:\.\w+)?", re.I)
WEIGHTS = (".safetensors", ".sft")


def is_civitai(text: str) -> bool:
    """A page or download URL of it, the number of a version, or an AIR."""
    of_host = urlsplit(text).hostname in (CIVITAI, f"www.{CIVITAI}")
    return text.isdecimal() or bool(AIR.fullmatch(text)) or of_host


def is_hugging_face(text: str) -> bool:
    return urlsplit(text).hostname == HUGGING_FACE


def host_of(text: str) -> str:
    """The host that is asked first. Raises ValueError where the text names no source."""
    if text.isdecimal() or AIR.fullmatch(text):
        return CIVITAI
    try:
        parts = urlsplit(text)
        if parts.scheme == "https" and parts.hostname:
            return CIVITAI if is_civitai(text) else parts.hostname
    except ValueError:
        pass
    raise ValueError(
        "must be an https URL, or the number of a version on Civitai or an AIR, such as civitai:257749@290640"
    )
