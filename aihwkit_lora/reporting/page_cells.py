"""What stands in the tables of the page: numbers over seeds, and Markdown around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.reporting.comparison import ComparedValue
from aihwkit_lora.reporting.formatting import MISSING, format_interval, format_number

NOT_RUN = "not run"


def accuracy(value: ComparedValue | None) -> str:
    """Write an accuracy over seeds in percent, or a dash.

    Args:
        value: Fractions over seeds, or None.

    Example:
        >>> kept = ComparedValue(
        ...     group="A",
        ...     arm="hybrid",
        ...     stage="forget",
        ...     kind="metric",
        ...     name="retain_accuracy",
        ...     mean=0.97,
        ...     worst=0.96,
        ...     low=0.96,
        ...     high=0.98,
        ...     seeds=3,
        ...     deviation=0.01,
        ... )
        >>> accuracy(kept)
        '97.0 ± 1.0 % (worst 96.0)'
    """
    if value is None:
        return MISSING
    if value.seeds == 1:
        return f"{100.0 * value.mean:.1f} %"
    mean, deviation, worst = (100.0 * n for n in (value.mean, value.deviation, value.worst))
    return f"{mean:.1f} ± {deviation:.1f} % (worst {worst:.1f})"


def metric(value: ComparedValue | None, seeds: int) -> str:
    """Write any metric over seeds: accuracies in percent, others as they are.

    Args:
        value: The metric, or None.
        seeds: How many runs there are; said where fewer have this metric.
    """
    if value is None:
        return MISSING
    if "accuracy" in value.name:
        text = accuracy(value)
    else:
        text = format_number(value.mean)
        if value.seeds > 1:
            deviation, worst = format_number(value.deviation), format_number(value.worst)
            text += f" ± {deviation} (worst {worst})"
    return text if value.seeds == seeds else f"{text}, in {value.seeds} of {seeds} seeds"


def interval(found: Interval | None, unit: str) -> str:
    """Write a quantity with the range of its prices, or a dash.

    Args:
        found: In ``unit``, without prefix; or None.
        unit: For example ``"J"``.

    Example:
        >>> interval(Interval(2e-3, 1e-3, 3e-3), "J"), interval(None, "s")
        ('2.00 mJ [1.00, 3.00]', '–')
    """
    return MISSING if found is None else format_interval(found, unit)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """Write a table.

    Args:
        header: Titles of the columns.
        rows: Cells; missing ones at the end stay empty.
        left: How many columns, from the left, are words; the others are set to the right.

    Example:
        >>> print(markdown_table(("arm", "pulses"), [("hybrid", "0")], left=1))
        | arm | pulses |
        |---|---:|
        | hybrid | 0 |
    """
    lines = [_row(header), "|" + "---|" * left + "---:|" * (len(header) - left)]
    lines += [_row([*row, *[""] * (len(header) - len(row))]) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
