"""Observation against closed forms, and x²·G against a sum over all cells in exact fractions."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.chips import ConductanceMapping
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import tile_probe
from aihwkit_lora.metering.events import X2G_STEPS
from aihwkit_lora.tiles.layers import FrozenLinear

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
INS, OUTS = 20, 9  # 3 × 3 tiles of unequal sizes


def frozen(*layers: nn.Module, programmed: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = al.convert(nn.Sequential(*layers), CHIP)
    if not programmed:
        return al.freeze_(model, programmed_by="read back")
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


def observed(model: nn.Module, x: Tensor, **settings: object) -> al.Counts:
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", **settings), torch.no_grad():  # type: ignore[arg-type]
        model(x)
    return ledger.total(phase="infer")


def some(vectors: int, ins: int = INS) -> Tensor:
    return torch.randn(vectors, ins, generator=torch.Generator().manual_seed(1))


def x2g(layer: FrozenLinear, x: Tensor, window: tuple[int, int] = (20, 80)) -> int:
    """Cell by cell: drives scaled by each tile to its largest input, 8-bit DAC, whole pS."""
    middle, half = (Fraction(sum(window), 2), Fraction(window[1] - window[0], 2))
    total, start = 0, 0
    blocks = layer.analog_module.blocks
    for i, rows in enumerate(blocks.in_sizes):
        for vector in x[:, start : start + rows].tolist():
            largest = max(map(abs, vector)) or 1.0
            codes = [round(127 * Fraction(value) / Fraction(largest)) for value in vector]
            steps = [X2G_STEPS // 127 * code for code in codes]
            for o in range(len(blocks.out_sizes)):
                for column in layer.analog_module.tile(i, o)[0].tolist():
                    for step, weight in zip(steps, column, strict=True):
                        microsiemens = max(Fraction(0), middle + half * Fraction(weight))
                        total += step**2 * round(microsiemens * 10**6)
        start += rows
    return total


@pytest.mark.parametrize(("ins", "outs"), [(INS, OUTS), (8, 4), (3, 2), (17, 13), (1, 1)])
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_forward_reads_of_split_tiles(ins: int, outs: int, shape: tuple[int, ...]) -> None:
    model = frozen(nn.Linear(ins, outs))
    x = some(6, ins)[: max(1, sum(shape))] if len(shape) < 2 else some(6, ins).view(*shape, ins)
    x = x[0] if shape == () else x
    counts, n = observed(model, x), x.numel() // ins
    in_tiles, out_tiles = ceil(ins / 8), ceil(outs / 4)
    assert {k: counts[k] for k in counts if k != "cell_read_x2g"} == {
        "array_cycles": n,
        "tile_reads": n * in_tiles * out_tiles,
        "row_drives": n * ins * out_tiles,
        "active_row_drives": n * ins * out_tiles,
        "row_drive_bits": 8 * n * ins * out_tiles,
        "active_row_drive_bits": 8 * n * ins * out_tiles,
        "cell_reads": n * ins * outs,
        "adc_conversions": n * outs * in_tiles,
        "shift_adds": n * outs * in_tiles,
    }
    assert counts["cell_read_x2g"] == x2g(model[0], x.view(n, ins))
    assert counts.level == "exact"


def test_rows_driven_with_zero_are_not_active() -> None:
    x = some(4)
    x[0] = 0.0
    x[1, ::2] = 0.0
    x[2, 3] = x[2].abs().max() * 1e-4  # below half a step of the DAC
    model = frozen(nn.Linear(INS, OUTS))
    counts = observed(model, x)
    assert counts["row_drives"] == 4 * INS * 3
    assert counts["active_row_drives"] == (0 + 10 + 19 + 20) * 3
    assert counts["cell_read_x2g"] == x2g(model[0], x)


def test_an_array_driven_at_full_scale_conducts_its_whole_conductance() -> None:
    model = frozen(nn.Linear(INS, OUTS, bias=False))
    x = torch.tensor([[0.7], [-0.2]]).expand(2, INS)
    tiles = (model[0].analog_module.tile(i, o)[0] for i in range(3) for o in range(3))
    cells = [w for tile in tiles for w in tile.flatten().tolist()]
    picosiemens = sum(max(0, round(50_000_000 + 30_000_000 * Fraction(w))) for w in cells)
    assert observed(model, x)["cell_read_x2g"] == 2 * X2G_STEPS**2 * picosiemens


def test_a_cell_far_below_the_window_conducts_nothing() -> None:
    model = al.convert(nn.Sequential(nn.Linear(3, 2, bias=False)), CHIP)
    tile = next(iter(model.analog_tiles()))
    weights = torch.tensor([[-3.0, 0.5, 1.0], [-1.0, -2.0, 0.0]])
    tile.set_weights(weights, None, apply_weight_scaling=False)
    al.freeze_(model, programmed_by="test")
    # 0, 65, 80, 20, 0 and 50 µS
    counts = observed(model, torch.ones(1, 3), mapping=CHIP.mapping)
    assert counts["cell_read_x2g"] == X2G_STEPS**2 * 215_000_000


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_an_ideal_product_is_driven_by_each_vectors_largest_value(config_class: type) -> None:
    config = config_class()
    config.forward.is_perfect = True
    config.mapping.weight_scaling_omega = 1.0
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0]])
    model = convert_to_analog(nn.Sequential(layer), config, ensure_analog_root=False)
    al.freeze_(model, programmed_by="test")
    counts = observed(
        model, torch.tensor([[4.0, 1.0], [0.0, 0.0], [-1.0, 2.0]]), mapping=CHIP.mapping
    )
    # 80 µS and 20 µS, at drives of (1, 1/4), nothing, and (1/2, 1) in codes of 8 bit
    first, last = 127**2 * 80 + 32**2 * 20, 64**2 * 80 + 127**2 * 20
    assert counts["cell_read_x2g"] == (X2G_STEPS // 127) ** 2 * (first + last) * 10**6
    assert counts["active_row_drives"] == 4


def overflowing(config_class: type, weight: Tensor) -> tuple[nn.Module, Tensor]:
    """2 × 2 tiles, and three vectors of which the first drives the first row of tiles fully."""
    config = config_class()
    config.mapping.max_input_size, config.mapping.max_output_size = 8, 4
    config.mapping.weight_scaling_omega = 1.0
    forward = config.forward
    forward.inp_res, forward.out_noise, forward.w_noise, forward.out_bound = 0.0, 0.0, 0.0, 2.0
    forward.noise_management = NoiseManagementType.ABS_MAX
    forward.bound_management = BoundManagementType.ITERATIVE
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data = weight
    model = convert_to_analog(nn.Sequential(layer), config, ensure_analog_root=False)
    al.freeze_(model, programmed_by="test")
    x = torch.zeros(3, 16)
    x[0, :8] = 1.0  # 8 at full scale, 4 at a half, 2 at a quarter: repeated twice
    x[1, 0] = x[2, 8] = 1.0
    return model, x


@pytest.mark.parametrize(
    ("config_class", "vectors"), [(InferenceRPUConfig, 1), (TorchInferenceRPUConfig, 3)]
)
def test_reads_repeated_because_of_overflow_count(config_class: type, vectors: int) -> None:
    """C++ tiles repeat the vector that overflows, torch tiles the batch, as in aihwkit."""
    weight = torch.zeros(8, 16)
    weight[4:] = 1.0  # the second column of tiles
    model, x = overflowing(config_class, weight)
    counts = observed(model, x, mapping=CHIP.mapping)
    repeats = 2 * vectors
    active = 8 if vectors == 1 else 9
    assert {k: counts[k] for k in counts if k != "cell_read_x2g"} == {
        "array_cycles": 3 + repeats,
        "tile_reads": 3 * 4 + repeats,
        "row_drives": 3 * 16 * 2 + repeats * 8,
        "active_row_drives": 10 * 2 + 2 * active,
        # The configuration has no DAC resolution, so 8 bit are taken.
        "row_drive_bits": 8 * (3 * 16 * 2 + repeats * 8),
        "active_row_drive_bits": 8 * (10 * 2 + 2 * active),
        "cell_reads": 3 * 16 * 8 + repeats * 8 * 4,
        "adc_conversions": 3 * 8 * 2 + repeats * 4,
        "shift_adds": 3 * 8 * 2,
    }
    # Columns of 4 cells at 50 and at 80 µS; repeats see the latter, at 1/2 and 1/4 in 8-bit codes.
    first, again = 10 * (4 * 50 + 4 * 80), active * 4 * 80
    squares = 127**2 * first + (64**2 + 32**2) * again
    assert counts["cell_read_x2g"] == (X2G_STEPS // 127) ** 2 * squares * 10**6


@pytest.mark.parametrize("waiting", [0, 30, 10**6])
@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_tiles_that_share_their_inputs_repeat_them_each(
    monkeypatch: pytest.MonkeyPatch, config_class: type, waiting: int
) -> None:
    """However many repeats wait to be counted; in parallel, so that they take no more time."""
    monkeypatch.setattr(tile_probe, "_MOST_WAITING", waiting)
    both, one = torch.ones(8, 16), torch.ones(8, 16)
    one[:4] = 0.0
    twice, once, plain = (
        observed(*overflowing(config_class, weight), mapping=CHIP.mapping)
        for weight in (both, one, torch.zeros(8, 16))
    )
    assert twice["array_cycles"] == once["array_cycles"] > plain["array_cycles"]
    for event in ("tile_reads", "active_row_drives", "cell_reads", "adc_conversions"):
        assert twice[event] - plain[event] == 2 * (once[event] - plain[event]) > 0
    # Of both columns of tiles as of the second one, whose cells are at 80 µS instead of 50.
    first = 10 * 4 * 30 * 127**2
    steps = (X2G_STEPS // 127) ** 2 * 10**6
    more_once = once["cell_read_x2g"] - plain["cell_read_x2g"] - steps * first
    more_twice = twice["cell_read_x2g"] - plain["cell_read_x2g"] - 2 * steps * first
    assert more_twice == 2 * more_once > 0


@given(st.lists(st.integers(0, 12), max_size=4))
def test_counts_do_not_depend_on_how_a_batch_is_split(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 12]
    parts = [SPLIT_X[a:b] for a, b in pairwise(bounds)]
    assert al.Counts.sum(observed(SPLIT, part) for part in parts) == observed(SPLIT, SPLIT_X)


SPLIT, SPLIT_X = frozen(nn.Linear(INS, OUTS), nn.ReLU(), nn.Linear(OUTS, 5)), some(12)


def test_counts_of_a_copy_are_those_of_the_original() -> None:
    model, x = frozen(nn.Linear(INS, OUTS), nn.Tanh(), nn.Linear(OUTS, 5)), some(3)
    before = observed(model, x)
    assert observed(copy.deepcopy(model), x) == before == observed(model, x)


def test_a_copy_of_frozen_tiles_made_while_they_are_observed_is_not_observed() -> None:
    model, ledger = frozen(nn.Linear(INS, OUTS)), al.Ledger()
    with al.observe(model, ledger, phase="infer"):
        copy.deepcopy(model)(some(2))
    assert ledger.total() == al.Counts()


def test_layers_are_counted_by_name() -> None:
    model, ledger = frozen(nn.Linear(INS, OUTS), nn.ReLU(), nn.Linear(OUTS, 5)), al.Ledger()
    with al.observe(model, ledger, phase="infer"):
        model(some(2))
    reads = {name: counts["cell_reads"] for name, counts in ledger.by_layer("infer").items()}
    assert reads == {"0": 2 * INS * OUTS, "1": 0, "2": 2 * OUTS * 5}


def test_unknown_conductances_are_refused_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, INS), frozen(nn.Linear(INS, OUTS)))
    model.append(frozen(nn.Linear(OUTS, 5), programmed=False))
    ledger = al.Ledger()
    observer = al.observe(model, ledger, phase="infer")
    match = r"layer '2\.0': expected known conductances, got an array frozen as 'read back'"
    with pytest.raises(StageError, match=match):
        observer.start()
    model(some(2, 3)).sum().backward()
    assert ledger.total() == al.Counts()
    assert observed(model, some(2, 3), mapping=CHIP.mapping)["array_cycles"] == 4


def test_a_window_given_by_hand_counts_for_unknown_conductances_only() -> None:
    window, x = ConductanceMapping(g_min_siemens=1e-6, g_max_siemens=40e-6), some(3)
    known = frozen(nn.Linear(INS, OUTS))
    assert observed(known, x, mapping=window)["cell_read_x2g"] == x2g(known[0], x)
    other = frozen(nn.Linear(INS, OUTS), programmed=False)
    assert observed(other, x, mapping=window)["cell_read_x2g"] == x2g(other[0], x, (1, 40))


def test_an_unfrozen_layer_is_refused() -> None:
    model = al.convert(nn.Sequential(nn.Linear(INS, OUTS)), CHIP)
    with pytest.raises(StageError, match=r"layer '0': expected a frozen layer, got AnalogLinear"):
        al.observe(model, al.Ledger(), phase="infer").start()
