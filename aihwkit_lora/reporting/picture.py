"""A run in one picture: accuracy and cumulative energy over optimiser steps, arm against arm."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aihwkit_lora.reporting.formatting import format_si
from aihwkit_lora.reporting.run_report import RunReport
from aihwkit_lora.reporting.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
_METRICS = {
    "forget_accuracy": ("forgotten", "#D55E00"),
    "retain_accuracy": ("kept", "#0072B2"),
    "new_accuracy": ("new", "#009E73"),
}
# The first arm is broad and pale, so that both show where another one coincides with it.
_STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "solid", "linewidth": 4.5, "alpha": 0.5},
    {"linestyle": "dashed", "linewidth": 1.7},
    {"linestyle": "dotted", "linewidth": 1.7},
    {"linestyle": "dashdot", "linewidth": 1.2},
    {"linestyle": (0, (6, 1, 1, 1, 1, 1)), "linewidth": 1.2},
)
_ENTRIES_IN_A_ROW = 5
_INK = "#222222"
_GREY = "#8A8A8A"


def draw(report: RunReport, path: str | Path) -> None:
    """Draw accuracy and cumulative energy over the optimiser steps after programming.

    Args:
        report: A run with steps. Energy starts at that of the initial programming.
        path: PNG to write; its folder is made if need be.
    Raises:
        DataError: No stage after ``program`` has steps.

    Example:
        >>> import tempfile
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.metering import Counts, price
        >>> from aihwkit_lora.reporting import StageRecord, StepRecord
        >>> step = StepRecord(step=1, energy_j=1e-6, pulses=0, metrics={"retain_accuracy": 0.9})
        >>> forget = StageRecord(
        ...     name="forget",
        ...     metrics={},
        ...     counts=Counts(),
        ...     energy=price(Counts(), chips.get("rm-180nm")),
        ...     trainable_parameters=1404,
        ...     fingerprint="",
        ...     steps=(step,),
        ...     wall_s=0.0,
        ... )
        >>> report = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={"hybrid": (forget,)},
        ...     ratios=(),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw(report, Path(folder, "run.png"))
        ...     Path(folder, "run.png").exists()
        True
    """
    timeline = Timeline.of(report)
    figure = _figure(f"{report.recipe} on {report.chip}, seed {report.seed}")
    accuracy, energy = figure.axes
    _draw_accuracy(accuracy, report, timeline)
    _draw_energy(energy, report, timeline)
    _mark_stages(figure, timeline)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _figure(title: str) -> Figure:
    # No pyplot: it would choose, and keep, a backend for the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    for axes in figure.subplots(2, 1, sharex=True):
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK)
    return figure


def _draw_accuracy(axes: Axes, report: RunReport, timeline: Timeline) -> None:
    shown: dict[str, str] = {}
    for (_, stages), style in zip(report.arms.items(), cycle(_STYLES), strict=False):
        for metric, (label, colour) in _METRICS.items():
            steps, fractions = timeline.accuracy(stages, metric)
            if steps:
                shown[label] = colour
                percent = [100.0 * fraction for fraction in fractions]
                axes.plot(steps, percent, color=colour, **style)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("accuracy / %")
    _add_legend(axes, shown, list(report.arms))


def _add_legend(axes: Axes, colours: dict[str, str], arms: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=4) for colour in colours.values()]
    for _, style in zip(arms, cycle(_STYLES), strict=False):
        lines.append(Line2D([], [], color=_INK, **style))
    axes.legend(
        lines,
        [*colours, *arms],
        # One row as far as it fits beside the axes' own width; a longer one would squeeze them.
        ncols=len(lines) if len(lines) <= _ENTRIES_IN_A_ROW else -(-len(lines) // 2),
        loc="lower left",
        bbox_to_anchor=(0.0, 1.08),
        borderaxespad=0.0,
        handlelength=2.8,
        frameon=False,
    )


def _draw_energy(axes: Axes, report: RunReport, timeline: Timeline) -> None:
    first: list[float] = []
    ends: list[tuple[float, str]] = []
    for (arm, stages), style in zip(report.arms.items(), cycle(_STYLES), strict=False):
        steps, joules = timeline.energy(stages)
        # A logarithmic axis has no place for nothing.
        visible = [energy if energy > 0.0 else float("nan") for energy in joules]
        axes.plot(steps, visible, color=_INK, **style)
        first.append(joules[0])
        ends.append((joules[-1], f"{arm}\n{format_si(joules[-1], 'J')}"))
    waits = "; an arm that needs fewer waits for the next stage" if timeline.waits else ""
    axes.set_xlabel(f"optimiser steps after programming{waits}")
    axes.set_xlim(0, timeline.last)
    axes.set_ylabel("cumulative energy\n(programming included)")
    if max(ends)[0] > 0.0:
        axes.set_yscale("log")
    if max(first) > 0.0:
        _scale(axes, max(first), max(ends)[0])
        _label_start(axes, max(first))
    _label_ends(axes, ends)


def _scale(axes: Axes, start: float, stop: float) -> None:
    """Give a logarithmic axis room for a label below its lines, and ticks however short it is."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    span = max(stop / start, 2.0)
    axes.set_ylim(start / span**0.18, start * span**1.1)
    if span < 100.0:
        subs = (1.0, 2.0, 5.0) if span > 5.0 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(unit="J"))


def _label_start(axes: Axes, joules: float) -> None:
    """Say what was spent before the first step, below the lines, which can only rise from there."""
    axes.plot([0], [joules], marker="o", color=_INK, clip_on=False, zorder=3)
    axes.annotate(
        f"initial programming: {format_si(joules, 'J')}",
        (0, joules),
        xytext=(10, -8),
        textcoords="offset points",
        va="top",
        color=_INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )


def _label_ends(axes: Axes, ends: list[tuple[float, str]]) -> None:
    """Write each line's name and last value beside its end, moved apart where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    labels: dict[str, float] = {}
    free = 1.0
    for joules, label in sorted(ends, reverse=True):
        height = float(to_axes.transform((0.0, joules))[1]) if joules > 0.0 else 0.0
        labels[label] = min(height, free)
        free = labels[label] - 0.14
    lift = max(0.06 - min(labels.values()), 0.0)
    for label, height in labels.items():
        axes.text(1.01, height + lift, label, transform=axes.transAxes, va="center", color=_INK)


def _mark_stages(figure: Figure, timeline: Timeline) -> None:
    """Name the stages above the picture and draw a line where a new one starts."""
    top = figure.axes[0]
    free = 0.0
    for name, (start, _) in timeline.spans.items():
        place = max(start / timeline.last, free)
        top.text(place, 1.02, name, transform=top.transAxes, color=_INK, style="italic")
        free = place + 0.02 + 0.0095 * len(name)
        if start:
            for axes in figure.axes:
                axes.axvline(start, color=_GREY, linewidth=1.0, linestyle=(0, (1, 2)))
