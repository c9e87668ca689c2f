"""A made-up run on a made-up chip: numbers in here mean nothing, their proportions are realistic.

Pulses, reads and steps are of the order that the face workload needs on a 128 × 128 macro.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from aihwkit_lora.metering import Counts, Level, PriceList, Quantity, Status, price
from aihwkit_lora.reporting import RunReport, StageRecord, StepRecord, energy_ratio

CELLS = 5048
IMAGES = 120


@dataclass(frozen=True)
class TinyChip:
    name: str
    prices: PriceList


def quantity(value: float, unit: str, low: float | None = None) -> Quantity:
    return Quantity(value=value, unit=unit, source="made up", status=Status.ASSUMED, low=low)


TINY = TinyChip(
    name="tiny",
    prices=PriceList(
        energy={
            "set_pulses": quantity(153e-12, "J", low=0.6e-12),
            "reset_pulses": quantity(312e-12, "J", low=0.6e-12),
            "verify_reads": quantity(46e-12, "J", low=11e-12),
            "row_drives": quantity(18e-12, "J"),
            "adc_conversions": quantity(44e-12, "J", low=9e-12),
            "shift_adds": quantity(0.12e-12, "J"),
            "forward_macs": quantity(24e-12, "J", low=14e-12),
            "weight_gradient_macs": quantity(24e-12, "J", low=14e-12),
            "optimizer_updates": quantity(120e-12, "J"),
            "sram_read_bits": quantity(1.3e-12, "J"),
        },
        latency={
            "set_pulses": quantity(1e-6, "s"),
            "reset_pulses": quantity(1e-6, "s"),
            "verify_reads": quantity(1e-6, "s"),
            "array_cycles": quantity(1e-6, "s"),
        },
        energy_free=frozenset({"failed_cells", "array_cycles"}),
        latency_free=frozenset({"failed_cells", "row_drives", "adc_conversions", "shift_adds"}),
    ),
)


def writing(cells: int) -> Counts:
    happened = {
        "set_pulses": 5 * cells,
        "reset_pulses": 4 * cells,
        "verify_reads": 10 * cells,
        "failed_cells": cells // 400,
    }
    return Counts(happened, level=Level.SIMULATED)


def training(steps: int, parameters: int, macs: int) -> Counts:
    reads = {
        "array_cycles": 64,
        "row_drives": 1600,
        "adc_conversions": 1950,
        "shift_adds": 1900,
        "forward_macs": macs,
        "weight_gradient_macs": macs,
        "sram_read_bits": 16 * parameters,
    }
    images = Counts({event: count * IMAGES for event, count in reads.items()})
    return (images + Counts({"optimizer_updates": parameters})).scaled(steps)


def towards(start: float, end: float, step: int, pace: float) -> float:
    return end + (start - end) * math.exp(-step / pace)


def relearning(step: int) -> dict[str, float]:
    return {
        "forget_accuracy": max(0.0, towards(1.0, -0.02, step, 9.0)),
        "retain_accuracy": 0.985 - 0.05 * math.exp(-(((step - 10) / 6) ** 2)),
    }


def forgetting(step: int) -> dict[str, float]:
    return {
        "forget_accuracy": max(0.0, towards(1.0, -0.02, step, 4.0)),
        "retain_accuracy": 0.97 - 0.08 * math.exp(-(((step - 6) / 4) ** 2)),
    }


def continuing(step: int) -> dict[str, float]:
    return {
        "forget_accuracy": 0.0,
        "retain_accuracy": 0.96 - 0.15 * math.exp(-(((step - 12) / 9) ** 2)),
        "new_accuracy": towards(0.0, 0.955, step, 18.0),
    }


def stage(name, counts, *, metrics=None, parameters=0, fingerprint="", curve=None, steps=0):
    energy = price(counts, TINY)
    each = energy.energy_j.value / max(steps, 1)
    pulses = (counts["set_pulses"] + counts["reset_pulses"]) // max(steps, 1)
    records = tuple(
        StepRecord(
            step=n,
            energy_j=each,
            pulses=pulses,
            metrics=curve(n) if n % 2 == 0 or n == steps else {},
        )
        for n in range(1, steps + 1)
    )
    return StageRecord(
        name=name,
        metrics=dict(metrics or {}) | (curve(steps) if curve else {}),
        counts=counts,
        energy=energy,
        trainable_parameters=parameters,
        fingerprint=fingerprint,
        steps=records,
        wall_s=1.25,
    )


def arm(*, frozen: bool) -> tuple[StageRecord, ...]:
    learnt = {"learnt_accuracy": 0.9731}
    base = {"forget_accuracy": 1.0, "retain_accuracy": 0.9688}
    fingerprint = "5e8f03ac7be1d2" if frozen else ""
    adapted = {"adapter_off_forget_accuracy": 0.9583} if frozen else {}

    def trained(name: str, steps: int, curve, parameters: int, macs: int) -> StageRecord:
        counts = training(steps, parameters, macs)
        counts += Counts() if frozen else writing(CELLS).scaled(steps)
        return stage(
            name,
            counts,
            metrics=adapted,
            parameters=parameters,
            fingerprint=fingerprint,
            curve=curve,
            steps=steps,
        )

    sizes = (1404, 20_124) if frozen else (5148, 87_160)
    return (
        stage("learn", Counts(), metrics=learnt, parameters=5148),
        stage("program", writing(CELLS), metrics=learnt | base, fingerprint=fingerprint),
        trained("forget", *((16, forgetting) if frozen else (40, relearning)), *sizes),
        trained("continue", 100, continuing, *sizes),
    )


@pytest.fixture(scope="session")
def chip() -> TinyChip:
    return TINY


@pytest.fixture(scope="session")
def report(chip: TinyChip) -> RunReport:
    arms = {"hybrid": arm(frozen=True), "reprogram": arm(frozen=False)}
    above, below = (Counts.sum(s.counts for s in stages[2:]) for stages in arms.values())
    ratio = energy_ratio(
        "training energy",
        below,
        above,
        chip,
        above="reprogram: forget and continue",
        below="hybrid: forget and continue",
        includes="pulses, verify reads, analogue reads, digital MACs, optimiser [all steps]",
    )
    return RunReport(
        recipe="face_recognition",
        chip=chip.name,
        seed=10,
        config={"forget": {"rank": 6, "people": (2,)}},
        environment={"python": "3.12.0"},
        arms=arms,
        ratios=(ratio,),
    )
