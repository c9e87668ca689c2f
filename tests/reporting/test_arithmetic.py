"""The arithmetic of the two published workloads, line by line, against a hand calculation.

The hand calculation is a table of named ratios for the face and the speaker workload of
arXiv:2601.10037 on three chips, made with the prices of these chips rounded to three digits. Each
line is reached from the counts and prices of the package: within half a unit of its last digit and
0.1 % for the rounding of the prices.

Where the table took a shortcut that the package does not take, the line says which. The shortcut is
then made by hand here, to show that nothing else differs, and the distance of what the package says
from the printed figure stands beside it. Two small ones, up to 1 % together, are behind all figures
with adapters: half a read and half a write for each activation, and no additions of the adapters'
outputs to those of the arrays. Two figures cannot be reached; they are at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

import aihwkit_lora as al
from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Counts, Level, Quantity, price
from aihwkit_lora.metering.workload import (
    DigitalExecution,
    Reuse,
    Workload,
    analog_forward,
    digital_forward,
    loading,
    programming,
)
from aihwkit_lora.reporting import (
    FACES,
    SPEAKERS,
    Case,
    PublishedWorkload,
    baselines,
    case_ratio,
    deployment_energy_ratio,
    deployment_time_ratio,
    inference_energy_ratio,
    published_ratios,
    rtx_4090,
    training_energy_ratio,
    update_count_ratio,
    update_energy_ratio,
)

RM, NEURRAM, HERMES = map(al.chips.get, ("rm-180nm", "neurram-130nm", "hermes-14nm"))
GPU = rtx_4090(utilisation=1.0)
ONCE, EACH = Reuse.STATIONARY, Reuse.REFETCHED

HALVES = "half a read and half a write for each activation"
HEAD = "the table leaves the head off the arrays, as the authors' counter does"
FETCHES = (
    "the table skips zeros in the MACs of the adapters, but fetches their weights all the same"
)
READ_ONCE = "the table fetches a tenth of the weights per sample; in ten steps most are needed"
FIRST_READ = "the table verifies after each pulse only, not before the first"
ROWS = (
    "the table gives an array 256 inputs, though pairs on two word lines leave 128, and drives "
    "active rows only, though the published figure does not tell them apart"
)


@dataclass(frozen=True)
class Line:
    """A printed figure, how to reach it, and, if the package says something else, how far off."""

    what: str
    printed: str
    found: Callable[[], float]
    shortcut: str = ""
    ours: Callable[[], float] | None = None
    off_percent: float = 0.0


def tolerance(printed: str) -> float:
    mantissa, _, exponent = printed.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - decimals) + 0.001 * float(printed)


def agrees(value: float, printed: str) -> bool:
    return abs(value - float(printed)) <= tolerance(printed)


def nano(counts: Counts, chip: Chip) -> float:
    report = price(counts, chip)
    assert report.unpriced_energy == ()
    return 1e9 * report.energy_j.value


def published_as(layers: Workload) -> PublishedWorkload:
    return FACES if layers is FACES.layers else SPEAKERS


def headless(layers: Workload) -> Workload:
    return layers.where(lambda name, _: name != "head")


def way(reuse: Reuse, *, sparse: bool = False) -> DigitalExecution:
    return DigitalExecution(reuse=reuse, skips_zeros=sparse)


def arrays(layers: Workload, chip: Chip, *events: str) -> float:
    counts = analog_forward(layers, chip)
    return nano(counts.only(events) if events else counts, chip)


def halved(layers: Workload, execution: DigitalExecution) -> Counts:
    """A digital forward pass with the table's half a read and half a write per value."""
    counts = digital_forward(layers, execution)
    once = execution.reuse is ONCE
    fetched = 8 * (layers.weights if once else counts["forward_macs_int8"])
    moved = counts["sram_read_bits"] + counts["sram_write_bits"] - fetched
    macs = counts.only(["forward_macs_int8"])
    return macs + Counts({"sram_read_bits": fetched + moved // 2, "sram_write_bits": moved // 2})


def adapters(layers: Workload, count: Callable[..., Counts] = halved) -> float:
    return nano(count(layers.adapters(), way(ONCE, sparse=True)), RM)


def all_digital(layers: Workload, reuse: Reuse) -> float:
    return nano(digital_forward(layers, way(reuse)), RM) / 1e3


def inference(above: Case, below: Case) -> float:
    return inference_energy_ratio(above, below).value


def hybrid(
    layers: Workload, chip: Chip, reuse: Reuse, *, head: bool = True, fetch_zeros: bool = False
) -> Case:
    """The hybrid chip as the table has it: halves, no additions, and the given shortcuts."""
    arrays = layers if head else headless(layers)
    execution, branches = way(reuse, sparse=True), layers.adapters()
    counts = analog_forward(arrays, chip) + halved(branches, execution)
    if fetch_zeros and reuse is EACH:
        done = digital_forward(branches, execution)["forward_macs_int8"]
        counts += Counts({"sram_read_bits": 8 * (branches.macs - done)})
    return Case(name="hybrid", counts=counts, chip=chip)


def dense(
    layers: Workload, chip: Chip, reuse: Reuse, *, sparse: bool = False, **shortcuts: bool
) -> float:
    above = baselines.infer_digital(layers, chip, way(reuse, sparse=sparse))
    return inference(above, hybrid(layers, chip, reuse, **shortcuts))


def ours(layers: Workload, chip: Chip, reuse: Reuse, *, sparse: bool = False) -> float:
    """What ``published_ratios`` says of the same."""
    above = baselines.infer_digital(layers, chip, way(reuse, sparse=sparse))
    found = published_ratios(published_as(layers), chip, GPU)
    names = {ratio.name: ratio.value for ratio in found}
    return names[f"inference energy, {above.name} ÷ hybrid"]


def read_tenth(layers: Workload, chip: Chip) -> float:
    """Zeros skipped and, per sample, a weight fetched as often as its input is not zero."""
    counts = digital_forward(layers, way(ONCE, sparse=True))
    read = sum(round(layer.weights * Fraction(layer.density)) for layer in layers.layers.values())
    unread = Counts({"sram_read_bits": 8 * (layers.weights - read)})
    tenth = Case(name="tenth", counts=counts.minus(unread), chip=chip)
    return inference(tenth, hybrid(layers, chip, ONCE))


def alone(layers: Workload, reuse: Reuse, *, head: bool = True) -> float:
    below = baselines.infer_analog_only(layers if head else headless(layers), RM)
    return inference(baselines.infer_digital(layers, RM, way(reuse)), below)


def graphics(layers: Workload, chip: Chip, **shortcuts: bool) -> float:
    return inference(baselines.infer_gpu(layers, GPU), hybrid(layers, chip, ONCE, **shortcuts))


def written(case: Case, *, first: bool) -> Case:
    """Writing as it is counted, or without the first read of each cell."""
    if first:
        return case
    events = ("verify_reads", "verify_conversions", "verify_slots")
    reads = dict.fromkeys(events, case.counts["programmed_cells"])
    return replace(case, counts=case.counts.minus(Counts(reads, level=Level.MEAN)))


def deployment(
    layers: Workload, chip: Chip, *, bits: int = 8, offchip: bool = False, first: bool = False
) -> float:
    above = baselines.deploy_on_arrays(layers, chip, offchip_bits=bits * offchip)
    below = baselines.deploy_adapters(layers, chip, bits=bits, offchip=offchip)
    return deployment_energy_ratio(written(above, first=first), below).value


def write_time(layers: Workload, *, first: bool = False) -> float:
    case = written(baselines.deploy_on_arrays(layers, RM), first=first)
    return price(case.counts, RM).latency_s.value


def deployment_time(layers: Workload, *, first: bool = False) -> float:
    above = written(baselines.deploy_on_arrays(layers, RM), first=first)
    below = baselines.deploy_adapters(layers, RM)
    return deployment_time_ratio(above, below, port_bits=64, cycle_s=1e-8).value


def load_time(layers: Workload) -> float:
    return write_time(layers) / deployment_time(layers)


def trained(layers: Workload, chip: Chip) -> tuple[Case, Case]:
    found = published_as(layers)
    every_step = baselines.train_on_arrays(layers, chip, found.full, written="every step")
    return every_step, baselines.train_hybrid(layers, chip, found.hybrid)


def training(layers: Workload, chip: Chip, kind: str) -> float:
    schedule, (above, below) = published_as(layers).full, trained(layers, chip)
    if kind == "once":
        above = baselines.train_on_arrays(layers, chip, schedule, written="once")
    if kind == "digital":
        above = baselines.train_digital(layers, chip, schedule)
    return training_energy_ratio(above, below).value


def update_count(layers: Workload) -> float:
    return update_count_ratio(*trained(layers, RM)).value


def updates(layers: Workload, chip: Chip, *, first: bool = False) -> float:
    above, below = trained(layers, chip)
    return update_energy_ratio(written(above, first=first), below).value


def writes(layers: Workload, *, first: bool = False) -> float:
    """Write–verify alone, against 16-bit adapters stored after every step."""
    found = published_as(layers)
    above = Case(name="cells", counts=programming(layers, RM).scaled(found.full.steps), chip=RM)
    stored = loading(layers, bits=16).scaled(found.hybrid.steps)
    below = Case(name="SRAM", counts=stored, chip=RM)
    return case_ratio("writes", written(above, first=first), below, includes="writes").value


def repriced(chip: Chip, **factors: float) -> Chip:
    """The chip with some energy prices multiplied."""
    energy = dict(chip.prices.energy)
    for event, factor in factors.items():
        ends = (energy[event].interval * factor).to_dict()
        energy[event] = replace(energy[event], **ends)  # type: ignore[arg-type]
    return replace(chip, prices=replace(chip.prices, energy=energy))


def with_adc(picojoules: float) -> Chip:
    old = RM.prices.energy["adc_conversions"].value
    return repriced(RM, adc_conversions=picojoules * 1e-12 / old)


def with_large_sram(chip: Chip) -> Chip:
    # 64 kB at 180 nm, CACTI 7 at 90 nm times 4: 6.48 pJ to read a bit, 4.70 pJ to write one.
    energy = chip.prices.energy
    return repriced(
        chip,
        sram_read_bits=6.48e-12 / energy["sram_read_bits"].value,
        sram_write_bits=4.70e-12 / energy["sram_write_bits"].value,
    )


def short_pulses(chip: Chip) -> Chip:
    # 100 ns for pulses and for the cell's part of a verification.
    return repriced(chip, set_pulses=0.1, reset_pulses=0.1, verify_reads=0.1)


def as_drawn(chip: Chip) -> Chip:
    """NeuRRAM as the table has it: 256 inputs, and only active rows cost."""
    energy: dict[str, Quantity] = dict(chip.prices.energy)
    energy["active_row_drive_bits"] = energy.pop("row_drive_bits")
    free = chip.prices.energy_free - {"active_row_drive_bits"} | {"row_drive_bits"}
    prices = replace(chip.prices, energy=energy, energy_free=free)
    return replace(chip, rows=256, prices=prices)


F, S = FACES.layers, SPEAKERS.layers
DRAWN, SHORT = as_drawn(NEURRAM), short_pulses(RM)


def both(
    what: str,
    printed: tuple[str, str],
    of: Callable[..., float],
    *arguments: Any,
    off: tuple[float, float] = (0.0, 0.0),
    **settings: Any,
) -> list[Line]:
    """A line for each workload; ``off``: how far the missing first read takes it from ours."""
    found = []
    for index, (name, layers) in enumerate((("faces", F), ("speakers", S))):
        table = partial(of, layers, *arguments, **settings)
        line = Line(f"{name}: {what}", printed[index], table)
        if off[index]:
            exact = partial(table, first=True)
            line = replace(line, shortcut=FIRST_READ, ours=exact, off_percent=off[index])
        found.append(line)
    return found


LINES = [
    # arrays and adapters of one sample, nJ
    Line("faces: arrays", "261", partial(arrays, F, RM)),
    Line("faces: DAC", "70", partial(arrays, F, RM, "active_row_drive_bits")),
    Line("faces: cells", "17", partial(arrays, F, RM, "cell_read_x2g")),
    Line("faces: ADC", "172", partial(arrays, F, RM, "adc_conversions")),
    Line(
        "speakers: arrays",
        "1441",
        partial(arrays, headless(S), RM),
        HEAD,
        partial(arrays, S, RM),
        0.6,
    ),
    Line("speakers: ADC", "1355", partial(arrays, S, RM, "adc_conversions")),
    Line("faces: adapters", "161", partial(adapters, F, digital_forward)),
    Line(
        "speakers: adapters",
        "693",
        partial(adapters, S),
        HALVES,
        partial(adapters, S, digital_forward),
        2.3,
    ),
    # all digital, one sample, µJ
    *both("digital, stationary", ("565e-3", "19.7"), all_digital, ONCE),
    *both("digital, refetched", ("1419e-3", "51.0"), all_digital, EACH),
    # dense digital ÷ hybrid
    Line("faces: dense, stationary", "1.3", partial(ours, F, RM, ONCE)),
    Line("faces: dense, refetched", "2.3", partial(ours, F, RM, EACH)),
    Line(
        "speakers: dense, stationary",
        "9.3",
        partial(dense, S, RM, ONCE, head=False),
        HEAD,
        partial(ours, S, RM, ONCE),
        -1.9,
    ),
    Line(
        "speakers: dense, refetched",
        "15",
        partial(dense, S, RM, EACH, fetch_zeros=True),
        FETCHES,
        partial(ours, S, RM, EACH),
        16.0,
    ),
    # dense digital ÷ arrays alone, which have no head in the table (0.6 % of them)
    Line("faces: arrays alone, stationary", "2.2", partial(alone, F, ONCE)),
    Line("faces: arrays alone, refetched", "5.4", partial(alone, F, EACH)),
    Line("speakers: arrays alone, stationary", "13.7", partial(alone, S, ONCE, head=False)),
    Line("speakers: arrays alone, refetched", "35.4", partial(alone, S, EACH, head=False)),
    # RTX 4090 at its peak ÷ hybrid
    *both("GPU", ("2.3", "17"), graphics, RM),
    # sparse digital ÷ hybrid
    Line("faces: sparse, stationary", "1.3", partial(ours, F, RM, ONCE, sparse=True)),
    Line("faces: sparse, refetched", "2.3", partial(ours, F, RM, EACH, sparse=True)),
    Line(
        "speakers: sparse, stationary",
        "1.0",
        partial(read_tenth, S, RM),
        READ_ONCE,
        partial(ours, S, RM, ONCE, sparse=True),
        143.4,
    ),
    Line(
        "speakers: sparse, refetched",
        "1.55",
        partial(dense, S, RM, EACH, sparse=True, head=False, fetch_zeros=True),
        f"{FETCHES}; {HEAD}",
        partial(ours, S, RM, EACH, sparse=True),
        15.9,
    ),
    # deployment
    *both("deployment, 8 bit", ("621", "4332"), deployment, RM, off=(1.9, 1.9)),
    *both("deployment, 16 bit", ("310", "2166"), deployment, RM, off=(2.1, 1.9), bits=16),
    *both("deployment, 32 bit", ("155", "1083"), deployment, RM, off=(2.1, 1.9), bits=32),
    *both("deployment, LPDDR", ("29", "203"), deployment, RM, off=(1.9, 1.5), offchip=True),
    *both("time of writing, s", ("86e-3", "5.7"), write_time, off=(5.9, 6.5)),
    *both("time of loading, s", ("1.8e-6", "17e-6"), load_time),
    *both("time", ("4.9e4", "3.4e5"), deployment_time, off=(5.6, 6.5)),
    # training
    *both("update count", ("44.9", "25.1"), update_count),
    *both("training, every step", ("13.3", "6.7"), training, RM, "every step"),
    *both("training, once", ("13.3", "6.2"), training, RM, "once"),
    *both("training, digital", ("31.9", "17.8"), training, RM, "digital"),
    *both("writes", ("3880", "2166"), writes, off=(2.0, 1.9)),
    *both("updates", ("931", "520"), updates, RM, off=(1.9, 1.8)),
    *both("updates, 100 ns", ("260", "145"), updates, SHORT, off=(6.2, 6.3)),
    # NeuRRAM
    Line("NeuRRAM, faces: stationary", "1.4", partial(ours, F, NEURRAM, ONCE)),
    Line("NeuRRAM, faces: refetched", "2.2", partial(ours, F, NEURRAM, EACH)),
    Line("NeuRRAM, faces: training", "13.1", partial(training, F, NEURRAM, "every step")),
    Line(
        "NeuRRAM, speakers: stationary",
        "20",
        partial(dense, S, DRAWN, ONCE),
        ROWS,
        partial(ours, S, NEURRAM, ONCE),
        -34.9,
    ),
    Line(
        "NeuRRAM, speakers: refetched",
        "22",
        partial(dense, S, DRAWN, EACH, fetch_zeros=True),
        f"{ROWS}; {FETCHES}",
        partial(ours, S, NEURRAM, EACH),
        -5.0,
    ),
    Line(
        "NeuRRAM, speakers: training",
        "8.1",
        partial(training, S, DRAWN, "every step"),
        ROWS,
        partial(training, S, NEURRAM, "every step"),
        -10.8,
    ),
    # HERMES
    *both("HERMES, stationary", ("0.07", "0.7"), ours, HERMES, ONCE),
    *both("HERMES, refetched", ("0.13", "1.2"), ours, HERMES, EACH),
    *both("HERMES, GPU", ("4.5", "44"), graphics, HERMES),
    *both("HERMES, deployment", ("4e4", "3e5"), deployment, HERMES, first=True),
    *both("HERMES, training", ("10.6", "5.1"), training, HERMES, "every step"),
    # what the ADC and the SRAM do to dense digital ÷ hybrid, speakers
    *(
        Line(
            f"ADC of {adc} pJ, {reuse}",
            printed,
            partial(dense, S, with_adc(adc), reuse, head=False, fetch_zeros=True),
        )
        for reuse, figures in ((ONCE, ("9.3", "16.6", "18.6")), (EACH, ("15", "21", "22")))
        for adc, printed in zip((44.1, 13.4, 9.13), figures, strict=True)
    ),
    Line(
        "64 kB and an ADC of 9 pJ, refetched",
        "23",
        partial(dense, S, with_large_sram(with_adc(9.13)), EACH, fetch_zeros=True),
    ),
]
SHORTCUTS = [line for line in LINES if line.ours is not None]


def test_every_line_has_a_name_of_its_own() -> None:
    names = [line.what for line in LINES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.what)
def test_each_printed_figure_is_reached(line: Line) -> None:
    found = line.found()
    assert agrees(found, line.printed), f"{found:.5g} for {line.printed}"


@pytest.mark.parametrize("line", SHORTCUTS, ids=lambda line: line.what)
def test_what_a_shortcut_hides(line: Line) -> None:
    assert line.ours is not None
    ours = line.ours()
    assert not agrees(ours, line.printed), f"{ours:.5g} is {line.printed}: no shortcut is needed"
    assert round(100.0 * (ours / float(line.printed) - 1.0), 1) == line.off_percent


@pytest.mark.parametrize(
    ("layers", "printed"), [(F, "917"), (S, "6396")], ids=["faces", "speakers"]
)
def test_deployment_on_neurram_is_printed_too_high(layers: Workload, printed: str) -> None:
    """0.3 % above what the table's own prices give; a verification of 14.6 pJ would give it."""
    found = deployment(layers, NEURRAM)
    assert not agrees(found, printed)
    assert round(1000.0 * (found / float(printed) - 1.0)) in (-4, -3)

    energy = NEURRAM.prices.energy
    read, conversion = (energy[f"verify_{part}"].value for part in ("reads", "conversions"))
    assert round((read + conversion) * 1e12, 1) == 14.2
    dearer = repriced(NEURRAM, verify_conversions=(14.6e-12 - read) / conversion)
    assert agrees(deployment(layers, dearer), printed)


def test_gpu_against_neurram_is_printed_between_two_conventions() -> None:
    """With the table's arrays, 54.8 lies between those with and those without the head."""
    found = [graphics(S, DRAWN, head=head) for head in (True, False)]
    assert [f"{ratio:.1f}" for ratio in found] == ["54.2", "55.4"]
    assert not any(agrees(ratio, "54.8") for ratio in found)
    # As the package has it, with 128 inputs and every row driven.
    assert f"{graphics(S, NEURRAM):.1f}" == "36.5"
