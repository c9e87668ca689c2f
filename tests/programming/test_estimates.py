"""Writing by statistics: the distributions drawn, and the laws they share with the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.estimates import write_mean, write_sampled
from aihwkit_lora.programming.response import CellState

CELLS = 100_000


def policy(**fields: Any) -> WritePolicy:
    defaults = {"device": ReRamArrayOMPresetDevice, "tolerance": 0.02, "max_pulses": 60}
    return WritePolicy(**defaults | fields)


def blank(*shape: int) -> CellState:
    return CellState(torch.zeros(shape), torch.zeros(shape))


def spread_targets(*shape: int) -> Tensor:
    """Half of the targets above the cells, half below, all out of tolerance."""
    sign = torch.where(torch.arange(math.prod(shape)) % 2 == 0, 1.0, -1.0)
    return (0.5 * sign).view(shape)


def test_sampled_pulses_are_log_normal_up_to_the_budget() -> None:
    target = spread_targets(CELLS)
    result = write_sampled(target, blank(CELLS), policy(), Generator().manual_seed(0))
    pulses = result.pulses.double()
    assert result.level is Level.SAMPLED
    assert float(pulses.median()) == 5.0
    # Share above 60: P(Z > ln(60.5 / 5) / 1.06) = 0.93 %; 5 standard errors.
    share = 0.5 * math.erfc(math.log(60.5 / 5) / 1.06 / math.sqrt(2))
    failed = float(result.failed.float().mean())
    assert failed == pytest.approx(share, abs=5 * math.sqrt(share / CELLS))
    assert bool((result.pulses[result.failed] == 60).all())
    # Mean of the log-normal, 5 exp(1.06^2 / 2) = 8.77, less what the budget cuts off.
    assert 8.2 < float(pulses.mean()) < 8.77
    half = float(result.set_pulses.sum() / result.pulses.sum())
    assert half == pytest.approx(0.5, abs=0.005)


def test_sampled_cells_end_in_tolerance_and_failed_ones_stay() -> None:
    target = spread_targets(CELLS)
    result = write_sampled(target, blank(CELLS), policy(), Generator().manual_seed(0))
    error = (result.state.apparent - target)[~result.failed]
    assert float(error.abs().max()) <= 0.02 + 1e-6
    assert float(error.std()) == pytest.approx(0.02 / math.sqrt(3), rel=0.02)
    assert bool((result.state.apparent[result.failed] == 0.0).all())


def test_sampled_counts_follow_the_given_statistics_and_the_seed() -> None:
    target = spread_targets(1000)
    results = [
        write_sampled(
            target, blank(1000), policy(), Generator().manual_seed(1), median_pulses=7, sigma_ln=0.0
        )
        for _ in range(2)
    ]
    assert results[0].pulses.unique().tolist() == [7]
    assert torch.equal(results[0].state.apparent, results[1].state.apparent)
    # The odd pulse goes towards the target.
    assert results[0].set_pulses[:2].tolist() == [4, 3]


def test_sampled_cells_need_at_least_one_pulse() -> None:
    target = spread_targets(1000)
    result = write_sampled(
        target, blank(1000), policy(), Generator().manual_seed(0), median_pulses=0.1
    )
    assert int(result.pulses.min()) == 1


def test_sampled_verification_has_noise() -> None:
    noisy = policy(verify_noise=0.02, verify_averages=4)
    result = write_sampled(torch.zeros(CELLS), blank(CELLS), noisy, Generator().manual_seed(0))
    share = math.erfc(2 / math.sqrt(2))  # 0.02 is two standard deviations of the average
    found = float((result.pulses > 0).float().mean())
    assert found == pytest.approx(share, abs=5 * math.sqrt(share / CELLS))
    assert torch.equal(result.verify_reads, 4 * (result.pulses + 1))


@given(cells=st.integers(0, 200), mean=st.floats(0.0, 50.0))
@settings(max_examples=50, deadline=None)
def test_mean_counts_add_up_to_the_mean_and_differ_by_one_at_most(cells: int, mean: float) -> None:
    result = write_mean(spread_targets(cells), blank(cells), policy(), mean_pulses=mean)
    assert abs(int(result.pulses.sum()) - mean * cells) <= 1.0
    assert torch.equal(result.state.apparent, spread_targets(cells))
    assert not bool(result.failed.any())
    if cells:
        assert int(result.pulses.max() - result.pulses.min()) <= 1


def test_the_default_mean_is_neurram_s() -> None:
    result = write_mean(spread_targets(100, 100), blank(100, 100), policy())
    assert result.level is Level.MEAN
    assert int(result.pulses.sum()) == 85_200
    # 8.52 pulses per cell: 4800 cells take 8 and 5200 take 9, with one SET more or less each.
    assert abs(int(result.set_pulses.sum()) - 42_600) <= 5_200


@pytest.mark.parametrize("level", ["sampled", "mean"])
def test_cells_in_tolerance_cost_no_pulse_and_one_verification(level: str) -> None:
    target = torch.zeros(3, 4)
    target[0, 0] = 0.3
    settled = policy(verify_averages=5, verify_discarded=3)
    if level == "mean":
        result = write_mean(target, blank(3, 4), settled)
    else:
        result = write_sampled(target, blank(3, 4), settled, Generator().manual_seed(0))
    assert int((result.pulses > 0).sum()) == 1
    assert bool((result.verify_reads.flatten()[1:] == 8).all())
    assert torch.equal(result.state.apparent.flatten()[1:], torch.zeros(11))
    assert result.counts()["programmed_cells"] == 12
    assert result.counts()["pulsed_cells"] == 1


def test_statistics_out_of_range_are_refused() -> None:
    target, state, generator = torch.zeros(2), blank(2), Generator()
    with pytest.raises(ConfigurationError, match="median_pulses above 0 and sigma_ln"):
        write_sampled(target, state, policy(), generator, median_pulses=0.0)
    with pytest.raises(ConfigurationError, match=r"got 5\.0 and -1\.0"):
        write_sampled(target, state, policy(), generator, sigma_ln=-1.0)
    with pytest.raises(ConfigurationError, match="mean_pulses of 0 or more, got -1"):
        write_mean(target, state, policy(), mean_pulses=-1)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="of one shape"):
        write_mean(torch.zeros(2), blank(3), policy())
