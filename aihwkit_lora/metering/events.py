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


class Part(StrEnum):
    """Part of a training step that an event belongs to."""

    WRITE = "write"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    TRANSFER = "transfer"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is counted.

    Args:
        name: Key in counts, reports and price lists.
        side: Part of the chip that it happens on.
        part: Part of a training step that it belongs to.
        meaning: What one count is.
    """

    name: str
    side: Side
    part: Part
    meaning: str


EVENTS: Registry[Event] = Registry("event")

X2G_STEPS = 21_082_635
"""Steps of full scale in which ``cell_read_x2g`` takes x.

The smallest number that the codes of every DAC of 2 to 9 bits divide: 1, 3, 7, … 255.
"""


def define(name: str, side: Side, meaning: str, *, part: Part = Part.FORWARD) -> Event:
    """Add a counted event.

    Args:
        name: Unique key.
        side: Part of the chip that it happens on.
        meaning: What one count is, in one sentence.
        part: Part of a training step that it belongs to.
    Raises:
        ConfigurationError: The name is taken.
    """
    event = Event(name=name, side=side, part=part, meaning=meaning)
    EVENTS.add(name, event)
    return event


_ANALOG: dict[str, str] = {
    "set_pulses": "one SET pulse on one cell",
    "reset_pulses": "one RESET pulse on one cell",
    "verify_reads": "one read of one cell by a verification; n-fold averaging counts n",
    "verify_conversions": "one verify read digitised by an ADC",
    "verify_comparisons": "one verification decided by a comparator",
    "row_selects": "one word line selected for writing",
    "set_slots": "one pulse time in which SET pulses are applied to all cells that go together",
    "reset_slots": "one pulse time in which RESET pulses are applied to all that go together",
    "verify_slots": "one read time in which all cells that go together are read for verification",
    "programmed_cells": "one cell that was addressed by a write–verify call",
    "pulsed_cells": "one cell that got at least one pulse in a write–verify call",
    "failed_cells": "one cell left off its target because its pulse budget ran out, now or earlier",
    "array_cycles": "one input vector presented to a layer, whose tiles work in parallel",
    "tile_reads": "one input vector multiplied in one tile",
    "row_drives": "one row of one tile driven by its DAC, whatever the value",
    "active_row_drives": "one row of one tile driven by its DAC with a value other than zero",
    "row_drive_bits": (
        "one bit of the input of one row drive, whatever the value (8 per drive where a tile's "
        "configuration has no DAC resolution)"
    ),
    "active_row_drive_bits": "one bit of the input of one row drive with a value other than zero",
    "cell_reads": "one cell of one tile read by a matrix–vector product",
    "cell_read_x2g": (
        "the sum of x²·G over all cells read, x in steps of 1/21,082,635 of full scale (which the "
        "codes of a DAC of 2 to 9 bits are multiples of), G in whole pS"
    ),
    "adc_conversions": "one column of one tile digitised",
    "transposed_array_cycles": "one gradient vector sent backwards through a layer",
    "transposed_tile_reads": "one gradient vector multiplied in one tile, backwards",
    "transposed_cell_reads": "one cell of one tile read backwards",
    "transposed_cell_read_x2g": (
        "the sum of x²·G over all cells read backwards, in the units of cell_read_x2g; the largest "
        "drive of a vector in a tile is full scale"
    ),
    "transposed_row_drives": "one column of one tile driven backwards by a DAC",
    "transposed_row_drive_bits": "one bit of the input of one column driven backwards",
    "transposed_adc_conversions": "one row of one tile digitised, backwards",
}
_DIGITAL: dict[str, str] = {
    "shift_adds": "one partial sum of a tile added to the sum of its column",
    "transposed_shift_adds": "one partial sum of a tile added to the sum of its row, backwards",
    "additions": "one output value of an adapter added to the output of its layer",
    "activation_functions": "one value of an activation function",
    "forward_macs": "one multiply–accumulate in 16-bit floats of a digital layer, forwards",
    "forward_macs_int8": "one multiply–accumulate in integers of up to 8 bit, forwards",
    "forward_macs_int16": "one multiply–accumulate in integers of 9 to 16 bit, forwards",
    "input_gradient_macs": "one multiply–accumulate of the gradient towards a layer's input",
    "weight_gradient_macs": "one multiply–accumulate of the gradient of a digital weight",
    "optimizer_updates": "one scalar parameter updated by one optimiser step",
}
_MEMORY: dict[str, str] = {
    "sram_read_bits": "one bit read from the digital unit's SRAM",
    "sram_write_bits": "one bit written to the digital unit's SRAM",
    "offchip_read_bits": "one bit read from memory outside the chip",
    "offchip_write_bits": "one bit written to memory outside the chip",
    "adapter_loads": "one adapter of one layer loaded into SRAM",
}


def _part(name: str, side: Side) -> Part:
    if side is Side.MEMORY:
        return Part.TRANSFER
    if name == "optimizer_updates":
        return Part.OPTIMIZER
    if name.startswith("transposed_") or "gradient" in name:
        return Part.BACKWARD
    return Part.WRITE if name in _WRITE else Part.FORWARD


_WRITE = tuple(_ANALOG)[: tuple(_ANALOG).index("array_cycles")]
for _side, _events in (
    (Side.ANALOG, _ANALOG),
    (Side.DIGITAL, _DIGITAL),
    (Side.MEMORY, _MEMORY),
):
    for _name, _meaning in _events.items():
        define(_name, _side, _meaning, part=_part(_name, _side))
