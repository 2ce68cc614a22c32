"""imagend init: a place for imagend. Makes what is missing and never overwrites."""

from __future__ import annotations

import argparse
import getpass
import re
from pathlib import Path

from imagend import config as configuration
from imagend import files
from imagend.architecture import ModelKind
from imagend.config import Client, Config
from imagend.errors import UsageError
from imagend.job import CLIENT_NAME
from imagend.models import EMBEDDED, Models
from imagend.signers import NAMESPACE
from imagend.signing import Key


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where (default: here)")
    parser.add_argument("--client", metavar="NAME", help="the first client's name (default: your login name)")


def run(arguments: argparse.Namespace) -> int:
    home: Path = arguments.folder
    if arguments.client and not re.fullmatch(CLIENT_NAME, arguments.client):
        raise UsageError(f"--client: {arguments.client!r} must match {CLIENT_NAME}: it becomes a folder's name.")
    path = arguments.config or home / "config.yaml"
    files.make_folder(path.parent)
    text = configuration.template(Config(client=Client(name=arguments.client or login_name())))
    _say(files.create(path, text.encode()), path)
    config = configuration.load(path)
    for folder in (
        config.spool,
        *config.inboxes,
        config.outputs,
        *(config.models / name for kind in ModelKind for name in kind.folders),
        config.reference,
    ):
        _say(not folder.is_dir(), folder)
        files.make_folder(folder)
    _make_keys(config)
    if Models(config.models).install_embedded():
        _say(True, config.models / "diffusers" / EMBEDDED)
    print(f"Ready. Start the daemon with: imagend serve --config {path}")
    return 0


def login_name() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "me"
    return name if re.fullmatch(CLIENT_NAME, name) else "me"


def _make_keys(config: Config) -> None:
    private, signers = config.client.key, config.allowed_signers
    for folder in (private.parent, signers.parent):
        files.make_folder(folder)
    public = private.with_name(f"{private.name}.pub")
    if not private.exists():
        key = Key.generate()
        files.create(private, key.private_bytes(config.client.name), mode=0o600)
        files.create(public, f"{key.public_line(config.client.name)}\n".encode())
        _say(True, private)
    else:
        _say(False, private)
    if not public.exists():
        print(f"no {public}: write allowed_signers yourself, with the line that ssh-keygen -y -f {private} prints")
    else:
        line = " ".join(public.read_text().split()[:2])
        header = (
            "# Who may ask imagend: a line per client, NAME namespaces=... KEY. See: man ssh-keygen, ALLOWED SIGNERS\n"
        )
        _say(files.create(signers, f'{header}{config.client.name} namespaces="{NAMESPACE}" {line}\n'.encode()), signers)


def _say(made: bool, path: Path) -> None:
    print(f"{'made' if made else 'kept'}  {path}")
