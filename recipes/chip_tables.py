"""Chips in print: side by side by their key figures, or one with every number it consists of."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

import aihwkit_lora as al
from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import EVENTS, Quantity, Status
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.workload import LayerShape, Workload, analog_forward, programming
from aihwkit_lora.reporting import format_interval, format_si
from aihwkit_lora.reporting.formatting import MISSING

ASSUMED = "*"
"""Stands beside every number that is assumed, or that an assumed price went into."""

LEGEND = f"{ASSUMED} assumed: nobody has published this number, or not for this chip."

_ATTO = 1e-18
"""Below this no prefix helps a reader."""


def overview(chips: Iterable[Chip]) -> Table:
    """Show chips side by side.

    Args:
        chips: One column each.
    """
    columns = {chip.name: key_figures(chip) for chip in chips}
    table = Table("", *columns, box=SIMPLE)
    for name in next(iter(columns.values()), {}):
        table.add_row(name, *(Text(figures[name]) for figures in columns.values()))
    return table


def key_figures(chip: Chip) -> dict[str, str]:
    """What a chip is compared by, as text, with a sign where something is assumed.

    Args:
        chip: Any chip.

    Example:
        >>> figures = key_figures(al.chips.get("rm-180nm"))
        >>> figures["write a cell"], figures["read a full tile"], figures["time of that read"]
        ('2.42 nJ *', '11.3 nJ *', '1.00 µs *')
    """
    window, policy = chip.mapping, chip.write_policy
    figures = {
        "inputs × outputs": f"{chip.rows} × {chip.columns}",
        "cells per weight": f"{window.cells_per_weight}",
        "window of a cell": f"{window.g_min_siemens * 1e6:g}–{window.g_max_siemens * 1e6:g} µS",
        "accepted error": _fact(
            chip, "accepted error of a cell", format_si(chip.tolerance_siemens, "S")
        ),
        "mean pulses of a cell": _fact(
            chip, "pulses of a cell, mean", f"{policy.statistics.mean_pulses:g}"
        ),
        "endurance, pulses": _endurance(chip.endurance_pulses),
    }
    return figures | _costs(chip)


def _costs(chip: Chip) -> dict[str, str]:
    tile = Workload(layers={"tile": LayerShape(inputs=chip.rows, outputs=chip.columns)})
    macs, cells = tile.macs, tile.macs * chip.mapping.cells_per_weight
    written = al.price(programming(tile, chip), chip)
    read = al.price(analog_forward(tile, chip), chip)
    guessed = _unsourced(chip, "pulses of a cell, mean")
    return {
        "write a cell": _energy(chip, written, cells, guessed),
        "time of that, one by one": _time(chip, written, cells, guessed),
        "read a full tile": _energy(chip, read),
        "time of that read": _time(chip, read),
        "read, per weight": _energy(chip, read, macs),
        "8-bit MAC": _price(chip, "forward_macs_int8"),
        "16-bit float MAC": _price(chip, "forward_macs"),
        "SRAM bit, read": _price(chip, "sram_read_bits"),
        "SRAM bit, written": _price(chip, "sram_write_bits"),
        "off-chip bit": _price(chip, "offchip_read_bits"),
    }


def numbers(chip: Chip) -> Table:
    """Show every number of a chip with its range, status and source.

    Args:
        chip: Any chip.
    """
    table = Table("quantity", "value [low, high]", "status", title=chip.title, box=SIMPLE)
    table.add_column("source", overflow="fold")
    endurance = {} if chip.endurance_pulses is None else {"endurance": chip.endurance_pulses}
    sections = (
        {**chip.facts, **endurance},
        {f"energy of {event}": price for event, price in chip.prices.energy.items()},
        {f"time of {event}": price for event, price in chip.prices.latency.items()},
    )
    for section in sections:
        for what, quantity in section.items():
            table.add_row(what, Text(_shown(quantity)), _status(quantity), Text(quantity.source))
        table.add_section()
    return table


def gaps(chip: Chip) -> list[str]:
    """Say which events a chip takes for free, and which it cannot price.

    Args:
        chip: Any chip.
    """
    prices = chip.prices
    everything = al.price(al.Counts(dict.fromkeys(EVENTS, 1)), chip)
    lists = {
        "no energy of their own": sorted(prices.energy_free),
        "no time of their own": sorted(prices.latency_free),
        "energy unpriced": everything.unpriced_energy,
        "time unpriced": everything.unpriced_latency,
    }
    return [f"{what}: {', '.join(events) or 'none'}" for what, events in lists.items()]


def _fact(chip: Chip, name: str, text: str) -> str:
    return _marked(text, _unsourced(chip, name))


def _unsourced(chip: Chip, fact: str) -> bool:
    known = chip.facts.get(fact)
    return known is None or _assumed([known])


def _endurance(pulses: Quantity | None) -> str:
    return MISSING if pulses is None else _marked(f"{pulses.value:.3g}", _assumed([pulses]))


def _energy(chip: Chip, report: al.EnergyReport, parts: int = 1, guessed: bool = False) -> str:
    prices = [chip.prices.energy[event] for event in report.energy_by_event]
    return _cost(report.energy_j.value / parts, "J", prices, guessed)


def _time(chip: Chip, report: al.EnergyReport, parts: int = 1, guessed: bool = False) -> str:
    prices = [chip.prices.latency[event] for event in report.latency_by_event]
    return _cost(report.latency_s.value / parts, "s", prices, guessed)


def _price(chip: Chip, event: str) -> str:
    known = [price for name, price in chip.prices.energy.items() if name == event]
    return _cost(sum(price.value for price in known), "J", known)


def _cost(value: float, unit: str, prices: list[Quantity], guessed: bool = False) -> str:
    """What some prices add up to, at counts that may be guessed; a dash if there are none."""
    return _marked(format_si(value, unit), guessed or _assumed(prices)) if prices else MISSING


def _assumed(quantities: list[Quantity]) -> bool:
    return any(quantity.status is Status.ASSUMED for quantity in quantities)


def _marked(text: str, assumed: bool) -> str:
    return f"{text} {ASSUMED}" if assumed else text


def _status(quantity: Quantity) -> Text:
    if quantity.status is Status.ASSUMED:
        return Text(_marked(str(quantity.status), True), style="bold yellow")
    return Text(str(quantity.status))


def _shown(quantity: Quantity) -> str:
    if quantity.unit == "1":
        return _plain(quantity.interval)
    if 0.0 < quantity.value < _ATTO:
        return f"{quantity.value:.3g} {quantity.unit}"
    return format_interval(quantity.interval, quantity.unit)


def _plain(interval: Interval) -> str:
    ends = f" [{interval.low:g}, {interval.high:g}]" if interval.low < interval.high else ""
    return f"{interval.value:g}{ends}"
