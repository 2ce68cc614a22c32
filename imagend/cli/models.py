"""imagend models: the models there are, from spool/catalog.json, or by looking where no daemon runs; what can be done
with one of them is in model_actions.py."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import Any

from imagend import config as configuration
from imagend import references
from imagend.architecture import ModelKind
from imagend.catalog import FILE
from imagend.cli import model_actions
from imagend.cli.look import daemon_alive, read
from imagend.config import Config
from imagend.models import Models
from imagend.spool import STATUS
from imagend.survey import Survey


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=[kind.value for kind in ModelKind], help="only models of this kind")
    parser.add_argument("--json", action="store_true", help="catalog.json itself")
    parser.epilog = "Where no daemon runs the folders are looked through at once; hashes are then left out."
    model_actions.configure(parser)


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    if arguments.action not in (None, "list"):
        return model_actions.run(arguments, config)
    catalog = _of_kind(catalogue(config), arguments.kind)
    print(json.dumps(catalog, indent=1) if arguments.json else "\n".join(_lines(catalog)))
    return 0


def catalogue(config: Config) -> dict[str, Any]:
    """catalog.json while the daemon runs, else what there is now."""
    if daemon_alive(read(config.spool / STATUS)) and (known := read(config.spool / FILE)):
        return known
    *_, catalog = Survey(Models(config.models, config.extra_model_paths), settle_s=0.0).look()
    document = catalog.document(datetime.now(UTC).isoformat(timespec="milliseconds"))
    return document | {"references": references.look(config.reference).document()}


def _of_kind(catalog: dict[str, Any], kind: str | None) -> dict[str, Any]:
    parts = {part: catalog[part] for part in ("models", "refused", "arriving")}
    return catalog | {part: [one for one in all_ if kind in (None, one["kind"])] for part, all_ in parts.items()}


def _lines(catalog: dict[str, Any]) -> list[str]:
    """A line per model: kind, name, what it is; those that cannot be used after them."""
    models = catalog["models"]
    width = min(48, max((len(one["name"]) for one in models), default=0))
    lines = [f"{one['kind']:11} {one['name']:{width}}  {_told(one)}" for one in models]
    lines += [f"{one['kind']:11} {one['name']:{width}}  is still being copied" for one in catalog["arriving"]]
    if catalog["refused"]:
        lines += ["", "cannot be used:", *(f"{one['kind']:11} {one['why']}" for one in catalog["refused"])]
    return lines or ["No models: put some under models/checkpoints/, or run: imagend init"]


def _told(one: dict[str, Any]) -> str:
    size = one["size"]
    said = [
        one["family"],
        one["prediction_type"] if one["prediction_type"] == "v_prediction" else None,
        f"{one['native_size']} px" if one["native_size"] else None,
        f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
        one["autov2"],
        f"trigger words: {', '.join(one['trigger_words'])}" if one["trigger_words"] else None,
        f"trained on {one['trained_on']}" if one["trained_on"] else None,
        "for inpainting" if one["inpainting"] else None,
        f"retired: {record['retired']}" if (record := one.get("record")) and record["retired"] else None,
    ]
    return ", ".join(text for text in said if text)
