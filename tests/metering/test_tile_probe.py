"""Reads backwards, bits of the drives, drifted arrays: counted against slow arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.nn import AnalogLinear
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.chips import Chip, ConductanceMapping
from aihwkit_lora.metering.code_sums import exact_dot
from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.tiles.array import FrozenTileArray

SMALL = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
PAIRED = replace(
    SMALL, mapping=ConductanceMapping(g_min_siemens=1e-6, g_max_siemens=40e-6, pairs=1)
)
INS, OUTS, N = 20, 9, 5  # 3 × 3 tiles of unequal sizes


def frozen(chip: Chip, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(nn.Linear(INS, OUTS, **options)), chip)
    al.program_(model, chip, seed=0)
    return al.freeze_(model)


def trained(model: nn.Module, grad: Tensor) -> al.Counts:
    ledger, x = al.Ledger(), torch.randn(N, INS, requires_grad=True)
    with al.observe(model, ledger, phase="train"):
        model(x).backward(grad)
    return ledger.total()


def gradient() -> Tensor:
    return torch.randn(N, OUTS, generator=torch.Generator().manual_seed(3))


def cells(array: FrozenTileArray, index: int) -> list[list[list[int]]]:
    """Whole pS of each cell of one tile; those of single cells as the weights say."""
    mapping = array.programming.mapping
    assert mapping is not None
    siemens = array.programming.cells[index].siemens
    if mapping.pairs == 0:
        weight = array.tile(*list(array.positions())[index])[0].double()
        siemens = mapping.to_siemens(weight).clamp(min=0.0)[None]
    whole: list[list[list[int]]] = (siemens * 1e12).round().long().tolist()
    return whole


def x2g_backwards(array: FrozenTileArray, grad: Tensor) -> int:
    """Cell by cell: each column driven with its gradient behind its digital factor."""
    total, blocks = 0, array.blocks
    for index, position in enumerate(blocks.positions()):
        _, columns = blocks.features_of(position)
        factor = array.tile(*position)[1]
        for vector in (grad[:, columns] * factor).tolist():
            largest = max(map(abs, vector))
            drives = [X2G_STEPS // 127 * round(127 * abs(v) / largest) for v in vector]
            for polarity in cells(array, index):
                for drive, column in zip(drives, polarity, strict=True):
                    total += drive**2 * sum(column)
    return total


@pytest.mark.parametrize("chip", [SMALL, PAIRED], ids=["one cell", "a pair"])
def test_gradients_conduct_through_the_columns_they_drive(chip: Chip) -> None:
    model = frozen(chip)
    counts = trained(model, gradient())
    expected = x2g_backwards(model[0].analog_module, gradient())
    # Drives are 32-bit floats here and fractions there: the last of 2¹⁶ steps may differ.
    assert counts["transposed_cell_read_x2g"] == pytest.approx(expected, rel=1e-4)
    reads = N * INS * OUTS * chip.mapping.cells_per_weight
    assert counts["cell_reads"] == counts["transposed_cell_reads"] == reads


def test_one_gradient_in_one_column_is_a_read_at_full_scale() -> None:
    model = frozen(SMALL)
    grad = torch.zeros(N, OUTS)
    grad[0, 2] = -0.3
    array = model[0].analog_module
    picosiemens = sum(sum(cells(array, index)[0][2]) for index in (0, 3, 6))
    counts = trained(model, grad)
    assert counts["transposed_cell_read_x2g"] == X2G_STEPS**2 * picosiemens
    assert counts["transposed_row_drives"] == N * OUTS * 3


@pytest.mark.parametrize(("bits", "resolution"), [(2, 0.5), (6, 1 / 62), (8, 1 / 254), (8, -1.0)])
def test_each_drive_has_the_bits_of_its_dac(bits: int, resolution: float) -> None:
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = resolution
    model = nn.Sequential(AnalogLinear(3, 2, rpu_config=config))
    al.freeze_(model, programmed_by="test")
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=SMALL.mapping):
        model(torch.tensor([[1.0, 0.0, -1.0]]))
    counts = ledger.total()
    assert (counts["row_drives"], counts["active_row_drives"]) == (3, 2)
    assert (counts["row_drive_bits"], counts["active_row_drive_bits"]) == (3 * bits, 2 * bits)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=20),
    bits=st.integers(0, 62),
)
def test_dot_products_are_exact_however_large(pairs: list[tuple[int, int]], bits: int) -> None:
    left = [a >> bits for a, _ in pairs]
    right = [b for _, b in pairs]
    found = exact_dot(torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64))
    assert found == sum(a * b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("vectors", [1, 1039, 1041, 5000])
def test_squares_of_long_batches_add_up_exactly(vectors: int) -> None:
    """32-bit floats are exact up to 2²⁴, that is for 1,040 full-scale drives of 8 bits."""
    model, ledger = frozen(SMALL), al.Ledger()
    x = torch.ones(1, INS)
    with al.observe(model, ledger, phase="infer"), torch.no_grad():
        model(x)
        one = ledger.total()["cell_read_x2g"]
        model(x.expand(vectors, -1))
    assert ledger.total()["cell_read_x2g"] == (1 + vectors) * one


def test_a_drifted_array_conducts_less() -> None:
    model, ledger = frozen(SMALL), al.Ledger()
    x = torch.ones(1, INS)
    with al.observe(model, ledger, phase="fresh"):
        model(x)
        # The same observer sees the array at its new age.
        al.drift_(model, 86400.0, noise_model=PCMLikeNoiseModel(g_max=80.0))
        before = ledger.total()
        model(x)
    fresh, later = before["cell_read_x2g"], ledger.since(before)["cell_read_x2g"]
    weights = torch.as_tensor(model[0].analog_module.tensors.conductance).double()
    assert later != fresh
    # 50 µS around the weights, whose sum is what drift has changed: all rows are at full scale.
    expected = X2G_STEPS**2 * (50e6 * INS * OUTS + 30e6 * float(weights.sum()))
    assert later == pytest.approx(expected, rel=1e-6)
