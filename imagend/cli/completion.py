"""imagend completion: a script for the shell, made by shtab from what the commands say of their options."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from imagend import cli

EPILOG = """\
bash:  imagend completion bash > ~/.local/share/bash-completion/completions/imagend
zsh:   imagend completion zsh > "${fpath[1]}/_imagend"     (a folder of $fpath)
fish:  imagend completion fish > ~/.config/fish/completions/imagend.fish"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="your shell")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    import shtab

    parser, commands = cli.parser_of(cli.COMMANDS)
    for command in commands.values():
        for action in _actions(command):
            if action.type is Path:
                vars(action)["complete"] = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Of a command and, where it has some, of its own commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)
