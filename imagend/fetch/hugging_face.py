"""Models on the Hugging Face Hub: a file, or a repository in diffusers' format, at one commit. Documented at
https://huggingface.co/docs/hub/api; not by huggingface_hub, which goes to addresses and redirects unchecked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from imagend.architecture import ModelKind
from imagend.errors import DownloadFailed
from imagend.fetch.plan import Item, Plan, short, tame
from imagend.sources import HUGGING_FACE as HOST

_REPOSITORY = re.compile(r"/([\w.-]{1,96}/[\w.-]{1,96})(?:/(resolve|blob|tree)/([^/]+)(?:/(.+))?)?/?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = r"(?:unet|vae|text_encoder|text_encoder_2)/"
_WEIGHTS = r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?"
_WORDS = r"(?:vocab|special_tokens_map|tokenizer_config|tokenizer|added_tokens)\.json"
_TOKENIZER = rf"tokenizer(?:_2)?/{_WORDS}"
_PIPELINE = re.compile(
    rf"model_index\.json|scheduler/scheduler_config\.json|{_PART}config\.json|{_TOKENIZER}|tokenizer(?:_2)?/merges\.txt|"
    rf"{_PART}{_WEIGHTS}"
)
_SINGLE = re.compile(rf"(?:preprocessor_)?config\.json|{_WORDS}|vocab\.txt|{_WEIGHTS}")
_MAX_FILES = 100
Json = Callable[[str], dict[str, Any]]


def plan(text: str, json: Json, variant: str | None = None) -> Plan:
    """`variant`: fp16, for the files of that name. Raises DownloadFailed, and what `json` raises."""
    found = _REPOSITORY.fullmatch(urlsplit(text).path)
    if found is None:
        raise DownloadFailed(HOST, "give the URL of a repository, or of a file in one")
    repository, verb, revision, path = found.groups()
    path = unquote(path) if path else None
    told = json(
        f"https://{HOST}/api/models/{repository}/revision/{quote(unquote(revision or 'main'), safe='')}?blobs=true"
    )
    commit = str(told.get("sha"))
    if not _COMMIT.fullmatch(commit):
        raise DownloadFailed(HOST, f"it does not say which commit {repository} is at")
    listed = told.get("siblings")
    siblings = {
        str(one.get("rfilename")): one for one in (listed if isinstance(listed, list) else ()) if isinstance(one, dict)
    }
    if path and verb != "tree":
        if not path.endswith(".safetensors") or path not in siblings:
            raise DownloadFailed(HOST, f"{repository} has no .safetensors file of that name at {commit[:10]}")
        items: tuple[Item, ...] = (_item(repository, commit, path, f"{tame(path)}.safetensors", siblings[path]),)
    elif path:
        raise DownloadFailed(HOST, "a part of a repository is not fetched: give the whole one, or one file")
    else:
        chosen = _chosen(siblings, variant, repository)
        items = tuple(_item(repository, commit, source, target, siblings[source]) for target, source in chosen.items())
    place = f"https://{HOST}/{repository}/{'blob' if path else 'tree'}/{commit}{f'/{quote(path)}' if path else ''}"
    return Plan(
        HOST,
        tame(path or repository),
        items,
        is_file=path is not None,
        kind=None if path or "model_index.json" not in siblings else ModelKind.BASE,
        said={"source": short(place), "version": f"{repository} at {commit}"} | _card(told.get("cardData")),
    )


def _chosen(siblings: dict[str, Any], variant: str | None, repository: str) -> dict[str, str]:
    """What a pipeline in diffusers' format is loaded from, by the name it shall have here: no code, no pickle, no other
    variant."""
    wanted = _PIPELINE if "model_index.json" in siblings else _SINGLE
    chosen = {name: name for name in siblings if wanted.fullmatch(name)}
    if variant is not None:
        mark = f".{variant}.safetensors"
        own = {name.removesuffix(mark) + ".safetensors": name for name in siblings if name.endswith(mark)}
        own = {target: source for target, source in own.items() if wanted.fullmatch(target)}
        if not own:
            raise DownloadFailed(HOST, f"{repository} has no files of the variant {variant}")
        chosen |= own
    for target in list(chosen):  # shards, where there is the whole
        whole = re.sub(r"-\d{5}-of-\d{5}|\.index\.json$", "", target)
        if target != whole and whole in chosen:
            del chosen[target]
    if not any(name.endswith(".safetensors") for name in chosen) or not any(
        name in chosen for name in ("model_index.json", "config.json")
    ):
        raise DownloadFailed(HOST, f"{repository} is no model in diffusers' format: give the URL of one of its files")
    if len(chosen) > _MAX_FILES:
        raise DownloadFailed(HOST, f"{repository} has more than {_MAX_FILES} files for one model")
    return chosen


def _item(repository: str, commit: str, source: str, target: str, told: dict[str, Any]) -> Item:
    """Weights lie in LFS, by their SHA-256; small files in git, by the SHA-1 of their blob."""
    url = f"https://{HOST}/{repository}/resolve/{commit}/{quote(source)}"
    size = told.get("size")
    lfs = told.get("lfs")
    sha256 = str(lfs.get("sha256")) if isinstance(lfs, dict) else None
    blob = str(told.get("blobId"))
    if not (_SHA256.fullmatch(sha256) if sha256 is not None else _COMMIT.fullmatch(blob)) or type(size) is not int:
        raise DownloadFailed(HOST, f"it has no digest of {short(source, 80)}, without which nothing is fetched")
    return Item(url, target, sha256, None if sha256 else blob, size)


def _card(card: object) -> dict[str, object]:
    """Of the model card's metadata."""
    if not isinstance(card, dict):
        return {}
    named = [short(card.get(key)) for key in ("license_name", "license", "license_link")]
    base, prompt = card.get("base_model"), short(card.get("instance_prompt"), 200)
    return {
        "license": ", ".join(filter(None, named)) or None,
        "base": short(base[0] if isinstance(base, list) and base else base),
        "trigger_words": (prompt,) if prompt else (),
    }
