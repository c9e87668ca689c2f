"""Counts from shapes: identities of the published workloads, the real mixer, and hard bounds."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit, digitize_
from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Level, PriceList, Quantity, Status, price
from aihwkit_lora.metering.events import X2G_STEPS
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
    loading,
    programming,
)
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer
from aihwkit_lora.reporting import FACES, SPEAKERS

CHIPS = [al.chips.get(name) for name in ("rm-180nm", "neurram-130nm", "hermes-14nm")]
RM = CHIPS[0]
MIXER, SPIKING = FACES.layers, SPEAKERS.layers
# DiT-B/2 with ConvNeXt blocks: width 768, MLP ratio 4, 12 blocks, 8 × 8 tokens of a 128 × 128
# image behind an autoencoder of factor 8; LoRA of rank 4 on both linears of each MLP.
DIT = Workload(
    layers={
        f"blocks.{block}.fc{number}": LayerShape(
            inputs=inputs, outputs=outputs, vectors_per_sample=64, adapter_rank=4
        )
        for block in range(12)
        for number, (inputs, outputs) in enumerate(((768, 3072), (3072, 768)), start=1)
    }
)
DATA = {"cell_read_x2g", "transposed_cell_read_x2g", "active_row_drives", "active_row_drive_bits"}

shapes = st.builds(
    LayerShape,
    inputs=st.integers(1, 600),
    outputs=st.integers(1, 600),
    vectors_per_sample=st.integers(1, 20),
    adapter_rank=st.integers(0, 16),
    density=st.fractions(0, 1, max_denominator=1000),
    input_bits=st.none() | st.integers(1, 8),
    analog=st.booleans(),
)


def named(*layers: LayerShape) -> Workload:
    return Workload(layers={str(index): layer for index, layer in enumerate(layers)})


workloads = st.lists(shapes, max_size=5).map(lambda layers: named(*layers))


@pytest.mark.parametrize(
    ("workload", "weights", "macs", "trainable", "adapter_macs"),
    [
        pytest.param(MIXER, 5_048, 87_160, 1_404, 20_124, id="mixer"),
        pytest.param(SPIKING, 336_384, 3_340_800, 13_408, 134_080, id="spiking"),
        pytest.param(DIT, 56_623_104, 64 * 56_623_104, 368_640, 64 * 368_640, id="dit"),
    ],
)
def test_published_workloads_have_the_published_sizes(
    workload: Workload, weights: int, macs: int, trainable: int, adapter_macs: int
) -> None:
    adapters = workload.adapters()
    assert (workload.weights, workload.macs) == (weights, macs)
    assert (adapters.weights, adapters.macs) == (trainable, adapter_macs)


def observed(chip: Chip, images: int, *, adapted: bool) -> al.Ledger:
    torch.manual_seed(0)
    model = al.convert(MlpMixer(), chip).requires_grad_(False)
    ledger = al.Ledger()
    al.program_(model, chip, ledger=ledger, seed=0, level="mean")
    al.freeze_(model)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=6, target_modules=LORA_TARGETS))
    with al.observe(model, ledger, phase="run"):
        output = model(torch.rand(images, 1, 16, 16))
        if adapted:
            output.sum().backward()
    return ledger


def shared(counts: Counts, others: Counts) -> dict[str, int]:
    """Counts that do not depend on data, of the events that shapes tell of."""
    return {event: counts[event] for event in {*counts, *others} - DATA}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_forward_reads_are_those_of_the_real_mixer(chip: Chip) -> None:
    found = observed(chip, 3, adapted=False).total(phase="run")
    found = found.only(event for event in found if event != "activation_functions")
    told = analog_forward(MIXER, chip).scaled(3)
    assert shared(told, found) == shared(found, told)
    for event in DATA & {*told, *found}:
        assert 0 < found[event] <= told[event]
        assert told.level_of(event) is Level.BOUND
    assert told.only(shared(told, found)).level is Level.EXACT


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_training_is_that_of_the_real_mixer_by_layer(chip: Chip) -> None:
    ledger = observed(chip, 3, adapted=True)
    for name, layer in MIXER.layers.items():
        found = ledger.total(phase="run", layer=name)
        told = analog_forward(named(layer), chip)
        # torch sends no gradient past the first adapter.
        if found["transposed_tile_reads"]:
            told += analog_backward(named(layer), chip)
        told = (told + additions(named(layer))).scaled(3)
        assert shared(told, found) == shared(found, told)
        assert all(found[event] <= told[event] for event in DATA)
    passed = [n for n in MIXER.layers if ledger.total(layer=n)["transposed_tile_reads"]]
    # All behind the patch embedding, the token mixing of block 0, and the first adapted layer.
    assert passed == list(MIXER.layers)[4:]

    total = digital_training(MIXER.adapters()).scaled(3)
    first = MIXER.layers["blocks.0.channel_mixing.fc1"]
    unsent = 3 * first.vectors_per_sample * first.inputs * first.adapter_rank
    run = ledger.total(phase="run")
    assert run["forward_macs"] == total["forward_macs"]
    assert run["weight_gradient_macs"] == total["weight_gradient_macs"]
    assert run["input_gradient_macs"] == total["input_gradient_macs"] - unsent


@pytest.mark.parametrize(
    ("bits", "unit_reuse", "reuse"),
    [(8, "batch", Reuse.STATIONARY), (8, "none", Reuse.REFETCHED), (12, "batch", Reuse.STATIONARY)],
)
def test_the_digital_unit_does_what_shapes_tell(
    bits: int, unit_reuse: Literal["batch", "none"], reuse: Reuse
) -> None:
    model = al.freeze_(al.convert(MlpMixer(), RM), programmed_by="test").requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=6, target_modules=LORA_TARGETS))
    ledger = al.Ledger()
    digitize_(adapted, DigitalUnit(bits=bits, reuse=unit_reuse), ledger=ledger, phase="load")
    assert ledger.total(phase="load") == loading(MIXER, bits=bits, offchip=True)

    with al.observe(adapted, ledger, phase="run", mapping=RM.mapping), torch.no_grad():
        adapted(torch.rand(1, 1, 16, 16))
    told = digital_forward(MIXER.adapters(), DigitalExecution(reuse=reuse, bits=bits))
    told += additions(MIXER)
    assert ledger.total(phase="run").only(told) == told


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_programming_is_that_of_the_real_mixer_if_every_cell_needs_the_mean(chip: Chip) -> None:
    found = observed(chip, 1, adapted=False).total(phase="program")
    told = programming(MIXER, chip)
    assert found.level is told.level is Level.MEAN
    for event in ("programmed_cells", "row_selects", "failed_cells"):
        assert found[event] == told[event]
    # Cells that are in tolerance at their first read take no pulse.
    mean, pulsed = chip.write_policy.statistics.mean_pulses, found["pulsed_cells"]
    assert pulsed < told["pulsed_cells"] == told["programmed_cells"]
    assert found.pulses == pytest.approx(mean * pulsed, abs=len(MIXER.layers))
    assert told.pulses == pytest.approx(mean * told["programmed_cells"], abs=0.5)
    for counts in (found, told):
        reads = counts.pulses + counts["programmed_cells"]
        assert counts["verify_reads"] == counts["verify_conversions"] == reads
        assert counts["verify_slots"] == reads
        assert counts["set_slots"] + counts["reset_slots"] == counts.pulses


@given(st.lists(shapes, max_size=4), st.sampled_from(CHIPS), st.sampled_from(list(Reuse)))
def test_counts_add_up_over_layers(layers: list[LayerShape], chip: Chip, reuse: Reuse) -> None:
    execution = DigitalExecution(reuse=reuse, skips_zeros=True)
    for count in (
        lambda part: analog_forward(part, chip),
        lambda part: analog_backward(part, chip),
        lambda part: digital_forward(part, execution),
        lambda part: digital_forward(part.adapters(), execution),
        digital_training,
        additions,
        loading,
    ):
        apart = Counts.sum(count(named(layer)) for layer in layers)
        assert count(named(*layers)) == apart


@given(shapes, st.sampled_from(CHIPS))
def test_each_row_meets_each_column_once(layer: LayerShape, chip: Chip) -> None:
    layer = replace(layer, analog=True)
    there, back = analog_forward(named(layer), chip), analog_backward(named(layer), chip)
    cells, density = chip.mapping.cells_per_weight, Fraction(layer.density)
    assert there["cell_reads"] == back["transposed_cell_reads"] == cells * layer.macs
    assert there["tile_reads"] == back["transposed_tile_reads"]
    assert there["row_drives"] == back["transposed_adc_conversions"]
    assert there["adc_conversions"] == back["transposed_row_drives"]
    assert there["active_row_drives"] == round(density * there["row_drives"])
    bits = layer.input_bits or chip.dac_bits
    assert there["row_drive_bits"] == bits * there["row_drives"]
    assert abs(there["active_row_drive_bits"] - density * there["row_drive_bits"]) <= Fraction(1, 2)
    full_scale = back["transposed_cell_read_x2g"]
    assert abs(there["cell_read_x2g"] - density * full_scale) <= 1
    drives = there.level_of("active_row_drives")
    assert drives is (Level.BOUND if density == 1 else Level.MEAN) or not there["active_row_drives"]


def test_cells_at_full_scale_have_their_middle_conductance() -> None:
    counts = analog_forward(named(LayerShape(inputs=3, outputs=5)), RM)
    assert counts["cell_read_x2g"] == 15 * 50 * 10**6 * X2G_STEPS**2


@given(shapes)
def test_layers_off_the_arrays_are_neither_read_nor_programmed(layer: LayerShape) -> None:
    workload = named(replace(layer, analog=False))
    assert workload.off_arrays() == workload
    for counts in (
        analog_forward(workload, RM),
        analog_backward(workload, RM),
        programming(workload, RM),
    ):
        assert counts == Counts()


@given(shapes, st.sampled_from(list(Reuse)), st.integers(2, 16))
def test_digital_layers_compute_and_move_what_they_must(
    layer: LayerShape, reuse: Reuse, bits: int
) -> None:
    dense = digital_forward(named(layer), DigitalExecution(reuse=reuse, bits=bits))
    macs = "forward_macs_int8" if bits <= 8 else "forward_macs_int16"
    fetched = layer.weights if reuse is Reuse.STATIONARY else layer.macs
    values = layer.vectors_per_sample * (layer.inputs + layer.outputs)
    moved = dense["sram_read_bits"] + dense["sram_write_bits"]
    assert dense[macs] == layer.macs
    assert abs(moved - bits * (fetched + values)) <= 1
    assert dense.level is Level.EXACT

    sparse = digital_forward(
        named(layer), DigitalExecution(reuse=reuse, bits=bits, skips_zeros=True)
    )
    assert sparse[macs] == round(layer.density * layer.macs)
    assert all(sparse[event] <= dense[event] for event in dense)


def test_a_sparse_level_is_a_mean() -> None:
    execution = DigitalExecution(reuse=Reuse.STATIONARY, skips_zeros=True)
    sparse = named(LayerShape(inputs=10, outputs=10, density=0.5))
    assert digital_forward(sparse, execution).level is Level.MEAN


@given(workloads, st.integers(1, 32))
def test_loading_moves_each_bit_of_an_adapter_once(workload: Workload, bits: int) -> None:
    near, far = loading(workload, bits=bits), loading(workload, bits=bits, offchip=True)
    moved = bits * workload.adapters().weights
    assert near["sram_write_bits"] == far["sram_write_bits"] == far["offchip_read_bits"] == moved
    assert near["offchip_read_bits"] == 0
    adapted = sum(layer.adapter_rank > 0 for layer in workload.layers.values())
    assert near["adapter_loads"] == adapted == len(workload.adapters().layers) // 2


@pytest.mark.parametrize(
    ("together", "order", "groups", "selects"),
    [("cell", "cell", 300 * 20, 300), ("row", "row", 300, 300), ("array", "array", 3, 2856)],
)
def test_cells_that_go_together_share_their_slots(
    together: Any, order: Any, groups: int, selects: int
) -> None:
    policy = replace(RM.write_policy, together=together, order=order, verify_averages=5)
    counts = programming(
        named(LayerShape(inputs=300, outputs=20)), replace(RM, write_policy=policy)
    )
    slots = round(groups * Fraction(8.52))
    assert counts["set_slots"] + counts["reset_slots"] == slots
    assert counts["verify_slots"] == 5 * (slots + groups)
    assert counts["row_selects"] == selects
    assert counts.pulses == round(6000 * Fraction(8.52))


def test_a_comparator_compares_once_per_verification() -> None:
    policy = replace(RM.write_policy, verify_with="comparator", verify_averages=3)
    chip = replace(RM, write_policy=policy)
    counts = programming(named(LayerShape(inputs=10, outputs=10)), chip)
    assert (counts["verify_comparisons"], counts["verify_conversions"]) == (952, 0)
    assert counts["verify_reads"] == 3 * 952


def test_no_pulses_leave_cells_untouched() -> None:
    statistics = replace(RM.write_policy.statistics, mean_pulses=0.0)
    chip = replace(RM, write_policy=replace(RM.write_policy, statistics=statistics))
    counts = programming(named(LayerShape(inputs=10, outputs=10)), chip)
    assert (counts.pulses, counts["pulsed_cells"], counts["verify_reads"]) == (0, 0, 100)


adapted = st.lists(
    shapes.map(lambda layer: replace(layer, analog=True, adapter_rank=layer.adapter_rank + 1)),
    min_size=1,
    max_size=4,
).map(lambda layers: named(*layers))


@given(adapted)
def test_training_gains_less_than_one_and_a_half_in_macs(workload: Workload) -> None:
    """All digital: 3 M. Hybrid: the arrays do M forwards and M backwards, adapters 3 M_A."""
    there, back = analog_forward(workload, RM), analog_backward(workload, RM)
    full = sum(digital_training(workload).values())
    adapters = sum(digital_training(workload.adapters()).values())
    gain = Fraction(full, there["cell_reads"] + back["transposed_cell_reads"] + adapters)
    macs, adapter_macs = workload.macs, workload.adapters().macs
    assert gain == Fraction(3 * macs, 2 * macs + 3 * adapter_macs) < Fraction(3, 2)


def joules(value: float) -> Quantity:
    return Quantity(value=value, unit="J", source="drawn", status=Status.ASSUMED)


@given(adapted, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from(list(Reuse)))
def test_inference_gains_less_than_the_macs_that_stay_digital(
    workload: Workload, mac: float, sram: float, reuse: Reuse
) -> None:
    """At equal prices, zeros computed, the gain is below M / M_A as far as MACs are concerned.

    SRAM traffic has a bound of its own, the ratio of the bits; together they cannot exceed the
    larger of the two. Where traffic per MAC is the same on both sides, M / M_A bounds it all.
    """
    energy = {"forward_macs_int8": mac, "sram_read_bits": sram, "sram_write_bits": sram}
    energy |= {"adc_conversions": 1e-3}
    prices = PriceList(energy={event: joules(value) for event, value in energy.items()}, latency={})
    chip = replace(RM, prices=prices)
    execution = DigitalExecution(reuse=reuse)
    digital = digital_forward(workload, execution)
    branches = digital_forward(workload.adapters(), execution)
    hybrid = branches + analog_forward(workload, RM)
    gain = price(digital, chip).energy_j.value / price(hybrid, chip).energy_j.value
    moved = [c["sram_read_bits"] + c["sram_write_bits"] for c in (digital, branches)]
    assert gain < max(workload.macs / workload.adapters().macs, moved[0] / moved[1])


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("reuse", Reuse)
@pytest.mark.parametrize("workload", [MIXER, SPIKING, DIT], ids=["mixer", "spiking", "dit"])
def test_published_workloads_gain_less_than_m_over_m_a(
    workload: Workload, reuse: Reuse, chip: Chip
) -> None:
    execution = DigitalExecution(reuse=reuse)
    hybrid = digital_forward(workload.adapters(), execution) + analog_forward(workload, chip)
    above, below = (
        price(c, chip).energy_j.value for c in (digital_forward(workload, execution), hybrid)
    )
    assert above / below < workload.macs / workload.adapters().macs


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("inputs", 0, "1 or more"),
        ("outputs", 0, "1 or more"),
        ("vectors_per_sample", 0, "1 or more"),
        ("adapter_rank", -1, "0 or more"),
        ("density", 1.5, "0 to 1"),
        ("density", float("nan"), "0 to 1"),
        ("input_bits", 0, "1 or more, or None"),
    ],
)
def test_impossible_shapes_are_refused(field: str, value: float, expected: str) -> None:
    settings: dict[str, Any] = {"inputs": 3, "outputs": 4, field: value}
    with pytest.raises(ConfigurationError, match=rf"LayerShape\.{field}: expected {expected}, got"):
        LayerShape(**settings)


def test_an_execution_states_its_reuse_and_its_bits() -> None:
    with pytest.raises(ConfigurationError, match="reuse: expected stationary or refetched"):
        DigitalExecution(reuse="x")  # type: ignore[arg-type]
    for bits in (1, 17):
        with pytest.raises(ConfigurationError, match=f"bits: expected 2 to 16, got {bits}"):
            DigitalExecution(reuse=Reuse.STATIONARY, bits=bits)


def test_a_workload_does_not_follow_the_dict_it_was_made_of() -> None:
    layers = {"fc": LayerShape(inputs=3, outputs=4)}
    workload = Workload(layers=layers)
    layers["head"] = LayerShape(inputs=3, outputs=4)
    assert list(workload.layers) == ["fc"]
