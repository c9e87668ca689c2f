"""A core of IBM's HERMES project chip: 14 nm, 256 × 256 unit cells of four phase-change devices.

Le Gallo et al., Nature Electronics 2023, doi:10.1038/s41928-023-01010-1. What a product costs is
measured, for the core as a whole: input converters, cells, output converters and the sums behind
them are one number, which the output conversions pay for here. Nothing that we could read gives
pulse counts or pulse energies of this chip: writing is assumed or taken from another cell.
"""

from __future__ import annotations

from aihwkit.inference import GlobalDriftCompensation, HermesNoiseModel
from aihwkit.simulator.presets.devices import PCMPresetDevice

from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.maker import Maker
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.chips.quantities import (
    BOOKKEEPING,
    OVERLAPPING,
    backwards,
    digital_prices,
    quantity,
    write_and_read_times,
)
from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy
from aihwkit_lora.metering.pricing import PriceList, Status

_PAPER = "Le Gallo et al., Nat. Electron. 2023 (arXiv:2212.02872)"
_CELL_FILE = "nvmexplorer_PCM.cell in hwcomponents_neurosim (an ISCA 2009 cell, not this one)"
_AIHWKIT = "HermesNoiseModel of aihwkit 1.2.0"
_LIBRARY = "hwcomponents_library 1.0.58 at 14 nm"
_HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, known to us from transcriptions only, times 0.25 for CV² at "
    "14 nm and 0.8 V"
)

_SIZE, _CORES = 256, 64
_OPERATIONS = 2 * _SIZE * _SIZE
"""Of one product of a core: a multiplication and an addition for each weight."""

EFFICIENCY = quantity(
    9.76e12,
    "op/J",
    f"operations per joule, one phase; low: four, {_PAPER}, abstract",
    Status.CITED,
    low=2.48e12,
)
THROUGHPUT = quantity(
    63.1e12,
    "op/s",
    f"operations of 64 cores, one phase; low: four, {_PAPER}, abstract",
    Status.CITED,
    low=16.1e12,
)
SET_CURRENT = quantity(150, "µA", _CELL_FILE, Status.LIBRARY)
SET_WIDTH = quantity(150, "ns", _CELL_FILE, Status.LIBRARY)
SET_VOLTAGE = quantity(1.0, "V", "drop at the cell while it is set", Status.ASSUMED)
RESET_CURRENT = quantity(300, "µA", _CELL_FILE, Status.LIBRARY)
RESET_WIDTH = quantity(40, "ns", _CELL_FILE, Status.LIBRARY)
RESET_VOLTAGE = quantity(1.6, "V", "drop at the cell while it is molten", Status.ASSUMED)
VERIFY_TIME = quantity(512, "ns", f"t_read of {_AIHWKIT}", Status.LIBRARY)

_CONVERSION = _OPERATIONS / EFFICIENCY.value / _SIZE
_adc = quantity(
    _CONVERSION,
    "J",
    "all of a core's product over 256 outputs, one phase; high: four phases",
    Status.DERIVED,
    high=_OPERATIONS / EFFICIENCY.interval.low / _SIZE,
)
_product = quantity(
    _CORES * _OPERATIONS / THROUGHPUT.value,
    "s",
    "operations of 64 cores over their throughput, one phase; high: four phases",
    Status.DERIVED,
    high=_CORES * _OPERATIONS / THROUGHPUT.interval.low,
)

_ENERGY = {
    "set_pulses": quantity(
        SET_CURRENT.value * SET_VOLTAGE.value * SET_WIDTH.value,
        "J",
        f"I·V·t with 150 µA, 1.0 V (assumed), 150 ns; {_CELL_FILE}",
        Status.ASSUMED,
    ),
    "reset_pulses": quantity(
        RESET_CURRENT.value * RESET_VOLTAGE.value * RESET_WIDTH.value,
        "J",
        f"I·V·t with 300 µA, 1.6 V (assumed), 40 ns; {_CELL_FILE}",
        Status.ASSUMED,
    ),
    "verify_conversions": quantity(
        5.0,
        "pJ",
        f"reading a cell and converting; low: a read of {_CELL_FILE}; high: a conversion of a "
        "product",
        Status.ASSUMED,
        low=2.0,
        high=_CONVERSION * 1e12,
    ),
    "adc_conversions": _adc,
    "transposed_adc_conversions": backwards(_adc, "adc_conversions"),
} | digital_prices(
    mac_fp16=quantity(
        0.54,
        "pJ",
        f"16-bit integer MAC of {_LIBRARY}, taken for FP16; low: FP16, {_HOROWITZ}",
        Status.LIBRARY,
        low=0.37,
    ),
    mac_int8=quantity(
        0.152,
        "pJ",
        f"8-bit integer MAC of {_LIBRARY}; low: {_HOROWITZ}",
        Status.LIBRARY,
        low=0.074,
    ),
    mac_int16=quantity(0.54, "pJ", f"16-bit integer MAC of {_LIBRARY}", Status.LIBRARY),
    addition=quantity(
        0.0168,
        "pJ",
        f"16-bit integer adder of {_LIBRARY}; high: FP16 sum, {_HOROWITZ}",
        Status.LIBRARY,
        high=0.10,
    ),
    sram_read=quantity(
        0.020,
        "pJ",
        f"8 kB, CACTI 7 at 22 nm times √(14/22); high: {_HOROWITZ}",
        Status.DERIVED,
        high=0.039,
    ),
    sram_write=quantity(0.022, "pJ", "8 kB, CACTI 7 at 22 nm times √(14/22)", Status.DERIVED),
    offchip=quantity(
        8.0,
        "pJ",
        "LPDDR4, hwcomponents_cacti 1.0.40; low: HBM2, high: LPDDR",
        Status.LIBRARY,
        low=6.25,
        high=40.0,
    ),
)

# 20 pulses a cell, and a log-normal distribution of that mean with the width that IBM's ReRAM has.
_STATISTICS = PulseStatistics(mean_pulses=20.0, median_pulses=11.4, sigma_ln=1.06)
_UNCONFIRMED = "no source; UNCONFIRMED"

# Each polarity has two devices in parallel, so a device has half of the 20.7 µS that aihwkit gives
# for both. The second is used once the first is full, as in max-fill (Vasilopoulos et al., TED
# 2023), and each is programmed by itself: aihwkit's model with num_devices=1.
_mapping = ConductanceMapping(g_min_siemens=0.0, g_max_siemens=10.35e-6, pairs=2)
_TOLERANCE_SIEMENS = 0.5e-6

_FACTS = {
    "rows and columns": quantity(_SIZE, "1", _PAPER, Status.CITED),
    "cores": quantity(_CORES, "1", _PAPER, Status.CITED),
    "lower end of the window": quantity(0, "S", _AIHWKIT, Status.LIBRARY),
    "upper end of the window": quantity(
        10.35, "µS", f"a single device, {_AIHWKIT}", Status.LIBRARY
    ),
    "upper end, two devices in parallel": quantity(20.7, "µS", _AIHWKIT, Status.LIBRARY),
    "mean conductance, two in parallel": quantity(
        10, "µS", "about half of the window; no price depends on it", Status.ASSUMED
    ),
    "cells per weight": quantity(
        4, "1", f"two pairs, {_PAPER}; Nat. Commun. s41467-025-63794-4, abstract", Status.CITED
    ),
    "simulated cell, dw_min": quantity(
        0.01,
        "1",
        "aihwkit's PCMPresetDevice (Nandakumar et al., Front. Neurosci. 2020) stands in",
        Status.ASSUMED,
    ),
    "cell state of the window's upper end": quantity(
        1,
        "1",
        "half of the preset's w_max, so that cells are not asked for their last step",
        Status.ASSUMED,
    ),
    "accepted error of a cell": quantity(
        0.5, "µS", f"half of the programming error of {_AIHWKIT}, about", Status.ASSUMED
    ),
    "pulses before a cell fails": quantity(
        200, "1", "where more than 99 % of simulated cells have verified", Status.ASSUMED
    ),
    "pulses of a cell, mean": quantity(_STATISTICS.mean_pulses, "1", _UNCONFIRMED, Status.ASSUMED),
    "pulses of a cell, median": quantity(
        _STATISTICS.median_pulses, "1", f"log-normal with that mean; {_UNCONFIRMED}", Status.ASSUMED
    ),
    "pulses of a cell, σ of the logarithm": quantity(
        _STATISTICS.sigma_ln, "1", f"as IBM's OM ReRAM; {_UNCONFIRMED}", Status.ASSUMED
    ),
    "SET current": SET_CURRENT,
    "SET pulse width": SET_WIDTH,
    "SET voltage": SET_VOLTAGE,
    "RESET current": RESET_CURRENT,
    "RESET pulse width": RESET_WIDTH,
    "RESET voltage": RESET_VOLTAGE,
    "operations per joule": EFFICIENCY,
    "operations per second": THROUGHPUT,
    "bits of an input and of an output": quantity(8, "1", f"{_PAPER}, abstract", Status.CITED),
    "column sum at which the ADC clips": quantity(
        12.0, "1", "default of aihwkit 1.2.0 (out_bound)", Status.LIBRARY
    ),
    "energy of a row drive, of reading a cell, of a shift-add": quantity(
        0,
        "J",
        "the published figure is for the core as a whole; conversions carry all of it",
        Status.DERIVED,
    ),
    "energy of the read of a verification": quantity(
        0, "J", "part of the 5 pJ of its conversion", Status.ASSUMED
    ),
    "energy of selecting a word line": quantity(
        0, "J", "no source gives the C·V² of a word line", Status.ASSUMED
    ),
}

HERMES_14NM = Chip(
    name="hermes-14nm",
    title="14 nm HERMES core, 256 × 256 unit cells of four PCM devices, Le Gallo et al., 2023",
    rows=_SIZE,
    columns=_SIZE,
    mapping=_mapping,
    cell_states=(0.0, 1.0),
    write_policy=WritePolicy(
        device=PCMPresetDevice,
        tolerance=0.5 * _TOLERANCE_SIEMENS / _mapping.half_width_siemens,
        max_pulses=200,
        abrupt_reset=True,
        statistics=_STATISTICS,
    ),
    dac_bits=8,
    adc_bits=8,
    adc_full_scale=12.0,
    prices=PriceList(
        energy=_ENERGY,
        latency=write_and_read_times(
            set_pulse=SET_WIDTH, reset_pulse=RESET_WIDTH, verify=VERIFY_TIME, product=_product
        ),
        energy_free=BOOKKEEPING
        | {
            "verify_reads",
            "row_drive_bits",
            "active_row_drive_bits",
            "cell_read_x2g",
            "shift_adds",
            "transposed_shift_adds",
            "transposed_row_drive_bits",
            "transposed_cell_read_x2g",
        },
        latency_free=OVERLAPPING,
    ),
    endurance_pulses=quantity(1e8, "1", "no source", Status.ASSUMED),
    noise_model=Maker(HermesNoiseModel, {"num_devices": 1}, _mapping),
    drift_compensation=GlobalDriftCompensation,
    facts=_FACTS,
)
chips.add(HERMES_14NM.name, HERMES_14NM)
