"""What is carried to a machine without a network: all that imagend needs there, and not torch."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the engine: pip install 'imagend[engine]'")

from benchmarks import wheels


def test_all_that_is_needed_is_gathered_but_torch() -> None:
    names = wheels.needed("3.12")
    assert names >= {"pydantic", "pydantic-core", "diffusers", "tokenizers", "compel", "peft", "pytest", "cryptography"}
    assert names.isdisjoint({"torch", "imagend", "ruff", "celery", "colorama"})
    assert names <= wheels.pinned().keys()
