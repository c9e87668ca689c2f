"""A core of NeuRRAM: 130 nm, 256 × 256 1T1R cells, Wan et al., Nature 2022.

doi:10.1038/s41586-022-04992-8. A weight is a differential pair, whose cells lie on two word lines:
a core has 128 logical inputs and 256 outputs. What a product costs is measured; we read it in
CiMLoop's repository, which digitised the paper's figure 12. How cells are written stands in the
chip's own code. The digital unit beside it is modelled.
"""

from __future__ import annotations

from aihwkit.inference import ReRamWan2022NoiseModel
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice

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
)
from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy
from aihwkit_lora.metering.pricing import PriceList, Status

_CODE = "NeuRRAM chip code (github.com/weierwan/Neurram_48core)"
_CIMLOOP = "CiMLoop, memory_cells/rram_wan_nature_2022.cell.yaml"
_FIGURE = "fig. 12 of Wan et al., Nature 2022, digitised in CiMLoop, wan_nature_2022/_tests.py"
_SPREAD = (
    "low: 0.6 pJ of nvsim_RRAM.cell (MΩ memory cells, 10 ns); high: 2.5 V on 50 µS, as rm-180nm"
)
_HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, known to us from transcriptions only, times 5.1 for CV² at "
    "130 nm and 1.2 V"
)
_LIBRARY = "hwcomponents_library 1.0.58 at 130 nm"

_ROWS, _COLUMNS, _CORES, _INPUT_BITS = 128, 256, 48, 6
_OPERATIONS = 2 * _ROWS * _COLUMNS
"""Of one product of a core: a multiplication and an addition for each weight."""

READ_VOLTAGE = quantity(0.5, "V", f"inputs, {_FIGURE}", Status.CITED)
VERIFY_VOLTAGE = quantity(0.2, "V", f"1.1 V - 0.9 V, {_CODE}", Status.CITED)
PULSE_WIDTH = quantity(
    1,
    "µs",
    f"program_array in {_CODE}; low: program_increment there",
    Status.CITED,
    low=0.1,
)
VERIFY_TIME = quantity(1, "µs", "as long as a pulse", Status.ASSUMED)
SET_VOLTAGE = quantity(1.75, "V", f"{_CIMLOOP}; the ramp of {_CODE} begins at 1.2 V", Status.CITED)
RESET_VOLTAGE = quantity(
    2.5,
    "V",
    f"one of the starts of the RESET ramp (1.2, 1.5 or 2.5 V), {_CODE}, taken for its mean",
    Status.ASSUMED,
)
MEAN_CONDUCTANCE = quantity(20, "µS", "about the middle of the window", Status.ASSUMED)

# Energy per operation, with 6-bit inputs in two phases and 8-bit outputs.
WORD_LINES = quantity(37.2, "fJ", f"switching word lines, {_FIGURE}", Status.CITED)
NEURONS = quantity(52.5, "fJ", f"neurons and control, {_FIGURE}", Status.CITED)
INPUTS = quantity(19.2, "fJ", f"input pulses, {_FIGURE}", Status.CITED)
EFFICIENCY = quantity(8.26e12, "op/J", f"operations per joule, two phases, {_FIGURE}", Status.CITED)
THROUGHPUT = quantity(
    0.418e12,
    "op/s",
    f"operations of 48 cores, two phases; low: one phase, {_FIGURE}",
    Status.CITED,
    low=0.261e12,
)

# The same figure's efficiency implies 11 % more energy than its breakdown adds up to.
_MORE = 1.0 / (EFFICIENCY.value * (WORD_LINES.value + NEURONS.value + INPUTS.value))
_HIGH = "high: all that the efficiency of the same figure implies"
_ROW_BIT = (WORD_LINES.value + INPUTS.value) * _OPERATIONS / _ROWS / _INPUT_BITS
_CONVERSION = NEURONS.value * _OPERATIONS / _COLUMNS
_PRODUCT_TIME = _CORES * _OPERATIONS / THROUGHPUT.value

_row_bit = quantity(
    _ROW_BIT,
    "J",
    f"word lines and input pulses of 6 bits over 128 rows and 6 bits; {_HIGH}",
    Status.DERIVED,
    high=_ROW_BIT * _MORE,
)
_adc = quantity(
    _CONVERSION,
    "J",
    f"neurons and control over 256 outputs of 8 bits; {_HIGH}",
    Status.DERIVED,
    high=_CONVERSION * _MORE,
)


_shift_add = quantity(0.10, "pJ", f"NeuRRAM's, in {_LIBRARY}", Status.LIBRARY)
_LOWEST_PULSE, _HIGHEST_PULSE = 0.6e-12, 2.5**2 * 50e-6 * 1e-6

_ENERGY = {
    "set_pulses": quantity(
        cell_energy_j(SET_VOLTAGE, MEAN_CONDUCTANCE, PULSE_WIDTH),
        "J",
        f"V²·G·t with 1.75 V, 20 µS (assumed), 1 µs; {_SPREAD}",
        Status.ASSUMED,
        low=_LOWEST_PULSE,
        high=_HIGHEST_PULSE,
    ),
    "reset_pulses": quantity(
        cell_energy_j(RESET_VOLTAGE, MEAN_CONDUCTANCE, PULSE_WIDTH),
        "J",
        f"V²·G·t with 2.5 V and 20 µS (both assumed), 1 µs; {_SPREAD}",
        Status.ASSUMED,
        low=_LOWEST_PULSE,
        high=_HIGHEST_PULSE,
    ),
    "verify_reads": quantity(
        cell_energy_j(VERIFY_VOLTAGE, MEAN_CONDUCTANCE, VERIFY_TIME),
        "J",
        "V²·G·t with 0.2 V, 20 µS and 1 µs (both assumed)",
        Status.ASSUMED,
    ),
    "verify_conversions": _adc,
    "row_drive_bits": _row_bit,
    "adc_conversions": _adc,
    "transposed_row_drive_bits": backwards(_row_bit, "row_drive_bits"),
    "transposed_adc_conversions": backwards(_adc, "adc_conversions"),
    "shift_adds": _shift_add,
    "transposed_shift_adds": backwards(_shift_add, "shift_adds"),
} | digital_prices(
    mac_fp16=quantity(
        11.9,
        "pJ",
        f"16-bit integer MAC of {_LIBRARY}, taken for FP16; low: FP16, {_HOROWITZ}",
        Status.LIBRARY,
        low=7.7,
    ),
    mac_int8=quantity(
        3.35,
        "pJ",
        f"8-bit integer MAC of {_LIBRARY}; low: {_HOROWITZ}",
        Status.LIBRARY,
        low=1.5,
    ),
    mac_int16=quantity(11.9, "pJ", f"16-bit integer MAC of {_LIBRARY}", Status.LIBRARY),
    addition=quantity(
        0.371,
        "pJ",
        f"16-bit integer adder of {_LIBRARY}; high: FP16 sum, {_HOROWITZ}",
        Status.LIBRARY,
        high=2.04,
    ),
    sram_read=quantity(
        0.68,
        "pJ",
        f"8 kB, CACTI 7 at 90 nm times 2.09 for 130 nm; high: {_HOROWITZ}",
        Status.DERIVED,
        high=0.796,
    ),
    sram_write=quantity(0.90, "pJ", "8 kB, CACTI 7 at 90 nm times 2.09 for 130 nm", Status.DERIVED),
    offchip=LPDDR,
)

# Between these states of the device that stands in, the loop writes normally distributed weights
# with ten pulses a cell and 0.1 % failures, uniformly distributed ones with thirteen and 0.6 %.
# The chip's logs show 0.2 to 1.4 % of failures.
_STATES = (-0.2, 0.8)
_STATISTICS = PulseStatistics(mean_pulses=8.52, median_pulses=5.0, sigma_ln=1.06)
_LOOP = "closed loop simulated on the device parameters of Gong et al., IEDM 2022, at ±0.02"

_mapping = ConductanceMapping(g_min_siemens=1e-6, g_max_siemens=40e-6, pairs=1)
_TOLERANCE_SIEMENS = 1e-6

_FACTS = {
    "rows of cells": quantity(256, "1", "Wan et al., Nature 2022", Status.CITED),
    "logical rows": quantity(
        _ROWS, "1", "a weight's two cells lie on two word lines", Status.CITED
    ),
    "columns": quantity(_COLUMNS, "1", "Wan et al., Nature 2022", Status.CITED),
    "cores": quantity(_CORES, "1", "Wan et al., Nature 2022", Status.CITED),
    "lower end of the window": quantity(1, "µS", f"g_min in {_CODE}", Status.CITED),
    "upper end of the window": quantity(40, "µS", f"g_max in {_CODE}", Status.CITED),
    "mean conductance": MEAN_CONDUCTANCE,
    "cells per weight": quantity(
        2, "1", "differential pair, Wan et al., Nature 2022", Status.CITED
    ),
    "simulated cell, dw_min": quantity(
        0.0949,
        "1",
        "aihwkit's ReRamArrayOM (Gong et al., IEDM 2022) stands in for NeuRRAM's cell",
        Status.ASSUMED,
    ),
    "cell state of the window's upper end": quantity(
        _STATES[1], "1", "the window lies where the device's cells can be written", Status.ASSUMED
    ),
    "accepted error of a cell": quantity(1, "µS", f"g_tol in {_CODE}", Status.CITED),
    "reads of a verification": quantity(
        1,
        "1",
        f"one is taken; {_CODE} averages 5 of 8",
        Status.ASSUMED,
        high=8,
    ),
    "pulses before a cell fails": quantity(
        200, "1", "where more than 99 % of simulated cells have verified", Status.ASSUMED
    ),
    "pulses of a cell, mean": quantity(
        _STATISTICS.mean_pulses, "1", f"8520 ns in pulses of 1 µs, {_CIMLOOP}", Status.DERIVED
    ),
    "pulses of a cell, median": quantity(_STATISTICS.median_pulses, "1", _LOOP, Status.DERIVED),
    "pulses of a cell, σ of the logarithm": quantity(
        _STATISTICS.sigma_ln, "1", _LOOP, Status.DERIVED
    ),
    "read voltage": READ_VOLTAGE,
    "verify voltage": VERIFY_VOLTAGE,
    "SET voltage": SET_VOLTAGE,
    "RESET voltage": RESET_VOLTAGE,
    "pulse width": PULSE_WIDTH,
    "energy of an operation: word lines": WORD_LINES,
    "energy of an operation: neurons": NEURONS,
    "energy of an operation: inputs": INPUTS,
    "operations per joule": EFFICIENCY,
    "operations per second": THROUGHPUT,
    "bits of an input": quantity(_INPUT_BITS, "1", f"the point of {_FIGURE}", Status.CITED),
    "bits of an output": quantity(8, "1", f"the point of {_FIGURE}", Status.CITED),
    "column sum at which the ADC clips": quantity(
        12.0, "1", "default of aihwkit 1.2.0 (out_bound)", Status.LIBRARY
    ),
    "energy of reading a cell": quantity(
        0, "J", "part of the input pulses, which the row drives pay for", Status.DERIVED
    ),
    "energy that a row driven with zero saves": quantity(
        0, "J", "the figure is for whole arrays and does not tell zeros apart", Status.ASSUMED
    ),
    "energy of selecting a word line": quantity(
        0, "J", "no source gives the C·V² of a word line at writing voltages", Status.ASSUMED
    ),
}

NEURRAM_130NM = Chip(
    name="neurram-130nm",
    title="130 nm NeuRRAM core, 256 × 256 cells in pairs, Wan et al., Nature 2022",
    rows=_ROWS,
    columns=_COLUMNS,
    mapping=_mapping,
    cell_states=_STATES,
    write_policy=WritePolicy(
        device=ReRamArrayOMPresetDevice,
        tolerance=(_STATES[1] - _STATES[0]) / 2 * _TOLERANCE_SIEMENS / _mapping.half_width_siemens,
        max_pulses=200,
        statistics=_STATISTICS,
    ),
    dac_bits=_INPUT_BITS,
    adc_bits=8,
    adc_full_scale=12.0,
    prices=PriceList(
        energy=_ENERGY,
        latency=write_and_read_times(
            set_pulse=PULSE_WIDTH,
            reset_pulse=PULSE_WIDTH,
            verify=VERIFY_TIME,
            product=quantity(
                _PRODUCT_TIME,
                "s",
                "operations of 48 cores over their throughput, two phases; high: one phase",
                Status.DERIVED,
                high=_CORES * _OPERATIONS / THROUGHPUT.interval.low,
            ),
        ),
        energy_free=BOOKKEEPING
        | {"active_row_drive_bits", "cell_read_x2g", "transposed_cell_read_x2g"},
        latency_free=OVERLAPPING,
    ),
    endurance_pulses=quantity(
        1e6,
        "1",
        "4-level HfOx cells (Huang et al., abstract); high: best cells in reviews (PMC5105152)",
        Status.ASSUMED,
        high=1e12,
    ),
    noise_model=Maker(ReRamWan2022NoiseModel, {}, _mapping),
    facts=_FACTS,
)
chips.add(NEURRAM_130NM.name, NEURRAM_130NM)
