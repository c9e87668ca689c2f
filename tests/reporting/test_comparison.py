"""Runs side by side: what is averaged, what is told apart, what is refused."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Interval, price
from aihwkit_lora.reporting import (
    ComparedValue,
    Comparison,
    RunReport,
    compare,
    print_comparison,
)
from aihwkit_lora.reporting.comparison import LOWER_IS_BETTER


def of_seed(report: RunReport, seed: int, **metrics: float) -> RunReport:
    """The report as another seed would have left it: other metrics after forgetting."""
    arms = {
        arm: tuple(
            replace(stage, metrics={**stage.metrics, **metrics})
            if stage.name == "forget"
            else stage
            for stage in stages
        )
        for arm, stages in report.arms.items()
    }
    config = {**report.config, "seed": seed}
    return replace(report, seed=seed, config=config, arms=arms)


def only(comparison: Comparison, **place: Any) -> list[ComparedValue]:
    return [
        value
        for value in comparison.values()
        if all(getattr(value, key) == wanted for key, wanted in place.items())
    ]


def one(comparison: Comparison, **place: Any) -> ComparedValue:
    (value,) = only(comparison, **place)
    return value


@pytest.fixture
def seeds(report: RunReport) -> list[RunReport]:
    scores = ((3, 0.0, 0.9), (1, 0.25, 0.8), (2, 0.125, 0.7))
    return [of_seed(report, n, forget_accuracy=f, retain_accuracy=r) for n, f, r in scores]


def test_runs_that_differ_in_their_seed_only_are_averaged(seeds: list[RunReport]) -> None:
    comparison = compare(seeds)
    (group,) = comparison.groups
    assert (comparison.recipe, group.label, group.seeds) == ("face_recognition", "A", (1, 2, 3))
    assert comparison.differences() == {}
    place = {"arm": "hybrid", "stage": "forget", "kind": "metric"}
    kept = one(comparison, name="retain_accuracy", **place)
    assert (kept.worst, kept.low, kept.high, kept.seeds) == (0.7, 0.7, 0.9, 3)
    assert kept.mean == pytest.approx(0.8, rel=1e-12)
    forgotten = one(comparison, name="forget_accuracy", **place)
    assert forgotten.interval == Interval(0.125, 0.0, 0.25)
    assert forgotten.worst == 0.25


def test_the_direction_of_a_metric_can_be_named(
    seeds: list[RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aihwkit_lora.reporting.comparison.LOWER_IS_BETTER", {*LOWER_IS_BETTER, "retain_accuracy"}
    )
    kept = one(compare(seeds), arm="hybrid", stage="forget", name="retain_accuracy")
    assert kept.worst == 0.9


def test_costs_and_ratios_keep_the_ranges_of_prices(report: RunReport, chip: Any) -> None:
    dearer = of_seed(report, 11)
    stages = dearer.arms["hybrid"]
    program = next(stage for stage in stages if stage.name == "program")
    counts = program.counts.scaled(3)
    changed = replace(program, counts=counts, energy=price(counts, chip))
    arms = {"hybrid": tuple(changed if s is program else s for s in stages)}
    comparison = compare([report, replace(dearer, arms={**dearer.arms, **arms})])

    place = {"arm": "hybrid", "stage": "program"}
    once = program.energy.energy_j
    energy = one(comparison, kind="energy", **place)
    assert energy.interval.to_dict() == pytest.approx((once * 2.0).to_dict(), rel=1e-12)
    assert energy.worst == pytest.approx(3 * once.value, rel=1e-12)
    latency = one(comparison, kind="latency", **place)
    assert latency.mean == pytest.approx(2 * program.energy.latency_s.value, rel=1e-12)
    pulses = one(comparison, kind="count", name="set_pulses", **place)
    first = program.counts["set_pulses"]
    assert (pulses.mean, pulses.worst, pulses.low) == (2 * first, 3 * first, first)
    ratio = one(comparison, kind="ratio")
    (given,) = report.ratios
    assert ratio.interval == given.interval
    assert (ratio.name, ratio.arm, ratio.stage, ratio.seeds) == (given.name, "", "", 2)


def test_what_differs_is_named_and_told_apart(report: RunReport) -> None:
    wider = replace(report, config={"forget": {"rank": 8, "people": (2,)}, "extra": True})
    newer = replace(report, environment={"python": "3.13.0"})
    elsewhere = replace(report, chip="other")
    comparison = compare([report, wider, of_seed(wider, 11), newer, elsewhere])
    assert [(group.label, group.chip, group.seeds) for group in comparison.groups] == [
        ("A", "tiny", (10,)),
        ("B", "tiny", (10, 11)),
        ("C", "tiny", (10,)),
        ("D", "other", (10,)),
    ]
    assert comparison.differences() == {
        "chip": ("tiny", "tiny", "tiny", "other"),
        "forget.rank": ("6", "8", "6", "6"),
        "python": ("3.12.0", "3.12.0", "3.13.0", "3.12.0"),
        "extra": ("–", "true", "–", "–"),
    }


def test_order_of_runs_decides_the_labels_only(seeds: list[RunReport]) -> None:
    wider = replace(seeds[0], config={"rank": 8})
    there, back = compare([*seeds, wider]), compare([wider, *reversed(seeds)])
    assert [group.seeds for group in there.groups] == [(1, 2, 3), (3,)]
    assert [group.seeds for group in back.groups] == [(3,), (1, 2, 3)]
    swap = {"A": "B", "B": "A"}
    swapped = [replace(value, group=swap[value.group]) for value in back.values()]
    assert sorted(map(repr, swapped)) == sorted(map(repr, there.values()))


def test_a_stage_that_only_some_runs_have_says_how_many(report: RunReport) -> None:
    shorter = of_seed(report, 11)
    shorter = replace(shorter, arms={"hybrid": shorter.arms["hybrid"][:2]})
    comparison = compare([report, shorter])
    program = one(comparison, arm="hybrid", stage="program", name="learnt_accuracy")
    forget = one(comparison, arm="hybrid", stage="forget", name="retain_accuracy")
    assert (program.seeds, forget.seeds) == (2, 1)
    assert {v.seeds for v in only(comparison, arm="reprogram")} == {1}


def test_a_count_that_a_seed_lacks_is_none_and_a_metric_that_it_lacks_is_absent(
    report: RunReport,
) -> None:
    other = of_seed(report, 11, tail_accuracy=0.5)
    stages = list(other.arms["hybrid"])
    stages[2] = replace(stages[2], counts=stages[2].counts + Counts({"failed_cells": 4}))
    comparison = compare([report, replace(other, arms={"hybrid": tuple(stages)})])
    place = {"arm": "hybrid", "stage": "forget"}
    failed = one(comparison, kind="count", name="failed_cells", **place)
    assert (failed.mean, failed.low, failed.worst) == (2.0, 0.0, 4.0)
    assert one(comparison, name="tail_accuracy", **place).seeds == 1


def test_reports_of_different_recipes_are_refused(report: RunReport) -> None:
    other = replace(report, recipe="speaker_authentication")
    with pytest.raises(
        ConfigurationError,
        match="expected reports of one recipe, got face_recognition, speaker_authentication",
    ):
        compare([report, other])


def test_no_reports_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected at least one report, got none"):
        compare([])


def test_a_run_given_twice_is_refused(report: RunReport) -> None:
    with pytest.raises(ConfigurationError, match="got two of 'face_recognition' on 'tiny' with se"):
        compare([report, of_seed(report, 11), report])


def test_more_groups_than_letters_are_refused(report: RunReport) -> None:
    many = [replace(report, config={"rank": n}) for n in range(27)]
    with pytest.raises(ConfigurationError, match="expected at most 26 groups of runs, got 27"):
        compare(many)


def printed(comparison: Comparison, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    return console.export_text()


def row(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_a_column_for_each_group_and_arm(
    seeds: list[RunReport], report: RunReport
) -> None:
    text = printed(compare([*seeds, replace(report, config={"forget": {"rank": 8}})]))
    assert "A: tiny, seeds 1, 2, 3" in text
    assert "B: tiny, seed 10" in text
    assert row(text, "forget.rank") == ["forget.rank", "6", "8"]
    columns = ["A hybrid", "A reprogram", "B hybrid", "B reprogram"]
    assert row(text, "A hybrid") == columns
    kept = next(line for line in text.splitlines() if "80.0 % (70.0 %)" in line)
    assert kept.split()[:2] == ["retain", "accuracy"]
    assert "12.5 % (25.0 %)" in text
    pulses = [line.split()[2:] for line in text.splitlines() if line.strip().startswith("set pul")]
    assert pulses[0] == ["25,240"] * 4
    assert [line[::2] for line in pulses[1:]] == [["0", "0"]] * 2
    assert all(int(cell.replace(",", "")) > 10**6 for line in pulses[1:] for cell in line[1::2])
    assert "J [" in text
    assert text.index("Metrics and costs") < text.index("Ratios")
    assert row(text, "training energy")[0] == "training energy"
    assert "Mean over seeds (worst)" in text


def test_one_run_is_printed_without_means_and_differences(report: RunReport) -> None:
    text = printed(compare([report]))
    assert "What differs" not in text
    assert "Mean over seeds" not in text
    assert "97.3 %" in text
    assert "(" not in text.split("Metrics and costs")[1].split("Ratios")[0]
