"""Pictures to PNG files: infotext, imagend's own chunk, and the mark that says a machine made it.

Infotext is AUTOMATIC1111's format, which most tools read; a prompt can spoof its fields by newlines, so the truth is in
our own chunk and in the manifest. The mark is IPTC's DigitalSourceType in XMP.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagend import __version__, lora, schedulers
from imagend.edit_spec import Edit
from imagend.generate_spec import Generate
from imagend.manifest import Artifact

AI_MADE = "trainedAlgorithmicMedia"
_COMPOSITE = "compositeWithTrainedAlgorithmicMedia"
_WORKED_ON = "algorithmicallyEnhanced"
AI_MARKS = (AI_MADE, _COMPOSITE)
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 of the 8-bit RGB samples, row by row."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def save_png(image: Image.Image, path: Path, text: PngInfo) -> bytes:
    """Write durably and in one step (a temporary name, fsync, rename); returns the file's bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        image.save(file, format="PNG", pnginfo=text, compress_level=4)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return path.read_bytes()


def describe(
    image: Image.Image, file: str, data: bytes, pixels: str, index: int, seed: int | None, seconds: float
) -> Artifact:
    """A picture that was saved: `data` is its file, `pixels` what pixels_sha256() says."""
    return Artifact(
        index=index,
        file=file,
        width=image.width,
        height=image.height,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels,
        seed=seed,
        seconds=seconds,
    )


def mark(made_by_ai: bool, item: dict[str, Any] | None) -> PngInfo:
    """For a picture that was only worked on: it stays marked as AI-made if it was, else it is marked as worked on."""
    return _with(PngInfo(), item, _XMP if made_by_ai else _XMP.replace(AI_MADE, _WORKED_ON))


def png_text(spec: Generate, seed: int, engine: dict[str, Any], item: dict[str, Any]) -> PngInfo:
    """What goes into the PNG beside the pixels; with metadata "none" only the AI mark. Of an edit a part is AI-made."""
    text, full = PngInfo(), spec.metadata == "full"
    if full:
        text.add_itxt("parameters", infotext(spec, seed, engine))
    xmp = _XMP.replace(AI_MADE, _COMPOSITE) if isinstance(spec, Edit) else _XMP
    return _with(text, item if full else None, xmp)


def _with(text: PngInfo, item: dict[str, Any] | None, xmp: str) -> PngInfo:
    if item is not None:
        text.add_itxt("imagend", json.dumps(item, ensure_ascii=False, allow_nan=False))
    text.add_itxt("XML:com.adobe.xmp", xmp)
    return text


def infotext(spec: Generate, seed: int, engine: dict[str, Any]) -> str:
    """AUTOMATIC1111's three-part text: prompt, negative prompt, settings."""
    scheduler, model, vae, upscaler = engine["scheduler"], engine["model"], engine.get("vae"), engine.get("upscaler")
    painted = engine.get("edit") or {"width": spec.width, "height": spec.height}
    hires = spec.chain.upscale.strength if spec.chain and upscaler else None
    settings: dict[str, object] = {
        "Steps": spec.num_inference_steps,
        "Sampler": schedulers.sampler_name(scheduler["class"], scheduler["config"]),
        "Schedule type": schedulers.schedule_type_of(scheduler["config"]) or spec.schedule_type,
        "Denoising strength": hires or spec.strength,
        "CFG scale": f"{spec.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{painted['width']}x{painted['height']}",
        "Model hash": model["sha256"][:10],
        "Model": model["name"],
        "VAE hash": vae["sha256"][:10] if vae else None,
        "VAE": vae["name"] if vae else None,
        "Lora hashes": _hashes(engine.get("loras", ()), "autov3"),
        "TI hashes": _hashes(engine.get("embeddings", ()), "sha256"),
        "Clip skip": spec.clip_skip + 2 if spec.clip_skip is not None else None,
        f"{'Hires upscale' if hires else 'Postprocess upscale by'}": upscaler["scale"] if upscaler else None,
        f"{'Hires' if hires else 'Postprocess'} upscaler": upscaler["name"] if upscaler else None,
        "RNG": "CPU",
        "Version": f"imagend {__version__}",
    }
    tags = [lora.tag(one["name"], one["weight"], one.get("blocks")) for one in engine.get("loras", ())]
    lines = [" ".join((spec.prompt, *tags))]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def _hashes(files: Iterable[dict[str, Any]], digest: str) -> str | None:
    """As AUTOMATIC1111 has it: 12 digits; of a LoRA its AutoV3, of an embedding the file's SHA-256."""
    return ", ".join(f"{one['name']}: {one[digest][:12]}" for one in files) or None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
