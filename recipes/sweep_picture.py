"""Accuracy along an axis of trouble in one picture: a panel per group, a line per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "osD^v"
_TITLES = {"forget": "forgotten", "retain": "kept", "new": "new"}
_INK = "#222222"
_GREY = "#8A8A8A"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The axis along which trouble grows.

    Args:
        title: What the picture shows.
        label: Quantity and unit.
        draws: What a draw is called, in the plural.
        ticks: Places with a name of their own; the axis is logarithmic where there are some.
    """

    title: str
    label: str
    draws: str
    ticks: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model in one panel; accuracies are fractions.

    Args:
        points: Along the axis.
        clean: Accuracy before any trouble.
        mean: Over the draws, at each point.
        std: Over the draws, at each point.
        worst: Of the draws, at each point.
    """

    points: Sequence[float]
    clean: float
    mean: Sequence[float]
    std: Sequence[float]
    worst: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One group of classes.

    Args:
        title: Name of the group.
        lines: By model.
    """

    title: str
    lines: Mapping[str, Line]


def draw(panels: Sequence[Panel], axis: Axis, draws: int, path: Path) -> None:
    """Draw means, a band of one standard deviation, and the worst draw.

    Args:
        panels: One beside the other, at least one, each with a line.
        axis: Common to all.
        draws: How many there are at each point.
        path: PNG to write; its folder is there.

    Example:
        >>> import tempfile
        >>> points, mean, std, worst = (1.0, 2.0), (0.94, 0.9), (0.01, 0.02), (0.92, 0.85)
        >>> line = Line(points=points, clean=0.95, mean=mean, std=std, worst=worst)
        >>> axis = Axis(title="noise", label="σ / µS", draws="chips")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "noise.png")
        ...     draw([Panel(title="retain", lines={"hybrid": line})], axis, 3, path)
        ...     path.exists()
        True
    """
    styles = _styles(panels)
    figure, places = _figure(axis, len(panels))
    for place, panel in zip(places, panels, strict=True):
        place.set_title(_TITLES.get(panel.title, panel.title), loc="left", fontsize=11, color=_INK)
        for model, line in panel.lines.items():
            _draw_line(place, line, axis, draws, styles[model])
    places[0].set_ylabel("accuracy / %")
    _add_legend(figure, styles, axis, draws)
    figure.savefig(path, dpi=150)


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Look of each model, in the order in which they first appear."""
    models = dict.fromkeys(model for panel in panels for model in panel.lines)
    looks = zip(models, cycle(_COLOURS), cycle(_MARKERS), strict=False)
    styles: dict[str, dict[str, Any]] = {
        model: {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.7}
        for model, colour, marker in looks
    }
    # The first one is broad and pale, so that both show where another one coincides with it.
    styles[next(iter(models))] |= {"linewidth": 4.5, "alpha": 0.5}
    return styles


def _figure(axis: Axis, panels: int) -> tuple[Figure, list[Axes]]:
    # No pyplot: it would choose, and keep, a backend for the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(axis.title, x=0.01, ha="left", fontsize=12, color=_INK)
    places = list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])
    for place in places:
        place.grid(color="#E6E6E6", linewidth=0.8)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
        place.spines[["left", "bottom"]].set_color(_GREY)
        place.tick_params(colors=_INK)
        place.set_xlabel(axis.label)
        place.set_ylim(-4, 104)
        if axis.ticks:
            place.set_xscale("log")
            place.set_xticks(list(axis.ticks), list(axis.ticks.values()))
            place.minorticks_off()
    return figure, places


def _draw_line(place: Axes, line: Line, axis: Axis, draws: int, style: Mapping[str, Any]) -> None:
    points = list(line.points)
    # Before any trouble: at zero, for which a logarithmic axis has no place but its own left.
    start = min(points) / 4.0 if axis.ticks else 0.0
    colour, marker = style["color"], style["marker"]
    clean = [100.0 * line.clean]
    place.plot([start], clean, color=colour, marker=marker, markersize=7, fillstyle="none")
    place.plot(points, [100.0 * mean for mean in line.mean], **style)
    if draws > 1:
        both = list(zip(line.mean, line.std, strict=True))
        low = [100.0 * max(0.0, mean - std) for mean, std in both]
        high = [100.0 * min(1.0, mean + std) for mean, std in both]
        place.fill_between(points, low, high, color=colour, alpha=0.18, linewidth=0)
        worst = [100.0 * worst for worst in line.worst]
        place.plot(points, worst, color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))


def _add_legend(
    figure: Figure, styles: Mapping[str, Mapping[str, Any]], axis: Axis, draws: int
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: dict[str, Any] = {model: Line2D([], [], **style) for model, style in styles.items()}
    entries["as programmed"] = Line2D(
        [], [], color=_INK, marker="o", markersize=7, fillstyle="none", linestyle="none"
    )
    if draws > 1:
        entries[f"mean ± std of {draws} {axis.draws}"] = Patch(color=_INK, alpha=0.18)
        entries["worst"] = Line2D([], [], color=_INK, linewidth=1.2, linestyle=(0, (1, 1.5)))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower left",
        ncols={1: 2, 2: 3}.get(len(figure.axes), len(entries)),
        frameon=False,
        handlelength=2.2,
    )
