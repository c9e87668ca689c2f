"""What is counted: one entry per event, with the side of the chip that it happens on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from aihwkit_lora.registry import Registry


class Side(StrEnum):
    """Part of the chip that an event happens on."""

    ANALOG = "analog"
    DIGITAL = "digital"
    MEMORY = "memory"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is counted.

    Args:
        name: Key in counts, reports and price lists.
        side: Part of the chip that it happens on.
        meaning: What one count is.
    """

    name: str
    side: Side
    meaning: str


EVENTS: Registry[Event] = Registry("event")


def define(name: str, side: Side, meaning: str) -> Event:
    """Add a counted event.

    Args:
        name: Unique key.
        side: Part of the chip that it happens on.
        meaning: What one count is, in one sentence.
    Raises:
        ConfigurationError: The name is taken.
    """
    event = Event(name=name, side=side, meaning=meaning)
    EVENTS.add(name, event)
    return event


_ANALOG: dict[str, str] = {
    "set_pulses": "one SET pulse on one cell",
    "reset_pulses": "one RESET pulse on one cell",
    "verify_reads": "one read of one cell by a verification; n-fold averaging counts n",
    "programmed_cells": "one cell that was addressed by a write–verify call",
    "pulsed_cells": "one cell that got at least one pulse in a write–verify call",
    "failed_cells": "one cell left off its target because its pulse budget ran out, now or earlier",
    "array_cycles": "one input vector presented to a layer, whose tiles work in parallel",
    "tile_reads": "one input vector multiplied in one tile",
    "row_drives": "one row of one tile driven by its DAC, whatever the value",
    "active_row_drives": "one row of one tile driven by its DAC with a value other than zero",
    "cell_reads": "one cell of one tile read by a matrix–vector product",
    "cell_read_x2g": (
        "the sum of x²·G over all cells read, in units of 2⁻³² pS (x as a fraction of full scale "
        "in steps of 2⁻¹⁶, row sums of G in whole pS)"
    ),
    "adc_conversions": "one column of one tile digitised",
    "transposed_array_cycles": "one gradient vector sent backwards through a layer",
    "transposed_tile_reads": "one gradient vector multiplied in one tile, backwards",
    "transposed_cell_reads": "one cell of one tile read backwards",
    "transposed_row_drives": "one column of one tile driven backwards by a DAC",
    "transposed_adc_conversions": "one row of one tile digitised, backwards",
}
_DIGITAL: dict[str, str] = {
    "shift_adds": "one partial sum of a tile added to the sum of its column",
    "forward_macs": "one multiply–accumulate of a digital layer in a forward pass",
    "input_gradient_macs": "one multiply–accumulate of the gradient towards a layer's input",
    "weight_gradient_macs": "one multiply–accumulate of the gradient of a digital weight",
    "optimizer_updates": "one scalar parameter updated by one optimiser step",
}
_MEMORY: dict[str, str] = {
    "sram_read_bits": "one bit read from the digital unit's SRAM",
    "sram_write_bits": "one bit written to the digital unit's SRAM",
    "offchip_read_bits": "one bit read from memory outside the chip",
    "offchip_write_bits": "one bit written to memory outside the chip",
}

for _side, _events in (
    (Side.ANALOG, _ANALOG),
    (Side.DIGITAL, _DIGITAL),
    (Side.MEMORY, _MEMORY),
):
    for _name, _meaning in _events.items():
        define(_name, _side, _meaning)
