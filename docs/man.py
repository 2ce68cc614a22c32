"""Man pages from what is there: the commands' own --help, config.yaml's comments, docs/job.md and docs/spool.md.

python docs/man.py FOLDER writes FOLDER/man1/imagend.1 and its like, by lowdown. `make man` calls it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from imagend import __version__, cli
from imagend import config as configuration

DOCS = Path(__file__).parent
PAGES = {"job": "imagend-job(5)", "spool": "imagend-spool(7)"}
"""What of docs/ is a page, too."""
_TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
_CELL = re.compile(r"(?<!\\)\|")
_LINK = re.compile(r"\[([^\]]+)\]\((?!http)(?:\.\./)?(?:docs/)?([\w.-]+?)(?:\.md)?(?:#[\w-]*)?\)")


def pages() -> Iterator[tuple[str, int, str]]:
    """Name, section and Markdown of each page."""
    yield "imagend", 1, commands()
    yield "imagend-job", 5, document("job")
    yield "imagend.yaml", 5, settings()
    yield "imagend-spool", 7, document("spool")


def commands() -> str:
    parser, each = cli.parser_of(cli.COMMANDS)
    parts = [
        _name("imagend", "turns signed JSON job files into SDXL pictures"),
        "# SYNOPSIS\n\n**imagend** *COMMAND* [*options*]",
        f"# DESCRIPTION\n\n{parser.description} What the folders mean: **imagend-spool**(7).",
        "# COMMANDS",
    ]
    for name, command in each.items():
        usage = " ".join(command.format_usage().removeprefix("usage: ").split())
        parts += [f"## imagend {name}", f"{_plain(command.description or '')}", _code(usage)]
        parts += [_code(command.epilog) if "\n" in command.epilog else _plain(command.epilog)] if command.epilog else []
        parts += _options(command)
    status = cli.EPILOG.removeprefix("exit status: ").split("Start: ")[0].replace("\n", " ")
    parts += [
        f"# EXIT STATUS\n\n{_plain(status)}",
        "# FILES\n\n`config.yaml`, `/etc/imagend/config.yaml`: imagend.yaml(5)",
    ]
    return "\n\n".join([*parts, "# SEE ALSO\n\n**imagend-job**(5), **imagend.yaml**(5), **imagend-spool**(7)"])


def settings() -> str:
    """config.yaml as `imagend init` writes it is a manual already."""
    name = _name("imagend.yaml", "the configuration of imagend, with every key, its default and its meaning")
    return f"{name}\n\n# DESCRIPTION\n\nconfig.yaml, as `imagend init` writes it:\n\n{_code(configuration.template())}"


def document(stem: str) -> str:
    text = (DOCS / f"{stem}.md").read_text()
    title, _, body = text.partition("\n")
    name = PAGES[stem].partition("(")[0]
    body = _TABLE.sub(lambda table: _list(table[0]), body)
    body = re.sub(r"^##", "#", body, flags=re.MULTILINE)
    first, sections = re.split(r"(?m)^(?=# )", body, maxsplit=1)
    summary = title.removeprefix("# ").removeprefix(f"{PAGES[stem]}: ")
    summary = summary[0].lower() + summary[1:]
    return f"{_name(name, summary)}\n\n# DESCRIPTION\n\n{_LINK.sub(_reference, first + sections)}"


def _reference(link: re.Match[str]) -> str:
    page = PAGES.get(link[2])
    return "**{}**({})".format(*page[:-1].split("(")) if page else link[1]


def _name(name: str, summary: str) -> str:
    return f"# NAME\n\n{name} - {summary}"


def _list(table: str) -> str:
    """A table as a list: a terminal is too narrow for four columns."""
    head, _, *rows = (_CELL.split(line.strip().strip("|")) for line in table.splitlines())
    entries = []
    for first, *others in rows:
        cells = zip(head[1:], others, strict=True)
        told = [_titled(column.strip(), cell.strip()) for column, cell in cells if cell.strip()]
        entries.append(f"{first.strip()}\n\n:   {'; '.join(told)}".replace("\\|", "|"))
    return "\n".join(f"{entry}\n" for entry in entries)


def _titled(column: str, cell: str) -> str:
    return f"{column}: {cell}" if column in ("default", "status", "exit status") else cell


def _options(command: argparse.ArgumentParser) -> Iterable[str]:
    for action in command._actions:
        words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        takes = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
        text = (action.help or "") % {**vars(action), "prog": command.prog}
        if text != argparse.SUPPRESS:
            yield f"`{words}{takes}`\n\n:   {_plain(text)}"


def _plain(text: str) -> str:
    """Not Markdown: what would be read as such stays what it is."""
    return re.sub(r"([*_<>\[\]\\])", r"\\\1", text)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def write(folder: Path) -> list[Path]:
    """Write all pages below a folder, as man(1) looks for them."""
    written = []
    for name, section, text in pages():
        target = folder / f"man{section}" / f"{name}.{section}"
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"title": name, "section": str(section), "source": f"imagend {__version__}", "volume": "imagend"}
        told = [word for key, value in about.items() for word in ("-M", f"{key}={value}")]
        done = subprocess.run(
            ["lowdown", "-s", "-Tman", *told, "-"], input=text, capture_output=True, text=True, check=True
        )
        target.write_text(done.stdout)
        written.append(target)
    return written


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
