"""Gathers wheels for a machine without a network: what imagend[engine] and its tests need, but torch. See docs/gpu.md.

What is needed is read from the metadata of what is installed here, versions from constraints.txt. Wheels are for Linux
on x86-64 and the other machine's Python.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
ROOTS = ("imagend[engine]", "pytest")
NOT_CARRIED = {"imagend", "torch"}
"""the checkout itself, and what the other machine has"""
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__)
    parser.add_argument("--python", required=True, metavar="3.N", help="the other machine's version")
    parser.add_argument("--to", type=Path, required=True, help="a folder")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="what that machine has already")
    options = parser.parse_args(arguments)
    names = sorted(needed(options.python) - {canonicalize_name(name) for name in options.without})
    versions = pinned()
    for wheel in options.to.glob("*.whl"):  # pip refuses two versions of one package
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(options.to)]
    command += ["--python-version", options.python, "--implementation", "cp", "--disable-pip-version-check", "--quiet"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={versions[name]}" for name in names)], check=True)
    sizes = {path.name: path.stat().st_size for path in options.to.glob("*.whl")}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        print(f"{sizes[name] / 2**20:7.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 2**20:7.1f} MB  in {len(sizes)} wheels")


def needed(python: str) -> set[str]:
    """The names of all that the roots need there, without torch and what is needed by torch alone."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found: set[str] = set()
    waiting = list(ROOTS)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "torch" or f"{name}{sorted(requirement.extras)}" in found:
            continue
        found.add(f"{name}{sorted(requirement.extras)}")
        waiting += _requirements(name, requirement.extras, environment)
    return {re.sub(r"\[.*", "", name) for name in found} - NOT_CARRIED


def _requirements(name: str, extras: set[str], environment: dict[str, str]) -> Iterator[str]:
    for text in metadata.requires(name) or ():
        marker = Requirement(text).marker
        wanted = ({**environment, "extra": extra} for extra in ("", *extras))
        if marker is None or any(marker.evaluate(one) for one in wanted):
            yield text


def pinned() -> dict[str, str]:
    lines = (line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, _, version in lines}


if __name__ == "__main__":
    main()
