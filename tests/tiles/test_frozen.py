"""Frozen layers and tiles: everything reads, nothing writes, for torch and for aihwkit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.presets import ReRamESPreset
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.tiles.array import FrozenTile, FrozenTileArray
from aihwkit_lora.tiles.layers import FrozenLinear

CHIP = al.chips.get("rm-180nm")

# What aihwkit 1.2.0 offers to write a tile, in simulator/tiles/{base,module,periphery}.py.
TILE_WRITES = [
    *("set_weights", "program_weights", "drift_weights", "remap_weights", "decay_weights"),
    *("diffuse_weights", "reset", "reset_columns", "set_hidden_parameters", "load_extra"),
    *("set_hidden_update_index", "update", "update_indexed", "set_forward_parameters"),
    *("set_backward_parameters", "set_weights_uniform_random", "ensure_shared_weights"),
    *("set_delta_weights", "replace_with", "set_scales", "set_mapping_scales"),
    *("set_learned_out_scales", "set_input_range", "post_update_step"),
]
LAYER_WRITES = [
    *("set_weights", "drift_analog_weights", "program_analog_weights", "remap_analog_weights"),
    *("replace_rpu_config", "reset_parameters"),
]


def model(tile: int = 4, bias: bool = True) -> nn.Module:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    config.mapping.weight_scaling_omega = 1.0
    config.forward.is_perfect = True
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 10, bias=bias))
    analog = convert_to_analog(net, config, exclude_modules=["0"], ensure_analog_root=False)
    return al.freeze_(analog, programmed_by="test")


@pytest.fixture
def frozen() -> nn.Module:
    return model()


def tiles(layer: nn.Module) -> list[FrozenTile]:
    return list(layer.analog_tiles())


@pytest.mark.parametrize("method", TILE_WRITES)
def test_every_write_of_a_tile_names_layer_and_tile(frozen: nn.Module, method: str) -> None:
    before = al.fingerprint(frozen)
    where = r"layer '2', tile \(input 1, output 2\)"
    with pytest.raises(al.FrozenConductanceError, match=rf"{where}.*got {method}\(\)"):
        getattr(tiles(frozen[2])[5], method)(torch.zeros(2, 1))
    assert al.fingerprint(frozen) == before


@pytest.mark.parametrize("method", LAYER_WRITES)
def test_every_write_of_a_layer_names_it(frozen: nn.Module, method: str) -> None:
    before = al.fingerprint(frozen)
    with pytest.raises(al.FrozenConductanceError, match=rf"layer '2'.*got {method}\(\)"):
        getattr(frozen[2], method)()
    assert al.fingerprint(frozen) == before


def test_assigning_the_weight_is_refused(frozen: nn.Module) -> None:
    with pytest.raises(al.FrozenConductanceError, match=r"layer '2'.*got an assignment.*thaw_"):
        frozen[2].weight = nn.Parameter(torch.zeros(10, 5))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.T.zero_(),
        lambda layer: layer.weight.copy_(torch.zeros(10, 5)),
        lambda layer: torch.neg(torch.ones(10, 5), out=layer.weight),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
    ],
)
def test_writing_the_weight_names_the_layer(
    frozen: nn.Module, write: Callable[[nn.Module], Any]
) -> None:
    before = al.fingerprint(frozen)
    with pytest.raises(al.FrozenConductanceError, match=r"layer '2': expected the frozen weight"):
        write(frozen[2])
    assert al.fingerprint(frozen) == before


@pytest.mark.parametrize("tile", [2, 4, 512])
def test_all_views_of_the_weights_agree(tile: int) -> None:
    layer = model(tile)[2]
    weight, bias = layer.get_weights()
    assert torch.equal(weight, torch.as_tensor(layer.weight))
    assert torch.equal(bias, layer.bias)
    found = torch.zeros_like(weight)
    for part in tiles(layer):
        i, o = part.position
        rows = slice(sum(layer.analog_module.blocks.in_sizes[:i]), None)
        columns = slice(sum(layer.analog_module.blocks.out_sizes[:o]), None)
        scaled, none = part.get_weights()
        raw, _ = part.get_weights(apply_weight_scaling=False)
        assert none is None
        assert tuple(scaled.shape) == (part.out_size, part.in_size)
        assert 0.99 < float(raw.abs().max()) < 1.000001
        found[columns, rows][: part.out_size, : part.in_size] = scaled
    assert torch.equal(found, weight)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=0, atol=1e-6)


def test_what_is_read_are_copies(frozen: nn.Module) -> None:
    before = al.fingerprint(frozen)
    layer = frozen[2]
    for values in (*layer.get_weights(), tiles(layer)[0].get_weights()[0]):
        values.zero_()
    tiles(layer)[0].get_weights(apply_weight_scaling=False)[0].zero_()
    layer.analog_module.logical_weight().zero_()
    assert al.fingerprint(frozen) == before
    assert bool(layer.bias.any())


def test_a_frozen_layer_is_linear_for_torch_and_analogue_for_aihwkit(frozen: nn.Module) -> None:
    layer = frozen[2]
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, AnalogLayerBase)
    assert layer.analog_tile_count() == 6
    assert "in_features=5, out_features=10, bias=True, tiles=6, frozen" in repr(layer)
    assert "(4, 3, frozen)" in repr(tiles(layer)[0])
    assert tiles(layer)[0].rpu_config is layer.analog_module.rpu_config
    assert tiles(layer)[0].device == torch.device("cpu")
    assert isinstance(frozen[0], nn.Linear)
    assert not isinstance(frozen[0], FrozenLinear)
    assert [(name, type(found)) for name, found in al.frozen_layers(frozen)] == [
        ("2", FrozenLinear)
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_no_parameter_of_a_frozen_layer_wants_a_gradient(bias: bool) -> None:
    layer = model(bias=bias)[2]
    parameters = list(layer.parameters())
    assert parameters
    assert not any(p.requires_grad for p in parameters)
    assert sum(p.numel() for p in parameters) == (10 if bias else 0)


def test_gradients_flow_through_to_the_layer_upstream(frozen: nn.Module) -> None:
    x, upstream = torch.randn(4, 5), torch.randn(4, 10)
    frozen(x).backward(upstream)
    hidden = frozen[0](x)
    through = (upstream @ torch.as_tensor(frozen[2].weight)) * (hidden > 0)
    torch.testing.assert_close(frozen[0].weight.grad, through.T @ x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [3, 512])
def test_outputs_can_be_changed_in_place(bias: bool, tile: int) -> None:
    net = model(tile, bias)
    x = torch.randn(4, 5)
    expected = torch.relu(net(x))
    expected.sum().backward()
    gradient, net[0].weight.grad = net[0].weight.grad, None
    changed = nn.functional.relu(net(x), inplace=True)
    changed.sum().backward()
    assert torch.equal(changed, expected)
    assert torch.equal(net[0].weight.grad, gradient)


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.SGD, AnalogSGD])
def test_no_optimiser_moves_a_frozen_layer(optimiser: type[torch.optim.Optimizer]) -> None:
    trained = model()
    before, bias = al.fingerprint(trained), trained[2].bias.clone()
    digital = trained[0].weight.clone()
    optimizer = optimiser(trained.parameters(), lr=0.1, weight_decay=0.1)
    if isinstance(optimizer, AnalogSGD):
        optimizer.regroup_param_groups(trained)
    for _ in range(3):
        optimizer.zero_grad()
        trained(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    assert al.fingerprint(trained) == before
    al.verify(trained)
    assert torch.equal(trained[2].bias, bias)
    assert not torch.equal(trained[0].weight, digital)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casts_reach_the_digital_parts_only(frozen: nn.Module, dtype: torch.dtype) -> None:
    x, before = torch.randn(3, 5), al.fingerprint(frozen)
    expected = frozen(x)
    layer = frozen.to(dtype)[2]
    assert layer.bias.dtype == dtype
    assert layer.analog_module.conductance.dtype == torch.float32
    assert al.fingerprint(frozen) == before
    found = frozen(x.to(dtype))
    assert found.dtype == dtype
    # Inputs, hidden values, bias and outputs each lose what the type does not hold.
    torch.testing.assert_close(
        found.float(), expected, rtol=0, atol=20 * max(torch.finfo(dtype).eps, 1e-7)
    )
    assert torch.equal(frozen.float()[2].analog_module.conductance, layer.analog_module.conductance)


def test_a_device_without_data_is_refused(frozen: nn.Module) -> None:
    before = al.fingerprint(frozen)
    with pytest.raises(al.FrozenConductanceError, match=r"layer '2': .*got 'meta'.*real device"):
        frozen[2].to("meta")
    assert al.fingerprint(frozen) == before


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_tiles_of_a_copy_read_the_copy(
    frozen: nn.Module, twin_of: Callable[[nn.Module], nn.Module]
) -> None:
    frozen[2].analog_module.probes.append(object())
    twin = twin_of(frozen)
    assert twin[2].analog_module.probes == []
    twin[2].analog_module.programmed.conductance.zero_()
    assert not tiles(twin[2])[0].get_weights()[0].any()
    assert tiles(frozen[2])[0].get_weights()[0].any()
    with pytest.raises(al.FrozenConductanceError, match=r"layer '2', tile \(input 0, output 0\)"):
        al.verify(twin)
    al.verify(frozen)


def test_the_state_holds_conductances_scales_digests_and_bias_only(frozen: nn.Module) -> None:
    state = {name: tuple(value.shape) for name, value in frozen[2].state_dict().items()}
    assert state == {
        "bias": (10,),
        "analog_module.conductance": (2, 3, 12),
        "analog_module.scale": (2, 3, 4),
        "analog_module.digest": (6, 32),
    }


def test_a_checkpoint_of_another_programmed_scale_is_refused() -> None:
    programmed = al.convert(nn.Sequential(nn.Linear(4, 3)), CHIP)
    al.program_(programmed, CHIP, seed=0)
    al.freeze_(programmed)
    state = programmed.state_dict()
    state["0.analog_module.scale"] = 2 * state["0.analog_module.scale"]
    with pytest.raises(al.FrozenConductanceError, match=r"'0\.analog_module\.scale': expected"):
        programmed.load_state_dict(state)


@pytest.mark.parametrize("preset", [TorchInferenceRPUConfig, ReRamESPreset])
def test_blocks_hold_each_tile_where_it_belongs(preset: type) -> None:
    config = preset()
    config.mapping.max_input_size, config.mapping.max_output_size = 3, 4
    analog = convert_to_analog(nn.Sequential(nn.Linear(7, 9)), config, ensure_analog_root=False)
    held = [tile.tile.get_weights().clone() for tile in analog[0].analog_tiles()]
    array: FrozenTileArray = al.freeze_(analog, programmed_by="test")[0].analog_module
    assert len(held) == array.blocks.tiles == 9
    for position, expected in zip(array.positions(), held, strict=True):
        assert torch.equal(array.tile(*position)[0], expected)
