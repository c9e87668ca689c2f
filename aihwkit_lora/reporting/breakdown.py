"""Where the energy of a stage went, in the parts of the chip that people talk about."""

from __future__ import annotations

from collections.abc import Mapping

from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import EnergyReport

OTHER = "other"

GROUPS: Mapping[str, frozenset[str]] = {
    "programming": frozenset(
        {
            "set_pulses",
            "reset_pulses",
            "row_selects",
            "set_slots",
            "reset_slots",
            "programmed_cells",
            "pulsed_cells",
            "failed_cells",
        }
    ),
    "verify reads": frozenset(
        {"verify_reads", "verify_conversions", "verify_comparisons", "verify_slots"}
    ),
    "analogue: DAC": frozenset(
        {
            "row_drives",
            "active_row_drives",
            "row_drive_bits",
            "active_row_drive_bits",
            "transposed_row_drives",
            "transposed_row_drive_bits",
        }
    ),
    "analogue: cells": frozenset(
        {
            "array_cycles",
            "tile_reads",
            "cell_reads",
            "cell_read_x2g",
            "transposed_array_cycles",
            "transposed_tile_reads",
            "transposed_cell_reads",
            "transposed_cell_read_x2g",
        }
    ),
    "analogue: ADC": frozenset({"adc_conversions", "transposed_adc_conversions"}),
    "analogue: shift-add": frozenset({"shift_adds", "transposed_shift_adds"}),
    "digital MACs": frozenset(
        {
            "forward_macs",
            "forward_macs_int8",
            "forward_macs_int16",
            "input_gradient_macs",
            "weight_gradient_macs",
        }
    ),
    "digital: other": frozenset({"additions", "activation_functions"}),
    "optimiser": frozenset({"optimizer_updates"}),
    "SRAM": frozenset({"sram_read_bits", "sram_write_bits"}),
    "off-chip memory": frozenset({"offchip_read_bits", "offchip_write_bits", "adapter_loads"}),
}
"""Events by group, in the order of reports. Events of other packages show up as "other"."""


def energy_by_group(energy: EnergyReport) -> dict[str, Interval]:
    """Add up energy by part of the chip.

    Args:
        energy: What some counts cost.
    Returns:
        Joules by group, in the order of :data:`GROUPS`; only groups that cost anything. Together
        they are all of ``energy.energy_j``.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.metering import Counts, price
        >>> cost = price(Counts({"set_pulses": 3, "verify_reads": 4}), chips.get("rm-180nm"))
        >>> list(energy_by_group(cost))
        ['programming', 'verify reads']
    """
    grouped: dict[str, list[Interval]] = {}
    for event, joules in energy.energy_by_event.items():
        grouped.setdefault(_group_of(event), []).append(joules)
    order = (*GROUPS, OTHER)
    return {group: Interval.sum(grouped[group]) for group in order if group in grouped}


def _group_of(event: str) -> str:
    return next((group for group, events in GROUPS.items() if event in events), OTHER)
