"""config.yaml: every mistake is named, every path is absolute, and what `imagend init` writes reads back as it was."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from imagend import config as configuration
from imagend.config import ENVIRONMENT, Client, Config, find, load, template
from imagend.errors import BadConfig
from imagend.job import CLIENT_NAME
from imagend.model_settings import ImageType
from imagend.rights import Limits, Rights

FILE = "config.yaml"


def refusal(folder: Path, text: str | bytes) -> str:
    path = folder / FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadConfig) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("Correct it, then run: imagend check")
    assert caught.value.exit_status == 78  # EX_CONFIG: systemd does not restart into it
    return message


# Which file


def test_the_named_file_wins_over_environment_over_here_over_etc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "etc.yaml"
    monkeypatch.setattr(configuration, "SYSTEM_CONFIG", system)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    here, named, explicit = Path(FILE), Path("named.yaml"), Path("explicit.yaml")
    assert find(None) == here  # so that "no such file" names the place to put one
    system.touch()
    assert find(None) == system
    here.touch()
    assert find(None) == here
    monkeypatch.setenv(ENVIRONMENT, str(named))
    assert find(None) == named  # even if it is missing: what was asked for is not passed over in silence
    assert find(explicit) == explicit
    monkeypatch.setenv(ENVIRONMENT, "")
    assert find(None) == here


def test_a_missing_file_says_who_writes_one(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no such file; `imagend init` writes one"):
        load(tmp_path / FILE)


# What it says


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text("# nothing\n")
    config = load(path)
    assert config.name == "imagend"
    assert config.model_copy(update={"client": Client()}).image_types == Config().image_types


def test_relative_paths_start_at_the_files_folder_and_absolute_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / FILE).write_text("spool: ../spool\ninboxes: [drop, /nfs/drop]\noutputs: /srv/out\nclient: {key: k}\n")
    monkeypatch.chdir(tmp_path)
    config = load(Path("etc") / FILE)
    assert config.spool == folder / "../spool"
    assert config.inboxes == (folder / "drop", Path("/nfs/drop"))
    assert config.outputs == Path("/srv/out")
    assert (config.models, config.allowed_signers) == (folder / "models", folder / "keys/allowed_signers")
    assert config.client.key == folder / "k"
    assert all(path.is_absolute() for path in (config.spool, *config.inboxes, config.client.key))


def test_whole_numbers_will_do_for_seconds(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("time_limit_s: 5\n")
    assert load(tmp_path / FILE).time_limit_s == 5.0


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("name: 1", "name", "1"),
        ("name: ../x", "name", "'../x'"),
        ("name:", "name", "None"),
        ("spool: 3", "spool", "3"),
        ("spool:", "spool", "None"),
        ("spool: ''", "spool", "''"),
        ("spool: [a]", "spool", "['a']"),
        ("inboxes: spool/inbox", "inboxes", "'spool/inbox'"),
        ("inboxes: []", "inboxes", "[]"),
        ("inboxes: [1]", "inboxes.0", "1"),
        ("inboxes: [a, a]", "inboxes", "['a', 'a']"),
        ("default_model: ../b", "default_model", "'../b'"),
        ("image_types: {a: {width: 100}}", "image_types.a.width", "100"),
        ("image_types: {a: {width: 4096}}", "image_types.a.width", "4096"),
        ("image_types: {a: }", "image_types.a", "None"),
        ("image_types: {'a b': {}}", "image_types.a b", "'a b'"),
        ("workers: {gpu0: cuda}", "workers.gpu0", "'cuda'"),
        ("workers: {gpu0: 0}", "workers.gpu0", "0"),
        ("workers: {'../x': cpu}", "workers.../x", "'../x'"),
        ("workers: [cpu]", "workers", "['cpu']"),
        ("max_attempts: 0", "max_attempts", "0"),
        ("max_attempts: 11", "max_attempts", "11"),
        ("max_attempts: '3'", "max_attempts", "'3'"),
        ("max_attempts: 2.5", "max_attempts", "2.5"),
        ("max_attempts: true", "max_attempts", "True"),
        ("time_limit_s: 0", "time_limit_s", "0"),
        ("silence_limit_s: -1", "silence_limit_s", "-1"),
        ("boot_limit_s: soon", "boot_limit_s", "'soon'"),
        ("cancel_grace_s: .nan", "cancel_grace_s", "nan"),
        ("stop_grace_s: .inf", "stop_grace_s", "inf"),
        ("scan_interval_s: 0.0", "scan_interval_s", "0.0"),
        ("file_grace_s: [60]", "file_grace_s", "[60]"),
        ("heartbeat_s: 2026-11-20", "heartbeat_s", "datetime.date(2026, 11, 20)"),
        ("client: me", "client", "'me'"),
        ("client: {key: 3}", "client.key", "3"),
        ("limits: 10", "limits", "10"),
        ("limits: {max_queued: -1}", "limits.max_queued", "-1"),
        ("limits: {max_work: 0}", "limits.max_work", "0"),
        ("limits: {jobs_per_minute: 0}", "limits.jobs_per_minute", "0"),
        ("limits: {kinds: generate}", "limits.kinds", "'generate'"),
        ("limits: {kinds: [paint]}", "limits.kinds.0", "'paint'"),
        ("limits: {models: [/a/b]}", "limits.models.0", "'/a/b'"),
        ("limits: {max_priority: 10}", "limits.max_priority", "10"),
        ("clients: {'../x': {}}", "clients.../x", "'../x'"),
        ("clients: {ops: true}", "clients.ops", "True"),
        ("clients: {ops: {operator: 1}}", "clients.ops.operator", "1"),
        ("clients: {ops: {group: 'a b'}}", "clients.ops.group", "'a b'"),
        ("reserve_mb: -1", "reserve_mb", "-1"),
        ("1: 2", "1", "1"),
    ],
)
def test_a_bad_value_is_named_with_its_key(tmp_path: Path, text: str, key: str, value: str) -> None:
    assert f": {key}: {value}: " in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "name: 1",
        "spool: 3",
        "inboxes: a",
        "workers: [cpu]",
        "image_types: {a: b}",
        "client: me",
        "max_attempts: a",
        "limits: {kinds: a}",
        "limits: {models: 1}",
        "clients: {a: {operator: 1}}",
        "clients: [a]",
    ],
)
def test_what_is_wrong_is_said_in_words_of_yaml_and_not_of_python(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    for python in ("tuple", "dictionary", "instance of", "<class", "pathlib", "valid string", "valid integer"):
        assert python not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "name: 1\nmax_attempts: 0\nspeed: 9\n")
    assert all(key in message for key in ("name: 1", "max_attempts: 0", "speed"))


@pytest.mark.parametrize(
    ("text", "key", "known"),
    [
        ("speed: 3", "speed", "name, spool, inboxes"),
        ("client: {nam: x}", "client.nam", "name, key."),
        ("image_types: {a: {with: 104}}", "image_types.a.with", "width, height, prompt_prefix"),
        (
            "limits: {max_que: 1}",
            "limits.max_que",
            "max_queued, max_work, jobs_per_minute, kinds, models, max_priority.",
        ),
        ("limits: {operator: true}", "limits.operator", "max_queued"),
        ("clients: {ops: {operators: true}}", "clients.ops.operators", "max_queued, max_work"),
    ],
)
def test_an_unknown_key_is_answered_with_those_that_may_stand_there(
    tmp_path: Path, text: str, key: str, known: str
) -> None:
    assert f"{key} is not a key; known keys are {known}" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "client: {name: a, name: b}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    """yaml takes the last: half of an edited file would be without effect, and nobody would know why."""
    assert "name stands twice" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "line 1, column 5"),
        ("name: imagend\n\tspool: x\n", "line 2"),
        ("- name", "keys and values"),
        ("imagend", "keys and values"),
        ("%", "line 1"),
        ("\0", "special characters are not allowed"),
        (b"name: \xff", "utf-8"),
        ("name: 2026-13-45", "month"),
        ("max_attempts: !!int three", "three"),
        ("[" * 5000, "deep"),
        ("name: !!python/object/apply:os.system [touch /tmp/owned]", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_yaml_says_where(tmp_path: Path, text: str | bytes, part: str) -> None:
    message = refusal(tmp_path, text)
    assert part in message
    assert "\n" not in message


def test_a_folder_in_its_place_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="Is a directory"):
        load(tmp_path)


@given(st.binary(max_size=60) | st.text(alphabet="abn:{}[]-'\"\n #&*!|>%@0129.", max_size=60).map(str.encode))
@settings(deadline=None)
def test_any_bytes_are_a_config_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with contextlib.suppress(BadConfig):
        load(path)


# Who may what


def rights(folder: Path, text: str, client: str) -> dict[str, Any]:
    (folder / FILE).write_text(text)
    return load(folder / FILE).rights(client).model_dump()


def test_a_clients_own_keys_win_one_by_one_over_those_of_all(tmp_path: Path) -> None:
    text = (
        "limits: {max_queued: 3, models: [a, b], max_priority: 5}\n"
        "clients: {ops: {operator: true, max_queued: 50}, web: {models: null, group: web}}\n"
    )
    shared = Limits().model_dump() | {"max_queued": 3, "models": ("a", "b"), "max_priority": 5}
    shared |= {
        "operator": False,
        "fetch": False,
        "safety": None,
        "train": False,
        "group": None,
        "unretrieved_h": None,
        "retrieved_h": None,
    }
    assert rights(tmp_path, text, "anybody") == shared
    assert rights(tmp_path, text, "ops") == shared | {"operator": True, "max_queued": 50}
    assert rights(tmp_path, text, "web") == shared | {"group": "web", "models": None}


def test_what_equals_the_built_in_default_is_an_own_key_too(tmp_path: Path) -> None:
    text = "limits: {max_queued: 3}\nclients: {bob: {max_queued: 10}}\n"
    assert rights(tmp_path, text, "bob")["max_queued"] == 10


def test_the_largest_ordinary_job_is_within_the_default_limit() -> None:
    assert Limits().max_work >= 64 * 1024 * 1024 * 50 / 1e6


# The template


def test_the_template_reads_back_as_the_defaults(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(template())
    filled = load(tmp_path / FILE)
    (tmp_path / FILE).write_text("")
    assert filled == load(tmp_path / FILE)


def test_the_template_holds_every_key_in_order_each_with_a_comment() -> None:
    text = template()
    assert list(yaml.safe_load(text)) == list(Config.model_fields)
    for name, field in Config.model_fields.items():
        assert field.description
        before = text.partition(f"\n{name}:")[0]
        assert before.splitlines()[-1].startswith("# ")
    assert max(map(len, text.splitlines())) <= 120


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SIDES = st.integers(8, 256).map(lambda n: n * 8)
CONFIGS = st.builds(
    Config,
    name=NAMES,
    default_model=NAMES,
    image_types=st.dictionaries(
        NAMES,
        st.builds(
            ImageType,
            width=SIDES,
            height=SIDES,
            prompt_prefix=TEXTS,
            prompt_suffix=TEXTS,
            negative_prompt=st.none() | TEXTS,
        ),
        max_size=3,
    ),
    workers=st.dictionaries(NAMES, st.sampled_from(["cpu", "cuda:0", "cuda:12"]), max_size=3),
    max_attempts=st.integers(1, 10),
    time_limit_s=st.floats(0.001, 1e9),
    limits=st.builds(Limits, max_queued=st.integers(0, 99), models=st.none() | st.lists(NAMES, max_size=2).map(tuple)),
    clients=st.dictionaries(
        NAMES.filter(re.compile(CLIENT_NAME).match),
        st.fixed_dictionaries(
            {},
            optional={
                "max_queued": st.integers(0, 99),
                "kinds": st.sampled_from([None, ("generate",)]),
                "operator": st.booleans(),
                "group": st.sampled_from([None, "web", "_a-1"]),
            },
        ).map(lambda keys: Rights(**keys)),
        max_size=3,
    ),
)


@given(CONFIGS)
@settings(deadline=None, max_examples=50)
def test_the_template_of_any_config_reads_back_as_it_was(config: Config) -> None:
    """Names like `no`, `1e3` and `0x10` are a text here and something else to yaml, unless quoted."""
    plain: dict[str, Any] = yaml.safe_load(template(config))
    again = Config.model_validate(plain)
    assert again == config
    assert all(again.rights(client) == config.rights(client) for client in config.clients)


# Where workers stand


def test_workers_are_those_that_are_named_or_one_somewhere() -> None:
    assert Config(workers={"a": "cuda:1", "b": "cpu"}).slots() == {"a": "cuda:1", "b": "cpu"}
    slots = Config().slots()
    assert slots == {"cpu0": "cpu"} or all(device == f"cuda:{name[3:]}" for name, device in slots.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inboxes: [spool]", "whose files are no jobs"),
        ("inboxes: [.]", "whose files are no jobs"),
        ("inboxes: [spool/pending]", "lies among imagend's own files"),
        ("inboxes: [outputs/inbox]", "lies among imagend's own files"),
        ("inboxes: [a/inbox, a/inbox2]", "shares"),
        ("inboxes: [a/inbox, a/inbox/b]", "lies in another inbox"),
    ],
)
def test_an_inbox_in_a_wrong_place_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadConfig, match=words):
        configuration.load(tmp_path / "config.yaml")
