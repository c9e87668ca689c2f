"""Reports on disk: what is written is what is read, or a clear error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.metering import Interval
from aihwkit_lora.reporting import SCHEMA, Ratio, RunReport, StepRecord, environment


def test_a_report_comes_back_as_it_was(report: RunReport, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    report.write(path)
    again = RunReport.read(path)
    assert again == report
    assert again.to_dict() == report.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_the_file_has_the_documented_layout(report: RunReport, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(stored) == [
        "schema", "recipe", "chip", "seed", "config", "environment", "arms", "ratios",
    ]  # fmt: skip
    assert stored["schema"] == SCHEMA == 1
    program = stored["arms"]["hybrid"]["stages"][1]
    expected = report.stage("hybrid", "program")
    assert list(program) == [
        "name", "metrics", "counts", "levels", "level", "chip", "energy_j", "latency_s",
        "energy_by_event", "latency_by_event", "unpriced_energy", "unpriced_latency",
        "trainable_parameters", "fingerprint", "wall_s", "steps",
    ]  # fmt: skip
    assert program["counts"] == {
        "failed_cells": 12, "reset_pulses": 20_192, "set_pulses": 25_240, "verify_reads": 50_480,
    }  # fmt: skip
    assert set(program["levels"].values()) == {program["level"]} == {"simulated"}
    assert Interval(**program["energy_j"]) == expected.energy.energy_j
    assert Interval(**program["latency_s"]) == expected.energy.latency_s
    assert list(stored["ratios"][0]) == [
        "name", "value", "low", "high", "numerator", "denominator", "includes",
    ]  # fmt: skip


def test_metrics_that_do_not_exist_are_absent(report: RunReport) -> None:
    stages = report.to_dict()["arms"]["hybrid"]["stages"]
    assert stages[0]["metrics"] == {"learnt_accuracy": 0.9731}
    assert "new_accuracy" not in stages[2]["metrics"]
    assert stages[2]["steps"][0] == {
        "step": 1, "energy_j": stages[2]["steps"][0]["energy_j"], "pulses": 0, "metrics": {},
    }  # fmt: skip


def test_pulses_are_those_of_both_directions(report: RunReport) -> None:
    assert report.stage("hybrid", "program").pulses == 25_240 + 20_192
    assert report.stage("hybrid", "forget").pulses == 0


def test_a_failed_write_leaves_the_old_file(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    report.write(path)

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(report, seed=11).write(path)
    assert RunReport.read(path).seed == report.seed
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_arms_and_stages_are_named(report: RunReport) -> None:
    assert report.stage("hybrid", "forget") is report.arms["hybrid"][2]
    with pytest.raises(UnknownNameError, match=r"unknown arm 'hybrit'\. Did you mean 'hybrid'"):
        report.stage("hybrit", "forget")
    with pytest.raises(UnknownNameError, match=r"unknown stage 'forgot' of arm 'hybrid'\. Did you"):
        report.stage("hybrid", "forgot")


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: expected a report, got 'No such file"):
        RunReport.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON, got "),
        (b"\xff", "expected JSON, got "),
        (b"[]", "expected a report of schema 1, got None"),
        (b'{"schema": 2}', "expected a report of schema 1, got 2"),
        (b'{"schema": 1}', "expected a complete report, got one that fails with KeyError"),
    ],
)
def test_a_file_that_is_no_report_is_a_data_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        RunReport.read(path)


def spoil_arms(stored: dict[str, Any]) -> None:
    stored["arms"] = []


def spoil_event(stored: dict[str, Any]) -> None:
    stage = stored["arms"]["hybrid"]["stages"][1]
    stage["counts"]["teleports"], stage["levels"]["teleports"] = 1, "exact"


def spoil_energy(stored: dict[str, Any]) -> None:
    stored["arms"]["hybrid"]["stages"][1]["energy_by_event"]["set_pulses"] = {"value": 1.0}


def spoil_level(stored: dict[str, Any]) -> None:
    stored["arms"]["hybrid"]["stages"][1]["level"] = "guessed"


@pytest.mark.parametrize("spoil", [spoil_arms, spoil_event, spoil_energy, spoil_level])
def test_a_spoilt_report_is_a_data_error(report: RunReport, tmp_path: Path, spoil: Any) -> None:
    stored = json.loads(json.dumps(report.to_dict()))
    spoil(stored)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(DataError, match=r"report\.json: expected a complete report"):
        RunReport.read(path)


def test_fields_of_later_versions_are_ignored(report: RunReport, tmp_path: Path) -> None:
    stored = json.loads(json.dumps(report.to_dict()))
    stage = stored["arms"]["hybrid"]["stages"][2]
    for part in (stored, stage, stage["steps"][0], stored["ratios"][0]):
        part["added_later"] = 1
    (tmp_path / "report.json").write_text(json.dumps(stored), encoding="utf-8")
    assert RunReport.read(tmp_path / "report.json") == report


@pytest.mark.parametrize("value", [Path("somewhere"), math.nan, {1, 2}])
def test_a_configuration_that_json_cannot_hold_is_refused(report: RunReport, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="config: expected values that JSON can hold"):
        replace(report, config={"x": value})


def test_two_stages_of_one_name_are_refused(report: RunReport) -> None:
    forget = report.stage("hybrid", "forget")
    with pytest.raises(ConfigurationError, match="arm 'hybrid': expected one stage of each name"):
        replace(report, arms={"hybrid": (forget, forget)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step 0: expected step of 1 or more, got 0"),
        ({"energy_j": -1.0}, "step 1: expected energy_j of 0 or more, got -1.0"),
        ({"energy_j": math.nan}, "step 1: expected energy_j of 0 or more, got nan"),
        ({"pulses": -1}, "step 1: expected pulses of 0 or more, got -1"),
        ({"metrics": {"loss": math.nan}}, "step 1: expected a finite metric 'loss', got nan"),
    ],
)
def test_impossible_steps_are_refused(change: dict[str, Any], message: str) -> None:
    step: dict[str, Any] = {"step": 1, "energy_j": 1.0, "pulses": 0, "metrics": {}}
    with pytest.raises(ConfigurationError, match=message):
        StepRecord(**(step | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_parameters": -1}, "stage 'forget': expected trainable_parameters of 0"),
        ({"wall_s": math.inf}, "stage 'forget': expected wall_s of 0 or more, got inf"),
        ({"metrics": {"new_accuracy": math.nan}}, "stage 'forget': expected a finite metric"),
    ],
)
def test_impossible_stages_are_refused(
    report: RunReport, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(report.stage("hybrid", "forget"), **change)


def test_a_ratio_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected 0 <= low <= value <= high"):
        Ratio(name="x", value=3.0, low=1.0, high=2.0, numerator="a", denominator="b", includes="c")


def test_the_environment_names_versions_and_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    from importlib import metadata

    found = environment()
    assert list(found) == [
        "python", "aihwkit-lora", "aihwkit", "torch", "peft", "pytorch-lightning", "platform",
    ]  # fmt: skip
    assert found["torch"] == metadata.version("torch")
    assert platform.node() not in found.values()

    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    assert environment()["peft"] == "not installed"
