"""The 180 nm, 128 × 128, 1T1R resistive-memory macro of arXiv:2601.10037.

Geometry and conductance window are the authors' (their README and code). The body of the paper
gives no pulse settings or energies that we could read, so everything around the array is modelled:
each number below names its source and says whether it was cited, printed by a library, derived
from cited numbers, or assumed. Ranges span what the sources disagree about.
"""

from __future__ import annotations

from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice

from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.metering.pricing import PriceList, Quantity, Status

_NEURRAM = "NeuRRAM chip code (github.com/weierwan/Neurram_48core)"
_CIMLOOP = "CiMLoop, memory_cells/rram_wan_nature_2022.cell.yaml"
_CELL_FILES = "low: 0.6 pJ of nvsim_RRAM.cell (MΩ memory cells, 10 ns)"
_HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, known to us from transcriptions only, times 16 for CV² at 180 nm "
    "and 1.8 V"
)
_HWC = "hwcomponents-adc 1.0.21 (arXiv:2404.06553) at 180 nm"
_ISAAC = "ISAAC constants in hwcomponents_library 1.0.58, scaled to 180 nm"

READ_VOLTAGE = Quantity(
    value=0.2,
    unit="V",
    source="verify voltage of " + _NEURRAM + ", taken for inference too",
    status=Status.ASSUMED,
)
READ_TIME = Quantity(
    value=100e-9, unit="s", source="time that a row is driven in a product", status=Status.ASSUMED
)
PULSE_WIDTH = Quantity(
    value=1e-6, unit="s", source="pulse_width of " + _NEURRAM, status=Status.CITED
)
SET_VOLTAGE = Quantity(value=1.75, unit="V", source=_CIMLOOP, status=Status.CITED)
RESET_VOLTAGE = Quantity(
    value=2.5, unit="V", source="start of the RESET ramp, " + _NEURRAM, status=Status.ASSUMED
)
MEAN_CONDUCTANCE = Quantity(
    value=50e-6, unit="S", source="zero of the mapping, arXiv:2601.10037, code", status=Status.CITED
)
VERIFY_TIME = Quantity(value=1e-6, unit="s", source="as long as a pulse", status=Status.ASSUMED)
MVM_TIME = Quantity(
    value=1e-6, unit="s", source="8-bit input and conversion of a tile", status=Status.ASSUMED
)


def _joules(
    picojoules: float,
    source: str,
    status: Status,
    low: float | None = None,
    high: float | None = None,
) -> Quantity:
    return Quantity(
        value=picojoules * 1e-12,
        unit="J",
        source=source,
        status=status,
        low=None if low is None else low * 1e-12,
        high=None if high is None else high * 1e-12,
    )


# V²·G·t of one pulse at the mean conductance, in pJ.
_SET = SET_VOLTAGE.value**2 * MEAN_CONDUCTANCE.value * PULSE_WIDTH.value * 1e12
_RESET = RESET_VOLTAGE.value**2 * MEAN_CONDUCTANCE.value * PULSE_WIDTH.value * 1e12
_VERIFY_CELL = READ_VOLTAGE.value**2 * MEAN_CONDUCTANCE.value * VERIFY_TIME.value * 1e12
_READ_CELL = READ_VOLTAGE.value**2 * MEAN_CONDUCTANCE.value * READ_TIME.value * 1e12
# One count of cell_read_x2g is 2⁻³² pS of x²·G; the rest is V²·t.
_X2G_UNIT = READ_VOLTAGE.value**2 * READ_TIME.value * 1e-12 / 2**32 * 1e12

_ADC = 44.1
_ADC_LOW = 9.13
_MAC_FP16 = 24.0
_SRAM_READ = 1.30
_SRAM_WRITE = 1.72

_dac = _joules(18.2, "8 one-bit steps, " + _ISAAC, Status.LIBRARY)
_adc = _joules(_ADC, f"8 bit, {_HWC}; low: {_ISAAC}", Status.LIBRARY, low=_ADC_LOW)
_mac = _joules(
    _MAC_FP16,
    f"FP16, {_HOROWITZ}; low: 16-bit integer MAC of hwcomponents_library 1.0.58 at 180 nm",
    Status.DERIVED,
    low=14.0,
)

_ENERGY = {
    "set_pulses": _joules(
        _SET,
        f"V²·G·t with 1.75 V, 50 µS, 1 µs; {_CELL_FILES}; high: as RESET",
        Status.DERIVED,
        low=0.6,
        high=_RESET,
    ),
    "reset_pulses": _joules(
        _RESET, f"V²·G·t with 2.5 V, 50 µS, 1 µs; {_CELL_FILES}", Status.DERIVED, low=0.6
    ),
    "verify_reads": _joules(
        _VERIFY_CELL + _ADC,
        f"V²·G·t with 0.2 V, 50 µS, 1 µs, and one conversion by {_HWC}; low: {_ISAAC}",
        Status.DERIVED,
        low=_VERIFY_CELL + _ADC_LOW,
    ),
    "row_drives": _dac,
    "cell_read_x2g": _joules(
        _X2G_UNIT, "V²·x²·G·t with 0.2 V and 100 ns, summed over cells", Status.DERIVED
    ),
    "adc_conversions": _adc,
    "transposed_row_drives": _dac,
    "transposed_cell_reads": _joules(
        _READ_CELL,
        "V²·G·t with 0.2 V, 50 µS, 100 ns, as if every gradient were full scale; low: none is",
        Status.DERIVED,
        low=0.0,
    ),
    "transposed_adc_conversions": _adc,
    "shift_adds": _joules(0.12, _ISAAC, Status.LIBRARY),
    "forward_macs": _mac,
    "input_gradient_macs": _mac,
    "weight_gradient_macs": _mac,
    "optimizer_updates": _joules(
        2.0 * _MAC_FP16 + 48.0 * 0.5 * (_SRAM_READ + _SRAM_WRITE),
        "two FP16 MAC and 48 bits of SRAM traffic, half of it reads",
        Status.DERIVED,
        low=2.0 * 14.0 + 48.0 * 0.5 * (_SRAM_READ + _SRAM_WRITE),
    ),
    "sram_read_bits": _joules(
        _SRAM_READ,
        "8 kB, CACTI 7 at 90 nm times 4 for 180 nm; high: " + _HOROWITZ,
        Status.DERIVED,
        high=2.5,
    ),
    "sram_write_bits": _joules(
        _SRAM_WRITE, "8 kB, CACTI 7 at 90 nm times 4 for 180 nm", Status.DERIVED
    ),
    "offchip_read_bits": _joules(
        40.0, "LPDDR, hwcomponents_cacti; low: LPDDR4, high: DDR3", Status.LIBRARY, 8.0, 70.0
    ),
    "offchip_write_bits": _joules(
        40.0, "LPDDR, hwcomponents_cacti; low: LPDDR4, high: DDR3", Status.LIBRARY, 8.0, 70.0
    ),
}
_LATENCY = {
    "set_pulses": PULSE_WIDTH,
    "reset_pulses": PULSE_WIDTH,
    "verify_reads": VERIFY_TIME,
    "array_cycles": MVM_TIME,
    "transposed_array_cycles": MVM_TIME,
}
# Bookkeeping, or part of another event of the same read or write.
_NO_ENERGY = frozenset(
    {
        "programmed_cells",
        "pulsed_cells",
        "failed_cells",
        "array_cycles",
        "tile_reads",
        "active_row_drives",
        "cell_reads",
        "transposed_array_cycles",
        "transposed_tile_reads",
    }
)
_NO_TIME = (_NO_ENERGY - _LATENCY.keys()) | {
    "row_drives",
    "cell_read_x2g",
    "adc_conversions",
    "shift_adds",
    "transposed_row_drives",
    "transposed_cell_reads",
    "transposed_adc_conversions",
}

# Weights fill this part of the device's nominal range, so that few cells are asked for more than
# they can reach. The accepted ±1 µS of the 30 µS half window are then ±0.02 in cell states, for
# which the closed loop needs 8.8 pulses a cell with write noise off, for targets well inside each
# cell's own range; CiMLoop's file for NeuRRAM implies 8.52. With write noise, and weights that
# reach the window's ends, it is about twice that.
_STATE_FULL_SCALE = 0.6
_TOLERANCE_SIEMENS = 1e-6

_mapping = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)

RM_180NM = Chip(
    name="rm-180nm",
    title="180 nm 1T1R resistive-memory macro, 128 × 128, arXiv:2601.10037; periphery modelled",
    rows=128,
    columns=128,
    mapping=_mapping,
    state_full_scale=_STATE_FULL_SCALE,
    write_policy=WritePolicy(
        device=ReRamArrayOMPresetDevice,
        tolerance=_STATE_FULL_SCALE * _TOLERANCE_SIEMENS / _mapping.half_width_siemens,
        max_pulses=200,
    ),
    dac_bits=8,
    adc_bits=8,
    adc_full_scale=8.0,
    prices=PriceList(
        energy=_ENERGY, latency=_LATENCY, energy_free=_NO_ENERGY, latency_free=_NO_TIME
    ),
    facts={
        "rows and columns": Quantity(
            value=128, unit="1", source="arXiv:2601.10037, README of its code", status=Status.CITED
        ),
        "lower end of the window": Quantity(
            value=20e-6, unit="S", source="arXiv:2601.10037, code", status=Status.CITED
        ),
        "upper end of the window": Quantity(
            value=80e-6, unit="S", source="arXiv:2601.10037, code", status=Status.CITED
        ),
        "accepted error of a cell": Quantity(
            value=_TOLERANCE_SIEMENS,
            unit="S",
            source="g_tol in " + _NEURRAM + "; nothing is published for this macro",
            status=Status.ASSUMED,
        ),
        "pulses before a cell fails": Quantity(
            value=200,
            unit="1",
            source="where about 99 % of simulated cells have verified",
            status=Status.ASSUMED,
        ),
        "cells per weight, and their device": Quantity(
            value=1,
            unit="1",
            source="a cell per weight; aihwkit's ReRamArrayOM (Gong et al., IEDM 2022) stands in",
            status=Status.ASSUMED,
        ),
        "cell state of a full-scale weight": Quantity(
            value=_STATE_FULL_SCALE,
            unit="1",
            source="chosen so that nearly all cells can reach the window's ends",
            status=Status.ASSUMED,
        ),
        "column sum at which the ADC clips": Quantity(
            value=8.0, unit="1", source="no source", status=Status.ASSUMED
        ),
        "read voltage": READ_VOLTAGE,
        "time a row is driven": READ_TIME,
        "pulse width": PULSE_WIDTH,
        "SET voltage": SET_VOLTAGE,
        "RESET voltage": RESET_VOLTAGE,
        "mean conductance": MEAN_CONDUCTANCE,
    },
)
chips.add(RM_180NM.name, RM_180NM)
