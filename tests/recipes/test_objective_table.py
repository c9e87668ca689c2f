"""The table of objectives: every person, every objective, compared with retrained models."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.recipes import RECIPES, RunFolder
from aihwkit_lora.recipes.objective_table import RETRAINED, ObjectiveTable
from aihwkit_lora.reporting import RunReport
from aihwkit_lora.unlearning import objectives

QUICK = ObjectiveTable(
    people=(0, 1, 2),
    objectives="npo, kl_uniform",
    seeds=2,
    learn_epochs=3,
    forget_epochs=2,
    noisy_chips=3,
)


def run(path, *, resume: bool = False) -> tuple[RunReport, list[str]]:
    said: list[str] = []
    options = {"recipe": "unlearning_objectives", "config": asdict(QUICK), "say": said.append}
    folder = RunFolder(path, resume=resume, **options)
    return RECIPES.get("unlearning_objectives").run(QUICK, folder), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("table")
    report, said = run(path)
    return path, report, said


def test_each_objective_forgets_each_person_with_each_seed(finished):
    path, report, said = finished
    assert list(report.arms) == [RETRAINED, "npo", "kl_uniform"]
    forgotten = [line for line in said if line.startswith("forget-") and "done" in line]
    assert len(forgotten) == 2 * 3 * 2
    assert len(list(path.glob("stages/retrained-*.pt"))) == 2 * 3 * 2


def test_forgetting_takes_no_pulse_and_retraining_does(finished):
    _, report, _ = finished
    counts = {name: stages[0].counts for name, stages in report.arms.items()}
    assert counts["npo"].pulses == counts["kl_uniform"].pulses == 0
    assert counts[RETRAINED].pulses > 0
    # What the reference of NPO reads is counted too: one more pass over each batch of both parts.
    assert counts["npo"]["tile_reads"] > counts["kl_uniform"]["tile_reads"]


def test_means_lie_between_zero_and_the_highest(finished):
    _, report, _ = finished
    for (stage,) in report.arms.values():
        for key in ("forget_accuracy", "tug_of_war", "js_forget", "noisy_forget_worst"):
            assert 0.0 <= stage.metrics[key] <= stage.metrics[f"{key}_highest"] <= 1.0
        assert stage.metrics["noisy_forget_mean"] <= stage.metrics["noisy_forget_worst"]


def test_the_table_shows_what_the_report_holds(finished):
    path, report, _ = finished
    rows = [line.split(" | ") for line in (path / "table.md").read_text().splitlines()]
    shown = {row[0].strip("| "): row for row in rows if len(row) > 4}
    tug = report.arms["npo"][0].metrics["tug_of_war"]
    assert shown["npo"][4].startswith(f"{tug:.3f} ± ")


def test_a_resumed_run_takes_everything_from_disk(finished):
    path, report, _ = finished
    again, said = run(path, resume=True)
    assert all("taken from" in line for line in said)
    assert again.arms == report.arms


def test_all_objectives_for_classifiers_are_taken_by_default():
    chosen = ObjectiveTable().chosen
    assert {"npo", "masked_teacher", "scrub", "negation"} <= set(chosen)
    assert not {"esd", "token_npo"} & set(chosen)
    assert set(chosen) <= set(objectives.names())


@pytest.mark.parametrize("name", ["seeds", "learn_epochs", "forget_epochs", "noisy_chips"])
def test_counts_start_at_one(name):
    with pytest.raises(ConfigurationError, match=f"{name} of at least 1, found 0"):
        ObjectiveTable(**{name: 0})


def test_unknown_objectives_and_those_for_other_models_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'npo'"):
        ObjectiveTable(objectives="npoo")
    with pytest.raises(ConfigurationError, match="expected one for classifiers"):
        ObjectiveTable(objectives="esd")
