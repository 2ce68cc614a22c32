"""imagend install: this host's user, folders, config.yaml and systemd unit. Makes what is missing; --dry-run tells."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagend import config as configuration
from imagend.architecture import ModelKind
from imagend.cli.host import Accounts, Advice, File, Folder, Host, Link, Step
from imagend.config import SYSTEM_CONFIG, Config
from imagend.errors import UsageError
from imagend.inbox import ATTACHMENTS, REJECTED
from imagend.job import CLIENT_NAME
from imagend.models import EMBEDDED, Models
from imagend.rights import Rights

UNIT = Path("/usr/local/lib/systemd/system/imagend.service")
PROGRAM = Path("/opt/imagend/bin/imagend")
HOME = Path("/srv/imagend")
_PACKAGE = Path(__file__).parents[1]
_CARRIED = (_PACKAGE / UNIT.name, _PACKAGE.parent / UNIT.name)  # a wheel's, a checkout's
_HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))  # from the unit, by ProtectHome=yes
_COMMAND = Path("/usr/local/bin/imagend")
_SIGNERS = """\
# Who may ask imagend: a line per client, NAME namespaces="imagend-job@v1" KEY. See: man ssh-keygen, ALLOWED SIGNERS
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help=f"queue, models and results (default: as it was, at first {HOME})"
    )
    parser.add_argument(
        "--client",
        dest="clients",
        type=_client,
        action="append",
        default=[],
        metavar="NAME[:GROUP]",
        help="a folder in the inbox that only this Unix group (default: the client's name) and imagend may enter, and "
        "results that only they may read; again for more of them",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="another file system than this host's, for packages"
    )
    parser.add_argument(
        "--program",
        type=Path,
        metavar="FILE",
        help="what the unit starts (default: this very command; with --root: /opt/imagend/bin/imagend)",
    )
    parser.epilog = "What is there is kept; where it differs from what would be made, how to change that is said."


def run(arguments: argparse.Namespace) -> int:
    host = Host(arguments.root.absolute())
    if not (host.leave or arguments.dry_run) and host.is_ours:
        raise UsageError("Only root may do this: sudo imagend install, or imagend install --dry-run.")
    os.umask(0o022)  # root's own may be narrower, and imagend is to read what is made here
    program = arguments.program or (_this_program() if host.is_ours else PROGRAM)
    former = _settings(host)
    home = arguments.home or Path(former.get("WorkingDirectory", HOME))
    wanted = Wanted(home, arguments.config or SYSTEM_CONFIG, dict(arguments.clients), program)
    changed = False
    for step in wanted.steps(host):
        state = step.state()
        if state in ("made", "replaced"):
            changed = True
            if arguments.dry_run:
                state = {"made": "would make", "replaced": "would replace"}[state]
            else:
                step.do()
        word, _, remedy = state.partition(": ")
        print(f"{word:<8}  {step}" + (f"\n          {remedy}" if remedy else ""))
    if not arguments.dry_run:
        if changed and host.is_ours and Path("/run/systemd/system").is_dir():  # sd_booted(3)
            subprocess.run(["systemctl", "daemon-reload"], check=True)
        print(f"Next: write clients' keys into {wanted.signers}, then: imagend check; systemctl enable --now imagend")
        print("After an upgrade: systemctl restart imagend")
    return 0


@dataclass(frozen=True)
class Wanted:
    """How a host is to look. `clients`: the Unix group of each."""

    home: Path
    config: Path
    clients: dict[str, str]
    program: Path

    @property
    def signers(self) -> Path:
        return self.config.parent / "allowed_signers"

    def fresh(self) -> Config:
        """The settings of a host that has none."""
        return Config(
            spool=self.home / "spool",
            inboxes=(self.home / "drop" / "inbox",),
            outputs=self.home / "outputs",
            models=self.home / "models",
            reference=self.home / "reference",
            allowed_signers=self.signers,
            clients={client: Rights(group=group) for client, group in self.clients.items()},
        )

    def steps(self, host: Host) -> Iterator[Step]:
        for client, group in self.clients.items():
            if host.group(group) is None:
                raise UsageError(f"There is no group {group} here: groupadd {group}, or --client {client}:GROUP.")
        there = host.path(self.config)
        config = configuration.load(there) if there.exists() else self.fresh()
        unit = self.unit(config)  # raises, before anything is made
        yield Folder(host, self.config.parent, owner="root", group="root")
        yield Accounts(host, self.home, tuple(sorted(set(self.clients.values()))))
        yield from self._folders(host, config)
        yield File(host, self.config, configuration.template(config))
        yield File(host, config.allowed_signers, _SIGNERS)
        yield Embedded(host, config.models)
        yield File(host, UNIT, unit, ours=True)
        if self.program.parent not in (Path("/usr/bin"), _COMMAND.parent):
            yield Link(host, _COMMAND, self.program)
        yield from self._advice(host, config)

    def _advice(self, host: Host, config: Config) -> Iterator[Step]:
        hiding = Path("/etc/systemd/system") / UNIT.name
        if host.path(hiding).exists():
            yield Advice(f"{hiding} hides {UNIT}", f"make a drop-in of it (systemctl edit imagend), and: rm {hiding}")
        for client, group in self.clients.items():
            if config.rights(client).group != group:
                what = f"{self.config} does not give {client}'s results to the group {group}"
                yield Advice(
                    what, f"write there, under clients: {client}: {{group: {group}}}; systemctl reload imagend"
                )

    def _folders(self, host: Host, config: Config) -> Iterator[Step]:
        yield Folder(host, self.home, owner="root", group="root")
        for path in (config.spool, config.outputs, config.models, config.reference):
            yield Folder(host, path)
        for name in dict.fromkeys(name for kind in ModelKind for name in kind.folders):
            yield Folder(host, config.models / name)
        inbox = config.inboxes[0]
        if inbox.is_relative_to(self.home):  # else it is the file server's
            yield Folder(host, inbox.parent)
            yield Folder(host, inbox, 0o3771)
            yield Folder(host, inbox.parent / REJECTED, 0o2751)
            for client, group in self.clients.items():
                yield Folder(host, inbox / client, 0o3770, group=group)
                yield Folder(host, inbox / client / ATTACHMENTS, 0o3770, group=group)
                yield Folder(host, inbox.parent / REJECTED / client, 0o2750, group=group)

    def unit(self, config: Config) -> str:
        """The unit of the package, with this host's paths."""
        text = next(path for path in _CARRIED if path.exists()).read_text(encoding="utf-8")
        written = {config.spool, config.outputs}
        written |= {path.parent for path in (config.metrics, config.history, config.dashboard) if path}
        boxes = {inbox.parent for inbox in config.inboxes}  # on a mount that may come later: -
        lines = {
            "RequiresMountsFor": _outermost({config.spool, config.outputs, config.models}),
            "WorkingDirectory": [str(self.home)],
            "ExecStart": [f"{self.program} serve --config {self.config}"],
            "ReadWritePaths": [*_outermost(written), *(f"-{path}" for path in _outermost(boxes - written))],
        }
        for path in {self.home, self.program, self.config, *written, *boxes, config.models}:
            if not re.fullmatch(r"/[\w./@+-]*", str(path)):
                raise UsageError(
                    f"{str(path)!r} cannot stand in a systemd unit. Use an absolute path of letters and digits."
                )
        for key, values in lines.items():
            text = re.sub(rf"(?m)^{key}=.*$", f"{key}={' '.join(values)}", text)
        return text


@dataclass(frozen=True)
class Embedded:
    """The model that imagend carries, so that a new host can paint at once."""

    host: Host
    models: Path

    def __str__(self) -> str:
        return str(self.models / "diffusers" / EMBEDDED)

    def state(self) -> str:
        path = self.host.path(self.models / "diffusers" / EMBEDDED)
        return "kept" if (path / "model_index.json").exists() else "made"

    def do(self) -> None:
        Models(self.host.path(self.models)).install_embedded()


def drift(path: Path, config: Config) -> bool:
    """Whether this host's unit, if it has one that serves this config.yaml, is not what would be installed now."""
    host = Host(Path("/"))
    settings = _settings(host)
    program, *arguments = settings.get("ExecStart", "-").split()
    if arguments != ["serve", "--config", str(path)]:
        return False
    wanted = Wanted(Path(settings.get("WorkingDirectory", HOME)), path, {}, Path(program))
    return wanted.unit(config) != host.path(UNIT).read_text(encoding="utf-8")


def _settings(host: Host) -> dict[str, str]:
    """Those of the installed unit that stand there once."""
    path = host.path(UNIT)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return dict(re.findall(r"(?m)^(\w+)=(.*)$", text))


def _outermost(paths: set[Path]) -> list[str]:
    """Those that lie in no other."""
    return sorted(str(path) for path in paths if not any(path.is_relative_to(other) for other in paths - {path}))


def _client(text: str) -> tuple[str, str]:
    name, _, group = text.partition(":")
    if not re.fullmatch(CLIENT_NAME, name):
        raise argparse.ArgumentTypeError(f"{name!r} must match {CLIENT_NAME}: it becomes a folder's name")
    return name, group or name


def _this_program() -> Path:
    """The command that is running now. Raises UsageError if the service could not see it or its Python."""
    program = Path(sysconfig.get_path("scripts"), "imagend")
    for path in (program, Path(sys.base_prefix)):
        if any(path.is_relative_to(hidden) for hidden in _HIDDEN):
            raise UsageError(
                f"{path} is hidden from the service (ProtectHome=yes). Install imagend where all may read it, with the "
                f"system's Python: /usr/bin/python3 -m venv {PROGRAM.parents[1]}."
            )
    return program
