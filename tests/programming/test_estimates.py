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

from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.estimates import write, write_mean, write_sampled
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.write_verify import write_verify

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
    same = policy(statistics=PulseStatistics(median_pulses=7.0, sigma_ln=0.0))
    results = [
        write_sampled(target, blank(1000), same, Generator().manual_seed(1)) for _ in range(2)
    ]
    assert results[0].pulses.unique().tolist() == [7]
    assert torch.equal(results[0].state.apparent, results[1].state.apparent)
    # The odd pulse goes towards the target.
    assert results[0].set_pulses[:2].tolist() == [4, 3]


def test_sampled_cells_need_at_least_one_pulse() -> None:
    target = spread_targets(1000)
    quick = policy(statistics=PulseStatistics(median_pulses=0.1))
    result = write_sampled(target, blank(1000), quick, Generator().manual_seed(0))
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
    given_mean = policy(statistics=PulseStatistics(mean_pulses=mean))
    result = write_mean(spread_targets(cells), blank(cells), given_mean)
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


def test_noise_tells_what_written_cells_hold_and_no_others() -> None:
    target = spread_targets(4, CELLS // 4)
    target[:, 0] = 0.0  # in tolerance already
    asked: list[Tensor] = []

    def noise(targets: Tensor, generator: Generator) -> Tensor:
        asked.append(targets)
        return targets + 0.3 * torch.randn(targets.shape, generator=generator).double()

    state = blank(*target.shape)
    result = write_sampled(target, state, policy(), Generator().manual_seed(0), noise=noise)
    done = (result.pulses > 0) & ~result.failed
    assert bool(result.failed.any())
    assert not bool(done[:, 0].any())
    assert torch.equal(asked[0], target[done])
    assert bool((result.state.apparent[~done] == 0.0).all())
    assert torch.equal(result.state.persistent, result.state.apparent)
    # Standard error of a standard deviation of n normals: sigma / sqrt(2 n); 5 of them.
    spread = float((result.state.apparent - target)[done].std())
    assert spread == pytest.approx(0.3, abs=5 * 0.3 / math.sqrt(2 * 0.98 * CELLS))


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"for each of 10 targets, got shape \(1,\)"):
        write_sampled(
            spread_targets(10),
            blank(10),
            policy(max_pulses=1000),
            Generator().manual_seed(0),
            noise=lambda targets, generator: targets[:1],
        )


def test_one_door_leads_to_every_level() -> None:
    generator = Generator().manual_seed(0)
    cells = PulseResponse.draw(ReRamArrayOMPresetDevice(), (20, 30), generator)
    state, target = cells.fresh(generator), spread_targets(20, 30)

    def same_seed() -> Generator:
        return Generator().manual_seed(3)

    def noise(targets: Tensor, generator: Generator) -> Tensor:
        return targets + 1.0

    direct = {
        Level.SIMULATED: write_verify(target, state, cells, policy(), same_seed()),
        Level.SAMPLED: write_sampled(target, state, policy(), same_seed(), noise=noise),
        Level.MEAN: write_mean(target, state, policy()),
    }
    for level, expected in direct.items():
        result = write(target, state, cells, policy(), same_seed(), level=level, noise=noise)
        assert result.level is level
        assert result.counts() == expected.counts()
        assert {result.counts().level_of(event) for event in result.counts()} == {level}
        assert torch.equal(result.state.apparent, expected.state.apparent)
    plain = write(target, state, cells, policy(), same_seed())
    assert plain.counts() == direct[Level.SIMULATED].counts()


@pytest.mark.parametrize("level", [Level.EXACT, Level.BOUND, "guessed"])
def test_no_other_level_can_be_written_at(level: Any) -> None:
    cells = PulseResponse.draw(ReRamArrayOMPresetDevice(), (2,), Generator().manual_seed(0))
    words = f"expected level 'simulated', 'sampled' or 'mean', got '{level}'"
    with pytest.raises(ConfigurationError, match=words):
        write(torch.zeros(2), blank(2), cells, policy(), Generator(), level=level)


@pytest.mark.parametrize("level", [Level.SIMULATED, Level.SAMPLED, Level.MEAN])
def test_cells_must_have_the_shape_of_their_targets(level: Level) -> None:
    cells = PulseResponse.draw(ReRamArrayOMPresetDevice(), (3,), Generator().manual_seed(0))
    with pytest.raises(ConfigurationError, match=r"of one shape, got \(2,\), \(2,\) and \(3,\)"):
        write(torch.zeros(2), blank(2), cells, policy(), Generator(), level=level)


@pytest.mark.parametrize("level", ["sampled", "mean"])
def test_slots_follow_from_the_pulses_of_each_cell(level: str) -> None:
    shared = policy(order="array", together="row", verify_with="comparator", verify_averages=3)
    cells = PulseResponse.draw(ReRamArrayOMPresetDevice(), (8, 5), Generator().manual_seed(0))
    target, seeded = spread_targets(8, 5), Generator().manual_seed(0)
    result = write(target, blank(8, 5), cells, shared, seeded, level=Level(level))
    columns = result.set_pulses, result.reset_pulses, result.pulses + 1
    most = [int(per_cell.amax(dim=0).sum()) for per_cell in columns]
    counts = result.counts()
    assert [counts["set_slots"], counts["reset_slots"], counts["row_selects"]] == most
    assert counts["verify_slots"] == 3 * most[2]
    assert counts["verify_comparisons"] == 40 + counts.pulses
    assert counts["verify_reads"] == 3 * counts["verify_comparisons"]
    assert counts["verify_conversions"] == 0


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="of one shape"):
        write_mean(torch.zeros(2), blank(3), policy())
