"""What is printed of the two published workloads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import aihwkit_lora as al
from aihwkit_lora.chips import Chip
from aihwkit_lora.reporting import (
    PUBLISHED,
    PublishedWorkload,
    print_published_ratios,
    published_ratios,
    rtx_4090,
)

CHIPS = [al.chips.get(name) for name in ("rm-180nm", "neurram-130nm", "hermes-14nm")]
GPU = rtx_4090(utilisation=1.0)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("published", PUBLISHED.values(), ids=list(PUBLISHED))
def test_published_ratios_are_all_there_and_say_what_they_are(
    published: PublishedWorkload, chip: Chip
) -> None:
    found = published_ratios(published, chip, GPU)
    names = [ratio.name for ratio in found]
    assert len(set(names)) == len(names) == 15
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in found)
    assert not any("no price" in ratio.includes for ratio in found)
    refetched = [ratio for ratio in found if "refetched" in ratio.name]
    assert len(refetched) == 2
    assert all("weights refetched" in ratio.denominator for ratio in refetched)


def printed(chips: list[Chip]) -> str:
    console = Console(width=124, record=True, file=io.StringIO())
    print_published_ratios(chips, GPU, console)
    lines = console.export_text().strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def test_printed_ratios_have_a_column_for_each_workload() -> None:
    text = printed(CHIPS[::2])
    assert text.count("trainable parameters") == 2
    assert text.index("rm-180nm") < text.index("faces (MLP-Mixer)") < text.index("hermes-14nm")
    row = next(line for line in text.splitlines() if "trainable" in line)
    assert row.split()[-2:] == ["3.60", "25.1"]
    assert "RTX 4090 at 100 % of its peak" in text


def test_the_page_shows_what_the_command_prints() -> None:
    """If prices have changed: ``COLUMNS=124 aihwkit-lora ratios --utilisation 1``."""
    page = Path(__file__).parents[2] / "docs" / "ratios.md"
    shown = page.read_text(encoding="utf-8").split("```text\n")[1].split("\n```")[0]
    assert shown == printed(sorted(CHIPS, key=lambda chip: chip.name))
