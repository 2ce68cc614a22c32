"""imagend replay: paint a job again from its manifest and say whether it is the same, bit for bit, or what differs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imagend import config as configuration
from imagend import likeness
from imagend.cli import drop
from imagend.cli.look import Sight, look, read, removed
from imagend.cli.watch import TIMED_OUT, exit_status, parse_ref, shower, wait
from imagend.config import Config
from imagend.errors import Rejected, UsageError
from imagend.fields import digest_of
from imagend.job import Kind, Ref
from imagend.likeness import Difference, Likeness, Picture
from imagend.outputs import MANIFEST

NOT_THE_SAME = 5
_SHOWN = 60
_PAINTED = ("succeeded", "partial")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job's id, or CLIENT/ID")
    parser.add_argument("--client", metavar="NAME", help="whose job it was; you paint it again as yourself")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="a picture that had been sent along with it; give it again for more of them",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    parser.add_argument("--timeout", type=float, metavar="S", help="stop waiting after so many seconds")
    parser.epilog = (
        f"exit status: 0 the same bits, {NOT_THE_SAME} other bits, 1 it failed this time, 3 rejected, 4 cancelled, "
        f"{TIMED_OUT} --timeout passed"
    )


def run(arguments: argparse.Namespace) -> int:
    config = configuration.load(configuration.find(arguments.config))
    ref = parse_ref(arguments.id, config)
    ref = Ref(arguments.client or ref.client, ref.id)
    manifest = manifest_of(config, ref)
    if manifest.get("kind") == Kind.FETCH:
        raise UsageError(
            f"{ref} fetched a model and painted nothing that could be painted again. To see whether the model is still "
            f"the same: imagend models verify. To fetch it again: imagend submit fetch {manifest['spec'].get('source')}"
        )
    if manifest.get("kind") == Kind.TRAIN:
        raise UsageError(
            f"{ref} trained a LoRA. To train it again, submit the spec of its manifest with another name: on the CPU, "
            "the same dataset and seed give the same bits."
        )
    if manifest.get("outcome") not in _PAINTED or not manifest.get("artifacts"):
        raise UsageError(f"{ref} has no pictures to compare with: its outcome was {manifest.get('outcome')}.")
    again = send_again(config, ref, manifest, arguments.image, {"label": f"replay of {ref}"})
    sight = wait(config, again, arguments.timeout, (lambda _: None) if arguments.json else shower(config, again))
    found = likeness.compare(manifest, sight.document) if sight and sight.outcome in _PAINTED else None
    if arguments.json:
        print(json.dumps(_as_json(ref, again, sight, found)))
    elif found:
        print("\n".join(_lines(ref, found)))
    if found:
        return 0 if found.equal else NOT_THE_SAME
    return exit_status(sight)


def manifest_of(config: Config, ref: Ref) -> dict[str, Any]:
    """Of a job that has ended. Raises UsageError."""
    manifest = read(config.outputs / ref.client / ref.id / MANIFEST)
    if not manifest:
        sight = look(config, ref)
        if sight.state == "removed":
            raise UsageError(f"{removed(ref, sight.document)}. Send the job again instead: imagend submit")
        if sight.state in ("queued", "running", "inbox"):
            raise UsageError(f"{ref} has not ended yet. Wait for it: imagend watch {ref}")
        raise UsageError(f"No manifest of {ref} can be read under {config.outputs}. Whose job is it? Write CLIENT/ID.")
    return manifest


def send_again(
    config: Config, ref: Ref, manifest: dict[str, Any], images: Sequence[Path], changed: Mapping[str, Any]
) -> Ref:
    """Drop a job with the spec of one that has ended, and what is `changed` in it. Raises UsageError."""
    spec: dict[str, Any] = {key: value for key, value in manifest["spec"].items() if value is not None}
    fields = {"kind": manifest["kind"], **spec, **changed}
    pictures = _pictures(ref, spec, images)
    try:
        body = drop.compose(fields)
        drop.send_along(config, pictures)
        return drop.drop(config, body)
    except Rejected as error:  # its manifest is of another version
        raise UsageError(f"This imagend cannot paint {ref} again: {error}") from None


def _pictures(ref: Ref, spec: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, bytes]:
    """What has to be sent along once more: the daemon keeps none. Raises UsageError."""
    holders = (spec, *spec.get("control", ()), *(references := spec.get("references", ())), spec.get("mask", {}))
    named = [holder.get("image") for holder in holders] + [reference.get("mask") for reference in references]
    wanted = {name for name in named if isinstance(name, str) and digest_of(name) is not None}
    given = dict(drop.read_picture(path) for path in paths)
    if missing := sorted(wanted - given.keys()):
        raise UsageError(
            f"{ref} was painted with a picture that had been sent along ({missing[0]}): give it, --image FILE"
        )
    if given.keys() - wanted:
        raise UsageError(f"{ref} was not painted with one of the pictures of --image. Leave it out.")
    return given


def _lines(ref: Ref, found: Likeness) -> list[str]:
    other = [picture for picture in found.pictures if not picture.equal]
    seeds = ["" if picture.seed is None else f" (seed {picture.seed})" for picture in other]
    lines = [f"  {picture.file}{seed}: other bits" for picture, seed in zip(other, seeds, strict=True)]
    if not other:
        lines.append(f"{ref}: painted again, the same bit for bit")
    else:
        lines.append(f"{ref}: painted again, {len(other)} of {len(found.pictures)} pictures have other bits")
    lines += [f"  {one.component} was {_short(one.was)}, is {_short(one.is_)}" for one in found.differences]
    if other and not found.differences:
        lines.append("  nothing that both manifests record differs; docs/determinism.md says what they do not record")
    if other and found.unrecorded:
        lines.append(f"  only one of the manifests records: {', '.join(found.unrecorded)}")
    return lines


def _short(value: Any) -> str:
    text = "not there" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _as_json(ref: Ref, again: Ref, sight: Sight | None, found: Likeness | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": ref.id,
        "client": ref.client,
        "replay": {"id": again.id, "client": again.client},
        "outcome": sight.outcome if sight else None,
    }
    if sight and "error" in sight.document:
        told["error"] = sight.document["error"]
    if found:
        told |= {
            "equal": found.equal,
            "pictures": [_plain(picture) | {"equal": picture.equal} for picture in found.pictures],
            "differences": [_plain(difference) for difference in found.differences],
            "unrecorded": list(found.unrecorded),
        }
    return told


def _plain(value: Picture | Difference) -> dict[str, Any]:
    return {key.rstrip("_"): item for key, item in asdict(value).items()}
