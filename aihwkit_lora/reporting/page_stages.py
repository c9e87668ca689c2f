"""One workload on one chip, stage by stage: metrics, pulses, energy and time, arm beside arm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.pricing import EnergyReport
from aihwkit_lora.reporting.comparison import ComparedValue
from aihwkit_lora.reporting.formatting import MISSING, format_number, format_si
from aihwkit_lora.reporting.overview import Cell, mean_energy, mean_latency, mean_of
from aihwkit_lora.reporting.page_cells import NOT_RUN, interval, markdown_table, metric
from aihwkit_lora.reporting.records import StageRecord

_NAMES = {
    "learnt_accuracy": "learnt",
    "forget_accuracy": "forgotten",
    "retain_accuracy": "kept",
    "new_accuracy": "new",
    "adapter_off_forget_accuracy": "forgotten, adapter off",
}
_SWEPT = re.compile(r"(?P<name>.+)_at_(?P<at>[\d.e+-]+?)_?(?P<unit>us|s)(?P<worst>_worst)?")
"""Metrics of a sweep over write noise in microsiemens, or over time in seconds."""

_Stage = tuple[StageRecord, ...]


def stage_tables(cell: Cell, arms: Sequence[str]) -> Iterator[str]:
    """Write what each stage gave and took, and then its sweeps over write noise and time.

    Args:
        cell: One workload on one chip.
        arms: Columns; those that were not run say so.
    """
    header = ["stage", "", *(arm if arm in cell.stages else f"{arm}: {NOT_RUN}" for arm in arms)]
    stages = dict.fromkeys(name for each in cell.stages.values() for name in each)
    rows = [row for stage in stages for row in _stage_rows(cell, stage, arms)]
    yield markdown_table(header, rows, left=2)
    for unit, title in (("us", "write noise of a cell"), ("s", "time after programming")):
        if table := _sweep(cell, unit):
            yield f"Mean (worst) over chips, then over seeds, by {title}:"
            yield table


def _stage_rows(cell: Cell, stage: str, arms: Sequence[str]) -> Iterator[list[str]]:
    found = [cell.metrics(arm, stage) for arm in arms]
    names = dict.fromkeys(name for each in found for name in each if _shown(name))
    shown = [name for name in _NAMES if name in names]
    shown += [name for name in names if name not in _NAMES]
    rows = []
    for name in shown:
        values = (metric(each.get(name), len(cell.runs.seeds)) for each in found)
        rows.append([_title(name), *values])
    records = [cell.stages.get(arm, {}).get(stage, ()) for arm in arms]
    for title, write in _COSTS.items():
        cells = [write(each) if each else MISSING for each in records]
        if any(text != MISSING for text in cells):
            rows.append([title, *cells])
    for number, row in enumerate(rows):
        yield [stage if number == 0 else "", *row]


def _shown(name: str) -> bool:
    # Sweeps have tables of their own; a slash is before the parts of a number that is shown.
    return not _SWEPT.fullmatch(name) and "/" not in name


def _title(name: str) -> str:
    return _NAMES.get(name) or name.removesuffix("_accuracy").replace("_", " ")


def _pulses(records: _Stage) -> str:
    total = mean_of([record.pulses for record in records])
    if not total:
        return "0"
    counts = Counts.sum(record.counts for record in records)
    level = counts.only(("set_pulses", "reset_pulses")).level
    return f"{total:,.0f}" + f" ({level})" * (level is not Level.EXACT)


def _energy(records: _Stage) -> str:
    return interval(mean_energy(records), "J")


def _latency(records: _Stage) -> str:
    return interval(mean_latency(records), "s")


def _wall(records: _Stage) -> str:
    return f"{format_number(mean_of([record.wall_s for record in records]))} s"


def _statuses(records: _Stage) -> str:
    """Which part of the energy rests on cited, derived, … prices."""
    joules: dict[str, float] = {}
    for record in records:
        for status, energy in _by_status(record.energy):
            joules[status] = joules.get(status, 0.0) + energy
    total = sum(joules.values())
    if not total:
        return MISSING
    parts = sorted(joules.items(), key=lambda item: -item[1])
    return ", ".join(f"{status} {_percent(energy / total)}" for status, energy in parts)


def _by_status(energy: EnergyReport) -> Iterator[tuple[str, float]]:
    # Imported here because chips bring aihwkit along, which a report from disk can do without.
    from aihwkit_lora.chips import chips

    prices = chips.get(energy.chip).prices.energy if energy.chip in chips else {}
    for event, joules in energy.energy_by_event.items():
        yield str(prices[event].status) if event in prices else "not known here", joules.value


def _percent(fraction: float) -> str:
    return "< 1 %" if fraction < 0.005 else f"{100.0 * fraction:.0f} %"


_COSTS: dict[str, Callable[[_Stage], str]] = {
    "pulses": _pulses,
    "energy": _energy,
    "of it, by status of the price": _statuses,
    "time on the chip": _latency,
    "simulated in": _wall,
}


def _sweep(cell: Cell, unit: str) -> str:
    """Rows are metrics, columns what was swept over; nothing if nothing was."""
    found: dict[str, dict[float, dict[bool, ComparedValue]]] = {}
    for value in cell.values:
        match = _SWEPT.fullmatch(value.name) if value.kind == "metric" else None
        if match and match["unit"] == unit:
            row = found.setdefault(f"{value.arm}, {value.stage}: {_swept_title(match['name'])}", {})
            row.setdefault(float(match["at"]), {})[bool(match["worst"])] = value
    if not found:
        return ""
    steps = sorted({at for row in found.values() for at in row})
    header = ["", *(format_si(at * (1e-6 if unit == "us" else 1.0), _UNITS[unit]) for at in steps)]
    rows = [[name, *(_swept(row.get(at, {})) for at in steps)] for name, row in found.items()]
    return markdown_table(header, rows, left=1)


def _swept_title(name: str) -> str:
    *model, metric_name = name.split("/")
    return ", ".join([*model, _title(metric_name)])


_UNITS = {"us": "S", "s": "s"}


def _swept(found: dict[bool, ComparedValue]) -> str:
    if False not in found:
        return MISSING
    text = f"{100.0 * found[False].mean:.1f} %"
    return text + (f" ({100.0 * found[True].worst:.1f})" if True in found else "")
