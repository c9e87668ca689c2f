"""The 180 nm, 128 × 128, 1T1R resistive-memory macro of arXiv:2601.10037.

Geometry and conductance window are the authors' (their README and code). The body of the paper
gives no pulse settings or energies that we could read, so everything around the array is modelled:
each number below names its source and says whether it was cited, printed by a library, derived
from cited numbers, or assumed. Ranges span what the sources disagree about.
"""

from __future__ import annotations

from dataclasses import replace

from aihwkit.inference import StateIndependentNoiseModel
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice

from aihwkit_lora.chips.adc import adc_energy
from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.maker import Maker
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.chips.quantities import (
    BOOKKEEPING,
    LPDDR,
    OVERLAPPING,
    backwards,
    cell_energy_j,
    digital_prices,
    quantity,
    write_and_read_times,
    x2g_energy_j,
)
from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy
from aihwkit_lora.metering.pricing import PriceList, Status

_PAPER = "arXiv:2601.10037"
_CODE = _PAPER + ", code (github.com/MrLinNing/RMAdaptiveMachine)"
_NEURRAM = "NeuRRAM chip code (github.com/weierwan/Neurram_48core)"
_CIMLOOP = "CiMLoop, memory_cells/rram_wan_nature_2022.cell.yaml"
_CELL_FILES = "low: 0.6 pJ of nvsim_RRAM.cell (MΩ memory cells, 10 ns)"
_HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, known to us from transcriptions only, times 16 for CV² at 180 nm "
    "and 1.8 V"
)
_LIBRARY = "hwcomponents_library 1.0.58 at 180 nm"
_ISAAC = "ISAAC constants in hwcomponents_library 1.0.58, scaled to 180 nm"

READ_VOLTAGE = quantity(
    0.2, "V", f"verify voltage of {_NEURRAM}, taken for inference too", Status.ASSUMED
)
READ_TIME = quantity(100, "ns", "time that a row is driven in a product", Status.ASSUMED)
PULSE_WIDTH = quantity(
    1,
    "µs",
    f"program_array in {_NEURRAM}; low: program_increment there",
    Status.CITED,
    low=0.1,
)
SET_VOLTAGE = quantity(1.75, "V", _CIMLOOP, Status.CITED)
RESET_VOLTAGE = quantity(2.5, "V", f"start of the RESET ramp, {_NEURRAM}", Status.ASSUMED)
MEAN_CONDUCTANCE = quantity(50, "µS", f"zero of the mapping, {_CODE}", Status.CITED)
VERIFY_TIME = quantity(1, "µs", "as long as a pulse", Status.ASSUMED)
MVM_TIME = quantity(1, "µs", "8-bit input and conversion of a tile", Status.ASSUMED)

_SET = cell_energy_j(SET_VOLTAGE, MEAN_CONDUCTANCE, PULSE_WIDTH)
_RESET = cell_energy_j(RESET_VOLTAGE, MEAN_CONDUCTANCE, PULSE_WIDTH)
_VERIFY = cell_energy_j(READ_VOLTAGE, MEAN_CONDUCTANCE, VERIFY_TIME)
_LOWEST_PULSE = 0.6e-12

_adc = adc_energy(8, 180e-9)
_adc = replace(_adc, source=f"{_adc.source}; low: {_ISAAC}", low=9.13e-12)
_dac = quantity(2.28, "pJ", f"1-bit DAC, {_ISAAC}", Status.LIBRARY)
_shift_add = quantity(0.12, "pJ", _ISAAC, Status.LIBRARY)
_x2g = quantity(
    x2g_energy_j(READ_VOLTAGE, READ_TIME),
    "J",
    "V²·x²·G·t with 0.2 V and 100 ns (both assumed), summed over cells",
    Status.ASSUMED,
)

_ENERGY = {
    "set_pulses": quantity(
        _SET,
        "J",
        f"V²·G·t with 1.75 V, 50 µS, 1 µs; {_CELL_FILES}; high: as RESET",
        Status.DERIVED,
        low=_LOWEST_PULSE,
        high=_RESET,
    ),
    "reset_pulses": quantity(
        _RESET,
        "J",
        f"V²·G·t with 2.5 V (assumed), 50 µS, 1 µs; {_CELL_FILES}",
        Status.ASSUMED,
        low=_LOWEST_PULSE,
    ),
    "verify_reads": quantity(
        _VERIFY, "J", "V²·G·t with 50 µS, 0.2 V and 1 µs (both assumed)", Status.ASSUMED
    ),
    "verify_conversions": _adc,
    "active_row_drive_bits": _dac,
    "cell_read_x2g": _x2g,
    "adc_conversions": _adc,
    "transposed_row_drive_bits": backwards(_dac, "row_drive_bits"),
    "transposed_cell_read_x2g": backwards(_x2g, "cell_read_x2g"),
    "transposed_adc_conversions": backwards(_adc, "adc_conversions"),
    "shift_adds": _shift_add,
    "transposed_shift_adds": backwards(_shift_add, "shift_adds"),
} | digital_prices(
    mac_fp16=quantity(
        24.0,
        "pJ",
        f"FP16, {_HOROWITZ}; low: 16-bit integer MAC of {_LIBRARY}",
        Status.DERIVED,
        low=14.0,
    ),
    mac_int8=quantity(
        4.8,
        "pJ",
        f"8-bit product and sum, {_HOROWITZ}; low: 8-bit integer MAC of {_LIBRARY}",
        Status.DERIVED,
        low=3.95,
    ),
    mac_int16=quantity(14.0, "pJ", f"16-bit integer MAC, Aladdin's, of {_LIBRARY}", Status.LIBRARY),
    addition=quantity(
        0.436,
        "pJ",
        f"16-bit integer adder of {_LIBRARY}; high: FP16 sum, {_HOROWITZ}",
        Status.LIBRARY,
        high=6.4,
    ),
    sram_read=quantity(
        1.30,
        "pJ",
        f"8 kB, CACTI 7 at 90 nm times 4 for 180 nm; high: {_HOROWITZ}",
        Status.DERIVED,
        high=2.5,
    ),
    sram_write=quantity(1.72, "pJ", "8 kB, CACTI 7 at 90 nm times 4 for 180 nm", Status.DERIVED),
    offchip=LPDDR,
)

# Weights fill this part of the device's nominal range, so that few cells are asked for more than
# they can reach. The accepted ±1 µS of the 30 µS half window are then ±0.02 in cell states, for
# which the closed loop needs 8.8 pulses a cell with write noise off, for targets well inside each
# cell's own range; CiMLoop's file for NeuRRAM implies 8.52. With write noise, and weights that
# reach the window's ends, it is about twice that.
_STATE_FULL_SCALE = 0.6
_TOLERANCE_SIEMENS = 1e-6
_STATISTICS = PulseStatistics(mean_pulses=8.52, median_pulses=5.0, sigma_ln=1.06)
_LOOP = "closed loop simulated on the device parameters of Gong et al., IEDM 2022, at ±0.02"

_mapping = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)

_FACTS = {
    "rows and columns": quantity(128, "1", f"{_PAPER}, README of its code", Status.CITED),
    "lower end of the window": quantity(20, "µS", _CODE, Status.CITED),
    "upper end of the window": quantity(80, "µS", _CODE, Status.CITED),
    "mean conductance": MEAN_CONDUCTANCE,
    "cells per weight": quantity(
        1, "1", f"G = 50 µS + s·w, {_CODE}; the middle is taken out digitally", Status.CITED
    ),
    "simulated cell, dw_min": quantity(
        0.0949,
        "1",
        "aihwkit's ReRamArrayOM (Gong et al., IEDM 2022) stands in for the macro's cell",
        Status.ASSUMED,
    ),
    "accepted error of a cell": quantity(
        1, "µS", f"g_tol in {_NEURRAM}; nothing is published for this macro", Status.ASSUMED
    ),
    "cell state of the window's upper end": quantity(
        _STATE_FULL_SCALE,
        "1",
        "chosen so that nearly all cells can reach the window's ends",
        Status.ASSUMED,
    ),
    "pulses before a cell fails": quantity(
        200, "1", "where about 99 % of simulated cells have verified", Status.ASSUMED
    ),
    "pulses of a cell, mean": quantity(
        _STATISTICS.mean_pulses, "1", f"8520 ns in pulses of 1 µs, {_CIMLOOP}", Status.DERIVED
    ),
    "pulses of a cell, median": quantity(_STATISTICS.median_pulses, "1", _LOOP, Status.DERIVED),
    "pulses of a cell, σ of the logarithm": quantity(
        _STATISTICS.sigma_ln, "1", _LOOP, Status.DERIVED
    ),
    "error that programming leaves, σ": quantity(
        1, "µS", f"default of {_CODE}; high: end of its sweep", Status.CITED, high=10
    ),
    "read voltage": READ_VOLTAGE,
    "time a row is driven": READ_TIME,
    "SET voltage": SET_VOLTAGE,
    "RESET voltage": RESET_VOLTAGE,
    "pulse width": PULSE_WIDTH,
    "resolution of DAC and ADC": quantity(
        8, "1", "bits, as in NeuRRAM and HERMES; not published for this macro", Status.ASSUMED
    ),
    "column sum at which the ADC clips": quantity(8.0, "1", "no source", Status.ASSUMED),
    "energy of a row driven with zero": quantity(
        0,
        "J",
        f"count_rram_snn_operations in {_CODE} counts nonzero spikes only; a row that stays at "
        "rest is taken to cost nothing",
        Status.ASSUMED,
    ),
    "energy of selecting a word line": quantity(
        0, "J", "no source gives the C·V² of a word line", Status.ASSUMED
    ),
}

RM_180NM = Chip(
    name="rm-180nm",
    title="180 nm 1T1R resistive-memory macro, 128 × 128, arXiv:2601.10037; periphery modelled",
    rows=128,
    columns=128,
    mapping=_mapping,
    cell_states=(-_STATE_FULL_SCALE, _STATE_FULL_SCALE),
    write_policy=WritePolicy(
        device=ReRamArrayOMPresetDevice,
        tolerance=_STATE_FULL_SCALE * _TOLERANCE_SIEMENS / _mapping.half_width_siemens,
        max_pulses=200,
        statistics=_STATISTICS,
    ),
    dac_bits=8,
    adc_bits=8,
    adc_full_scale=8.0,
    prices=PriceList(
        energy=_ENERGY,
        latency=write_and_read_times(
            set_pulse=PULSE_WIDTH, reset_pulse=PULSE_WIDTH, verify=VERIFY_TIME, product=MVM_TIME
        ),
        energy_free=BOOKKEEPING | {"row_drive_bits"},
        latency_free=OVERLAPPING,
    ),
    endurance_pulses=quantity(
        1e6,
        "1",
        "4-level HfOx cells (Huang et al., abstract); high: best cells in reviews (PMC5105152)",
        Status.ASSUMED,
        high=1e12,
    ),
    programming_noise=Maker(StateIndependentNoiseModel, {"prog_coeff": [1.0, 0.0, 0.0]}, _mapping),
    facts=_FACTS,
)
chips.add(RM_180NM.name, RM_180NM)
