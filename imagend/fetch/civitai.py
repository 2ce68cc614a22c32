"""Models on Civitai: by page, download URL, number of a version, or AIR. https://developer.civitai.com/site/reference"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from imagend.architecture import ModelKind
from imagend.errors import DownloadFailed
from imagend.fetch.plan import Item, Plan, short, tame
from imagend.sources import AIR
from imagend.sources import CIVITAI as HOST

_API = f"https://{HOST}/api/v1"
_PAGE = re.compile(r"/models/(\d{1,12})(?:/[^/]*)?/?")
_VERSION = re.compile(r"/api/(?:download/models|v1/model-versions)/(\d{1,12})/?")
_KINDS = {
    "Checkpoint": ModelKind.BASE,
    "LORA": ModelKind.LORA,
    "LoCon": ModelKind.LORA,
    "DoRA": ModelKind.LORA,
    "VAE": ModelKind.VAE,
    "TextualInversion": ModelKind.EMBEDDING,
    "Controlnet": ModelKind.CONTROLNET,
    "Upscaler": ModelKind.UPSCALER,
}
_LICENSE = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")
Json = Callable[[str], dict[str, Any]]


def plan(text: str, json: Json) -> Plan:
    """Raises DownloadFailed, and what `json` raises."""
    model, version = _numbers(text)
    if version is None:
        versions = json(f"{_API}/models/{model}").get("modelVersions")
        newest = versions[0] if isinstance(versions, list) and versions else None
        version = str(newest.get("id")) if isinstance(newest, dict) else ""
        if not version.isdecimal():
            raise DownloadFailed(HOST, f"the model {model} has no version that can be fetched")
    told = json(f"{_API}/model-versions/{version}")
    if told.get("usageControl") not in (None, "Download"):
        raise DownloadFailed(HOST, f"the owner of version {version} lets nobody download it")
    file = _file(told, version)
    url, hashes = str(file.get("downloadUrl")), file.get("hashes")
    sha256 = str(hashes.get("SHA256", "")).lower() if isinstance(hashes, dict) else ""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DownloadFailed(HOST, f"it has no SHA-256 of version {version}, without which nothing is fetched")
    about = told.get("model") if isinstance(told.get("model"), dict) else {}
    assert isinstance(about, dict)
    number = told.get("modelId", model)
    words = told.get("trainedWords")
    return Plan(
        HOST,
        tame(str(file.get("name"))),
        (Item(url, tame(str(file.get("name"))) + ".safetensors", sha256),),
        kind=_KINDS.get(str(about.get("type"))),
        said={
            "source": f"https://{HOST}/models/{number}?modelVersionId={version}",
            "version": short(f"{short(about.get('name')) or number} {short(told.get('name')) or version}"),
            "base": short(told.get("baseModel")),
            "license": _license(number, json),
            "trigger_words": tuple(filter(None, map(short, words[:100]))) if isinstance(words, list) else (),
        },
    )


def _numbers(text: str) -> tuple[str | None, str | None]:
    if text.isdecimal():
        return None, text
    if air := AIR.fullmatch(text):
        return air[1], air[2]
    parts = urlsplit(text)
    if found := _VERSION.fullmatch(parts.path):
        return None, found[1]
    asked = parse_qs(parts.query).get("modelVersionId", [""])[0]
    page = _PAGE.fullmatch(parts.path)
    if page is None or not (asked.isdecimal() or not asked):
        raise DownloadFailed(HOST, "give the page of a model, a download URL, the number of a version or an AIR")
    return page[1], asked or None


def _file(told: dict[str, Any], version: str) -> dict[str, Any]:
    """The one with the weights; its primary one, where there are several."""
    listed = told.get("files")
    files = [file for file in listed if isinstance(file, dict)] if isinstance(listed, list) else []
    usable = [file for file in files if str(file.get("name", "")).endswith(".safetensors")]
    usable = [file for file in usable if file.get("type") in ("Model", "Pruned Model", "VAE", None)] or usable
    chosen = next((file for file in usable if file.get("primary")), usable[0] if usable else None)
    if chosen is None:
        names = ", ".join(filter(None, (short(file.get("name"), 80) for file in files[:5])))
        raise DownloadFailed(HOST, f"version {version} has no .safetensors file, only: {names or 'none'}")
    for scan in ("pickleScanResult", "virusScanResult"):
        if chosen.get(scan) == "Danger":
            raise DownloadFailed(HOST, f"its own scan found version {version} to be dangerous")
    return chosen


def _license(number: object, json: Json) -> str | None:
    """What the owner allows, as the site says it in flags; without an answer, nothing."""
    if not str(number).isdecimal():
        return None
    told = json(f"{_API}/models/{number}")
    said = [f"{key}: {told[key]}" for key in _LICENSE if isinstance(told.get(key), bool | str | list)]
    return short("; ".join(said))
