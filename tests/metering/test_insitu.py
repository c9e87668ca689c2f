"""Pulses of training in place, against the weights of aihwkit's own tiles with an ideal device.

Such a device moves by one step per pulse. Within one vector a cell moves one way, so the change of
a weight over an update with a single vector, in steps, is exactly the number of its pulses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aihwkit.nn import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv2dMapped,
    AnalogLinear,
    AnalogLinearMapped,
    AnalogLSTMCell,
    AnalogRNN,
)
from aihwkit.optim import AnalogAdam, AnalogSGD
from aihwkit.simulator.configs import (
    ChoppedTransferCompound,
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    IOParameters,
    OneSidedUnitCell,
    PulseType,
    ReferenceUnitCell,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
    UnitCellRPUConfig,
    UpdateParameters,
    VectorUnitCell,
    VectorUnitCellUpdatePolicy,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice, IdealDevice
from aihwkit.simulator.rpu_base import tiles
from aihwkit.simulator.tiles import AnalogTile
from aihwkit.simulator.tiles.transfer import TorchTransferTile
from torch import Generator, Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.metering.insitu import watch_pulses

STEP = 2.0**-10
CERTAIN = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
RANDOM = UpdateParameters()


def ideal(**fields: Any) -> ConstantStepDevice:
    return ConstantStepDevice(
        dw_min=STEP,
        dw_min_dtod=0.0,
        dw_min_std=0.0,
        up_down_dtod=0.0,
        w_max=100.0,
        w_min=-100.0,
        w_max_dtod=0.0,
        w_min_dtod=0.0,
        **fields,
    )


def single(update: UpdateParameters = CERTAIN, device: Any = None) -> SingleRPUConfig:
    perfect = IOParameters(is_perfect=True)
    return SingleRPUConfig(
        device=device or ideal(), update=update, forward=perfect, backward=copy.copy(perfect)
    )


def unit_cell(cell: Any, update: UpdateParameters = CERTAIN) -> UnitCellRPUConfig:
    return UnitCellRPUConfig(device=cell, update=update)


def net(config: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    config = config or single()
    layers = [AnalogLinear(5, 4, rpu_config=config), AnalogLinear(4, 3, rpu_config=config)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def vectors(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=Generator().manual_seed(seed))


def weights(model: nn.Module) -> dict[str, list[Tensor]]:
    """Weights of all C++ tiles as whole steps, by the name of their layer."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "tile", None), tiles.AnalogTile):
            layer = name.split(".")[0]
            found.setdefault(layer, []).append((module.tile.get_weights() / STEP).double())
    return found


class Oracle:
    """Adds up by how many steps weights rise and fall, over updates with a single vector each."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cells = model, {}
        self._before = weights(model)

    def update(self) -> dict[str, tuple[int, int]]:
        """Note an update, and tell by how many steps weights rose and fell in each layer."""
        took = {}
        for layer, now in weights(self.model).items():
            steps = [(a - b).round() for a, b in zip(now, self._before[layer], strict=True)]
            ups, downs = ([(way * s).clamp(min=0) for s in steps] for way in (1, -1))
            took[layer] = (_whole(ups), _whole(downs))
            known = self.cells.setdefault(layer, [[0] * len(steps), [0] * len(steps)])
            self.cells[layer] = [
                [a + b for a, b in zip(old, new, strict=True)]
                for old, new in zip(known, (ups, downs), strict=True)
            ]
        self._before = weights(self.model)
        return took

    def counts(self, layer: str) -> tuple[int, int]:
        ups, downs = self.cells[layer]
        return _whole(ups), _whole(downs)

    def most(self, layer: str) -> int:
        return max(int((up + down).max()) for up, down in zip(*self.cells[layer], strict=True))


def _whole(steps: list[Tensor]) -> int:
    return int(sum(each.sum() for each in steps))


def counted(ledger: al.Ledger, layer: str | None = None, phase: str | None = None) -> Any:
    total = ledger.total(layer=layer, phase=phase)
    return total["set_pulses"], total["reset_pulses"]


def sgd(model: nn.Module, lr: float = 0.05) -> AnalogSGD:
    optimizer = AnalogSGD(model.parameters(), lr=lr)
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


# ------------------------------------------------------------------ what is counted


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("pulse_type", [PulseType.DETERMINISTIC_IMPLICIT, PulseType.MEAN_COUNT])
def test_deterministic_trains_are_counted_exactly(pulse_type: PulseType, rate: float) -> None:
    model, ledger = net(single(UpdateParameters(pulse_type=pulse_type))), al.Ledger()
    optimizer, oracle = sgd(model, rate), Oracle(model)
    with watch_pulses(model, ledger, phase="learn"):
        for x in vectors(12).split(1):
            learn(model, optimizer, x)
            oracle.update()
    assert ledger.layers() == ("0", "2")
    assert {layer: counted(ledger, layer) for layer in "02"} == {
        layer: oracle.counts(layer) for layer in "02"
    }
    assert min(counted(ledger, "0")) > 0
    assert ledger.total().level == "exact"


@pytest.mark.parametrize("method", ["simulated", "mean"])
@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_stochastic_trains_are_counted_in_law(method: Any, rate: float) -> None:
    model, ledger = net(single(RANDOM)), al.Ledger()
    optimizer, oracle = sgd(model, rate), Oracle(model)
    errors: dict[str, list[Tensor]] = {"0": [], "2": []}
    with watch_pulses(model, ledger, phase="learn", method=method):
        for x in vectors(400).split(1):
            before = {layer: tensor(counted(ledger, layer)) for layer in errors}
            learn(model, optimizer, x)
            took = oracle.update()
            for layer, error in errors.items():
                error.append(tensor(counted(ledger, layer)) - before[layer] - tensor(took[layer]))
    for layer, error in errors.items():
        # Given its inputs, the error of an update has mean 0, so their sum over its own spread is
        # close to normal: |z| > 6.5 in fewer than 1 of 10^9 for the 24 comparisons made here.
        steps = torch.stack(error)
        assert bool((steps.sum(0).abs() < 6.5 * steps.square().sum(0).sqrt()).all())
        assert counted(ledger, layer) == pytest.approx(oracle.counts(layer), rel=0.1)
    assert ledger.total().level == method


def tensor(counts: tuple[int, int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64)


def test_nested_layers_go_by_their_names() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(5, 5), net()), "head": nn.Linear(3, 2)})
    ledger = al.Ledger()
    optimizer = sgd(model)
    with watch_pulses(model, ledger, phase="learn"):
        model["head"](model["body"](vectors(3))).sum().backward()
        optimizer.step()
    assert ledger.layers() == ("body.1.0", "body.1.2")


def test_a_layer_alone_and_a_tile_alone() -> None:
    layer, ledger = AnalogLinear(5, 4, bias=False, rpu_config=single()), al.Ledger()
    with watch_pulses(layer, ledger, phase="layer"):
        learn(layer, sgd(layer), vectors(1))
    assert ledger.layers() == ("",)
    holder = nn.ModuleDict({"array": layer.analog_module})
    with watch_pulses(holder, ledger, phase="tile"):
        learn(layer, sgd(layer), vectors(1))
    assert ledger.layers() == ("", "array")


def test_mapped_layers_add_up_over_their_tiles() -> None:
    model, ledger = nn.Sequential(AnalogLinearMapped(7, 5, rpu_config=narrow())), al.Ledger()
    assert len(list(model[0].analog_tiles())) == 6
    optimizer, oracle = sgd(model), Oracle(model)
    with watch_pulses(model, ledger, phase="learn", wear=True) as watch:
        for x in vectors(8, 7).split(1):
            learn(model, optimizer, x)
            oracle.update()
    assert counted(ledger, "0") == oracle.counts("0")
    assert watch.wear() == {"0": oracle.most("0")}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_convolutions_take_pulses_at_each_position(indexed: bool, bias: bool) -> None:
    config = single()
    config.mapping.digital_bias = False
    layer = AnalogConv2d(
        2, 3, 3, stride=2, padding=1, bias=bias, rpu_config=config, use_indexed=indexed
    )
    model, ledger = nn.Sequential(layer), al.Ledger()
    optimizer, oracle = sgd(model, 0.01), Oracle(model)
    images = torch.rand(4, 2, 6, 5, generator=Generator().manual_seed(0))
    with watch_pulses(model, ledger, phase="learn", wear=True) as watch:
        model(images).sum().backward()  # all positive, so that weights only fall
        optimizer.step()
    oracle.update()
    assert counted(ledger) == oracle.counts("0") == (0, oracle.counts("0")[1])
    assert watch.wear()["0"] == oracle.most("0") > 0


def test_convolutions_along_one_dimension() -> None:
    layer = AnalogConv1d(2, 3, 3, padding=1, rpu_config=single())
    model, ledger = nn.Sequential(layer), al.Ledger()
    optimizer, oracle = sgd(model, 0.01), Oracle(model)
    with watch_pulses(model, ledger, phase="learn"):
        model(torch.rand(4, 2, 6)).sum().backward()
        optimizer.step()
    oracle.update()
    assert counted(ledger) == oracle.counts("0") == (0, oracle.counts("0")[1])
    assert counted(ledger)[1] > 0


def narrow(most: int = 3) -> SingleRPUConfig:
    config = single()
    config.mapping.max_input_size = config.mapping.max_output_size = most
    return config


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: AnalogLinear(5, 4, rpu_config=single()), (9, 5)),
        (lambda: AnalogConv2dMapped(2, 6, 2, rpu_config=narrow(5)), (3, 2, 4, 4)),
        (lambda: AnalogRNN(AnalogLSTMCell, 5, 4, rpu_config=single()), (6, 2, 5)),
    ],
)
def test_set_less_reset_is_where_the_weights_went(
    layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, ledger = nn.Sequential(layer()), al.Ledger()
    optimizer, before = sgd(model, 0.02), states(model)
    with watch_pulses(model, ledger, phase="learn"):
        for seed in range(3):
            out = model(torch.randn(shape, generator=Generator().manual_seed(seed)))
            (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
            optimizer.step()
    set_pulses, reset_pulses = counted(ledger)
    went = [(now - old).round() for now, old in zip(states(model), before, strict=True)]
    assert set_pulses - reset_pulses == _whole(went)
    assert min(set_pulses, reset_pulses) > 0


@pytest.mark.parametrize(("transposed", "bias"), [(True, False), (False, True), (True, True)])
def test_tiles_with_transposed_inputs_and_an_analogue_bias(transposed: bool, bias: bool) -> None:
    config = single()
    config.mapping.digital_bias = False
    model = nn.Sequential(AnalogTile(4, 5, config, bias, transposed, transposed))
    model[0].tile.set_weights(torch.zeros(4, 5 + bias))
    model[0].set_learning_rate(0.01)
    ledger, oracle = al.Ledger(), Oracle(model)
    x, d = vectors(1), vectors(1, 4)
    with watch_pulses(model, ledger, phase="learn"):
        model[0].update(*((x.T, d.T) if transposed else (x, d)))
    oracle.update()
    assert counted(ledger) == oracle.counts("0") != (0, 0)
    with watch_pulses(model, ledger, phase="vector"):
        model[0].update(*((x.T, d.T) if transposed else (x[0], d[0])))
    oracle.update()
    assert counted(ledger) == oracle.counts("0")


def test_scales_of_the_periphery_act_before_the_pulses() -> None:
    config = single()
    config.mapping.weight_scaling_omega = 0.6
    config.mapping.weight_scaling_columnwise = True
    config.pre_post.input_range.enable = True
    model, ledger = net(config), al.Ledger()
    optimizer, oracle = sgd(model), Oracle(model)
    with watch_pulses(model, ledger, phase="learn"):
        for x in vectors(6).split(1):
            learn(model, optimizer, x)
            oracle.update()
    assert counted(ledger) == tuple(
        sum(each) for each in zip(*(oracle.counts(layer) for layer in "02"), strict=True)
    )


# ------------------------------------------------------------------ cells of a weight


def hidden(model: nn.Module) -> Tensor:
    """Weights of the single cells of a unit cell, in steps, shape ``(cells, out, in)``."""
    (tile,) = model[0].analog_tiles()
    parameters = tile.get_hidden_parameters()
    return torch.stack([v / STEP for k, v in parameters.items() if "hidden_weights" in k]).round()


POLICIES = VectorUnitCellUpdatePolicy
CELLS = [
    VectorUnitCell([ideal(), ideal(), ideal()], update_policy=POLICIES.ALL),
    VectorUnitCell([ideal(), ideal()], update_policy=POLICIES.SINGLE_FIXED, first_update_idx=1),
    VectorUnitCell([ideal(), ideal()], update_policy=POLICIES.SINGLE_SEQUENTIAL),
    VectorUnitCell([ideal(), ideal()], update_policy=POLICIES.SINGLE_RANDOM),
    ReferenceUnitCell([ideal(), ideal()]),
    ReferenceUnitCell([ideal()], update_policy=POLICIES.ALL),
    OneSidedUnitCell([ideal()]),
]


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_of_a_weight_is_counted(cell: Any) -> None:
    model = nn.Sequential(AnalogLinear(5, 4, bias=False, rpu_config=unit_cell(cell)))
    optimizer, ledger = sgd(model), al.Ledger()
    known = getattr(cell, "update_policy", POLICIES.ALL) in (POLICIES.ALL, POLICIES.SINGLE_FIXED)
    pulses, before = torch.zeros_like(hidden(model)), hidden(model)
    raised = torch.zeros_like(before)
    with watch_pulses(model, ledger, phase="learn", wear=known) as watch:
        for x in vectors(9).split(1):
            learn(model, optimizer, x)
            raised += (hidden(model) - before).clamp(min=0)
            pulses += (hidden(model) - before).abs()
            before = hidden(model)
    assert counted(ledger) == (int(raised.sum()), int((pulses - raised).sum()))
    assert (counted(ledger)[1] == 0) == isinstance(cell, OneSidedUnitCell)
    if known:
        assert watch.wear() == {"0": int(pulses.max())}


def test_the_two_arrays_of_a_transfer_tile_in_torch() -> None:
    cell = ChoppedTransferCompound(
        unit_cell_devices=[ideal(), ideal()],
        transfer_update=copy.copy(CERTAIN),
        units_in_mbatch=True,
        in_chop_prob=0.5,
        fast_lr=0.1,
    )
    config = unit_cell(cell)
    config.tile_class = TorchTransferTile
    model, ledger = nn.Sequential(AnalogLinear(5, 4, rpu_config=config)), al.Ledger()
    optimizer, oracle = sgd(model, 1.0), Oracle(model)
    with watch_pulses(model, ledger, phase="learn", wear=True) as watch:
        for x in vectors(60).split(1):
            learn(model, optimizer, x)
            oracle.update()
    fast, slow = (sum(int(way[array].sum()) for way in oracle.cells["0"]) for array in (0, 1))
    assert fast > slow > 0
    assert counted(ledger) == oracle.counts("0")
    assert watch.wear() == {"0": oracle.most("0")}


# ------------------------------------------------------------------ optimisers and queues


def test_accumulated_gradients_are_counted_when_they_are_applied() -> None:
    model, ledger = net(), al.Ledger()
    optimizer = sgd(model)
    with watch_pulses(model, ledger, phase="learn"):
        for x in vectors(6).split(2):
            model(x).square().sum().backward()
        assert counted(ledger) == (0, 0)
        optimizer.step()
    at_once, whole = net(), al.Ledger()
    assert all(torch.equal(a, b) for a, b in zip(*map(states, (net(), at_once)), strict=True))
    optimizer = sgd(at_once)
    with watch_pulses(at_once, whole, phase="learn"):
        at_once(vectors(6)).square().sum().backward()
        optimizer.step()
    assert ledger.total() == whole.total() != al.Counts()


def states(model: nn.Module) -> list[Tensor]:
    return [tensor for layer in weights(model).values() for tensor in layer]


def test_several_optimisers_count_nothing_twice() -> None:
    model, ledger = net(), al.Ledger()
    both = [sgd(model), sgd(model)]
    apart = [sgd(model[0]), sgd(model[2])]
    oracle = Oracle(model)
    with watch_pulses(model, ledger, phase="learn"):
        for optimizers in (both, apart):
            for x in vectors(3).split(1):
                model(x).square().sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
                oracle.update()
    for layer in "02":
        assert counted(ledger, layer) == oracle.counts(layer)


def test_a_closure_is_run_before_the_update() -> None:
    model, ledger = net(), al.Ledger()
    optimizer, oracle = AnalogAdam(model.parameters(), lr=0.05), Oracle(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(vectors(1)).square().sum()
        loss.backward()
        return loss

    with watch_pulses(model, ledger, phase="learn"):
        optimizer.step(closure)
    oracle.update()
    assert counted(ledger, "0") == oracle.counts("0") != (0, 0)


def test_what_is_not_applied_is_not_counted() -> None:
    model, ledger = net(), al.Ledger()
    idle = sgd(model, lr=0.0)
    digital = torch.optim.SGD(
        [p for p in model.parameters() if "bias" in str(p)] or [nn.Parameter(torch.ones(1))]
    )
    with watch_pulses(model, ledger, phase="learn"):
        learn(model, idle, vectors(2))
        idle.step()  # an empty queue
        learn(model, digital, vectors(2))
        with torch.no_grad():
            model.eval()(vectors(2))
        assert ledger.layers() == ()
        sgd(model).step()  # what the digital optimiser left in the queues
    assert min(counted(ledger)) > 0


def test_zero_inputs_and_gradients_take_no_pulses() -> None:
    model, ledger = net(single(RANDOM)), al.Ledger()
    with watch_pulses(model, ledger, phase="learn"):
        (0.0 * model(vectors(3)).sum()).backward()
        sgd(model).step()
        learn(model[0], sgd(model[0]), torch.zeros(3, 5))
    assert counted(ledger) == (0, 0)


@pytest.mark.parametrize(
    "config",
    [
        InferenceRPUConfig,
        TorchInferenceRPUConfig,
        FloatingPointRPUConfig,
        lambda: single(device=IdealDevice()),
    ],
)
def test_tiles_without_pulses_take_none(config: Callable[[], Any]) -> None:
    model, ledger = net(config()), al.Ledger()
    before = model[0].get_weights()[0].clone()
    with watch_pulses(model, ledger, phase="learn"):
        learn(model, sgd(model), vectors(3))
    assert not torch.equal(model[0].get_weights()[0], before)
    assert ledger.layers() == ()


def test_frozen_layers_take_none_beside_one_that_is_trained() -> None:
    chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
    frozen = al.convert(nn.Sequential(nn.Linear(5, 5)), chip)
    al.program_(frozen, chip, seed=0)
    model = nn.Sequential(al.freeze_(frozen), net())
    with watch_pulses(model, ledger, phase="learn"):
        learn(model, sgd(model), vectors(3))
    assert ledger.layers() == ("1.0", "1.2")


def test_programming_by_aihwkit_is_counted_where_it_happens() -> None:
    model, ledger = net(single(RANDOM)), al.Ledger()
    (tile,) = model[0].analog_tiles()
    with watch_pulses(model, ledger, phase="program"):
        tile.program_weights(max_iter=20, tolerance=None)
    moved = tile.tile.get_weights().abs().sum() / STEP
    assert sum(counted(ledger, "0", "program")) > float(moved) / 2 > 0
