"""kill -9 at random moments: the resumed run ends with the counts of one that nobody killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


# Three kills are quick. Moments follow from the seed, as far as the machine runs evenly.
@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), pytest.param(10, 2, marks=pytest.mark.slow)]
)  # fmt: skip
def test_killed_runs_end_as_one_that_was_not(tmp_path, kills, seed):
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found == {"hits": [True] * kills, "statuses": [0, 0]}, done.stderr
    through, broken = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("through", "broken")
    )
    assert broken == through
    assert through["steps"] == 4 * 9  # of 25 batches in threes
    # 1 + 8 + 15 + 22 in each epoch, and 1000 before
    assert through["metrics"]["pulses_total"] == 1000 + 4 * 46
