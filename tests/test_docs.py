"""The documents are true: tables equal the code, commands exist, the checkout's own config is the template."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from imagend import cli
from imagend import config as configuration
from imagend.cli import COMMANDS
from imagend.config import Config
from imagend.control import Control
from imagend.daemon import events
from imagend.edit_spec import Edit
from imagend.errors import ImagendError
from imagend.generate_spec import Generate
from imagend.job import SPECS, Header
from imagend.lora_field import Lora
from imagend.mask_field import Mask
from imagend.reference_field import Reference
from imagend.set_field import Item
from imagend.status import (
    ErrorReport,
    Gpu,
    Gpus,
    Inbox,
    PassedOver,
    Paused,
    Pipeline,
    Queue,
    Rates,
    Removal,
    Removed,
    Status,
    Storage,
    Waiting,
    Worker,
)
from imagend.upscaling import Chain, UpscaleStep


def fields_table(model: type[Any]) -> str:
    """The fields of a model as docs/job.md shows them; of what is a kind of another one, those that are not alike."""
    schema = model.model_json_schema()
    rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
    others = model.__base__.model_json_schema()["properties"] if model is Edit else {}
    for name, field in schema["properties"].items():
        if field == others.get(name):
            continue
        required = name in schema.get("required", ())
        default = "required" if required else f"`{_json(field.get('default'))}`"
        rows.append(f"| `{name}` | {_values(field, schema)} | {default} | {field['description']} |")
    return "\n".join(rows)


def _json(value: Any) -> str:
    return "none" if value is None else str(value)


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    option, *others = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    if others:
        return f"{_values(option, schema)}, or a list of them; 1 to {others[0]['maxItems']} of them"
    if "$ref" in option:
        option = schema["$defs"][option["$ref"].rpartition("/")[2]]
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "const" in option:
        return f"`{option['const']}`"
    if option.get("format") == "date-time":
        return "RFC 3339 time"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "object",
        "array": "list of whole numbers",
    }
    limits = option if option["type"] != "array" else option["items"]
    if "prefixItems" in limits:
        return f"list of {len(limits['prefixItems'])} whole numbers each, 1 to {option['maxItems']} of them"
    if limits is not option and limits.get("type") == "string" and "enum" not in limits:
        return _texts(option, limits)
    if "$ref" in limits:
        return f"list of objects, at most {option['maxItems']}: see below"
    if "enum" in limits and option["type"] == "array":
        return f"list of {_values(limits, schema)}; at most {option['maxItems']}"
    text = words[option["type"]]
    if "minimum" in limits:
        text += (
            f", {limits['minimum']:g} to {limits['maximum']:d}"
            if limits["maximum"] > 1e6
            else (f", {limits['minimum']:g} to {limits['maximum']:g}")
        )
    if "multipleOf" in option:
        text += f", a multiple of {option['multipleOf']}"
    if "maxLength" in option:
        text += f", at most {option['maxLength']} characters"
    if "maxItems" in option:
        text += f"; {option['minItems']} to {option['maxItems']} of them"
    if "pattern" in option:
        text += " like `{}`".format(option["pattern"].replace("|", r"\|"))  # else it would end the table's cell
    return text


def _texts(option: dict[str, Any], each: dict[str, Any]) -> str:
    length = f", each of at most {each['maxLength']} characters" if "maxLength" in each else ""
    return f"list of texts{length}; {option.get('minItems', 0)} to {option['maxItems']} of them"


@pytest.mark.parametrize("model", [Header, *SPECS.values(), Mask, Lora, Control, Reference, Chain, UpscaleStep, Item])
def test_the_job_reference_is_what_the_code_takes(model: type[Any]) -> None:
    table = fields_table(model)
    assert table in (REPOSITORY / "docs" / "job.md").read_text(), f"docs/job.md should hold:\n{table}"


STATUS = (Status, Queue, Paused, PassedOver, Waiting, Worker, Pipeline, Gpus, Gpu, Inbox, Storage, Removal, Removed)
STATUS += (Rates, ErrorReport)


def status_table(model: type[Any]) -> str:
    """The fields of a part of status.json as docs/status.md shows them."""
    schema = model.model_json_schema(mode="serialization")
    rows = ["| field | value | meaning |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        rows.append(f"| `{name}` | {_kind(field)} | {field.get('description', '')} |")
    return "\n".join(rows)


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "$ref" in field:
        return f"[{(name := field['$ref'].rpartition('/')[2])}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("format") == "date-time":
        return "RFC 3339 time"
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object":
        return f"by name: {_kind(field['additionalProperties'])}"
    return {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }[field["type"]]


@pytest.mark.parametrize(
    "model",
    [
        Status,
        Queue,
        Paused,
        PassedOver,
        Waiting,
        Worker,
        Pipeline,
        Gpus,
        Gpu,
        Inbox,
        Storage,
        Removal,
        Removed,
        Rates,
        ErrorReport,
    ],
)
def test_the_status_reference_is_what_the_daemon_writes(model: type[Any]) -> None:
    part = f"## {model.__name__}\n\n{model.__doc__}\n\n{status_table(model)}\n"
    assert part in (REPOSITORY / "docs" / "status.md").read_text(), f"docs/status.md should hold:\n{part}"


def test_the_checkouts_config_is_the_template() -> None:
    assert (REPOSITORY / "config.yaml").read_text() == configuration.template()


def test_the_readme_shows_every_command_and_no_other() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    named = set(re.findall(r"\bimagend (\w+)", re.sub(r"(?s)[^`\n]*\bimagend (is|turns|and|the|uses)\b", "", readme)))
    assert set(COMMANDS) <= named


def test_every_error_code_is_explained() -> None:
    text = (REPOSITORY / "docs" / "errors.md").read_text()

    def classes(cls: type[ImagendError]) -> set[type[ImagendError]]:
        return {cls}.union(*(classes(child) for child in cls.__subclasses__()))

    for error in classes(ImagendError):
        assert f"| {error.code} | {error.status} |" in text, (error.code, error.status)


def test_every_event_is_explained() -> None:
    told = set(events.ENDS.values())
    for path in (REPOSITORY / "imagend" / "daemon").glob("*.py"):
        told |= set(re.findall(r'\.tell\(\s*"([a-z._]+)"', path.read_text()))
    text = (REPOSITORY / "docs" / "spool.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z._, ]+) \|", text, re.MULTILINE)
    assert {word for row in rows for word in row.split(", ")} - {"type, after `imagend.`"} == told


def test_the_example_in_the_job_reference_is_a_valid_job() -> None:
    from imagend.jobfile import parse

    text = (REPOSITORY / "docs" / "job.md").read_text()
    for example in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        item = parse("alice", example.encode())
        assert isinstance(item.ref.client, str)
    assert Generate.model_fields


def commands_shown() -> dict[str, list[str]]:
    """Each `imagend …` in a block for the shell, and its words."""
    found = {}
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:^|[;|&] *|sudo (?:-u \S+ )?)imagend (.*)", line):
                    words = shlex.split(match[1], comments=True)
                    end = [place for place, word in enumerate(words) if re.match(r"[|;&<>]|2>", word)]
                    found[f"{path.name}: imagend {match[1]}"] = words[: min(end, default=len(words))]
    return found


@pytest.mark.parametrize("shown", commands_shown())
def test_every_command_in_the_documents_is_one_that_imagend_takes(shown: str) -> None:
    parser, commands = cli.parser_of(COMMANDS)
    arguments, unknown = parser.parse_known_args(commands_shown()[shown])
    assert (unknown, arguments.command in commands) == ([], True)


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("lowdown") is None or shutil.which("groff") is None or shutil.which("lexgrog") is None:
        pytest.skip("needs lowdown and man: apt-get install lowdown man-db")
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, REPOSITORY / "docs" / "man.py", folder], check=True, cwd=REPOSITORY)
    return folder


PAGES = ("man1/imagend.1", "man5/imagend-job.5", "man5/imagend.yaml.5", "man7/imagend-spool.7")


@pytest.mark.parametrize("page", PAGES)
def test_man_pages_are_good_roff_and_found_by_their_names(man: Path, page: str) -> None:
    lint = ["groff", "-t", "-man", "-Kutf8", "-Tutf8", "-ww", "-Wbreak", man / page]
    done = subprocess.run(lint, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = subprocess.run(["lexgrog", man / page], capture_output=True, text=True).stdout
    assert re.search(rf': "{Path(page).stem} - [a-z].+"$', found.strip()), found


def shown(page: Path) -> str:
    command = ["groff", "-t", "-man", "-Kutf8", "-Tutf8", "-P-cbou", "-rLL=1000n", page]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_man_pages_name_every_command_option_field_and_key(man: Path) -> None:
    commands, job, settings, spool = (shown(man / page) for page in PAGES)
    _, parsers = cli.parser_of(COMMANDS)
    for name, parser in parsers.items():
        assert f"imagend {name}" in commands
        assert all(option in commands for action in parser._actions for option in action.option_strings), name
    assert all(field in job for spec in SPECS.values() for field in spec.model_fields)
    assert all(f"{key}:" in settings for key in Config.model_fields)
    assert all(word in spool for word in ("PROMISES".title(), "rejected/", "SIGHUP"))


def completed(words: str) -> set[str]:
    """What bash offers after these words."""
    script = subprocess.run(
        [sys.executable, "-m", "imagend", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    ask = (
        f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="{words}"; _shtab_imagend; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_their_values() -> None:
    assert completed("imagend ref") == {"references"}
    assert completed("imagend submit --num-inf") == {"--num-inference-steps"}
    assert completed("imagend completion ''") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([sys.executable, "-m", "imagend", "completion", shell], capture_output=True, text=True)
    (tmp_path / "script").write_text(done.stdout)
    read = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")
