"""imagend submit: sign a job and drop it into the inbox, from options or from a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from imagend import config as configuration
from imagend import set_table
from imagend.cli import drop, mask_option
from imagend.cli.watch import add_watch_options, follow
from imagend.config import Config
from imagend.control import ControlType
from imagend.errors import Rejected, UsageError
from imagend.job import SPECS, Frozen, Header, Kind, Ref
from imagend.reference_field import Role
from imagend.signing import job_id, split

_TEXTS = ("trigger_words", "targets")
_LISTS = ("loras", "control", "references", "chain", "items", "mask", "validation_prompts")
_OWN = ("schema", "kind", "seeds", "image", "source", *_LISTS)
_HELP = {
    "type": "Of preprocess: what the control picture shows: canny, pose or depth. Of fetch: what it is, such as lora.",
    "name": "Of train and fetch: what to call the model; of fetch, the file's own name if left out.",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", choices=[kind.value for kind in Kind], help="what to do, with the options below"
    )
    parser.add_argument(
        "field_source", nargs="?", metavar="source", help=f"of fetch only: {_lower(SPECS['fetch'], 'source')}"
    )
    parser.add_argument(
        "--file", type=Path, metavar="PAYLOAD.json", help="instead: a job as JSON ('-': standard input)"
    )
    parser.add_argument(
        "--as", dest="client", metavar="NAME", help="sign as this client (default: client.name of config.yaml)"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="with this private key (default: client.key of config.yaml)"
    )
    parser.add_argument("--wait", action="store_true", help="follow the job to its end, as `imagend watch` does")
    add_watch_options(parser)
    fields = parser.add_argument_group("fields of a job (docs/job.md)")
    specs = (
        SPECS[kind].model_fields for kind in ("train", "fetch", "preprocess", "upscale", "mask", "edit", "generate")
    )
    every = dict(item for model_fields in (Header.model_fields, *specs) for item in model_fields.items())
    for name, field in every.items():
        if (field.alias or name) not in _OWN:
            option = f"--{name.replace('_', '-')}"
            text = _HELP.get(name) or field.description or ""
            fields.add_argument(option, dest=f"field_{name}", metavar="VALUE", help=text.replace("%", "%%"))
    fields.add_argument(
        "--lora",
        dest="field_loras",
        metavar="NAME[:WEIGHT]",
        action="append",
        type=_lora,
        help="a LoRA and how strongly it acts (1 if left out); give it again for more of them",
    )
    for option, plain, what in (
        ("--control", False, "a ControlNet, or the type canny, pose or depth, and the control picture, as for --image"),
        ("--control-from", True, "the same of a plain picture, from which the control picture is made first"),
    ):
        fields.add_argument(
            option,
            dest="field_control",
            metavar="NAME=PICTURE[:STRENGTH]",
            action="append",
            type=partial(_control, plain),
            help=f"{what}; give it again for more of them",
        )
    fields.add_argument(
        "--reference",
        dest="field_references",
        metavar="PICTURE[:STRENGTH]",
        action="append",
        type=_reference,
        help="a picture to go by, as for --image, and how strongly it acts (0.6 if left out); to 4 of them",
    )
    fields.add_argument(
        "--image",
        dest="field_image",
        metavar="PICTURE",
        help="a picture to begin with (img2img), to edit, to mask, to upscale or to preprocess: a file of yours, which "
        "is sent along, or ENTITY/VIEW as `imagend references` lists them",
    )
    mask_option.configure(fields)
    fields.add_argument(
        "--chain-upscale",
        dest="field_chain",
        metavar="SCALE[:UPSCALER[:STRENGTH]]",
        type=_chain,
        help="make each picture so many times as wide and as high once it is painted, 2 or 4, by a network or Lanczos; "
        "and paint anew from it, as in 2::0.3",
    )
    fields.add_argument(
        "--item",
        dest="item_values",
        metavar="NAME:KEY=VALUE",
        action="append",
        type=item_value,
        help="a set: VALUE stands for {KEY} in the prompts of picture NAME; again for more of both; KEY seed: its seed",
    )
    fields.add_argument(
        "--set",
        dest="table",
        metavar="FILE.csv",
        type=Path,
        help="a set from a table: a row for each picture, with its name in the column name, and perhaps a column seed",
    )
    fields.add_argument(
        "--validation-prompt",
        dest="field_validation_prompts",
        metavar="PROMPT",
        action="append",
        help="of train: a prompt that is painted as it goes, and at the end; give it again for more of them",
    )
    fields.add_argument(
        "--seeds", dest="field_seeds", metavar="N,N,…", help="one seed per picture, instead of seed and count"
    )


def run(arguments: argparse.Namespace) -> int:
    config = _identity(configuration.load(configuration.find(arguments.config)), arguments)
    given = {key.removeprefix("field_"): value for key, value in vars(arguments).items() if key.startswith("field_")}
    given |= {"items": _items(arguments), "mask": mask_option.field(arguments)}
    given = {key: value for key, value in given.items() if value is not None}
    if (arguments.kind is None) == (arguments.file is None):
        raise UsageError("Give either a kind (imagend submit generate --prompt …) or --file PAYLOAD.json.")
    if arguments.file is not None and given:
        option = "item" if next(iter(given)) == "items" else next(iter(given)).replace("_", "-")
        raise UsageError(f"--{option} goes with `submit generate`; with --file put it into the file.")
    try:
        ref = _from_file(config, arguments.file) if arguments.file else _from_options(config, arguments.kind, given)
    except Rejected as error:
        raise UsageError(f"Not sent: {error}") from None
    except UnicodeEncodeError:
        raise UsageError("Not sent: an option is not valid UTF-8. Set the terminal's locale, or use --file.") from None
    if arguments.wait:
        return follow(config, ref, arguments)
    print(json.dumps({"id": ref.id, "client": ref.client}) if arguments.json else ref.id)
    return 0


def _identity(config: Config, arguments: argparse.Namespace) -> Config:
    given = {"name": arguments.client, "key": arguments.key}
    client = config.client.model_copy(update={key: value for key, value in given.items() if value is not None})
    return config.model_copy(update={"client": client})


def _lower(spec: type[Frozen], field: str) -> str:
    """A field's description, to follow a colon."""
    text = spec.model_fields[field].description or ""
    return text[:1].lower() + text[1:]


def _lora(text: str) -> dict[str, Any]:
    name, colon, weight = text.rpartition(":")
    return {"name": name, "weight": drop.number(weight)} if colon else {"name": text}


def _control(plain: bool, text: str) -> dict[str, Any]:
    name, _, picture = text.partition("=")
    named = {"type" if name in [*ControlType] else "model": name, **_weighted(picture, "control_strength")}
    return named | ({"preprocess": True} if plain else {})


def _reference(text: str) -> dict[str, Any]:
    """A view that is called as a role shows just that."""
    found = _weighted(text, "strength")
    view = found["image"].rpartition("/")[2]
    return found | ({"role": view} if view in [*Role] and not Path(found["image"]).is_file() else {})


def _weighted(text: str, key: str) -> dict[str, Any]:
    """A picture, and after a colon how strongly it acts."""
    image, colon, strength = text.rpartition(":")
    if not colon or image == "sha256":
        return {"image": text}
    return {"image": image, key: drop.number(strength)}


def _chain(text: str) -> dict[str, Any]:
    scale, _, rest = text.partition(":")
    upscaler, colon, strength = rest.rpartition(":") if ":" in rest else (rest, "", "")
    chosen = ({"upscaler": upscaler} if upscaler else {}) | ({"strength": drop.number(strength)} if colon else {})
    return {"upscale": {"scale": drop.number(scale)} | chosen}


def item_value(text: str) -> tuple[str, str, str]:
    """The name of an item, of a value of it, and the value."""
    item, colon, value = text.partition(":")
    key, equals, value = value.partition("=")
    if not (colon and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:KEY=VALUE, such as red-car:colour=red")
    return item, key, value


def _items(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The items of a set, from a table, from options, or from both: then an option changes or adds something."""
    items = {item["name"]: item for item in _table(arguments.table)} if arguments.table is not None else {}
    change(items, arguments.item_values or ())
    return list(items.values()) or None


def change(items: dict[str, dict[str, Any]], options: Iterable[tuple[str, str, str]]) -> None:
    """As item_value() has read the options."""
    for name, key, value in options:
        item = items.setdefault(name, {"name": name, "values": {}})
        if key == set_table.SEED:
            item[key] = drop.number(value)
        else:
            item["values"][key] = value


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            items = set_table.items_of(file.read(set_table.MAX_BYTES + 1))
        if len({item["name"] for item in items}) < len(items):
            raise ValueError("two of its rows have the same name; give each its own")
        return items
    except OSError as error:
        raise UsageError(f"Cannot read the table {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"The table {path} cannot be used: {error}.") from None


def _from_options(config: Config, kind: str, given: dict[str, Any]) -> Ref:
    """Pictures that are files here are sent along."""
    pictures = {}
    if "sha256" in given:
        given["sha256"] = given["sha256"].lower()
    for holder in (given, *given.get("control", ()), *given.get("references", ()), given.get("mask", {})):
        if holder.get("image") and Path(holder["image"]).is_file():
            holder["image"], raw = drop.read_picture(Path(holder["image"]))
            pictures[holder["image"]] = raw
    body = _compose(kind, given)
    drop.send_along(config, pictures)
    return drop.drop(config, body)


def _compose(kind: str, given: dict[str, Any]) -> bytes:
    """Options are text; what the field wants as a number becomes one, and the rest is the daemon's check, made here."""
    schema = Header.model_json_schema()["properties"] | SPECS[kind].model_json_schema()["properties"]
    fields: dict[str, Any] = {"kind": kind}
    for name, text in given.items():
        types = {option.get("type") for option in schema.get(name, {}).get("anyOf", [schema.get(name, {})])}
        if name in _LISTS:
            fields[name] = text
        elif name in _TEXTS:
            fields[name] = [part.strip() for part in text.split(",")]
        elif "array" in types:
            fields[name] = [drop.number(part) for part in text.split(",")]
        elif "boolean" in types:
            fields[name] = {"true": True, "false": False}.get(text, text)
        else:
            fields[name] = drop.number(text) if types & {"integer", "number"} or name not in schema else text
    return drop.compose(fields)


def _from_file(config: Config, path: Path) -> Ref:
    """A payload to be signed, or a file that is signed already, which goes as it is."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    try:
        body, _ = split(raw)
    except Rejected:
        from imagend.jobfile import read_json

        return drop.drop(config, drop.compose(read_json(raw.strip())))
    return drop.put(config, raw, Ref(config.client.name, job_id(config.client.name, body)))
