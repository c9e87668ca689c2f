"""Three processes on one machine: one chip on all of them, and only adapters travel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("three_ranks.py")
RANKS = range(3)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes saw, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]


def seen(ranks: list[dict[str, Any]], scenario: str, what: str) -> list[Any]:
    return [rank[scenario][what] for rank in ranks]


def test_without_a_seed_all_ranks_program_the_chip_of_rank_0(ranks: Any) -> None:
    without = seen(ranks, "programming", "no seed")
    assert without == seen(ranks, "programming", "seed of rank 0")
    assert len(set(without)) == 1
    assert seen(ranks, "programming", "one draw") == [True] * 3


def test_reprogramming_without_a_seed_keeps_ranks_equal(ranks: Any) -> None:
    rewritten = set(seen(ranks, "programming", "rewritten"))
    assert len(rewritten) == 1
    assert rewritten != set(seen(ranks, "programming", "no seed"))


def test_seeds_of_ones_own_make_chips_of_ones_own(ranks: Any) -> None:
    assert len(set(seen(ranks, "programming", "own seed"))) == 3


def test_gradients_are_equal_on_all_ranks_and_those_of_the_whole_batch(ranks: Any) -> None:
    assert len(set(seen(ranks, "data parallel", "gradients"))) == 1
    assert len(set(seen(ranks, "data parallel", "adapters"))) == 1
    assert max(seen(ranks, "data parallel", "difference")) < 1e-5


def test_arrays_stay_what_they_are(ranks: Any) -> None:
    expected = seen(ranks, "data parallel", "expected")
    assert seen(ranks, "data parallel", "fingerprint") == expected
    assert len(set(expected)) == 1


def test_nothing_of_the_arrays_travels(ranks: Any) -> None:
    assert seen(ranks, "data parallel", "buffers") == [0] * 3
    before = seen(ranks, "different chips", "before")
    assert len(set(before)) == 3
    assert seen(ranks, "different chips", "after") == before
    assert len(set(seen(ranks, "different chips", "adapters"))) == 1


def test_lightning_trains_under_the_guard(ranks: Any) -> None:
    assert seen(ranks, "guarded", "error") == [""] * 3
    assert seen(ranks, "guarded", "steps") == [4] * 3
    assert len(set(seen(ranks, "guarded", "adapters"))) == 1
    assert len(set(seen(ranks, "guarded", "fingerprint"))) == 1


def test_chips_programmed_before_the_ranks_met_are_told_apart_by_all(ranks: Any) -> None:
    assert seen(ranks, "programmed alone", "steps") == [0] * 3
    (error,) = set(seen(ranks, "programmed alone", "error"))
    first, second, _ = seen(ranks, "programmed alone", "fingerprint")
    assert error.startswith("rank 0 and rank 1: expected the same conductances")
    assert f"{first[:12]}… and {second[:12]}…" in error
    assert "pass all of them the same seed, program_(model, chip, seed=0)" in error


def test_a_write_on_one_rank_stops_all_of_them(ranks: Any) -> None:
    assert seen(ranks, "written", "steps") == [2] * 3
    errors = seen(ranks, "written", "error")
    for rank in (0, 1):
        assert errors[rank].startswith("step 2: expected the conductances of the start")
        assert f"got others on rank 2, but not on rank {rank}." in errors[rank]
    assert "layers.0.base_layer', tile (input 0, output 0): expected the" in errors[2]
