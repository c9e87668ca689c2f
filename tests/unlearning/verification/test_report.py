"""The record: what it refuses, how it is stored, and how it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import aihwkit_lora as al
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.verification import (
    Finding,
    ForgettingReport,
    Verdict,
    markdown,
    print_verdict,
)
from aihwkit_lora.unlearning.verification.limits import limits

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def findings(draw: st.DrawFn) -> tuple[Finding, ...]:
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True))
    return tuple(_finding(draw, name) for name in names)


def _finding(draw: st.DrawFn, name: str) -> Finding:
    low, high = sorted([draw(numbers), draw(numbers)])
    interval = draw(st.booleans())
    return Finding(
        name=name,
        title=draw(st.text(max_size=9)),
        unit=draw(st.sampled_from(["fraction", "nats", "steps", "ratio"])),
        value=draw(st.none() | numbers),
        low=low if interval else None,
        high=high if interval else None,
        retrained=draw(st.lists(st.none() | numbers, max_size=3)),
        verdict=draw(st.sampled_from(Verdict)),
        attack=draw(st.booleans()),
    )


@given(findings(), st.sampled_from(ForgettingLevel), st.integers(0, 3))
def test_reports_survive_storage_and_can_be_shown(
    found: tuple[Finding, ...], level: ForgettingLevel, references: int
) -> None:
    report = ForgettingReport(
        level=level,
        references=references,
        findings=found,
        does_not_show=limits(level, references, found),
        samples={"forget": 3},
        settings={"bits": (8, 2), "relearn": None},
        series={"noisy": (0.0, 0.5)},
        retraining=al.Counts({"set_pulses": 2**60}),
    )
    again = ForgettingReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again == report
    assert sum(report.count(verdict) for verdict in Verdict) == len(found)
    assert {*report.metrics} | {*report.attacks} == {*report.findings}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_verdict(report, console)
        shown = console.export_text()
    assert markdown(report).count("\n| ") == len(found) + 2 * len(
        [part for part in (report.metrics, report.attacks) if part]
    )
    assert "eras" not in shown.lower()
    assert str(level) in shown


FINDINGS = (
    Finding(
        name="forget_accuracy",
        title="accuracy, forgotten samples",
        unit="fraction",
        value=0.025,
        low=0.0,
        high=0.1,
        interval="Wilson, 95 %",
        retrained=(0.0, 0.05),
        criterion="within 5 points of retrained",
        verdict=Verdict.PASS,
    ),
    Finding(
        name="relearn_steps",
        title="relearning",
        unit="steps",
        value=None,
        retrained=(7, None),
        attack=True,
        note="of 30 steps",
    ),
)


def report(**changes: Any) -> ForgettingReport:
    fields = {
        "level": "suppressed",
        "references": 2,
        "findings": FINDINGS,
        "does_not_show": ("It is a test.",),
        "samples": {"forget": 40},
        "reads": al.Counts({"tile_reads": 1200}),
    }
    return ForgettingReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_table_reads_as_it_should() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_verdict(report(), console)
        lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert "Forgetting: suppressed, compared with 2 retrained models" in lines
    row = next(line for line in lines if line.startswith("accuracy, forgotten samples"))
    assert row.split("  ")[0] == "accuracy, forgotten samples"
    for cell in ("2.5 %", "0.0 % to 10.0 %", "0.0 % to 5.0 %", "pass", "within 5 points of ret"):
        assert cell in row
    assert next(line for line in lines if line.startswith("relearning  ")).split() == [
        *("relearning", "–", "–", "7", "to", "–", "(1", "of", "2)", "not", "judged"),
    ]
    assert "• It is a test." in lines
    assert "Verdicts: 1 pass, 0 fail, 1 not judged." in lines
    assert "The verification itself took 1,200 tile reads (exact)." in lines
    assert "| accuracy, forgotten samples | 2.5 % | 0.0 % to 10.0 % | 0.0 % to 5.0 % | pass |" in (
        markdown(report())
    )


def test_a_mean_over_models_that_never_got_there_does_not_exist() -> None:
    assert FINDINGS[0].retrained_mean == 0.025
    assert FINDINGS[1].retrained_mean is None
    assert report().finding("relearn_steps") is FINDINGS[1]
    assert report(references=0).reference == "no reference"
    assert report(references=1).reference == "1 retrained model"


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = report().write(tmp_path / "forgetting.json")
    assert ForgettingReport.read(path) == report()
    assert [each.name for each in tmp_path.iterdir()] == ["forgetting.json"]
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert (stored["schema"], stored["level"], stored["reference"]) == (
        1,
        "suppressed",
        "2 retrained models",
    )
    later = {**stored, "new": 1, "findings": [{**stored["findings"][0], "new": 2}]}
    assert ForgettingReport.from_dict(later).findings == FINDINGS[:1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"forgetting.json': expected a forgetting report as JSON, got none"),
        ("[]", r"got a list or number"),
        ('{"schema": 2}', r"expected schema 1, got 2"),
        ('{"schema": 1, "level": "suppressed"}', r"expected the field 'references', got a file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "forgetting.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(al.DataError, match=match):
        ForgettingReport.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(al.DataError, match="got none"):
        ForgettingReport.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"findings": FINDINGS[:1] * 2}, r"one finding of each name, got forget_accuracy more"),
        ({"does_not_show": ()}, r"at least one sentence about what it does not show, got none"),
    ],
)
def test_impossible_reports_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(al.ConfigurationError, match=match):
        report(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"value": float("nan")}, r"finding 'x': expected finite numbers, got nan"),
        ({"retrained": (float("inf"),)}, r"finding 'x': expected finite numbers, got inf"),
        ({"low": 0.0}, r"finding 'x': expected both ends of an interval or none, got 0.0 and None"),
    ],
)
def test_impossible_findings_are_refused(changes: dict[str, Any], match: str) -> None:
    fields = {"name": "x", "title": "x", "unit": "ratio", "value": 0.0}
    with pytest.raises(al.ConfigurationError, match=match):
        Finding(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_unknown_finding_is_named() -> None:
    with pytest.raises(al.UnknownNameError, match="Did you mean 'forget_accuracy'"):
        report().finding("forgot_accuracy")
