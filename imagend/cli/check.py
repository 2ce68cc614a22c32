"""imagend check: look for mistakes and say how to mend them. All it writes is a probe in each inbox."""

from __future__ import annotations

import argparse
import importlib.util
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from imagend import config as configuration
from imagend.architecture import ModelKind
from imagend.cli.check_inbox import inboxes, shelves
from imagend.cli.finding import Finding, report
from imagend.cli.init import login_name
from imagend.cli.look import daemon_alive, read
from imagend.config import Config
from imagend.errors import BadConfig, BadKeys, JobFailed
from imagend.models import Models
from imagend.outputs import DRAFTS
from imagend.signers import NAMESPACE, AllowedSigners
from imagend.spool import STATUS, State
from imagend.survey import Survey

_SOON_S = 14 * 24 * 3600.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="findings as a JSON list")
    parser.epilog = "exit status: 0 when nothing is wrong (warnings may stand), 78 otherwise"


def run(arguments: argparse.Namespace) -> int:
    return report(examine(configuration.find(arguments.config)), arguments.json)


def examine(path: Path) -> Iterator[Finding]:
    try:
        config = configuration.load(path)
    except BadConfig as error:
        yield Finding("error", str(error))
        return
    yield Finding("ok", f"{path} is read")
    yield from _folders(config)
    yield from _devices(config)
    mountinfo = Path("/proc/self/mountinfo").read_text()
    status = read(config.spool / STATUS)
    yield from shelves(config, mountinfo)
    yield from inboxes(config, mountinfo, status if daemon_alive(status) else {})
    yield from _keys(config)
    yield from _models(config)
    yield from _safety(config)
    yield from _engine()
    yield from _daemon(config)


def _folders(config: Config) -> Iterator[Finding]:
    for folder in (config.spool, config.outputs, config.models):
        if not folder.is_dir():
            yield Finding("error", f"{folder} is no folder", "imagend init, or correct the path in config.yaml")
        elif folder != config.models and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            yield Finding(
                "error", f"{folder} cannot be written", f"chown it to the user that runs imagend: {login_name()}"
            )
        else:
            yield Finding("ok", f"{folder} is there")
    if config.models.is_dir() and not os.access(config.models, os.W_OK):
        for right, what in (("fetch", "have models fetched"), ("train", "have LoRAs trained")):
            for client in sorted(name for name, rights in config.clients.items() if getattr(rights, right)):
                remedy = f"chown it to {login_name()}, or take {right}: true from clients.{client}"
                yield Finding("warning", f"{client} may {what}, and {config.models} cannot be written", remedy)
    for folder in (config.spool, config.outputs):
        if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
            yield Finding("error", f"{folder} can be written by everybody", f"chmod o-w {folder}")


def _devices(config: Config) -> Iterator[Finding]:
    """A rename is a step only within one file system."""
    drafts = config.outputs / DRAFTS
    groups = [
        [config.spool, *(config.spool / state for state in State), config.spool / "journal"],
        [config.outputs, drafts, *(path for path in _listing(config.outputs) if path != drafts)],
    ]
    for group in groups:
        there = [path for path in group if path.is_dir()]
        strangers = [path for path in there if path.stat().st_dev != there[0].stat().st_dev]
        for path in strangers:
            what = f"{path} lies on another file system than {there[0]}"
            yield Finding("error", what, "mount them together: jobs move by rename")


def _keys(config: Config) -> Iterator[Finding]:
    path = config.allowed_signers
    try:
        signers = AllowedSigners.parse(path.read_bytes().decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        yield Finding("error", f"{path}: {error}", "imagend init makes one")
        return
    except BadKeys as error:
        yield Finding("error", str(error))
        return
    if not len(signers):
        fix = f'add a line: NAME namespaces="{NAMESPACE}" ssh-ed25519 AAAA… (from the client\'s .pub file)'
        yield Finding("warning", f"{path} names nobody: no job will be accepted", fix)
    else:
        yield Finding("ok", f"{path} names {', '.join(sorted(signers.clients()))}")
    if path.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        yield Finding("error", f"{path} can be written by others, who could let themselves in", f"chmod go-w {path}")
    for signer in signers.expiring(time.time(), _SOON_S):
        what = f"{path}, line {signer.line}: the key of {signer.principal} expires within 14 days"
        yield Finding("warning", what, "add its successor")
    key = config.client.key
    if key.exists() and key.stat().st_mode & 0o077:
        yield Finding("error", f"{key} can be read by others", f"chmod 600 {key}")


def _models(config: Config) -> Iterator[Finding]:
    models = Models(config.models, config.extra_model_paths)
    *_, catalog = Survey(models, settle_s=0.0).look()
    for entry in catalog.entries.values():
        model = entry.model
        size = f": native size {model.native_size}x{model.native_size}" if model.native_size else ""
        yield Finding("ok", f"{model.kind.noun} {model.name}{size}")
    for error in catalog.refused.values():
        yield Finding("warning", str(error))
    if models.folders.trouble:
        yield Finding("error", models.folders.trouble, "correct the file, or extra_model_paths in config.yaml")
    try:
        catalog.find(config.default_model)
    except JobFailed as error:
        what = f"default_model {config.default_model}: {error}"
        yield Finding("error", what, "imagend init installs shapes-xl; or set default_model")


def _safety(config: Config) -> Iterator[Finding]:
    """Whether a filter is on, for whom, and by which classifier."""
    filtered = {name: found.mode for name in config.clients if (found := config.filter_for(name))}
    if config.safety == "off" and not filtered:
        yield Finding("ok", "no safety filter: nobody looks at what is painted (safety in config.yaml)")
        return
    whom = ", ".join(f"{name}: {mode}" for name, mode in filtered.items() if mode != config.safety)
    told = f"the safety filter is on: {config.safety}{f' ({whom})' if whom else ''}"
    names = list(Models(config.models, config.extra_model_paths).list(ModelKind.SAFETY))
    wanted = config.safety_classifier.model
    if (wanted in names) if wanted is not None else len(names) == 1:
        yield Finding("ok", f"{told}, by {wanted or names[0]}")
    else:
        there = ", ".join(names) or "nothing"
        what = f"{told}, and jobs fail: {f'no {wanted}' if wanted else 'not one'} in models/safety/, but {there}"
        yield Finding("error", what, "fetch a classifier, or name one in safety_classifier.model (docs/safety.md)")


def _engine() -> Iterator[Finding]:
    needed = ("torch", "diffusers", "transformers", "compel", "peft")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        what = f"{', '.join(missing)} not installed: no worker can start"
        yield Finding("error", what, "pip install 'imagend[engine]'")
    else:
        yield Finding("ok", "the engine is installed")


def _daemon(config: Config) -> Iterator[Finding]:
    status = read(config.spool / STATUS)
    if not daemon_alive(status):
        yield Finding("warning", "the daemon is not running", "imagend serve")
        return
    yield Finding("ok", f"the daemon runs (pid {status['pid']}, {status['state']})")
    for reason in status["reasons"]:
        yield Finding("warning", f"the daemon says: {reason}")


def _listing(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
