"""A forgetting report for people: a table on the terminal, or a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.reporting.formatting import MISSING, format_number
from aihwkit_lora.unlearning.verification.report import Finding, ForgettingReport, Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_HEADINGS = ("", "value", "95 % interval", "retrained", "verdict", "criterion")
_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.NOT_JUDGED: "dim"}


def print_verdict(report: ForgettingReport, console: Console | None = None) -> None:
    """Print what was found, how it was judged, and what it does not show.

    Args:
        report: Of a verification.
        console: Where to print; the terminal if None. Reads best from 120 columns on.

    Example:
        >>> from rich.console import Console
        >>> report = ForgettingReport(
        ...     level="suppressed", references=0, findings=(), does_not_show=("It is a test.",)
        ... )
        >>> print_verdict(report, Console(width=80))  # doctest: +ELLIPSIS
        <BLANKLINE>
        Forgetting: suppressed, compared with no reference
        ...
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print()
    console.print(Text(_title(report), style="bold"))
    console.print(report.level.meaning)
    for heading, findings in _sections(report):
        console.print()
        console.print(_table(heading, findings))
    console.print()
    for line in _notes(report):
        console.print(Text(line))


def markdown(report: ForgettingReport) -> str:
    """Write a report as a page of Markdown.

    Args:
        report: Of a verification.

    Example:
        >>> report = ForgettingReport(
        ...     level="suppressed", references=0, findings=(), does_not_show=("It is a test.",)
        ... )
        >>> print(markdown(report).splitlines()[0])
        # Forgetting: suppressed, compared with no reference
    """
    lines = [f"# {_title(report)}", "", report.level.meaning, ""]
    for heading, findings in _sections(report):
        lines += [f"## {heading}", "", _row((heading, *_HEADINGS[1:])), _row(["---"] * 6)]
        lines += [_row(_cells(finding)) for finding in findings]
        lines += ["", *(f"- {line}" for line in _footnotes(findings)), ""]
    return "\n".join([*lines, *_paragraphs(report)]) + "\n"


def _title(report: ForgettingReport) -> str:
    return f"Forgetting: {report.level}, compared with {report.reference}"


def _sections(report: ForgettingReport) -> Iterator[tuple[str, Sequence[Finding]]]:
    if report.metrics:
        yield "As used", report.metrics
    if report.attacks:
        yield "Under attack", report.attacks


def _table(heading: str, findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=heading, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in _HEADINGS:
        table.add_column(name, justify="right" if name in _HEADINGS[1:4] else "left")
    for finding in findings:
        *cells, verdict, criterion = _cells(finding)
        colour = _COLOURS[finding.verdict]
        table.add_row(*cells, Text(verdict, style=colour), Text(criterion, style="dim"))
    return table


def _cells(finding: Finding) -> tuple[str, ...]:
    shown = _format(finding.unit)
    interval = MISSING
    if finding.low is not None and finding.high is not None:
        interval = f"{shown(finding.low)} to {shown(finding.high)}"
    return (
        finding.title,
        shown(finding.value),
        interval,
        _range(finding.retrained, shown),
        str(finding.verdict),
        finding.criterion,
    )


def _range(values: Sequence[float | None], shown: Callable[[float | None], str]) -> str:
    if not values:
        return MISSING
    known = sorted(value for value in values if value is not None)
    ends = list(dict.fromkeys(shown(value) for value in known))
    if len(known) < len(values):
        ends.append(f"{MISSING} ({len(values) - len(known)} of {len(values)})")
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def _format(unit: str) -> Callable[[float | None], str]:
    def shown(value: float | None) -> str:
        if value is None:
            return MISSING
        if unit == "fraction":
            return f"{100 * value:.1f} %"
        return f"{value:.0f}" if unit == "steps" else format_number(value)

    return shown


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"


def _footnotes(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.title}: {finding.note}." for finding in findings if finding.note]


def _paragraphs(report: ForgettingReport) -> list[str]:
    lines = ["## What this does not show", ""]
    lines += [f"- {sentence}" for sentence in report.does_not_show]
    return [*lines, "", "## How it was measured", "", *(f"- {line}" for line in _how(report))]


def _notes(report: ForgettingReport) -> Iterator[str]:
    yield from _footnotes(report.findings)
    yield ""
    yield "What this does not show"
    yield from (f"• {sentence}" for sentence in report.does_not_show)
    yield ""
    yield from _how(report)


def _how(report: ForgettingReport) -> Iterator[str]:
    verdicts = ", ".join(f"{report.count(each)} {each}" for each in Verdict)
    yield f"Verdicts: {verdicts}."
    if report.samples:
        yield f"Samples: {', '.join(f'{n} {name}' for name, n in report.samples.items())}."
    intervals = sorted({finding.interval for finding in report.findings if finding.interval})
    if intervals:
        yield f"Intervals: {'; '.join(intervals)}."
    if report.retraining is not None:
        yield f"Making the {report.reference} took {_took(report.retraining)}."
    if report.reads is not None:
        yield f"The verification itself took {_took(report.reads)}."


def _took(counts: Counts) -> str:
    events = ("set_pulses", "reset_pulses", "verify_reads", "tile_reads")
    found = [f"{counts[event]:,} {event.replace('_', ' ')}" for event in events if counts[event]]
    return f"{', '.join(found) or 'nothing on the arrays'} ({counts.level})"
