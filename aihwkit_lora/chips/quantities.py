"""Quantities in the units that papers print, and the prices that follow from them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import Quantity, Status

_PREFIXES = {
    "f": -15, "p": -12, "n": -9, "µ": -6, "μ": -6, "u": -6, "m": -3,
    "k": 3, "M": 6, "G": 9, "T": 12,
}  # fmt: skip
"""Powers of ten. Of the two signs for micro, one is Latin-1's and the other the Greek letter."""

_UNITS = frozenset({"J", "s", "S", "V", "A", "W", "Hz", "F", "C", "m"})


def to_si(value: float, unit: str) -> tuple[float, str]:
    """Take the prefix off a unit, without a rounding error.

    Args:
        value: In ``unit``.
        unit: An SI unit with or without prefix, with ``u`` for micro if you like. Anything else,
            such as ``"1"``, is left as it is.
    Returns:
        Value and unit without prefix.

    Example:
        >>> to_si(18.2, "pJ"), to_si(40, "uS"), to_si(8.52, "1")
        ((1.82e-11, 'J'), (4e-05, 'S'), (8.52, '1'))
    """
    if unit in _UNITS or unit[1:] not in _UNITS or unit[0] not in _PREFIXES:
        return float(value), unit
    return float(Decimal(repr(value)).scaleb(_PREFIXES[unit[0]])), unit[1:]


def quantity(
    value: float,
    unit: str,
    source: str,
    status: Status,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Quantity:
    """Make a quantity from numbers as they are printed.

    Args:
        value: In ``unit``.
        unit: With or without prefix; see :func:`to_si`.
        source: Paper, library with version, or the arithmetic that led to it.
        status: Whether it was cited, printed by a library, derived or assumed.
        low: Low end of the range, in ``unit``; ``value`` if None.
        high: High end, in ``unit``; ``value`` if None.
    Raises:
        ConfigurationError: No source is given, or the ends are not in order.

    Example:
        >>> pulse = quantity(153, "pJ", "V²·G·t", Status.DERIVED, low=0.6)
        >>> pulse.value, pulse.low, pulse.unit
        (1.53e-10, 6e-13, 'J')
    """
    number, plain_unit = to_si(value, unit)
    ends = [None if end is None else to_si(end, unit)[0] for end in (low, high)]
    return Quantity(
        value=number, unit=plain_unit, source=source, status=status, low=ends[0], high=ends[1]
    )


LPDDR = quantity(
    40.0,
    "pJ",
    "LPDDR, hwcomponents_cacti 1.0.40; low: LPDDR4, high: DDR3",
    Status.LIBRARY,
    low=8.0,
    high=70.0,
)
"""A bit moved from or to memory outside the chip."""


def cell_energy_j(voltage: Quantity, conductance: Quantity, time: Quantity) -> float:
    """Energy V²·G·t that a cell turns into heat, in joules.

    Args:
        voltage: Across the cell, in volts.
        conductance: Of the cell, in siemens.
        time: For which the voltage stands, in seconds.
    """
    return voltage.value**2 * conductance.value * time.value


def x2g_energy_j(voltage: Quantity, time: Quantity) -> float:
    """Energy of one count of ``cell_read_x2g``, in joules: V²·t, times 1 pS, by ``X2G_STEPS``².

    Args:
        voltage: Of a full-scale input, in volts.
        time: For which a row is driven, in seconds.
    """
    return voltage.value**2 * time.value * 1e-12 / X2G_STEPS**2


def backwards(forwards: Quantity, event: str) -> Quantity:
    """The price of an event of the transposed product, for which nothing is published.

    Args:
        forwards: Price of the same event of the forward product.
        event: Name of that event.
    """
    source = f"nothing published for products backwards; as forwards: {forwards.source}"
    return replace(forwards, source=source, status=Status.ASSUMED, follows=event)


def digital_prices(
    *,
    mac_fp16: Quantity,
    mac_int8: Quantity,
    mac_int16: Quantity,
    addition: Quantity,
    sram_read: Quantity,
    sram_write: Quantity,
    offchip: Quantity,
) -> dict[str, Quantity]:
    """Energy of the events of a digital unit and its memories, from the prices of its parts.

    Args:
        mac_fp16: A multiply–accumulate in 16-bit floats, in joules.
        mac_int8: One in 8-bit integers.
        mac_int16: One in 16-bit integers.
        addition: An addition of two 16-bit numbers.
        sram_read: A bit read from SRAM.
        sram_write: A bit written to SRAM.
        offchip: A bit moved from or to memory outside the chip.
    Returns:
        Energy prices by event.
    """
    return {
        "additions": addition,
        "forward_macs": mac_fp16,
        "forward_macs_int8": mac_int8,
        "forward_macs_int16": mac_int16,
        "input_gradient_macs": mac_fp16,
        "weight_gradient_macs": mac_fp16,
        "optimizer_updates": _update(mac_fp16, sram_read, sram_write),
        "sram_read_bits": sram_read,
        "sram_write_bits": sram_write,
        "offchip_read_bits": offchip,
        "offchip_write_bits": offchip,
    }


def _update(mac: Quantity, read: Quantity, write: Quantity) -> Quantity:
    # As SGD with momentum in 16-bit numbers.
    energy = Interval.sum([mac.interval * 2, read.interval * 24, write.interval * 24])
    assumed = Status.ASSUMED in (mac.status, read.status, write.status)
    return Quantity(
        value=energy.value,
        unit="J",
        source="two FP16 MAC and 48 bits of SRAM traffic, half of it reads",
        status=Status.ASSUMED if assumed else Status.DERIVED,
        low=energy.low,
        high=energy.high,
    )


BOOKKEEPING = frozenset(
    {
        "programmed_cells", "pulsed_cells", "failed_cells", "row_selects",
        "set_slots", "reset_slots", "verify_slots",
        "array_cycles", "tile_reads", "row_drives", "active_row_drives", "cell_reads",
        "transposed_array_cycles", "transposed_tile_reads", "transposed_row_drives",
        "transposed_cell_reads", "adapter_loads",
    }
)  # fmt: skip
"""Events without an energy of their own: other events of the same write or read have it."""

OVERLAPPING = frozenset(
    {
        # within the slots of write–verify
        "set_pulses", "reset_pulses", "verify_reads", "verify_conversions", "verify_comparisons",
        "row_selects", "programmed_cells", "pulsed_cells", "failed_cells",
        # within the array cycles of products
        "tile_reads", "row_drives", "active_row_drives", "row_drive_bits", "active_row_drive_bits",
        "cell_reads", "cell_read_x2g", "adc_conversions", "shift_adds",
        "transposed_tile_reads", "transposed_row_drives", "transposed_row_drive_bits",
        "transposed_cell_reads", "transposed_cell_read_x2g", "transposed_adc_conversions",
        "transposed_shift_adds",
        # it is the bits that take the time
        "adapter_loads",
    }
)  # fmt: skip
"""Events without a time of their own."""


def write_and_read_times(
    *, set_pulse: Quantity, reset_pulse: Quantity, verify: Quantity, product: Quantity
) -> dict[str, Quantity]:
    """Time of the events that pass one after another on the arrays.

    Args:
        set_pulse: Width of a SET pulse, in seconds.
        reset_pulse: Width of a RESET pulse.
        verify: Time of one read of a verification.
        product: Time of one matrix–vector product of a tile.
    Returns:
        Latency prices by event.
    """
    return {
        "set_slots": set_pulse,
        "reset_slots": reset_pulse,
        "verify_slots": verify,
        "array_cycles": product,
        "transposed_array_cycles": backwards(product, "array_cycles"),
    }
