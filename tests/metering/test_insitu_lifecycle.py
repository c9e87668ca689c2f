"""A watch over training in place: models that change under it, start, stop, leaving no trace."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    PulseType,
    SingleRPUConfig,
    TransferCompound,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.rpu_base import tiles
from torch import Generator, Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, StageError, UnsupportedTileError
from aihwkit_lora.metering.insitu import PulseWatch, watch_pulses
from aihwkit_lora.programming.pulse_trains import PulseTrains

STEP = 2.0**-10
CERTAIN = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
RANDOM = UpdateParameters()
IDEAL = ConstantStepDevice(
    dw_min=STEP,
    dw_min_dtod=0.0,
    dw_min_std=0.0,
    up_down_dtod=0.0,
    w_max=100.0,
    w_min=-100.0,
    w_max_dtod=0.0,
    w_min_dtod=0.0,
)


def single(update: UpdateParameters) -> SingleRPUConfig:
    config = SingleRPUConfig(device=IDEAL, update=update)
    config.forward.is_perfect = config.backward.is_perfect = True
    return config


def net(update: UpdateParameters = CERTAIN) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = (AnalogLinear(*size, rpu_config=single(update)) for size in ((5, 4), (4, 3)))
    return nn.Sequential(first, nn.Tanh(), last)


def layer_of(update: UpdateParameters = RANDOM) -> nn.Sequential:
    return nn.Sequential(AnalogLinear(5, 4, bias=False, rpu_config=single(update)))


def vectors(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=Generator().manual_seed(seed))


def weights(model: nn.Module) -> list[Tensor]:
    return [
        tile.tile.get_weights() for each in (model[0], model[2]) for tile in each.analog_tiles()
    ]


def counted(ledger: al.Ledger) -> tuple[int, int]:
    return ledger.total()["set_pulses"], ledger.total()["reset_pulses"]


def sgd(model: nn.Module) -> AnalogSGD:
    optimizer = AnalogSGD(model.parameters(), lr=0.05)
    optimizer.regroup_param_groups()
    return optimizer


def learn(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = dict(vars(tiles.AnalogTile))
    yield
    assert dict(vars(tiles.AnalogTile)) == before


# ------------------------------------------------------------------ models that change meanwhile


def test_loaded_states_and_new_layers_are_counted_on() -> None:
    model, ledger = net(), al.Ledger()
    saved = copy.deepcopy(model).state_dict()
    with watch_pulses(model, ledger, phase="learn"):
        learn(model, sgd(model), vectors(1))
        once = counted(ledger)
        model.load_state_dict(saved)
        learn(model, sgd(model), vectors(1))
        assert counted(ledger) == (2 * once[0], 2 * once[1])
        model[2] = AnalogLinear(4, 1, rpu_config=single(CERTAIN))
        before = weights(model)
        learn(model, sgd(model), vectors(1, seed=3))
    # A single vector moves a cell one way only, by one step per pulse.
    steps = torch.cat(
        [(a - b).flatten() / STEP for a, b in zip(weights(model), before, strict=True)]
    ).round()
    rose, fell = (int((way * steps).clamp(min=0).sum()) for way in (1, -1))
    assert counted(ledger) == (2 * once[0] + rose, 2 * once[1] + fell)


def test_a_layer_that_cannot_be_counted_does_not_slip_in() -> None:
    model, ledger = net(), al.Ledger()
    cell = TransferCompound(unit_cell_devices=[IDEAL, IDEAL])
    with watch_pulses(model, ledger, phase="learn"):
        model[2] = AnalogLinear(4, 3, rpu_config=UnitCellRPUConfig(device=cell))
        before = weights(model)
        model(vectors(1)).sum().backward()
        with pytest.raises(UnsupportedTileError, match=r"layer '2': .*TransferCompound"):
            sgd(model[2]).step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_copies_and_strangers_are_not_counted() -> None:
    model, ledger = net(), al.Ledger()
    with watch_pulses(model, ledger, phase="learn"):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), net()):
            learn(twin, sgd(twin), vectors(2))
        assert ledger.layers() == ()
        learn(model, sgd(model), vectors(2))
    assert ledger.layers() == ("0", "2")


# ------------------------------------------------------------------ start and stop


def test_counting_ends_with_the_block_and_may_begin_again() -> None:
    model, ledger = net(), al.Ledger()
    watch = watch_pulses(model, ledger, phase="first")
    watch.stop()

    def fail() -> None:
        with watch:
            learn(model, sgd(model), vectors(1))
            raise KeyError("from the block")

    with pytest.raises(KeyError, match="from the block"):
        fail()
    before = ledger.total()
    learn(model, sgd(model), vectors(1))
    assert ledger.total() == before != al.Counts()
    with watch:
        watch.phase = "second"
        learn(model, sgd(model), vectors(1))
    assert ledger.phases() == ("first", "second")


def test_a_model_is_counted_once_into_a_ledger() -> None:
    model, ledger, other = net(), al.Ledger(), al.Ledger()
    with watch_pulses(model, ledger, phase="a") as watch:
        with pytest.raises(StageError, match="expected a watch that is not running"):
            watch.start()
        with pytest.raises(StageError, match=r"layer '': .* does not count its pulses yet"):
            watch_pulses(model[2], ledger, phase="b").start()
        with watch_pulses(net(), ledger, phase="c"), watch_pulses(model, other, phase="d"):
            learn(model, sgd(model), vectors(2))
        learn(model, sgd(model), vectors(2))
    assert ledger.phases() == ("a",)
    assert other.total() != al.Counts()
    assert ledger.total().minus(other.total()) != al.Counts()


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected one of simulated, mean, got 'exact'"):
        watch_pulses(net(), al.Ledger(), phase="learn", method="exact")  # type: ignore[arg-type]


def test_wear_has_to_be_asked_for() -> None:
    with pytest.raises(StageError, match="Pass wear=True"):
        watch_pulses(net(), al.Ledger(), phase="learn").wear()


# ------------------------------------------------------------------ nothing else changes


@pytest.mark.parametrize("method", ["simulated", "mean"])
@pytest.mark.parametrize("wear", [False, True])
def test_aihwkit_draws_the_same_numbers(method: Any, wear: bool) -> None:
    # aihwkit 1.2.0 draws from C's rand(). Its list of normal numbers differs from tile to tile, so
    # the same tiles are trained twice, with every noise on.
    torch.manual_seed(0)
    model = nn.Sequential(AnalogLinear(5, 4, bias=False, rpu_config=SingleRPUConfig()))
    (tile,) = model[0].analog_tiles()
    start, found = tile.tile.get_weights(), []
    for watch in (None, watch_pulses(model, al.Ledger(), phase="x", method=method, wear=wear)):
        tile.tile.set_weights(start)
        ctypes.CDLL(None).srand(7)
        torch.manual_seed(1)
        if watch is not None:
            watch.start()
        for x in vectors(20).split(4):
            learn(model, sgd(model), x)
        if watch is not None:
            watch.stop()
        found.append((tile.tile.get_weights(), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], start)


def updated(watch: PulseWatch, model: nn.Module, updates: range) -> None:
    (tile,) = model[0].analog_tiles()
    with watch:
        for number in updates:
            tile.update(vectors(3, seed=number), vectors(3, 4, seed=number))


@pytest.mark.parametrize("method", ["simulated", "mean"])
def test_an_interrupted_count_goes_on_as_if_nothing_had_happened(method: Any) -> None:
    ledgers = []
    for parts in ([range(6)], [range(2), range(2, 6)]):
        model = layer_of()
        ledger, state = al.Ledger(), {"seed": 5, "updates": 0}
        for part in parts:
            watch = watch_pulses(model, ledger, phase="learn", method=method)
            watch.load_state_dict(state)
            updated(watch, model, part)
            state = watch.state_dict()
        ledgers.append(ledger)
        assert state == {"seed": 5, "updates": 6}
    assert ledgers[0].total() == ledgers[1].total() != al.Counts()
    another = al.Ledger()
    updated(watch_pulses(model, another, phase="learn", method=method, seed=6), model, range(6))
    assert another.total() != ledgers[0].total()


def test_means_lose_no_pulse_to_rounding() -> None:
    # Three vectors expect less than one pulse; 4000 updates add up to their mean.
    model = layer_of()
    (tile,) = model[0].analog_tiles()
    tile.set_learning_rate(1e-5)
    x, d = vectors(3), vectors(3, 4)
    mean = PulseTrains(update=RANDOM, granularity=STEP).mean(x, d, 1e-5)
    assert 0.01 < min(mean) < max(mean) < 1.0
    ledger = al.Ledger()
    with watch_pulses(model, ledger, phase="learn", method="mean"):
        for _ in range(4000):
            tile.update(x, d)
    for ours, expected in zip(counted(ledger), mean, strict=True):
        # Six standard deviations of 4000 coins: fails in less than 1 of 10^8.
        assert abs(ours - 4000 * expected) < 6 * (4000 * expected * (1 - expected)) ** 0.5


def test_a_thousand_steps_leave_no_tensors_behind() -> None:
    model, ledger = net(RANDOM), al.Ledger()
    optimizer, x = sgd(model), vectors(2)
    with watch_pulses(model, ledger, phase="learn", wear=True):
        for _ in range(20):
            learn(model, optimizer, x)
        gc.collect()
        before = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        for _ in range(1000):
            learn(model, optimizer, x)
        gc.collect()
        assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) <= before
