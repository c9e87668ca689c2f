"""Callbacks in three processes: one verdict, one drifting chip, one report, one ledger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aihwkit_lora as al
from aihwkit_lora.reporting import RunReport

SCRIPT = Path(__file__).with_name("three_trainers.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each of the processes left what it saw."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> Any:
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]
    return lambda scenario, what: [rank[scenario][what] for rank in ranks]


def test_relapse_is_found_in_all_parts_of_a_forget_set_and_stops_every_rank(seen):
    (error,) = set(seen("relapse", "error"))
    assert error.startswith("RelapseError: request 'person 2', step 2: expected BinaryAccuracy of ")
    assert "0.375 or less on its forget set" in error
    assert "got 0.5." in error
    assert seen("relapse", "values") == [{"relapse/person 2": 3 / 6}] * 3


def test_chip_of_all_ranks_drifts_alike(seen):
    assert seen("drift", "error") == [""] * 3
    first, *others = seen("drift", "outputs")
    assert others == [first] * 2


def test_sweep_has_one_value_for_all_ranks(seen):
    # Ranks 0, 1 and 2 with weights 1, 2 and 3.
    (value,) = {values["drift/rank_at_0s"] for values in seen("mean", "values")}
    assert value == pytest.approx(8 / 6)


def test_report_of_three_ranks_is_written_once_with_the_counts_of_all(seen, folder):
    (stage,) = RunReport.read(folder / "report.json").arms["hybrid"]
    # A batch of each rank: three times 16 J forwards and 28 J backwards, and one update of 20 J.
    assert [step.energy_j for step in stage.steps] == [152.0, 152.0]
    ledger = al.Ledger()
    ledger.load_state_dict(seen("report", "ledger")[0])
    assert stage.counts == ledger.total(phase="train")


def test_report_that_may_not_be_written_stops_every_rank_before_it_trains(seen):
    (error,) = set(seen("report", "refused"))
    assert "expected no finished stage 'forget' of arm 'hybrid' yet" in error


def test_trainer_of_transformers_adds_up_ranks(seen):
    # Forwards 2018 J and backwards 2132 J on each of them, and one update of 1024 J.
    assert seen("hugging face", "energy_j") == [[3 * (2018.0 + 2132.0) + 1024.0] * 2] * 3
    # transformers repeats the two images of the evaluation set, so that each rank gets a batch.
    assert seen("hugging face", "evaluation reads") == [3 * 66] * 3
    ledgers = seen("hugging face", "ledger")
    assert ledgers == [ledgers[0]] * 3
    assert seen("hugging face", "stored") == ledgers
