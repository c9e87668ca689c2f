"""The summary on a terminal: every number is there, whole, at any width that people use."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from aihwkit_lora.chips import chips
from aihwkit_lora.metering import Counts, Level, Status, price
from aihwkit_lora.reporting import RunReport, StageRecord, print_summary
from aihwkit_lora.reporting.notes import notes


def printed(report: RunReport, width: int = 120) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    print_summary(report, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def rows(lines: list[str], label: str) -> list[list[str]]:
    found = [line.strip() for line in lines if line.strip().startswith(label)]
    return [re.split(r"\s{2,}", line) for line in found]


def section(lines: list[str], title: str) -> list[str]:
    start = next(n for n, line in enumerate(lines) if line.startswith(title))
    return lines[start:]


def noted(report: RunReport, start: str) -> str:
    (note,) = [note for note in notes(report) if note.startswith(start)]
    return note


def with_stage(report: RunReport, change: Callable[[StageRecord], StageRecord]) -> RunReport:
    hybrid = tuple(change(s) if s.name == "continue" else s for s in report.arms["hybrid"])
    return replace(report, arms={**report.arms, "hybrid": hybrid})


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_stage_has_one_line_in_each_table(report: RunReport, width: int) -> None:
    lines = printed(report, width)
    assert rows(section(lines, "Accuracy"), "continue")[:2] == [
        ["continue", "–", "0.0 %", "96.0 %", "95.1 %", "95.8 %", "1,404"],
        ["continue", "–", "0.0 %", "96.0 %", "95.1 %", "–", "5,148"],
    ]
    assert rows(section(lines, "Cost"), "program")[0] == [
        "program", "45,432", "50,480", "12", "12.5 µJ", "[0.583, 12.5]", "95.9 ms",
    ]  # fmt: skip
    assert rows(section(lines, "Cost"), "continue") == [
        ["continue", "0", "0", "0", "13.3 mJ", "[7.69, 13.3]", "768 ms"],
        ["continue", "4,543,200", "5,048,000", "1,200", "54.2 mJ", "[31.2, 54.2]", "10.4 s"],
    ]
    assert max(map(len, lines)) <= width


def test_what_does_not_exist_is_a_dash(report: RunReport) -> None:
    lines = printed(report)
    assert rows(lines, "learn")[0] == ["learn", "97.3 %", "–", "–", "–", "–", "5,148"]
    assert rows(section(lines, "Cost"), "learn")[0] == ["learn", "0", "0", "0", "–", "–"]


def test_the_breakdown_has_shares_that_add_up(report: RunReport) -> None:
    lines = section(printed(report), "Energy of reprogram, by part of the chip")
    body = [line for line in lines[: lines.index("Ratios")] if "J" in line]
    shares = [int(share) for share in re.findall(r"(\d+) %$", "\n".join(body), re.MULTILINE)]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100, abs=4)
    assert rows(lines, "verify reads")[0][:2] == ["verify reads", "–"]


def test_ratios_say_what_they_compare(report: RunReport) -> None:
    text = "\n".join(section(printed(report), "Ratios"))
    assert "training energy" in text
    assert "4.90 [4.55, 5.14]" in text
    assert "reprogram: forget and continue" in text
    assert "÷ hybrid: forget and continue" in text
    assert "optimiser [all steps]" in text


def test_counts_say_how_sure_they_are(report: RunReport) -> None:
    assert noted(report, "Counts") == (
        "Counts: exact, except failed_cells, reset_pulses, set_pulses, verify_reads: simulated."
    )
    learn = {"hybrid": report.arms["hybrid"][:1]}
    assert noted(replace(report, arms=learn), "Counts") == "Counts: exact."


def test_what_has_no_price_is_named(report: RunReport) -> None:
    assert noted(report, "Latency") == (
        "Latency leaves out what the chip has no price for: digital (forward_macs, "
        "optimizer_updates, weight_gradient_macs); memory (sram_read_bits)."
    )
    assert not [note for note in notes(report) if note.startswith("Energy")]


def test_energy_without_price_is_named_and_never_zero(report: RunReport, chip: Any) -> None:
    counts = Counts({"offchip_read_bits": 8, "cell_reads": 1}, level=Level.BOUND)

    def unpriced(stage: StageRecord) -> StageRecord:
        return replace(stage, counts=counts, energy=price(counts, chip))

    changed = with_stage(report, unpriced)
    assert noted(changed, "Energy") == (
        "Energy leaves out what the chip has no price for: analogue (cell_reads); memory "
        "(offchip_read_bits)."
    )
    assert rows(section(printed(changed), "Cost"), "continue")[0][4:] == ["–", "–"]


def test_unfinished_stages_are_named(report: RunReport) -> None:
    assert not any("UNFINISHED" in note for note in notes(report))
    first, *rest = report.arms["hybrid"]
    stopped = replace(first, interrupted="KeyboardInterrupt in step 3")
    found = notes(replace(report, arms={"hybrid": (stopped, *rest)}))
    expected = f"Stage '{first.name}' of 'hybrid' is UNFINISHED: KeyboardInterrupt in step 3."
    assert expected in found


def test_prices_of_a_registered_chip_are_counted_by_status(report: RunReport) -> None:
    chip = chips.get("rm-180nm")
    counts = Counts({"set_pulses": 3, "set_slots": 3, "adc_conversions": 2, "array_cycles": 1})
    stage = replace(report.arms["hybrid"][0], counts=counts, energy=price(counts, chip))
    used = [chip.prices.energy[event] for event in ("set_pulses", "adc_conversions")]
    used += [chip.prices.latency[event] for event in ("set_slots", "array_cycles")]
    unsure = sum(quantity.status in (Status.ASSUMED, Status.DERIVED) for quantity in used)
    assert noted(replace(report, chip=chip.name, arms={"hybrid": (stage,)}), "Prices") == (
        f"Prices: {unsure} of the 4 used are assumed or derived; their sources: "
        "aihwkit-lora chips rm-180nm"
    )


def test_prices_of_an_unknown_chip_say_so(report: RunReport) -> None:
    assert noted(report, "Prices") == (
        "Prices: of 'tiny', a chip that is not registered here; sources not known."
    )


def test_the_fingerprint_proves_that_nothing_moved(report: RunReport) -> None:
    assert noted(report, "Frozen") == (
        "Frozen conductances of 'hybrid' unchanged from 'program' to 'continue' "
        "(fingerprint 5e8f03ac7be1)."
    )
    moved = with_stage(report, lambda stage: replace(stage, fingerprint="0000"))
    assert "'hybrid' REWRITTEN from" in noted(moved, "Frozen")


def test_a_run_that_was_interrupted_can_be_shown(report: RunReport) -> None:
    begun = replace(report, arms={"hybrid": report.arms["hybrid"][:2], "reprogram": ()}, ratios=())
    lines = printed(begun)
    assert rows(section(lines, "Cost"), "program")
    assert not any(line.startswith("Ratios") for line in lines)


def test_the_terminal_is_the_default(report: RunReport, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(report)
    assert "face_recognition on tiny, seed 10" in capsys.readouterr().out
