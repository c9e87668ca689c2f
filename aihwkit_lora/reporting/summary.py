"""A run on one screen: what it learnt and forgot, what it took, and how its arms compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.reporting.breakdown import energy_by_group
from aihwkit_lora.reporting.formatting import (
    MISSING,
    format_fraction,
    format_number,
    format_range,
    format_si,
)
from aihwkit_lora.reporting.notes import notes
from aihwkit_lora.reporting.records import Ratio, StageRecord
from aihwkit_lora.reporting.run_report import RunReport

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_ACCURACIES = {
    "learnt": "learnt_accuracy",
    "forgotten": "forget_accuracy",
    "kept": "retain_accuracy",
    "new": "new_accuracy",
    "forgotten,\nadapter off": "adapter_off_forget_accuracy",
}
_COSTS = ("set+reset\npulses", "verify\nreads", "failed\ncells", "energy", "[range]", "latency")


def print_summary(report: RunReport, console: Console | None = None) -> None:
    """Print accuracies, costs, where the energy went, ratios, and what limits them.

    Args:
        report: A run.
        console: Where to print; the terminal if None. Reads best from 100 columns on.

    Example:
        >>> from rich.console import Console
        >>> empty = RunReport(
        ...     recipe="face_recognition",
        ...     chip="mine",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={},
        ...     ratios=(),
        ... )
        >>> print_summary(empty, Console(width=80))  # doctest: +ELLIPSIS
        <BLANKLINE>
        face_recognition on mine, seed 0
        ...
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print()
    console.print(Text(f"{report.recipe} on {report.chip}, seed {report.seed}", style="bold"))
    for part in _parts(report):
        console.print()
        console.print(part)


def _parts(report: RunReport) -> Iterator[RenderableType]:
    if any(report.arms.values()):
        yield _accuracies(report)
        yield _costs(report)
    for arm, stages in report.arms.items():
        if any(stage.energy.energy_by_event for stage in stages):
            yield _breakdown(arm, stages)
    if report.ratios:
        yield _ratios(report.ratios)
    yield _notes(report)


def _accuracies(report: RunReport) -> Table:
    table = _table("Accuracy", "stage", *_ACCURACIES, "trainable\nparameters")
    for arm, stages in report.arms.items():
        _add_heading(table, arm)
        for stage in stages:
            accuracies = [format_fraction(stage.metrics.get(key)) for key in _ACCURACIES.values()]
            _add_row(table, f"  {stage.name}", *accuracies, f"{stage.trainable_parameters:,}")
    return table


def _costs(report: RunReport) -> Table:
    table = _table("Cost", "stage", *_COSTS)
    for arm, stages in report.arms.items():
        _add_heading(table, arm)
        for stage in stages:
            _add_row(
                table,
                f"  {stage.name}",
                f"{stage.pulses:,}",
                f"{stage.counts['verify_reads']:,}",
                f"{stage.counts['failed_cells']:,}",
                *_cost(stage.energy.energy_by_event, "J"),
                _cost(stage.energy.latency_by_event, "s")[0],
            )
    return table


def _cost(bill: Mapping[str, Interval], unit: str) -> tuple[str, str]:
    # Nothing on the bill is a dash, not 0: it may be that nothing on it has a price.
    total = Interval.sum(bill.values())
    return (format_si(total.value, unit), format_range(total)) if bill else (MISSING, "")


def _breakdown(arm: str, stages: Sequence[StageRecord]) -> Table:
    bills = [energy_by_group(stage.energy) for stage in stages]
    totals = [stage.energy.energy_j.value for stage in stages]
    table = _table(f"Energy of {arm}, by part of the chip", "", *(stage.name for stage in stages))
    for group in dict.fromkeys(group for bill in bills for group in bill):
        shares = [_share(bill.get(group), total) for bill, total in zip(bills, totals, strict=True)]
        _add_row(table, group, *shares)
    return table


def _share(energy: Interval | None, total: float) -> str:
    if energy is None:
        return MISSING
    share = f"{100.0 * energy.value / total:3.0f} %" if total else ""
    return f"{format_si(energy.value, 'J')} {share}"


def _ratios(ratios: Sequence[Ratio]) -> Table:
    table = _table("Ratios", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for ratio in ratios:
        ends = (format_number(ratio.low), format_number(ratio.high))
        span = "" if ratio.low == ratio.high else f" [{', '.join(ends)}]"
        _add_row(
            table,
            f"{ratio.name}\n{format_number(ratio.value)}{span}",
            f"{ratio.numerator}\n÷ {ratio.denominator}\nincludes {ratio.includes}",
        )
    return table


def _notes(report: RunReport) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(style="dim")
    for note in notes(report):
        _add_row(table, "•", note)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", vertical="top")
    return table


def _add_heading(table: Table, arm: str) -> None:
    from rich.text import Text

    table.add_row(Text(arm, style="bold cyan"))


def _add_row(table: Table, *cells: str) -> None:
    # Text, because rich takes the brackets of a range in a plain string for markup.
    from rich.text import Text

    row: list[Any] = [Text(cell) for cell in cells]
    table.add_row(*row)
