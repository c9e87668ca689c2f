"""One Markdown page of all workloads on all chips, arm beside arm, and the ratios between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from aihwkit_lora.reporting.comparison import ComparedValue
from aihwkit_lora.reporting.energy_chart import draw_energies
from aihwkit_lora.reporting.formatting import (
    MISSING,
    format_number,
)
from aihwkit_lora.reporting.overview import Adaptation, Cell, Overview, Workload
from aihwkit_lora.reporting.page_cells import NOT_RUN, accuracy, interval, markdown_table
from aihwkit_lora.reporting.page_stages import stage_tables

_NO_SPREAD = 1e-3
"""Spread of a ratio over seeds that is not worth ink, as a fraction of it."""

_ACCURACIES = ("forget_accuracy", "retain_accuracy", "new_accuracy")

_LEGEND = """\
- **±** is the standard deviation over seeds, *worst* the worst seed; one seed has neither.
  A spread of less than a thousandth of a ratio is left out.
- **[low, high]** is the range of the chip's prices alone, averaged over seeds.
- **Adapting** is every stage after `program` other than `noise`, `drift` and `restore`.
- **Pulses** are SET and RESET pulses of write–verify; how sure their count is stands behind them.
- **Status of the price**: *cited* from a paper, printed by a *library*, *derived* from such
  numbers, or *assumed*; `aihwkit-lora chips NAME` has every source.
- **Time on the chip** leaves out what has no price, digital work above all.
- **Simulated in** is the time that the simulation took, and says nothing about the chip.
- **(quick)**: few steps with small models, to see that everything works; accuracies mean nothing.
- *Forgotten* by adapters on frozen arrays means suppressed: the arrays still hold it, as the rows
  *adapter off* show."""

_CLAIMS = """\
[arXiv:2601.10037](https://arxiv.org/abs/2601.10037) claims, as "up to", over its three workloads:

| claim of the paper | factor | divided by what | of the ratios here, closest in meaning |
|---|---:|---|---|
| less training cost | 147.76 | not public | *update energy*, *training energy* |
| less deployment overhead | 387.95 | not public | *deployment energy* |
| less energy of inference | 48.44 | not public | *inference energy*: `aihwkit-lora ratios` |

These are claims, cited. Nothing on this page reproduces them: what they divide by what is not
public, and a ratio that comes near one of them may still be of something else."""


def page(overview: Overview, *, chart: str | None = None) -> str:
    """Write what all runs gave, for people, as Markdown.

    Args:
        overview: Runs by workload, chip and seed.
        chart: Path of a picture to show, as :func:`write_page` draws it; none if None.
    Returns:
        The page: everything at a glance; the named ratios; what the paper claims; then each
        workload on each chip, stage by stage.

    Example:
        >>> from aihwkit_lora.reporting import RunReport, overview
        >>> run = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={"hybrid": ()},
        ...     ratios=(),
        ... )
        >>> print(page(overview([run])).splitlines()[0])
        # Workloads on chips
    """
    parts = [
        "# Workloads on chips",
        f"Made of {overview.runs} run reports by `aihwkit-lora page`.",
        _LEGEND,
        "## At a glance",
        _glance(overview),
        *([f"![Energy of adapting, by arm, workload and chip]({chart})"] if chart else []),
        "## Named ratios",
        *_ratios(overview),
        "## What the paper claims",
        _CLAIMS,
        *(part for workload in overview.workloads for part in _workload(workload, overview.chips)),
    ]
    return "\n\n".join(parts) + "\n"


def write_page(overview: Overview, path: str | Path) -> str:
    """Write the page into a file, and its chart beside it as PNG.

    Args:
        overview: Runs by workload, chip and seed.
        path: Markdown file; its folder is made if need be.
    Returns:
        The page, as written.

    Example:
        >>> import tempfile
        >>> from aihwkit_lora.reporting import RunReport, overview
        >>> run = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={"hybrid": ()},
        ...     ratios=(),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = write_page(overview([run]), Path(folder, "page.md"))
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['page.md', 'page.png']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = path.with_suffix(".png")
    draw_energies(overview, chart)
    text = page(overview, chart=chart.name)
    path.write_text(text, encoding="utf-8")
    return text


def _glance(overview: Overview) -> str:
    header = (
        "workload", "chip", "arm", "seeds", "forgotten", "kept", "new", "pulses, adapting",
        "energy, adapting", "time on the chip, adapting", "simulated in",
    )  # fmt: skip
    rows = (
        row
        for workload in overview.workloads
        for chip in overview.chips
        for row in _glance_rows(workload, chip)
    )
    return markdown_table(header, rows, left=3)


def _glance_rows(workload: Workload, chip: str) -> Iterator[tuple[str, ...]]:
    cell = workload.cells.get(chip)
    if cell is None:
        yield workload.title, chip, MISSING, NOT_RUN
        return
    for arm in workload.arms:
        if arm not in cell.stages:
            yield workload.title, chip, arm, NOT_RUN
            continue
        took = cell.adaptation(arm)
        seeds = ", ".join(str(run.seed) for run in cell.runs.reports if arm in run.arms)
        yield (workload.title, chip, arm, seeds, *_outcome(took), *_simulated(cell, arm))


def _outcome(took: Adaptation | None) -> tuple[str, ...]:
    if took is None:
        return (MISSING,) * 6
    return (
        *(accuracy(took.metrics.get(name)) for name in _ACCURACIES),
        f"{took.pulses:,.0f}",
        interval(took.energy_j, "J"),
        interval(took.latency_s, "s"),
    )


def _simulated(cell: Cell, arm: str) -> tuple[str]:
    return (f"{format_number(cell.wall_s(arm))} s",)


def _ratios(overview: Overview) -> Iterator[str]:
    """One table of all ratios, and what each includes."""
    header = ("workload", "ratio", "above the line", "below the line", *overview.chips)
    named = [(w, name) for w in overview.workloads for name in _ratio_names(w)]
    if not named:
        yield "No run has compared two arms."
        return
    rows = (
        (
            workload.title,
            name,
            _words(workload, name, "numerator"),
            _words(workload, name, "denominator"),
            *(_ratio(workload.cells.get(chip), name) for chip in overview.chips),
        )
        for workload, name in named
    )
    yield markdown_table(header, rows, left=4)
    yield "What they include:"
    yield "\n".join(_inclusions(named))


def _ratio(cell: Cell | None, name: str) -> str:
    if cell is None:
        return NOT_RUN
    found = [value for value in cell.values if (value.kind, value.name) == ("ratio", name)]
    return _ratio_cell(found[0], len(cell.runs.seeds)) if found else MISSING


def _ratio_cell(value: ComparedValue, seeds: int) -> str:
    text = format_number(value.mean)
    if value.deviation > _NO_SPREAD * abs(value.mean):
        text += f" ± {format_number(value.deviation)}"
    if value.low < value.high:
        text += f" [{format_number(value.low)}, {format_number(value.high)}]"
    return text if value.seeds == seeds else f"{text}, in {value.seeds} of {seeds} seeds"


def _ratio_names(workload: Workload) -> list[str]:
    reports = [run for cell in workload.cells.values() for run in cell.runs.reports]
    return list(dict.fromkeys(ratio.name for run in reports for ratio in run.ratios))


def _words(workload: Workload, name: str, part: str) -> str:
    """What runs say about a ratio; several sentences where chips or seeds differ."""
    found = (
        getattr(ratio, part)
        for cell in workload.cells.values()
        for run in cell.runs.reports
        for ratio in run.ratios
        if ratio.name == name
    )
    return "; or ".join(dict.fromkeys(found))


def _inclusions(named: Sequence[tuple[Workload, str]]) -> Iterator[str]:
    """One line for each sentence, with all ratios that it stands for."""
    ratios: dict[str, dict[str, None]] = {}
    for workload, name in named:
        ratios.setdefault(_words(workload, name, "includes"), {})[name] = None
    for sentence, names in ratios.items():
        yield f"- *{'*, *'.join(names)}*: {sentence}."


def _workload(workload: Workload, chips: Iterable[str]) -> Iterator[str]:
    yield f"## {workload.title}"
    yield f"Settings: {', '.join(f'{key} = {value}' for key, value in workload.settings.items())}."
    for chip in chips:
        cell = workload.cells.get(chip)
        if cell is None:
            yield f"### {workload.recipe} on {chip}: {NOT_RUN}"
            continue
        seeds = cell.runs.seeds
        named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        yield f"### {workload.recipe} on {chip}, {named}"
        yield from stage_tables(cell, workload.arms)
