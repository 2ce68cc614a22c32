"""The rules of the house that a machine can keep: who imports whom, who renames, who catches all, how files look."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from imagend import config
from imagend.errors import ImagendError

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "imagend"
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}

# A module's part of the house is its first name below imagend. A new one is entered here and in ARCHITECTURE.md.
WORDS = {
    "errors",
    "status",
    "job",
    "jobfile",
    "job_schema",
    "manifest",
    "prompt",
    "prompt_tree",
    "compel_syntax",
    "mentions",
    "likeness",
    "lora",
    "lora_field",
    "set_field",
    "set_table",
    "control",
    "buckets",
    "dataset_report",
    "train_spec",
    "train_settings",
    "upscaling",
    "fields",
    "schedulers",
    "presets",
    "messages",
    "message_ids",
    "memory_plan",
    "signers",
    "signing",
    "config",
    "config_keys",
    "header",
    "architecture",
    "widths",
    "recognise",
    "recognise_lora",
    "recognise_folder",
    "model_names",
    "rights",
    "record",
    "fetch_settings",
    "fetch_spec",
    "generate_spec",
    "router",
    "safety_settings",
    "edit_rules",
    "edit_words",
    "edit_settings",
    "edit_spec",
    "mask_spec",
    "model_settings",
    "lanes",
    "sources",
    "retention_settings",
    "reference_field",
    "mask_field",
}
SHELVES = {
    "attachments",
    "feed",
    "files",
    "history",
    "results",
    "retention",
    "inbox",
    "spool",
    "outputs",
    "references",
    "datasets",
    "models",
    "model_folders",
    "weights",
    "hashes",
    "hints",
    "live",
    "orders",
    "catalog",
    "survey",
    "records",
    "installing",
}
ENTRANCES = {"__main__", "cli", "client", "logs"}
PROCESSES = {"daemon", "worker", "fetch"}
HEAVY = {"torch", "cv2", "diffusers", "transformers", "compel", "PIL", "numpy", "safetensors", "accelerate", "peft"}

MAY_IMPORT = {
    **dict.fromkeys(WORDS, WORDS),
    **dict.fromkeys(SHELVES, WORDS | {"files"}),
    "spool": WORDS | {"files", "attachments"},
    "live": WORDS | {"feed"},
    "hashes": WORDS | {"files", "hints"},
    "models": WORDS | {"files", "weights", "model_folders", "hashes"},
    "catalog": WORDS | {"models"},
    "survey": WORDS | {"models", "catalog", "model_folders", "records"},
    "history": WORDS | {"files", "outputs", "feed"},
    "installing": WORDS | {"files", "records"},
    "results": WORDS | {"files", "outputs"},
    "retention": WORDS | {"results", "spool"},
    "daemon": WORDS | SHELVES | {"daemon"},
    "worker": WORDS | {"files", "models", "datasets", "worker"},
    "fetch": WORDS | {"files", "models", "model_folders", "weights", "records", "installing", "fetch"},
    "cli": WORDS | SHELVES | {"cli", "logs"},
    "__main__": {"cli"},
    "logs": {"message_ids"},
    "client": set(),
}
MAX_LINES = 250
SCREEN = "imagend.cli.top_screen"
CLIENT = "imagend.client"


def part(module: str) -> str:
    """Where a module lives: "daemon" for imagend.daemon.loop, "" for imagend itself."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> Iterator[str]:
    """The full names of all that a module imports, wherever the statement stands."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else str(node.module) for name in names)


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call))


# Who imports whom


def test_every_module_has_its_place() -> None:
    assert {part(module) for module in MODULES} == {""} | WORDS | SHELVES | ENTRANCES | PROCESSES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_place_allows(module: str) -> None:
    ours = {part(name) for name in imports(module) if name.split(".")[0] == "imagend"}
    allowed = MAY_IMPORT.get(part(module), set()) | {""}  # "": imagend itself, for its __version__
    if module == "imagend.cli.serve":
        allowed = allowed | {"daemon"}
    if module == "imagend.cli.fetch":
        allowed = allowed | {"fetch"}
    assert ours <= allowed


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) != "worker"])
def test_only_the_worker_knows_the_engine(module: str) -> None:
    assert HEAVY.isdisjoint(name.split(".")[0] for name in imports(module))


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) != "fetch"])
def test_only_fetch_knows_the_network(module: str) -> None:
    """No other process of ours opens a connection: the painter is told where its files are."""
    assert {"urllib3", "requests", "httpx2", "ssl", "http"}.isdisjoint(name.split(".")[0] for name in imports(module))


def test_the_clients_module_runs_alone_and_on_python_3_8() -> None:
    assert {name.split(".")[0] for name in imports(CLIENT)} <= sys.stdlib_module_names
    ast.parse(MODULES[CLIENT].read_text(), feature_version=(3, 8))


def test_only_the_screen_of_top_knows_textual() -> None:
    """An extra, and slow to import."""
    known = {module for module in MODULES if {"textual", "rich"} & {name.split(".")[0] for name in imports(module)}}
    assert known == {SCREEN}


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert graph == {}


def test_client_and_daemon_run_without_the_engine() -> None:
    """In a process of its own: the engine's libraries stay unimported, nothing is printed, no thread is started."""
    light = [module for module in MODULES if part(module) != "worker" and module != SCREEN]
    program = (
        f"import sys, threading, {', '.join(light)}\n"
        f"assert not {HEAVY | {'textual'}!r} & sys.modules.keys(), sys.modules.keys() & {HEAVY!r}\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# Who may do what


def _renames(call: ast.Call) -> bool:
    """fsync, rename and their like. str.replace() and datetime.replace() have other arguments than Path.replace()."""
    if not isinstance(call.func, ast.Attribute):
        return False
    name, owner = call.func.attr, call.func.value
    if isinstance(owner, ast.Name) and owner.id == "files":  # by name: imagend.files itself
        return False
    of_os = isinstance(owner, ast.Name) and owner.id == "os"
    of_path = len(call.args) == 1 and not call.keywords
    return (
        name in {"fsync", "fdatasync", "rename", "renames", "sync_file_range"}
        or (name == "replace" and (of_os or of_path))
        or (name == "move" and isinstance(owner, ast.Name) and owner.id == "shutil")
    )


def test_only_files_py_renames_and_syncs() -> None:
    """The exceptions: a worker saves its pictures in its draft, whose pieces become durable as they are painted; the
    client's module is copied to hosts where nothing else of us is."""
    found = {module for module in MODULES for call in calls(module) if _renames(call)}
    assert found == {"imagend.files", "imagend.worker.images", CLIENT}


def test_all_errors_are_caught_in_three_places_only() -> None:
    """At the door, and around an attempt, to paint or to fetch. Anywhere else it hides a bug."""
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {""}
                found += [module for name in names if name in {"", "Exception", "BaseException"}]
    suppressed = [
        module
        for module in MODULES
        for call in calls(module)
        if ast.unparse(call.func).endswith("suppress")
        if any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in call.args)
    ]
    assert sorted(found + suppressed) == ["imagend.daemon.intake", "imagend.fetch.main", "imagend.worker.main"]


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    for module in MODULES:
        assert {"pickle", "marshal", "shelve", "dill"}.isdisjoint(name.split(".")[0] for name in imports(module))
        for call in calls(module):
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            is_method = isinstance(call.func, ast.Attribute)
            assert is_method or name not in {"eval", "exec"}, module
            assert name != "system", module
            assert not any(keyword.arg == "shell" for keyword in call.keywords), module


def test_only_config_py_reads_the_environment() -> None:
    """What a worker's libraries shall find there, it may write."""
    for module in MODULES.keys() - {"imagend.config"}:
        text = re.sub(r"os\.environ(\.update\(|\[[^]]+\] = )", "", ast.unparse(TREES[module]))
        assert "environ" not in text, module
        assert "getenv" not in text, module


# How a file looks


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_one_sentence_that_says_its_place(module: str) -> None:
    docstring = ast.get_docstring(TREES[module])
    assert docstring
    assert re.match(r"\S.*[.:?]", docstring)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_can_be_seen_at_once(module: str) -> None:
    """Lines of code and comments; blank lines and docstrings are free."""
    source = MODULES[module].read_text(encoding="utf-8")
    docstrings = {
        line
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    nothing = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.tokenize(io.BytesIO(source.encode()).readline)
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }
    assert len(lines - docstrings) <= MAX_LINES


# Errors and settings


def every_error() -> Iterator[type[ImagendError]]:
    waiting = [ImagendError]
    while waiting:
        cls = waiting.pop()
        yield cls
        waiting += cls.__subclasses__()


def test_every_error_has_a_message_a_code_and_a_status() -> None:
    for module in MODULES:
        if part(module) != "worker":  # its classes stand in errors.py; the engine need not be installed
            importlib.import_module(module)
    for cls in every_error():
        assert cls.__dict__.get("__doc__"), f"{cls.__name__} needs a docstring: it is the message"
        assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", cls.code), cls.__name__
        assert cls.status in {401, 403, 404, 409, 410, 413, 422, 429, 499, 500, 502, 503, 504, 507}, cls.__name__


def test_the_tree_in_errors_py_shows_every_error() -> None:
    import imagend.errors

    shown = set(re.findall(r"\w+", imagend.errors.__doc__ or ""))
    assert {cls.__name__ for cls in every_error() if cls.__module__ == "imagend.errors"} <= shown


def test_the_config_yaml_of_the_repository_is_what_init_writes() -> None:
    text = (REPOSITORY / "config.yaml").read_text(encoding="utf-8")
    assert text == config.template()
    assert yaml.safe_load(text)["name"] == "imagend"
