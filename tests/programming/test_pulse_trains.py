"""Pulse trains against aihwkit's C++ tile, whose ideal device moves by one step per pulse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from aihwkit.simulator.configs import PulseType, SingleRPUConfig, UpdateParameters
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    PowStepReferenceDevice,
    PulsedDevice,
    SoftBoundsReferenceDevice,
)
from aihwkit.simulator.tiles import AnalogTile
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import Generator, Tensor

from aihwkit_lora.errors import ConfigurationError, UnsupportedTileError
from aihwkit_lora.programming.pulse_trains import Pulses, PulseTrains

# Chance that one statistical comparison of right code fails. The file makes about 3000, most of
# them of numbers that aihwkit draws without a seed: fewer than 1 of 300,000 runs fails by chance.
ALPHA = 1e-9

STEP = 2.0**-10
"""A step of the ideal device; a power of 2, so that weights are exact sums of steps."""

WIDE: dict[str, float] = {"w_max": 1e3, "w_min": -1e3, "w_max_dtod": 0.0, "w_min_dtod": 0.0}
EQUAL: dict[str, float] = {"dw_min_dtod": 0.0, "dw_min_std": 0.0, "up_down_dtod": 0.0}
IDEAL: dict[str, float] = {"dw_min": STEP, **WIDE, **EQUAL}

STOCHASTIC = [PulseType.STOCHASTIC_COMPRESSED, PulseType.STOCHASTIC]
DETERMINISTIC = [PulseType.MEAN_COUNT, PulseType.DETERMINISTIC_IMPLICIT]
UNMANAGED: dict[str, Any] = {"update_management": False, "update_bl_management": False}
MANAGEMENT: list[dict[str, Any]] = [
    UNMANAGED,
    {**UNMANAGED, "fixed_bl": False},
    {"update_management": True, "update_bl_management": False},
    {"update_management": True, "update_bl_management": False, "fixed_bl": False},
    {"update_management": False, "update_bl_management": True},
    {"um_grad_scale": 0.5},
]


def tile_of(update: UpdateParameters, ins: int, outs: int, **device: Any) -> AnalogTile:
    ideal = ConstantStepDevice(**{**IDEAL, **device})
    tile = AnalogTile(outs, ins, SingleRPUConfig(device=ideal, update=update), bias=False)
    tile.tile.set_weights(torch.zeros(outs, ins))
    return tile


def raised(tile: AnalogTile, x: Tensor, d: Tensor, learning_rate: float) -> Tensor:
    """Steps by which aihwkit's tile raises its weights, cell by cell."""
    before = tile.tile.get_weights().clone()
    tile.tile.set_learning_rate(learning_rate)
    tile.tile.update(x, d, False)
    return (tile.tile.get_weights().double() - before.double()) / STEP


def vectors(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, generator=Generator().manual_seed(seed))


def margin(variance: Tensor, largest: float = 1.0, alpha: float = ALPHA) -> Tensor:
    """How far a sum of independent numbers may stray from its mean: Bernstein's inequality."""
    odds = math.log(2.0 / alpha)
    return largest * odds / 3.0 + ((largest * odds / 3.0) ** 2 + 2.0 * variance * odds).sqrt()


# ------------------------------------------------------------------ tiny cases, by hand


def test_products_of_implicit_trains() -> None:
    update = UpdateParameters(
        desired_bl=10, pulse_type=PulseType.DETERMINISTIC_IMPLICIT, **UNMANAGED
    )
    # sqrt(0.01 / (0.001 · 10)) is 1, so a cell takes 10·x·d pulses.
    trains = PulseTrains(update=update, granularity=0.001)
    x, d = torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.4, -0.8]])
    pulses = trains.simulate(x, d, 0.01, Generator())
    assert pulses.reset_pulses.tolist() == [[2, 0, 0], [0, 8, 0]]
    assert pulses.set_pulses.tolist() == [[0, 4, 0], [4, 0, 0]]
    assert trains.count(x, d, 0.01, Generator()) == (8, 10)


def test_a_train_holds_no_more_pulses_than_it_is_long() -> None:
    update = UpdateParameters(
        desired_bl=10, pulse_type=PulseType.DETERMINISTIC_IMPLICIT, **UNMANAGED
    )
    trains = PulseTrains(update=update, granularity=0.001)
    x, d = torch.tensor([[5.0, 0.5]]), torch.tensor([[3.0]])
    assert trains.simulate(x, d, 0.01, Generator()).reset_pulses.tolist() == [[10, 5]]


def test_implicit_trains_of_few_levels() -> None:
    update = UpdateParameters(
        desired_bl=10,
        pulse_type=PulseType.DETERMINISTIC_IMPLICIT,
        x_res_implicit=0.25,
        d_res_implicit=0.5,
        **UNMANAGED,
    )
    trains = PulseTrains(update=update, granularity=0.001)
    # x becomes 0.5 and 0, d becomes 0.5 and 1: 2.5 pulses round to the even 2, 5 stay.
    x, d = torch.tensor([[0.6, 0.1]]), torch.tensor([[0.7, 0.8]])
    assert trains.simulate(x, d, 0.01, Generator()).reset_pulses.tolist() == [[2, 0], [5, 0]]


def test_mean_counts_round_each_train_first() -> None:
    update = UpdateParameters(desired_bl=4, pulse_type=PulseType.MEAN_COUNT, **UNMANAGED)
    trains = PulseTrains(update=update, granularity=0.25)
    # x pulses round(4 · 0.6) = 2 times, d round(4 · 0.9) = 4 times, of which 2 · 4 / 4 meet.
    x, d = torch.tensor([[0.6, 0.1]]), torch.tensor([[0.9]])
    assert trains.simulate(x, d, 1.0, Generator()).reset_pulses.tolist() == [[2, 0]]


def test_stochastic_trains_that_pulse_all_the_time_are_certain() -> None:
    trains = PulseTrains(update=UpdateParameters(desired_bl=7, **UNMANAGED), granularity=0.001)
    x, d = torch.tensor([[2.0, -2.0, 0.0]]), torch.tensor([[3.0]])
    for pulses in (trains.simulate(x, d, 1.0, Generator()), trains.expect(x, d, 1.0)):
        assert pulses.reset_pulses.tolist() == [[7, 0, 0]]
        assert pulses.set_pulses.tolist() == [[0, 7, 0]]


def test_management_shortens_trains_to_what_the_largest_product_needs() -> None:
    trains = PulseTrains(update=UpdateParameters(desired_bl=10), granularity=0.5)
    x, d = torch.tensor([[1.0, 0.0], [1.0, 0.2], [9.0, 9.0]]), torch.tensor([[-1.0], [0.7], [9.0]])
    assert trains.lengths(x, d, 1.0).tolist() == [2, 2, 10]
    # Managed, the largest product fills its train where it needs a whole number of pulses.
    assert trains.expect(x[:1], d[:1], 1.0).set_pulses.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("fixed", [True, False])
def test_a_train_is_as_long_as_its_settings_say(fixed: bool) -> None:
    update = UpdateParameters(desired_bl=5, fixed_bl=fixed, **UNMANAGED)
    trains = PulseTrains(update=update, granularity=0.25)
    x, d = torch.ones(1, 2), torch.ones(1, 3)
    assert trains.lengths(x, d, 1.0).tolist() == [5]
    assert trains.lengths(x, d, 2.1).tolist() == [5 if fixed else 9]


@pytest.mark.parametrize("pulse_type", STOCHASTIC + DETERMINISTIC)
@pytest.mark.parametrize("management", MANAGEMENT)
def test_nothing_in_nothing_out(pulse_type: PulseType, management: dict[str, Any]) -> None:
    update = UpdateParameters(pulse_type=pulse_type, **management)
    trains = PulseTrains(update=update, granularity=STEP)
    some, none = vectors(5, 3, seed=0), torch.zeros(5, 3)
    for x, d, rate in ((none, some, 1.0), (some, none, 1.0), (some, some, 0.0)):
        assert trains.count(x, d, rate, Generator()) == (0, 0)
    assert trains.count(some[:0], some[:0], 1.0, Generator()) == (0, 0)
    mixed = torch.cat([none, some]), torch.cat([some, some])
    one, two = (trains.count(*batch, 1.0, Generator().manual_seed(1)) for batch in (mixed, mixed))
    assert one == two != (0, 0)


# ------------------------------------------------------------------ against aihwkit's C++ tile


@pytest.mark.parametrize("learning_rate", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("length", [1, 10, 31])
@pytest.mark.parametrize("management", MANAGEMENT)
@pytest.mark.parametrize("pulse_type", DETERMINISTIC)
def test_deterministic_trains_are_those_of_aihwkit(
    pulse_type: PulseType, management: dict[str, Any], length: int, learning_rate: float
) -> None:
    update = UpdateParameters(
        desired_bl=length,
        pulse_type=pulse_type,
        res=0.05,
        x_res_implicit=0.02,
        d_res_implicit=0.01,
        **management,
    )
    tile, trains = tile_of(update, 6, 5), PulseTrains(update=update, granularity=STEP)
    x, d = vectors(20, 6, seed=1), vectors(20, 5, seed=2)
    for row in range(len(x)):  # the signs of one vector leave each cell a single direction
        one = slice(row, row + 1)
        steps = raised(tile, x[one], d[one], learning_rate)
        pulses = trains.simulate(x[one], d[one], learning_rate, Generator())
        assert torch.equal(pulses.set_pulses, steps.clamp(min=0).long())
        assert torch.equal(pulses.reset_pulses, (-steps).clamp(min=0).long())
    assert trains.exact
    net = raised(tile, x, d, learning_rate)
    pulses = trains.simulate(x, d, learning_rate, Generator())
    assert torch.equal(pulses.set_pulses - pulses.reset_pulses, net.long())


@pytest.mark.parametrize("learning_rate", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("length", [1, 10, 31])
@pytest.mark.parametrize("management", MANAGEMENT)
@pytest.mark.parametrize("pulse_type", STOCHASTIC)
def test_stochastic_trains_have_the_mean_of_aihwkit(
    pulse_type: PulseType, management: dict[str, Any], length: int, learning_rate: float
) -> None:
    update = UpdateParameters(desired_bl=length, pulse_type=pulse_type, **management)
    tile, trains = tile_of(update, 4, 3), PulseTrains(update=update, granularity=STEP)
    x, d = vectors(2000, 4, seed=1).abs(), vectors(2000, 3, seed=2).abs()
    mean = trains.expect(x, d, learning_rate).reset_pulses
    # Slots of a cell are independent, each with a pulse or without, so the variance is below this.
    allowed = margin(mean)
    observed = -raised(tile, x, d, learning_rate)
    assert bool(((observed - mean).abs() < allowed).all())
    drawn = trains.simulate(x, d, learning_rate, Generator().manual_seed(3)).reset_pulses
    assert bool(((drawn - mean).abs() < allowed).all())
    slots = float(trains.lengths(x, d, learning_rate).sum())
    assert bool((observed <= slots).all())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_stochastic_trains_go_the_way_of_aihwkit(batch: int) -> None:
    tile = tile_of(UpdateParameters(), 4, 3)
    trains = PulseTrains(update=UpdateParameters(), granularity=STEP)
    x, d = vectors(batch, 4, seed=1), vectors(batch, 3, seed=2)
    repeats = 2000 // batch
    net = sum(raised(tile, x, d, 0.1) for _ in range(repeats))
    pulses = trains.expect(x, d, 0.1)
    mean = repeats * (pulses.set_pulses - pulses.reset_pulses)
    allowed = margin(repeats * (pulses.set_pulses + pulses.reset_pulses))
    assert bool(((net - mean).abs() < allowed).all())


@pytest.mark.parametrize("pulse_type", STOCHASTIC + DETERMINISTIC)
def test_stochastic_rounding_has_the_mean_of_aihwkit(pulse_type: PulseType) -> None:
    length = 10
    update = UpdateParameters(
        desired_bl=length,
        pulse_type=pulse_type,
        sto_round=True,
        res=0.3,
        x_res_implicit=0.3,
        d_res_implicit=0.4,
        **UNMANAGED,
    )
    tile, trains = tile_of(update, 3, 2), PulseTrains(update=update, granularity=STEP)
    x, d = vectors(3000, 3, seed=1).abs(), vectors(3000, 2, seed=2).abs()
    observed = -raised(tile, x, d, 0.002)
    drawn = trains.simulate(x, d, 0.002, Generator().manual_seed(3)).reset_pulses
    # Rounding is shared by all slots of a train: a vector adds up to ten pulses at once.
    allowed = margin(length * observed, largest=length)
    assert bool(((observed - drawn).abs() < 2 * allowed).all())
    assert not trains.exact
    if trains.stochastic:
        mean = trains.expect(x, d, 0.002).reset_pulses
        assert bool(((observed - mean).abs() < allowed).all())


def test_totals_vary_as_those_of_aihwkit() -> None:
    # Cells share the trains of their lines, which shows in the spread of their sum only.
    update = UpdateParameters(**UNMANAGED)
    tile, trains = tile_of(update, 2, 30), PulseTrains(update=update, granularity=STEP)
    x, d = torch.full((1, 2), 0.3), torch.full((1, 30), 0.5)
    rate, generator = 31 * STEP, Generator().manual_seed(3)  # probabilities are x and d themselves
    theirs = [float(-raised(tile, x, d, rate).sum()) for _ in range(600)]
    ours = [trains.count(x, d, rate, generator).reset_pulses for _ in range(600)]
    assert ks_2samp(theirs, ours).pvalue > ALPHA
    chance = torch.full((600, 31 * 60), 0.3 * 0.5)
    alone = torch.bernoulli(chance, generator=generator).sum(1)
    assert ks_2samp(theirs, alone).pvalue < ALPHA


@pytest.mark.parametrize(("learning_rate", "ratio"), [(0.01, 0.94), (0.1, 0.21), (1.0, 0.02)])
def test_the_product_of_inputs_and_gradients_is_no_pulse_count(
    learning_rate: float, ratio: float
) -> None:
    trains = PulseTrains(update=UpdateParameters(), granularity=0.001)
    tile = tile_of(UpdateParameters(), 8, 8, dw_min=0.001)
    x, d = vectors(4000, 8, seed=1).abs(), vectors(4000, 8, seed=2).abs()
    naive = float((learning_rate * (d.T @ x) / 0.001).sum())
    observed = float(-raised(tile, x, d, learning_rate).sum()) * STEP / 0.001
    assert round(observed / naive, 2) == ratio
    assert round(sum(trains.mean(x, d, learning_rate)) / naive, 2) == ratio


FAMILIES: list[PulsedDevice] = [
    ConstantStepDevice(**IDEAL),
    LinearStepDevice(gamma_up=0.0, gamma_down=0.0, gamma_up_dtod=0.0, gamma_down_dtod=0.0, **IDEAL),
    SoftBoundsReferenceDevice(
        **{**IDEAL, "w_max": 1e9, "w_min": -1e9}, subtract_symmetry_point=False
    ),
    ExpStepDevice(A_up=0.0, A_down=0.0, **IDEAL),
    PowStepDevice(pow_gamma=0.0, pow_gamma_dtod=0.0, pow_up_down_dtod=0.0, **IDEAL),
    PowStepReferenceDevice(pow_gamma=0.0, pow_gamma_dtod=0.0, pow_up_down_dtod=0.0, **IDEAL),
    PiecewiseStepDevice(piecewise_up=[1.0], piecewise_down=[1.0], **IDEAL),
]


@pytest.mark.parametrize("device", FAMILIES, ids=lambda device: type(device).__name__)
def test_each_family_takes_the_pulses_that_its_granularity_asks_for(device: PulsedDevice) -> None:
    update = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
    tile = AnalogTile(3, 4, SingleRPUConfig(device=device, update=update), bias=False)
    tile.tile.set_weights(torch.zeros(3, 4))
    (granularity,) = tile.tile.dump_extra()["rpu.rpu_device.weight_granularity"]
    trains = PulseTrains(update=update, granularity=granularity)
    x, d = vectors(1, 4, seed=1), vectors(1, 3, seed=2)
    steps = raised(tile, x, d, 0.05)
    pulses = trains.simulate(x, d, 0.05, Generator())
    assert torch.equal(pulses.set_pulses - pulses.reset_pulses, steps.round().long())
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert int(pulses.set_pulses.sum()) > 0


# ------------------------------------------------------------------ laws


@given(
    seed=st.integers(0, 2**31),
    pulse_type=st.sampled_from(STOCHASTIC + DETERMINISTIC),
    management=st.sampled_from(MANAGEMENT),
    learning_rate=st.sampled_from([0.001, 0.1, 2.0]),
    batch=st.integers(0, 5),
)
def test_totals_are_the_sums_of_all_cells(
    seed: int,
    pulse_type: PulseType,
    management: dict[str, Any],
    learning_rate: float,
    batch: int,
) -> None:
    update = UpdateParameters(pulse_type=pulse_type, desired_bl=9, res=0.01, **management)
    trains = PulseTrains(update=update, granularity=0.002)
    x, d = vectors(batch, 3, seed), vectors(batch, 2, seed + 1)
    count = trains.count(x, d, learning_rate, Generator().manual_seed(seed))
    pulses = trains.simulate(x, d, learning_rate, Generator().manual_seed(seed))
    assert count == tuple(int(each.sum()) for each in pulses)
    most = int(trains.lengths(x, d, learning_rate).sum())
    assert int((pulses.set_pulses + pulses.reset_pulses).max()) <= most
    direction = x[:, None, :] * d[:, :, None]
    assert not bool(pulses.set_pulses[(direction >= 0).all(0)].any())
    assert not bool(pulses.reset_pulses[(direction <= 0).all(0)].any())


@given(seed=st.integers(0, 2**31), split=st.integers(0, 6), rounding=st.booleans())
def test_means_add_up_over_batches_and_swap_with_the_sign(
    seed: int, split: int, rounding: bool
) -> None:
    update = UpdateParameters(res=0.1, sto_round=rounding)
    trains = PulseTrains(update=update, granularity=0.002)
    x, d = vectors(6, 3, seed), vectors(6, 2, seed + 1)
    whole = trains.mean(x, d, 0.1)
    parts = [trains.mean(x[part], d[part], 0.1) for part in (slice(split), slice(split, None))]
    assert whole == pytest.approx([sum(each) for each in zip(*parts, strict=True)])
    assert trains.mean(x, -d, 0.1) == pytest.approx(whole[::-1])
    expected: Pulses = trains.expect(x, d, 0.1)
    assert whole == pytest.approx([float(each.sum()) for each in expected])


def test_large_batches_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aihwkit_lora.programming.pulse_trains._ELEMENTS", 50)
    for pulse_type in (PulseType.STOCHASTIC_COMPRESSED, PulseType.DETERMINISTIC_IMPLICIT):
        trains = PulseTrains(update=UpdateParameters(pulse_type=pulse_type), granularity=STEP)
        x, d = vectors(300, 4, seed=1).abs(), vectors(300, 3, seed=2).abs()
        count = trains.count(x, d, 0.1, Generator().manual_seed(1))
        pulses = trains.simulate(x, d, 0.1, Generator().manual_seed(1))
        assert count == tuple(int(each.sum()) for each in pulses)
        allowed = margin(torch.tensor(float(count.reset_pulses)), largest=31 * 12)
        naive = trains.mean(x, d, 0.1)[1] if trains.stochastic else count.reset_pulses
        assert abs(count.reset_pulses - naive) <= float(allowed)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("pulse_type", [PulseType.NONE, PulseType.NONE_WITH_DEVICE])
def test_updates_without_pulses_are_refused(pulse_type: PulseType) -> None:
    with pytest.raises(UnsupportedTileError, match=f"trains of pulses, got {pulse_type.name}, "):
        PulseTrains(update=UpdateParameters(pulse_type=pulse_type), granularity=0.1)


@pytest.mark.parametrize("granularity", [0.0, -1.0, math.nan])
def test_a_step_has_to_be_positive(granularity: float) -> None:
    with pytest.raises(ConfigurationError, match="granularity: expected a step above 0, got"):
        PulseTrains(update=UpdateParameters(), granularity=granularity)


def test_a_train_has_to_have_a_pulse() -> None:
    with pytest.raises(ConfigurationError, match="trains of at least 1 pulse, got 0"):
        PulseTrains(update=UpdateParameters(desired_bl=0), granularity=0.1)


def test_inputs_and_gradients_have_to_belong_together() -> None:
    trains = PulseTrains(update=UpdateParameters(), granularity=0.1)
    with pytest.raises(ConfigurationError, match=r"shapes \(2, 3\) and \(4, 3\)"):
        trains.count(torch.ones(2, 3), torch.ones(4, 3), 0.1, Generator())


@pytest.mark.parametrize("learning_rate", [-0.1, math.nan])
def test_learning_rates_are_positive_as_in_aihwkit(learning_rate: float) -> None:
    trains = PulseTrains(update=UpdateParameters(), granularity=0.1)
    with pytest.raises(
        ConfigurationError, match=r"a learning rate of 0 or more, got (-0\.1|nan)\."
    ):
        trains.count(torch.ones(2, 3), torch.ones(2, 3), learning_rate, Generator())


@pytest.mark.parametrize("pulse_type", DETERMINISTIC)
def test_deterministic_trains_have_no_mean_but_a_count(pulse_type: PulseType) -> None:
    trains = PulseTrains(update=UpdateParameters(pulse_type=pulse_type), granularity=0.1)
    for ask in (trains.mean, trains.expect):
        with pytest.raises(ConfigurationError, match=r"stochastic trains, got .*\. Use count or"):
            ask(torch.ones(1, 1), torch.ones(1, 1), 0.1)
