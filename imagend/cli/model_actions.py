"""imagend models show, verify, retire, remove: one model and its record. The daemon need not run, and is not asked."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from imagend import files, jobfile, records, signing
from imagend.architecture import ModelKind
from imagend.cli.init import login_name
from imagend.config import Config
from imagend.control import chosen
from imagend.errors import AmbiguousModel, BrokenModel, ImagendError, JobFailed, UnknownModel, UsageError
from imagend.generate_spec import Generate
from imagend.job import Job
from imagend.lora_field import with_tags
from imagend.model_folders import Found
from imagend.model_names import NAMED_KINDS, match, named, wanted
from imagend.models import Models, digest
from imagend.record import MAX_TEXT, Record
from imagend.spool import Spool, State

DIFFERS = 1
REMOVED = ".removed"
_SHOWN = 5


class One(NamedTuple):
    """A model that was named, whether it can be used or not."""

    kind: ModelKind
    found: Found
    models: Models
    config: Config

    @property
    def noun(self) -> str:
        return f"{self.kind.noun} {self.found.name}"

    def record(self) -> Record | None:
        """Raises UsageError where there is one that cannot be read."""
        try:
            return records.read(self.found.path)
        except ValueError as error:
            place = records.place(self.found.path).parent
            raise UsageError(f"The record of the {self.noun} cannot be used: {error}. Correct it in {place}.") from None

    def sha256(self) -> str:
        """Of what lies there now, read to the last byte. Raises JobFailed."""
        model = self.models.judge(self.found, self.kind)
        self.models.check(model)
        try:
            return digest(self.models.digests(model))
        except OSError as error:
            raise BrokenModel(model.name, error.strerror) from None

    def check_is_ours(self, verb: str) -> None:
        if not self.found.path.is_relative_to(self.config.models):
            raise UsageError(
                f"The {self.noun} lies in a folder of extra_model_paths, where imagend only reads: {self.found.path}. "
                f"To {verb} it, use the program that the folder belongs to."
            )


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="one model")
    helps = {
        "list": "the models there are, as without an action",
        "show": "what is known of a model, with its record",
        "verify": "hash models and compare with their records",
        "retire": "refuse a model in jobs from now on, with a reason; --undo takes it back",
        "remove": f"move a model away, into {REMOVED}/ beside it",
    }
    made = {name: actions.add_parser(name, help=text, description=f"{text}.") for name, text in helps.items()}
    for name, action in made.items():
        action.add_argument(
            "--kind", choices=[kind.value for kind in ModelKind], default=argparse.SUPPRESS, help="its kind"
        )
        if name in ("list", "show", "verify"):
            action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON")
        if name in ("show", "retire", "remove"):
            action.add_argument("name", help="as `imagend models` lists it, or the last part of that")
    made["verify"].add_argument("name", nargs="?", help="one model; left out, all that have a record")
    made["verify"].epilog = f"exit status: 0 all are what they were, {DIFFERS} one is not"
    made["retire"].add_argument("--reason", help="why: jobs that name it get this answer")
    made["retire"].add_argument("--undo", action="store_true", help="let jobs use it again")
    made["remove"].add_argument("--force", action="store_true", help="even if queued jobs need it: they will fail")


def run(arguments: argparse.Namespace, config: Config) -> int:
    models = Models(config.models, config.extra_model_paths)
    kinds = [ModelKind(arguments.kind)] if arguments.kind else list(ModelKind)
    if arguments.action == "verify" and arguments.name is None:
        all_ = [One(kind, one, models, config) for kind in kinds for one in models.folders.list(kind).found.values()]
        return _verify([one for one in all_ if records.place(one.found.path).exists()], arguments.json)
    one = _find(arguments.name, kinds, models, config)
    match arguments.action:
        case "show":
            return _show(one, arguments.json)
        case "verify":
            return _verify([one], arguments.json)
        case "retire":
            return _retire(one, arguments.reason, arguments.undo)
    return _remove(one, arguments.force)


def _find(name: str, kinds: list[ModelKind], models: Models, config: Config) -> One:
    """Among all kinds; an error of one kind alone is its own."""
    found, errors = [], []
    for kind in kinds:
        listed = models.folders.list(kind).found
        try:
            found.append(One(kind, listed[match(wanted(name).name, kind, listed)], models, config))
        except (UnknownModel, AmbiguousModel) as error:
            errors.append(error)
    if len(found) > 1:
        raise UsageError(f"There are a {' and a '.join(one.noun for one in found)}. Say which with --kind.")
    if not found and len(kinds) > 1 and all(isinstance(error, UnknownModel) for error in errors):
        raise UsageError(f"No model of any kind is named {name!r}. imagend models lists them.")
    if not found:
        raise next(error for error in errors if len(kinds) == 1 or isinstance(error, AmbiguousModel))
    return found[0]


def _show(one: One, as_json: bool) -> int:
    record = one.record()
    said: dict[str, Any] = {"kind": one.kind.value, "name": one.found.name, "path": str(one.found.path)}
    try:
        model = one.models.judge(one.found, one.kind)
        said |= {"size": model.size, "base": model.architecture.base or None, "format": model.architecture.format}
    except JobFailed as error:
        said["refused"] = str(error)
    told = record.model_dump(mode="json", exclude={"kind", "schema_"}, exclude_none=True) if record else None
    said["record"] = told
    if as_json:
        print(json.dumps(said, indent=1))
        return 0
    retired = record.retired if record else None
    lines = {key: value for key, value in said.items() if key != "record"}
    lines["state"] = f"retired by {retired.by} at {retired.at.isoformat()}: {retired.reason}" if retired else "active"
    lines |= {f"record: {key}": value for key, value in (told or {"record": "none"}).items() if key != "retired"}
    if record and record.trained:
        lines["record: trained"] = [f"{key} {value}" for key, value in record.trained.model_dump().items()]
    for key, value in lines.items():
        print(f"{key:22} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _verify(all_: list[One], as_json: bool) -> int:
    results = []
    for one in all_:
        result: dict[str, Any] = {"kind": one.kind.value, "name": one.found.name, "recorded": None, "same": None}
        try:
            record = one.record()
            recorded = result["recorded"] = record.sha256 if record else None
            now = result["sha256"] = one.sha256()
            result["same"] = now == recorded if recorded else None
            why = {True: "is what was recorded", False: f"was {recorded} and is now", None: "has no digest in a record"}
            told = f"{why[result['same']]}: {now}"
        except ImagendError as error:
            result |= {"same": False, "why": str(error)}
            told = str(error)
        results.append(result)
        if not as_json:
            word = {True: "ok", False: "differs", None: "unknown"}[result["same"]]
            print(f"{word:8} {one.noun}: {told}", flush=True)
    if as_json:
        print(json.dumps(results, indent=1))
    elif not results:
        print("No model has a record. `imagend fetch` writes one; to hash one model: imagend models verify NAME")
    return DIFFERS if any(result["same"] is False for result in results) else 0


def _retire(one: One, reason: str | None, undo: bool) -> int:
    one.check_is_ours("retire")
    if one.kind not in NAMED_KINDS:
        raise UsageError(f"Jobs name {one.kind.a_noun} in no field of its own: it cannot be retired, but removed.")
    reason = " ".join(str(reason or "").split())
    if not undo and not 0 < len(reason) <= MAX_TEXT:
        raise UsageError(f"Say why, in {MAX_TEXT} characters at most: imagend models retire NAME --reason TEXT")
    record = one.record() or Record(kind=one.kind)
    if undo:
        record = record.model_copy(update={"retired": None})
    else:
        record = record.retire(login_name(), datetime.now(UTC), reason)
    _written(one, lambda: records.write(one.found.path, record))
    print(f"The {one.noun} may be used again." if undo else f"Jobs that come now may not name the {one.noun}.")
    return 0


def _remove(one: One, force: bool) -> int:
    one.check_is_ours("remove")
    path = one.found.path
    if (needing := list(_needed_by(one))) and not force:
        some = ", ".join(needing[:_SHOWN]) + (f" and {len(needing) - _SHOWN} more" if len(needing) > _SHOWN else "")
        raise UsageError(
            f"{len(needing)} queued jobs need the {one.noun}: {some}. Retire it instead, wait, or give --force: they "
            "will then fail."
        )
    target = path.parent / REMOVED / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}" / path.name

    def away() -> None:
        files.make_folder(target.parent)
        files.move(path, target)  # before its record: a retired model must not become an active one
        if (record := records.place(path)).exists():
            files.move(record, records.place(target))

    _written(one, away)
    print(f"moved to {target}")
    if needing:
        print(f"{len(needing)} queued jobs that need it will fail")
    return 0


def _written(one: One, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        where = one.found.path.parent
        raise UsageError(f"{where} cannot be written: {error.strerror}. Run this as the owner of {where}.") from None


def _needed_by(one: One) -> Iterator[str]:
    """The queued and running jobs that name a model, or take it by default. Raises UsageError."""
    spool, known = Spool(one.config.spool), one.models.folders.list(one.kind).found
    try:
        states = [state for state in (State.PENDING, State.ACTIVE) if (one.config.spool / state).exists()]
        for ticket in [ticket for state in states for ticket in spool.tickets(state)]:
            try:
                body, _ = signing.split(spool.read(ticket.ref))
            except FileNotFoundError:  # it has just ended
                continue
            job = jobfile.parse(ticket.ref.client, body)
            if isinstance(job, Job) and one.found.name in _names(job, one, known):
                yield str(ticket.ref)
    except OSError as error:
        raise UsageError(
            f"Whether queued jobs need the {one.noun} cannot be seen in {one.config.spool}: {error.strerror}. Run this "
            "as the user that runs imagend."
        ) from None


def _names(job: Job, one: One, known: dict[str, Found]) -> Iterator[str]:
    fields = job.spec.model_dump(mode="json")
    if isinstance(job.spec, Generate):
        _, loras = with_tags(job.spec.prompt, job.spec.prompt_syntax, job.spec.loras)
        base = job.spec.model or one.config.default_model
        bases = known if one.kind is ModelKind.BASE else one.models.folders.list(ModelKind.BASE).found
        with contextlib.suppress(JobFailed):
            settings = one.config.model_settings.get(match(wanted(base).name, ModelKind.BASE, bases))
            fields["vae"] = job.spec.vae or (settings.vae if settings else None)
        if one.kind is ModelKind.EMBEDDING:  # prompts name it, with or without its folder
            leaf = one.found.name.rpartition("/")[2]
            yield from (one.found.name for text in (job.spec.prompt, job.spec.negative_prompt or "") if leaf in text)
        fields |= {"model": base, "loras": [{"name": lora.name} for lora in loras]}
    if one.kind is ModelKind.CONTROLNET:
        yield from chosen(fields, list(known))
    for kind, text in named(fields):
        if kind is one.kind:
            try:
                yield match(wanted(text).name, kind, known)
            except JobFailed:
                continue
