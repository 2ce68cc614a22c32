"""What people type: commands run as they are typed, their words and exit statuses."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, REPOSITORY, Home, run_until, run_until_idle

from imagend import config as configuration
from imagend.job import Job, Ref
from imagend.jobfile import parse
from imagend.signing import split
from imagend.spool import State


def imagend(*arguments: object, cwd: Path, stdin: bytes | None = None, **environment: str) -> Any:
    """Run the command; the finished process, with text."""
    command = [sys.executable, "-m", "imagend", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=os.environ | environment, timeout=120)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_init_makes_a_place_that_check_finds_well(tmp_path: Path) -> None:
    done = imagend("init", "here", "--client", "bob", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = tmp_path / "here"
    config = configuration.load(here / "config.yaml")
    assert config.client.name == "bob"
    for path in (config.spool, *config.inboxes, config.outputs, config.models, here / "reference"):
        assert path.is_dir()
    assert stat.S_IMODE(config.client.key.stat().st_mode) == 0o600
    assert (
        config.allowed_signers.read_text()
        .splitlines()[-1]
        .startswith('bob namespaces="imagend-job@v1" ssh-ed25519 AAAA')
    )
    assert (config.models / "diffusers" / "shapes-xl" / "model_index.json").exists()
    check = imagend("check", cwd=here)
    assert check.returncode == 0, check.stdout
    assert "model shapes-xl: native size 128x128" in check.stdout


def test_init_again_changes_nothing(tmp_path: Path) -> None:
    imagend("init", cwd=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "config.yaml").write_bytes(before[tmp_path / "config.yaml"] + b"\n# mine\n")
    done = imagend("init", cwd=tmp_path)
    assert "made" not in done.stdout
    before[tmp_path / "config.yaml"] += b"\n# mine\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_submit_drops_a_job_that_the_daemon_accepts(home: Home) -> None:
    options = ["--seed", 7, "--count", 2, "--guidance-scale", 3.5, "--label", "12", "--model", "shapes-xl"]
    done = imagend("submit", "generate", "--prompt", "a red circle", *options, cwd=home.root)
    assert done.returncode == 0, done.stderr
    ref = Ref(CLIENT, done.stdout.strip())
    run_until_idle(home.daemon())
    manifest = home.manifest(ref)
    assert manifest["outcome"] == "succeeded"
    assert manifest["spec"]["seeds"] == [7, 8]
    assert (manifest["spec"]["guidance_scale"], manifest["label"]) == (3.5, "12")


def test_submit_of_seeds_and_of_a_prompt_that_looks_like_a_number(home: Home) -> None:
    done = imagend("submit", "generate", "--prompt", "1984", "--seeds", "3,1,4", "--json", cwd=home.root)
    ref = Ref(**json.loads(done.stdout))
    run_until_idle(home.daemon())
    assert home.manifest(ref)["spec"]["prompt"] == "1984"
    assert home.manifest(ref)["spec"]["seeds"] == [3, 1, 4]


@pytest.mark.parametrize("source", ["file", "stdin", "sealed"])
def test_submit_of_a_file(home: Home, source: str) -> None:
    payload = {"kind": "generate", "prompt": "a red circle", "nonce": "n"}
    raw = home.sealed(**payload) if source == "sealed" else json.dumps(payload, indent=1).encode()
    (home.root / "payload.json").write_bytes(raw)
    name = "-" if source == "stdin" else "payload.json"
    done = imagend("submit", "--file", name, cwd=home.root, stdin=raw if source == "stdin" else None)
    assert done.returncode == 0, done.stderr
    run_until_idle(home.daemon())
    assert home.outcome(Ref(CLIENT, done.stdout.strip())) == "succeeded"


def test_submit_of_loras_and_of_a_yes_or_no(home: Home) -> None:
    options = ["--lora", "hats/red hat:0.8", "--lora", "ink:-1", "--lora", "oil", "--rescale-betas-zero-snr", "true"]
    done = imagend("submit", "generate", "--prompt", "x", *options, cwd=home.root)
    assert done.returncode == 0, done.stderr
    run_until_idle(home.daemon())
    spec = home.manifest(Ref(CLIENT, done.stdout.strip()))["spec"]
    assert [(one["name"], one["weight"]) for one in spec["loras"]] == [("hats/red hat", 0.8), ("ink", -1), ("oil", 1)]
    assert spec["rescale_betas_zero_snr"] is True


def test_submit_of_controlnets(home: Home) -> None:
    for view in ("edges", "map", "front"):
        path = home.config.reference / "leona" / f"{view}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    options = [
        "--control",
        "my net=leona/edges",
        "--control",
        "depth=leona/map:0.8",
        "--control-from",
        "canny=leona/front",
    ]
    done = imagend("submit", "generate", "--prompt", "x", *options, cwd=home.root)
    assert done.returncode == 0, done.stderr
    run_until_idle(home.daemon())
    spec = home.manifest(Ref(CLIENT, done.stdout.strip()))["spec"]["control"]
    told = [(one["type"], one["model"], one["image"], one["control_strength"], one["preprocess"]) for one in spec]
    assert told == [
        (None, "my net", "leona/edges", 0.5, False),
        ("depth", None, "leona/map", 0.8, False),
        ("canny", None, "leona/front", 0.5, True),
    ]


def test_datasets_are_listed_and_looked_at(home: Home) -> None:
    pytest.importorskip("PIL", reason="needs the engine: pip install 'imagend[engine]'")
    from PIL import Image

    assert "No datasets: put pictures" in imagend("datasets", cwd=home.root).stdout
    folder = home.root / "reference" / "datasets" / "hats"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a hat")
    assert imagend("datasets", cwd=home.root).stdout == "hats\n"
    done = imagend("datasets", "hats", "--resolution", 64, cwd=home.root)
    told = done.stdout.splitlines()
    assert (done.returncode, told[1:]) == (0, ["buckets at 64: 64x64 (1)", "fit to train on"])
    assert told[0].startswith("hats: 1 pictures, 64x64; 1 an epoch; 1 different captions; sha256 ")
    (folder / "b.png").write_bytes(b"no picture")
    done = imagend("datasets", "hats", "--resolution", 64, "--json", cwd=home.root)
    assert (done.returncode, json.loads(done.stdout)["is_fit"]) == (1, False)
    assert json.loads(done.stdout)["unreadable"] == [{"file": "b.png", "why": "it is none of PNG, JPEG, WEBP"}]
    done = imagend("datasets", "caps", cwd=home.root)
    assert (done.returncode, "Known are: hats." in done.stderr) == (1, True)


def test_submit_of_a_training(home: Home) -> None:
    options = {"--dataset": "hats", "--name": "styles/hat", "--trigger-words": "ohwx hat, ink", "--alpha": 8}
    options |= {"--targets": "to_q,ff.net.2", "--train-text-encoder": "true", "--learning-rate": 0.001}
    prompts = ("--validation-prompt", "a hat, red", "--validation-prompt", "b")
    words = [word for pair in options.items() for word in pair]
    done = imagend("submit", "train", *words, *prompts, cwd=home.root)
    assert done.returncode == 0, done.stderr
    (path,) = (path for path in home.config.inboxes[0].rglob("*.json"))
    job = parse(CLIENT, split(path.read_bytes())[0])
    assert isinstance(job, Job)
    told = job.spec.model_dump(exclude_unset=True)
    assert told == {
        "dataset": "hats",
        "name": "styles/hat",
        "trigger_words": ("ohwx hat", "ink"),
        "alpha": 8,
        "targets": ("to_q", "ff.net.2"),
        "train_text_encoder": True,
        "learning_rate": 0.001,
        "validation_prompts": ("a hat, red", "b"),
    }
    done = imagend("submit", "train", "--name", "hat", cwd=home.root)
    assert (done.returncode, "dataset: is missing" in done.stderr) == (64, True)


def test_submit_of_references(home: Home, tmp_path: Path) -> None:
    for view in ("front", "dusk"):
        path = home.config.reference / "leona" / f"{view}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    photo = tmp_path / "back"
    photo.write_bytes(b"a picture of my own")
    options = ["--reference", "leona/front:0.7", "--reference", "leona/dusk", "--reference", f"{photo}:0.2"]
    done = imagend("submit", "generate", "--prompt", "x", *options, "--reference-strength", "0.9", cwd=home.root)
    assert done.returncode == 0, done.stderr
    run_until_idle(home.daemon())
    spec = home.manifest(Ref(CLIENT, done.stdout.strip()))["spec"]
    told = [(one["image"], one["strength"], one["role"]) for one in spec["references"]]
    own = f"sha256:{hashlib.sha256(photo.read_bytes()).hexdigest()}"
    assert told == [("leona/front", 0.7, "front"), ("leona/dusk", 0.6, None), (own, 0.2, None)]
    assert spec["reference_strength"] == 0.9


def test_submit_of_a_control_picture_that_was_sent_before(home: Home) -> None:
    for strength, expected in (("", 0.5), (":0.7", 0.7)):
        option = f"canny=sha256:{64 * '0'}{strength}"
        done = imagend("submit", "generate", "--prompt", "x", "--control", option, cwd=home.root)
        assert done.returncode == 0, done.stderr
        sent = max(home.config.inboxes[0].glob("*.json"), key=lambda path: path.stat().st_mtime_ns).read_text()
        (control,) = parse(CLIENT, split(sent.encode())[0]).spec.control
        assert (control.image, control.control_strength) == (f"sha256:{64 * '0'}", expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--prompt", "x", "--lora", "ink:3"], ["loras", "weight", "3"]),
        (["generate", "--prompt", "x", "--lora", "ink:much"], ["loras", "weight", "much"]),
        (["generate", "--prompt", "x", "--rescale-betas-zero-snr", "maybe"], ["rescale_betas_zero_snr", "maybe"]),
        (["generate", "--prompt", "x", "--width", "1000.5"], ["width", "1000.5", "whole number"]),
        (["generate", "--prompt", "x", "--seed", str(2**64)], ["18446744073709551616", "2^53"]),
        (["generate"], ["prompt", "missing"]),
        (["generate", "--prompt", "x", "--scheduler", "Eulr"], ["scheduler", "Euler a"]),
        ([], ["submit generate --prompt"]),
        (["--file", "no-such-file.json"], ["no-such-file.json"]),
        (["generate", "--prompt", "x", "--key", "no-such-key"], ["no-such-key", "imagend init"]),
        (["generate", "--steps", "3"], ["--steps", "imagend submit --help"]),
    ],
)
def test_submit_refuses_at_once_and_drops_nothing(home: Home, arguments: list[str], words: list[str]) -> None:
    done = imagend("submit", *arguments, cwd=home.root)
    assert done.returncode == 64
    for word in words:
        assert word in done.stderr
    assert list(home.config.inboxes[0].iterdir()) == []


def test_watch_tells_the_outcome_by_its_exit_status(home: Home) -> None:
    good, bad, gone = home.drop("a.json"), home.drop("b.json", prompt="fail"), home.drop("c.json", prompt="never")
    home.drop("d.json", kind="cancel", job=gone.id, prompt=...)
    run_until_idle(home.daemon())
    (done, failed, cancelled) = (imagend("watch", ref.id, cwd=home.root) for ref in (good, bad, gone))
    assert (done.returncode, failed.returncode, cancelled.returncode) == (0, 1, 4)
    assert f"outputs/{CLIENT}/{good.id}/0000.png" in done.stdout
    assert f"outputs/{CLIENT}/{good.id}/manifest.json" in done.stdout
    assert "failed: no" in failed.stdout


def test_watch_of_a_rejected_job_tells_why(home: Home) -> None:
    done = imagend("submit", "generate", "--prompt", "x", "--audience", "elsewhere", cwd=home.root)
    run_until_idle(home.daemon())
    watched = imagend("watch", done.stdout.strip(), cwd=home.root)
    assert watched.returncode == 3
    assert "'elsewhere' is another spool's name" in watched.stdout


def test_watch_of_an_unknown_id(home: Home) -> None:
    assert imagend("watch", "xyz", cwd=home.root).returncode == 64
    done = imagend("watch", "0" * 20, cwd=home.root)
    assert done.returncode == 69
    assert "No job 00000000000000000000" in done.stderr


def test_watch_with_timeout_says_that_the_daemon_is_not_running(home: Home) -> None:
    ref = home.drop()
    done = imagend("watch", ref.id, "--timeout", 0.2, cwd=home.root)
    assert done.returncode == 75
    assert "in the inbox  (the daemon is not running" in done.stdout


def test_cancel_drops_a_signed_wish(home: Home) -> None:
    ref = home.drop("a.json", prompt="stay")
    done = imagend("cancel", ref.id, cwd=home.root)
    assert done.returncode == 0, done.stderr
    run_until_idle(home.daemon())
    assert home.outcome(ref) == "cancelled"
    again = imagend("cancel", ref.id, cwd=home.root)
    assert (again.returncode, again.stdout) == (0, f"{ref.id} has ended already\n")
    other = imagend("cancel", f"bob/{ref.id}", cwd=home.root)
    assert other.returncode == 64
    assert "--client bob" in other.stderr


def test_cancel_of_another_clients_job_is_for_the_daemon_to_allow(home: Home) -> None:
    theirs = Ref("bob", "0" * 20)
    done = imagend("cancel", "--client", "bob", theirs.id, cwd=home.root)
    assert (done.returncode, done.stdout) == (0, f"asked to cancel {theirs.id}\n")
    (dropped,) = home.config.inboxes[0].iterdir()
    wish = json.loads(dropped.read_text())
    assert (wish["kind"], wish["client"], wish["job"]) == ("cancel", *theirs)
    bad = imagend("cancel", "--client", "../bob", theirs.id, cwd=home.root)
    assert bad.returncode != 0
    assert "client's name" in bad.stderr
    own = imagend("cancel", "--client", CLIENT, "1" * 20, cwd=home.root)
    assert own.returncode == 0, own.stderr
    (own_wish,) = (json.loads(path.read_text()) for path in home.config.inboxes[0].iterdir() if path != dropped)
    assert "client" not in own_wish


def test_cancel_that_waits_is_told_when_its_wish_is_rejected(home: Home) -> None:
    theirs = home.neighbour("bob").drop("b.json", prompt="stay")
    daemon = home.daemon()
    run_until(daemon, lambda: home.neighbour("bob").where(theirs) is State.ACTIVE)
    command = [sys.executable, "-m", "imagend", "cancel", "--client", "bob", theirs.id, "--wait", "--timeout", "90"]
    with subprocess.Popen(command, cwd=home.root, stdout=subprocess.PIPE, text=True) as cancel:
        run_until(daemon, lambda: cancel.poll() is not None)
        assert cancel.stdout is not None
        told = cancel.stdout.read()
    assert cancel.returncode == 3
    assert "rejected: client: bob is another client: you may cancel only your own jobs" in told
    assert home.where(theirs) is State.ACTIVE


def test_status_of_a_daemon_that_is_not_there(home: Home) -> None:
    done = imagend("status", cwd=home.root)
    assert done.returncode == 69
    assert "Start it: imagend serve" in done.stderr
    assert json.loads(imagend("status", "--json", cwd=home.root).stdout) == {"alive": False}


def test_schema_is_a_json_schema_of_every_field(tmp_path: Path) -> None:
    schema = json.loads(imagend("schema", cwd=tmp_path).stdout)
    generate = schema["oneOf"][0]
    assert generate["properties"]["width"]["description"]
    assert generate["required"] == ["schema", "kind", "issued_at", "prompt"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda home: (home.root / "config.yaml").write_text("max_attempts: often\n"), ["max_attempts", "'often'"]),
        (lambda home: (home.root / "config.yaml").write_text("spol: x\n"), ["spol is not a key", "spool"]),
        (lambda home: (home.root / "keys" / "id_ed25519").chmod(0o644), ["chmod 600"]),
        (lambda home: (home.root / "keys" / "allowed_signers").unlink(), ["allowed_signers", "imagend init"]),
        (lambda home: (home.root / "keys" / "allowed_signers").write_text("nonsense\n"), ["line 1"]),
        (lambda home: (home.root / "keys" / "allowed_signers").chmod(0o666), ["chmod go-w"]),
        (lambda home: home.config.inboxes[0].rmdir(), ["inbox is no folder"]),
        (lambda home: (home.root / "config.yaml").write_text("default_model: pony\n"), ["default_model pony"]),
    ],
)
def test_check_finds_mistakes_and_names_the_mending(home: Home, harm: Any, words: list[str]) -> None:
    for folder in (home.config.spool, home.config.outputs):
        folder.mkdir(exist_ok=True)
    assert imagend("check", cwd=home.root).returncode == 0
    harm(home)
    done = imagend("check", cwd=home.root)
    assert done.returncode == 78
    for word in words:
        assert word in done.stdout
    assert {"error"} <= {finding["level"] for finding in json.loads(imagend("check", "--json", cwd=home.root).stdout)}


def test_no_command_imports_torch(home: Home) -> None:
    script = """
import runpy, sys
sys.argv = ["imagend", *sys.argv[1:]]
try:
    runpy.run_module("imagend", run_name="__main__")
except SystemExit:
    pass
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers"} & set(sys.modules)
sys.exit(f"imports {heavy}" if heavy else 0)
"""
    for command in (
        ["status"],
        ["check"],
        ["doctor"],
        ["schema"],
        ["submit", "generate", "--prompt", "x"],
        ["init", "x"],
        ["replay", "0" * 20],
        ["--help"],
    ):
        done = subprocess.run([sys.executable, "-c", script, *command], cwd=home.root, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize(
    "command", ["init", "serve", "submit", "watch", "replay", "cancel", "queue", "status", "check", "doctor", "schema"]
)
def test_help_teaches(tmp_path: Path, command: str) -> None:
    done = imagend(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"usage: imagend {command}" in done.stdout
    assert command in imagend("--help", cwd=tmp_path).stdout


def test_the_shell_recipe_of_the_readme_makes_a_job(home: Home) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    recipe = readme.split("```sh\n# a job by hand\n")[1].split("```")[0]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", recipe],
        cwd=home.root,
        env=os.environ | {"KEY": str(home.root / "keys" / "id_ed25519"), "INBOX": str(home.config.inboxes[0])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    daemon = home.daemon()
    run_until_idle(daemon)
    (line,) = home.feed()
    assert (line["client"], line["outcome"]) == (CLIENT, "succeeded")
    assert home.manifest(Ref(CLIENT, line["id"]))["spec"]["prompt"] == "a red circle on a blue background"
