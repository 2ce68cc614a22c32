"""python -m fuzz TARGET SECONDS: one target under atheris. What it learns and what it breaks goes to .fuzz/TARGET/."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["imagend", "PIL", "json"]):
    import imagend.worker.decode  # noqa: F401  the target imports it only when it runs
    from fuzz.targets import TARGETS

HANGS_AFTER_S = 20
MEMORY_MB = 2048


def main() -> None:
    name, seconds = sys.argv[1:]
    target, seeds = TARGETS[name]
    folder = Path(".fuzz", name)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(raw: bytes) -> None:
        target(raw)

    limits = [f"-max_total_time={seconds}", f"-timeout={HANGS_AFTER_S}", f"-rss_limit_mb={MEMORY_MB}"]
    options = ["-max_len=70000", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], one)
    atheris.Fuzz()


main()
