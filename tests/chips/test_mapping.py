"""Cells of a weight: positions, conductances, and aihwkit's own converters as the yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aihwkit.inference.converter.conductance import (
    DualPairConductanceConverter,
    NPairConductanceConverter,
    SinglePairConductanceConverter,
)
from aihwkit.inference.noise.pcm import PCMLikeNoiseModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aihwkit_lora.chips import CellEncoding, ConductanceMapping
from aihwkit_lora.errors import ConfigurationError


def window(pairs: int, low: float = 1e-6, high: float = 40e-6) -> ConductanceMapping:
    return ConductanceMapping(g_min_siemens=low, g_max_siemens=high, pairs=pairs)


def weights(seed: int = 0) -> Tensor:
    """Weights that fill the window, so that aihwkit's converters scale them by 1."""
    drawn = 2.0 * torch.rand(7, 5, generator=torch.Generator().manual_seed(seed)) - 1.0
    drawn[0, 0] = 1.0
    return drawn.double()


AIHWKIT: dict[int, Any] = {
    1: SinglePairConductanceConverter(g_max=40.0, g_min=1.0),
    2: DualPairConductanceConverter([1.0, 1.0], g_max=40.0, g_min=1.0),
    3: NPairConductanceConverter([1.0, 1.0, 1.0], g_max=40.0, g_min=1.0),
}


@pytest.mark.parametrize("pairs", AIHWKIT)
def test_pairs_hold_what_aihwkits_converters_give_them(pairs: int) -> None:
    expected, _ = AIHWKIT[pairs].convert_to_conductances(weights())
    mapping = window(pairs)
    found = mapping.to_siemens(mapping.positions(weights())) * 1e6
    assert mapping.cells_per_weight == len(expected) == 2 * pairs
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pairs", AIHWKIT)
def test_pairs_anywhere_in_the_window_mean_what_aihwkit_reads(pairs: int) -> None:
    mapping = window(pairs)
    positions = 2.0 * torch.rand(2 * pairs, 7, 5, dtype=torch.float64) - 1.0
    cells = list(mapping.to_siemens(positions) * 1e6)
    _, params = AIHWKIT[pairs].convert_to_conductances(weights())
    expected = AIHWKIT[pairs].convert_back_to_weights(cells, params)
    torch.testing.assert_close(mapping.weights(positions), expected, rtol=1e-9, atol=1e-9)


def test_a_single_cell_lies_around_the_middle_of_the_window() -> None:
    mapping = window(0, 20e-6, 80e-6)
    cells = mapping.to_siemens(mapping.positions(torch.tensor([-1.0, 0.0, 0.5]).double())) * 1e6
    torch.testing.assert_close(cells, torch.tensor([[20.0, 50.0, 65.0]]).double())
    assert mapping.cells_per_weight == 1


@given(seed=st.integers(0, 2**32), pairs=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_positions_and_weights_undo_each_other(seed: int, pairs: int) -> None:
    mapping = window(pairs)
    positions = mapping.positions(weights(seed))
    assert positions.shape == (mapping.cells_per_weight, 7, 5)
    assert float(positions.abs().max()) <= 1.0
    torch.testing.assert_close(mapping.weights(positions), weights(seed), rtol=1e-12, atol=1e-12)
    siemens = mapping.to_siemens(positions)
    torch.testing.assert_close(mapping.to_positions(siemens), positions, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**32), pairs=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_one_cell_moves_its_weight_by_its_share(seed: int, pairs: int) -> None:
    encoding = CellEncoding(mapping=window(pairs), states=(0.0, 0.8))
    states = encoding.to_states(weights(seed))
    moved = states.clone()
    moved[0] += 0.01
    change = encoding.to_weights(moved) - encoding.to_weights(states)
    torch.testing.assert_close(change, torch.full_like(change, 0.01 * encoding.weight_per_state))
    moved = (
        states + 0.01 * torch.tensor([1.0, -1.0]).repeat(pairs)[:, None, None] if pairs else moved
    )
    change = encoding.to_weights(moved) - encoding.to_weights(states)
    torch.testing.assert_close(change, torch.full_like(change, encoding.weight_tolerance(0.01)))


def test_states_stand_for_the_ends_of_the_window() -> None:
    encoding = CellEncoding(mapping=window(1), states=(0.1, 0.9))
    ends = torch.tensor([0.1, 0.5, 0.9]).double()
    expected = torch.tensor([1.0, 20.5, 40.0]).double()
    torch.testing.assert_close(encoding.to_siemens(ends) * 1e6, expected)
    torch.testing.assert_close(encoding.from_siemens(expected / 1e6), ends)
    assert encoding.siemens_per_state == pytest.approx(39e-6 / 0.8)


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_aihwkits_noise_models_take_the_converter(pairs: int) -> None:
    model = PCMLikeNoiseModel(g_converter=window(pairs).converter(), prog_noise_scale=0.0)
    programmed, drift = model.apply_programming_noise(weights().float())
    torch.testing.assert_close(programmed, weights().float(), rtol=1e-5, atol=1e-6)
    assert len(drift) == window(pairs).cells_per_weight


def test_the_converter_says_what_it_is() -> None:
    assert str(window(0).converter()) == "OffsetConverter(g_max=40.00, g_min=1.00)"


def test_fewer_than_no_pairs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"pairs of 0 or more, got -1\. Give 0"):
        window(-1)


@pytest.mark.parametrize("states", [(1.0, -1.0), (0.5, 0.5)])
def test_states_out_of_order_are_refused(states: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="lower end below that of the upper end"):
        CellEncoding(mapping=window(0), states=states)
