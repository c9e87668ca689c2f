"""Ratios between made-up arms, in closed form."""

from __future__ import annotations

import pytest

import aihwkit_lora as al
from aihwkit_lora.metering import Counts
from aihwkit_lora.recipes.arm_ratios import ratios
from aihwkit_lora.reporting import StageRecord, StepRecord

CHIP = al.chips.get("rm-180nm")


def stage(name, counts, *, parameters=0, steps=0):
    return StageRecord(
        name=name,
        metrics={},
        counts=Counts(counts),
        energy=al.price(Counts(counts), CHIP),
        trainable_parameters=parameters,
        fingerprint="",
        steps=tuple(
            StepRecord(step=n + 1, energy_j=0.0, pulses=0, metrics={}) for n in range(steps)
        ),
        wall_s=0.0,
    )


ARMS = {
    "hybrid": (
        stage("learn", {}, parameters=500),
        stage("program", {"set_pulses": 3000, "verify_reads": 900}),
        stage("forget", {"array_cycles": 60, "optimizer_updates": 300}, parameters=100, steps=3),
        stage("continue", {"array_cycles": 40, "optimizer_updates": 700}, parameters=140, steps=5),
    ),
    "reprogram": (
        stage("learn", {}, parameters=500),
        stage("program", {"set_pulses": 3000, "verify_reads": 900}),
        stage(
            "forget",
            {
                "array_cycles": 200,
                "set_pulses": 70,
                "verify_conversions": 80,
                "verify_comparisons": 2,
                "optimizer_updates": 1000,
                "adc_conversions": 30,
            },
            parameters=500,
            steps=2,
        ),
        stage(
            "continue",
            {"array_cycles": 100, "verify_reads": 90, "row_selects": 7, "optimizer_updates": 1000},
            parameters=500,
            steps=2,
        ),
    ),
}


def energy(counts):
    return al.price(Counts(counts), CHIP).energy_j.value


HYBRID = {"array_cycles": 100, "optimizer_updates": 1000}
FULL = {
    "array_cycles": 300,
    "set_pulses": 70,
    "verify_reads": 90,
    "verify_conversions": 80,
    "row_selects": 7,
    "optimizer_updates": 2000,
    "adc_conversions": 30,
}
FULL_UPDATES = {name: n for name, n in FULL.items() if name != "adc_conversions"}
EXPECTED = {
    "deployment energy, all weights ÷ adapter": energy({"set_pulses": 3000, "verify_reads": 900})
    / energy({"sram_write_bits": 16 * 100}),
    "trainable parameters": 5.0,
    "update count, reprogram ÷ hybrid": 2.0,
    "update energy, reprogram per step ÷ hybrid per step": (energy(FULL_UPDATES) / 4)
    / (energy({"optimizer_updates": 1000}) / 8),
    "training energy, reprogram per image ÷ hybrid per image": (energy(FULL) / 300)
    / (energy(HYBRID) / 100),
    "training energy, reprogram ÷ hybrid": energy(FULL) / energy(HYBRID),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_ratio_in_closed_form(name):
    (found,) = (ratio for ratio in ratios(ARMS, CHIP) if ratio.name == name)
    assert found.value == pytest.approx(EXPECTED[name], rel=1e-12)
    assert found.low <= found.value <= found.high


def test_all_ratios_come_in_order_and_say_what_they_are():
    found = ratios(ARMS, CHIP)
    assert [ratio.name for ratio in found] == list(EXPECTED)
    assert found[0].denominator == "adapter: of forgetting, 100 × 16 bit"
    assert (found[1].numerator, found[1].denominator) == ("all weights: 500", "adapters: 100")
    for ratio in found[2:]:
        assert ratio.numerator.endswith("forget and continue, 4 steps")
        assert ratio.denominator.endswith("forget and continue, 8 steps")


DEPLOYED = {"forward_macs": 400, "set_pulses": 90, "verify_reads": 50, "optimizer_updates": 800}
DIGITAL = {"forward_macs": 700, "optimizer_updates": 1000}
PULSED = {"set_pulses": 600, "reset_pulses": 500}
MORE = {
    "update energy, deploy_once ÷ hybrid": energy(
        {name: n for name, n in DEPLOYED.items() if name != "forward_macs"}
    )
    / energy({"optimizer_updates": 1000}),
    "training energy, deploy_once ÷ hybrid": energy(DEPLOYED) / energy(HYBRID),
    "training energy, digital ÷ hybrid": energy(DIGITAL) / energy(HYBRID),
    # Reads of tiles that are trained in place are not counted: their training has no ratio.
    "update energy, in_situ ÷ hybrid": energy(PULSED) / energy({"optimizer_updates": 1000}),
}


def test_further_baselines_follow_each_with_what_is_known_of_it():
    arms = {
        arm: (stage("forget", counts, steps=1), stage("continue", {}, steps=1))
        for arm, counts in (("in_situ", PULSED), ("digital", DIGITAL), ("deploy_once", DEPLOYED))
    }
    found = ratios({**arms, **ARMS}, CHIP)
    assert [ratio.name for ratio in found] == [*EXPECTED, *MORE]
    for ratio in found[len(EXPECTED) :]:
        assert ratio.value == pytest.approx(MORE[ratio.name], rel=1e-12)
        assert ratio.low <= ratio.value <= ratio.high
        assert ratio.numerator.endswith("forget and continue, 2 steps")


def test_an_update_pays_for_verification_however_it_is_done():
    (found,) = (ratio for ratio in ratios(ARMS, CHIP) if ratio.name.startswith("update energy"))
    assert found.includes.endswith("without verify_comparisons: no price")


def test_without_the_baseline_only_deployment_is_compared():
    (found,) = ratios({"hybrid": ARMS["hybrid"]}, CHIP)
    assert found.name == next(iter(EXPECTED))
    assert found.value == pytest.approx(EXPECTED[found.name], rel=1e-12)


def test_without_reprogramming_the_other_full_update_gives_the_parameters():
    deployed = (
        stage("forget", DEPLOYED, parameters=500, steps=1),
        stage("continue", {}, parameters=500, steps=1),
    )
    found = ratios({"hybrid": ARMS["hybrid"], "deploy_once": deployed}, CHIP)
    deployment, parameters, *energies = [ratio.name for ratio in found]
    assert (deployment, parameters) == tuple(EXPECTED)[:2]
    assert energies == list(MORE)[:2]
    assert found[1].value == pytest.approx(5.0)


def test_a_sample_is_called_what_the_recipe_calls_it():
    per_sample = [r.name for r in ratios(ARMS, CHIP, sample="clip") if "per clip" in r.name]
    assert per_sample == ["training energy, reprogram per clip ÷ hybrid per clip"]
