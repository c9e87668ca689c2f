"""One chart of all workloads on all chips: what adapting takes, arm beside arm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aihwkit_lora.reporting.formatting import format_si
from aihwkit_lora.reporting.overview import ARMS, Overview, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, and a shape for each as well.
_LOOKS = dict(
    zip(
        ARMS,
        (("#0072B2", "o"), ("#D55E00", "s"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#009E73", "^")),
        strict=True,
    )
)
_OTHER = ("#555555", "x")
_INK = "#222222"
_GREY = "#8A8A8A"
_ROW_INCHES = 0.27


def draw_energies(overview: Overview, path: str | Path) -> None:
    """Draw the energy of adapting, by arm, workload and chip, with the range of the prices.

    Args:
        overview: Runs by workload, chip and seed.
        path: PNG to write; its folder is made if need be.

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
        ...     draw_energies(overview([run]), Path(folder, "energy.png"))
        ...     Path(folder, "energy.png").exists()
        True
    """
    figure = _figure(overview)
    for axes, workload in zip(figure.axes, overview.workloads, strict=True):
        _draw_workload(axes, workload, overview.chips)
    _scale(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rows(workload: Workload, chips: tuple[str, ...]) -> list[tuple[str, str]]:
    """Chip and arm, from top to bottom; one row without an arm where a chip has none."""
    arms = {chip: workload.arms if chip in workload.cells else () for chip in chips}
    return [(chip, arm) for chip in chips for arm in arms[chip] or ("",)]


def _figure(overview: Overview) -> Figure:
    # No pyplot: it would choose, and keep, a backend for the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(_rows(workload, overview.chips)) + 1.6 for workload in overview.workloads]
    size = (9.0, 1.2 + _ROW_INCHES * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Energy of adapting, without programming, noise and restoring",
        x=0.01,
        ha="left",
        fontsize=12,
        color=_INK,
    )
    figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return figure


def _draw_workload(axes: Axes, workload: Workload, chips: tuple[str, ...]) -> None:
    rows = _rows(workload, chips)
    axes.set_title(workload.title, loc="left", fontsize=10, color=_INK, style="italic")
    axes.set_yticks(range(len(rows)), [arm for _, arm in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for row, (chip, arm) in enumerate(rows):
        _draw_arm(axes, row, workload, chip, arm)
    for chip in chips:
        own = [row for row, (found, _) in enumerate(rows) if found == chip]
        middle = (own[0] + own[-1]) / 2
        axes.text(1.01, middle, chip, transform=axes.get_yaxis_transform(), va="center", color=_INK)
        if own[0]:
            axes.axhline(own[0] - 0.5, color="#CCCCCC", linewidth=0.8)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(which="both", colors=_INK, length=0)


def _draw_arm(axes: Axes, row: int, workload: Workload, chip: str, arm: str) -> None:
    cell = workload.cells.get(chip)
    took = cell.adaptation(arm) if cell else None
    energy = took.energy_j if took else None
    if energy is None or energy.value <= 0.0:
        run = cell is not None and arm in cell.stages
        why = "nothing priced" if took else "adapts nothing" if run else "not run"
        axes.text(0.01, row, why, transform=axes.get_yaxis_transform(), va="center", color=_GREY)
        return
    colour, shape = _LOOKS.get(arm, _OTHER)
    below, above = energy.value - energy.low, energy.high - energy.value
    axes.errorbar(energy.value, row, xerr=[[below], [above]], color=colour, marker=shape, capsize=3)
    axes.annotate(
        format_si(energy.value, "J"),
        (energy.high, row),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_INK,
    )


def _scale(figure: Figure) -> None:
    """A logarithmic axis for all, with room for the labels behind the points."""
    from matplotlib.ticker import EngFormatter

    last = figure.axes[-1]
    if last.dataLim.x1 > 0.0:
        last.set_xscale("log")
        low = min(axes.dataLim.minposx for axes in figure.axes)
        high = max(axes.dataLim.x1 for axes in figure.axes)
        span = max(high / low, 10.0)
        last.set_xlim(low / span**0.12, high * span**0.18)
        last.xaxis.set_major_formatter(EngFormatter(unit="J"))
    last.set_xlabel("mean over seeds; bars are the range of the prices", color=_INK)
