"""The soak in short for every change, in full for `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import Soak


def verify(soak: Soak, growth_mib: float) -> None:
    found = soak.run()
    assert found["jobs"] >= soak.jobs
    assert found["outcomes"].keys() == {"succeeded", "cancelled"}
    assert all(count >= soak.troubles // 7 for count in found["troubles"].values())
    first_mib, last_mib = found["rss_mib"]
    assert last_mib - first_mib <= growth_mib
    first, last = found["descriptors"]
    assert last - first <= 3


@pytest.mark.parametrize("seed", [1])
def test_nothing_is_lost_and_nothing_done_twice_whatever_happens(tmp_path: Path, seed: int) -> None:
    verify(Soak(tmp_path, jobs=1500, seed=seed, troubles=14), growth_mib=4.0)  # its caches still fill


@pytest.mark.torture
def test_a_hundred_thousand_jobs(tmp_path: Path) -> None:
    verify(Soak(tmp_path, jobs=100_000, seed=1, troubles=280), growth_mib=2.0)
