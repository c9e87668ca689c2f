"""Both sides of a ratio: what each of them counts, and what cannot be."""

from __future__ import annotations

from typing import Literal

import pytest

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts
from aihwkit_lora.metering.workload import (
    DigitalExecution,
    LayerShape,
    Reuse,
    Workload,
    additions,
    analog_backward,
    analog_forward,
    digital_forward,
    digital_training,
    programming,
)
from aihwkit_lora.reporting import Case, Schedule, baselines, rtx_4090

CHIP = al.chips.get("rm-180nm")
WORKLOAD = Workload(
    layers={
        "fc": LayerShape(inputs=300, outputs=40, vectors_per_sample=3, adapter_rank=2),
        "plain": LayerShape(inputs=40, outputs=40, vectors_per_sample=3),
        "head": LayerShape(inputs=40, outputs=5, analog=False),
    }
)
ADAPTERS = WORKLOAD.adapters()
WAY = DigitalExecution(reuse=Reuse.REFETCHED)
SCHEDULE = Schedule(steps=7, batch=11)
PASSES = (
    analog_forward(WORKLOAD, CHIP)
    + analog_backward(WORKLOAD, CHIP)
    + Counts({"forward_macs": 200, "input_gradient_macs": 200})
)


def test_hybrid_inference_reads_arrays_and_computes_the_rest() -> None:
    case = baselines.infer_hybrid(WORKLOAD, CHIP, WAY)
    assert case.counts == (
        analog_forward(WORKLOAD, CHIP)
        + digital_forward(ADAPTERS, WAY)
        + digital_forward(WORKLOAD.off_arrays(), WAY)
        + additions(WORKLOAD)
    )
    assert case.counts["forward_macs_int8"] == ADAPTERS.macs + 200
    assert str(case) == "hybrid: adapters in 8 bit, weights refetched, zeros computed"


def test_other_ways_of_inference() -> None:
    alone = baselines.infer_analog_only(WORKLOAD, CHIP)
    assert alone.counts == analog_forward(WORKLOAD, CHIP)
    digital = baselines.infer_digital(WORKLOAD, CHIP, WAY)
    assert digital.counts == digital_forward(WORKLOAD, WAY)
    assert digital.counts["forward_macs_int8"] == WORKLOAD.macs
    gpu = rtx_4090(utilisation=0.02)
    card = baselines.infer_gpu(WORKLOAD, gpu)
    assert (card.counts, card.chip) == (Counts({"forward_macs": WORKLOAD.macs}), gpu)
    assert card.name == "RTX 4090 at 2 % of its peak"


def test_hybrid_training_never_writes_an_array() -> None:
    case = baselines.train_hybrid(WORKLOAD, CHIP, SCHEDULE)
    sample = PASSES + digital_training(ADAPTERS) + additions(WORKLOAD)
    updates = Counts({"optimizer_updates": 7 * ADAPTERS.weights})
    assert case.counts == sample.scaled(77) + updates
    assert case.counts["programmed_cells"] == case.counts.pulses == 0


@pytest.mark.parametrize(("written", "times"), [("every step", 7), ("once", 1)])
def test_training_on_arrays_writes_all_cells(
    written: Literal["every step", "once"], times: int
) -> None:
    case = baselines.train_on_arrays(WORKLOAD, CHIP, SCHEDULE, written=written)
    sample = PASSES + Counts({"weight_gradient_macs": WORKLOAD.macs})
    updates = Counts({"optimizer_updates": 7 * WORKLOAD.weights})
    assert case.counts == sample.scaled(77) + updates + programming(WORKLOAD, CHIP).scaled(times)
    assert case.counts["programmed_cells"] == times * (300 * 40 + 40 * 40)
    assert str(case) == f"arrays written {written}: 7 steps of 11 samples"


def test_digital_training_has_no_arrays() -> None:
    case = baselines.train_digital(WORKLOAD, CHIP, SCHEDULE)
    updates = Counts({"optimizer_updates": 7 * WORKLOAD.weights})
    assert case.counts == digital_training(WORKLOAD).scaled(77) + updates


def test_deployment_moves_what_it_must() -> None:
    near = baselines.deploy_on_arrays(WORKLOAD, CHIP)
    assert near.counts == programming(WORKLOAD, CHIP)
    far = baselines.deploy_on_arrays(WORKLOAD, CHIP, offchip_bits=8)
    assert far.counts["offchip_read_bits"] == 8 * (300 * 40 + 40 * 40)
    assert far.name == "all weights from off-chip"
    loaded = baselines.deploy_adapters(WORKLOAD, CHIP, bits=4, offchip=True)
    assert loaded.counts["sram_write_bits"] == 4 * ADAPTERS.weights
    assert loaded.counts["offchip_read_bits"] == 4 * ADAPTERS.weights
    assert loaded.name == "4-bit adapters from off-chip"


def test_a_card_costs_its_power_over_what_it_gets_done() -> None:
    peak = rtx_4090(utilisation=1.0).prices.energy["forward_macs"]
    assert peak.value == pytest.approx(450.0 / (82.6e12 / 2), rel=1e-12)
    assert f"{peak.value * 1e12:.1f} pJ" == "10.9 pJ"
    hundredth = rtx_4090(utilisation=0.01).prices.energy["forward_macs"]
    assert hundredth.value == pytest.approx(100 * peak.value, rel=1e-12)
    assert "450 W" in peak.source
    assert "82.6 TFLOPS FP32" in peak.source


@pytest.mark.parametrize("utilisation", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_utilisation_is_refused(utilisation: float) -> None:
    with pytest.raises(ConfigurationError, match="RTX 4090: expected a utilisation above 0 and at"):
        rtx_4090(utilisation=utilisation)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch", -1)])
def test_a_schedule_without_samples_is_refused(field: str, value: int) -> None:
    numbers = {"steps": 3, "batch": 4} | {field: value}
    with pytest.raises(ConfigurationError, match=rf"Schedule.{field}: expected 1 or more, got"):
        Schedule(**numbers)


def test_a_case_without_detail_is_its_name() -> None:
    assert str(Case(name="arrays", counts=Counts(), chip=CHIP)) == "arrays"
