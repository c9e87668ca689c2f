"""aihwkit's layers: what they show of their weights, how they are tiled and converted."""

from __future__ import annotations

import pytest
import torch
from aihwkit.exceptions import ModuleError
from aihwkit.nn import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv2dMapped,
    AnalogConv3d,
    AnalogLinear,
    AnalogLinearMapped,
    AnalogSequential,
)
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.tiles.array import TileModuleArray
from aihwkit.simulator.tiles.module import TileModule
from peft import LoraConfig, get_peft_model
from torch import nn


def pulsed():
    return SingleRPUConfig(device=ConstantStepDevice())


ALL_KINDS = [pulsed, FloatingPointRPUConfig, InferenceRPUConfig, TorchInferenceRPUConfig]
INFERENCE = [InferenceRPUConfig, TorchInferenceRPUConfig]


def cut_at(size, config_class=TorchInferenceRPUConfig):
    config = config_class()
    config.mapping.max_input_size = config.mapping.max_output_size = size
    return config


def perfect(config_class=InferenceRPUConfig):
    config = config_class()
    config.forward.is_perfect = True
    return config


def tile_of(layer):
    return next(layer.analog_tiles())


# ------------------------------------------------------------------ what a layer shows


@pytest.mark.parametrize("config", ALL_KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_is_none_and_bias_a_bool(config, bias, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogLinear.weight is None and AnalogLinear.bias a bool",
        "frozen layers, which give both back as tensors",
        "see whether PEFT can wrap an AnalogLinear now; frozen layers keep their contract",
    )
    layer = AnalogLinear(3, 2, bias=bias, rpu_config=config())
    assert layer.weight is None, fact
    assert layer.bias is bias, fact
    assert (layer.analog_module.bias is not None) == bias, fact


def test_linear_is_a_torch_linear_but_convolutions_are_not_torch_convolutions(aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogLinear is an nn.Linear, AnalogConv2d is no nn.Conv2d, and both are no containers",
        "finding analogue layers by type, and giving each its frozen form",
        "look at how layers are found, and which frozen form fits",
    )
    assert issubclass(AnalogLinear, nn.Linear), fact
    assert not issubclass(AnalogConv2d, nn.Conv2d), fact
    for layer in (AnalogLinear, AnalogConv2d, AnalogConv2dMapped):
        assert issubclass(layer, AnalogLayerBase), fact
        assert layer.IS_CONTAINER is False, fact


def test_stock_peft_cannot_wrap_an_unfrozen_layer(aihwkit_fact):
    fact = aihwkit_fact(
        "stock PEFT fails on AnalogLinear, because it reads weight.device and weight is None",
        "the order of freeze_ before get_peft_model",
        "if PEFT now wraps unfrozen layers, refuse that or say in the guide what it means",
    )
    model = nn.Sequential(AnalogLinear(3, 2, rpu_config=pulsed()))
    with fact.raises(AttributeError, "'NoneType' object has no attribute 'device'"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


# ------------------------------------------------------------------ layout of the weights


@pytest.mark.parametrize("config", INFERENCE)
def test_linear_layout_is_torchs(config, aihwkit_fact):
    fact = aihwkit_fact(
        "get_weights() of a linear layer is (out_features, in_features) and a bias or None",
        "TileGrid, get_weights of frozen layers, and thaw_",
        "adapt how tiles are read and put back",
    )
    digital = nn.Linear(5, 3)
    weight, bias = AnalogLinear.from_digital(digital, config()).get_weights()
    assert torch.equal(weight, digital.weight), fact
    assert torch.equal(bias, digital.bias), fact
    assert not weight.requires_grad, fact
    assert AnalogLinear(5, 3, bias=False, rpu_config=config()).get_weights()[1] is None, fact


@pytest.mark.parametrize(
    ("analog", "digital", "kernel"),
    [
        (AnalogConv1d, nn.Conv1d, (3,)),
        (AnalogConv2d, nn.Conv2d, (3, 2)),
        (AnalogConv3d, nn.Conv3d, (2, 3, 2)),
    ],
)
def test_convolution_layout_is_torchs_flattened(analog, digital, kernel, aihwkit_fact):
    fact = aihwkit_fact(
        "get_weights() of a convolution is (out_channels, in_channels * kernel), channels first",
        "frozen convolutions, whose patches are unfolded in that order",
        "adapt the order of values in a patch",
    )
    reference = digital(3, 4, kernel)
    layer = analog.from_digital(reference, perfect())
    weight, bias = layer.get_weights()
    assert torch.equal(weight, reference.weight.flatten(1)), fact
    assert torch.equal(bias, reference.bias), fact
    assert (layer.out_features, layer.in_features) == weight.shape, fact
    x = torch.randn(2, 3, *(6 for _ in kernel))
    # A few units in the last place: sums of at most 36 products in another order.
    assert torch.allclose(layer(x), reference(x), rtol=0, atol=1e-5), fact


@pytest.mark.parametrize(("layer", "kernel"), [(AnalogConv1d, 3), (AnalogConv3d, (2, 2, 2))])
@pytest.mark.parametrize(
    ("tiles", "config"),
    [
        ("torch tiles", TorchInferenceRPUConfig()),
        ("tile arrays", cut_at(8, InferenceRPUConfig)),
    ],
)
def test_convolutions_in_one_and_three_dimensions_need_indexed_tiles(
    layer, kernel, tiles, config, aihwkit_fact
):
    fact = aihwkit_fact(
        f"AnalogConv1d and AnalogConv3d do not run on {tiles}, which know no indexed products",
        "frozen convolutions, which unfold their input themselves and so run on any tile",
        "say in the guide that such convolutions run unfrozen too",
    )
    convolution = layer(3, 5, kernel, rpu_config=config)
    assert convolution.NEEDS_INDEXED, fact
    x = torch.randn(2, 3, *(6 for _ in convolution.kernel_size))
    with fact.raises(ModuleError, "does not support indexed computation"):
        convolution(x)


def test_convolutions_in_two_dimensions_run_unindexed(aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogConv2d unfolds its input where a tile knows no indexed product",
        "frozen convolutions, which read their arrays once for each output pixel in the same way",
        "look at what AnalogConv2d calls its tiles with",
    )
    assert not AnalogConv2d.NEEDS_INDEXED, fact
    layer = AnalogConv2d(3, 5, 3, rpu_config=TorchInferenceRPUConfig())
    assert layer(torch.randn(2, 3, 6, 6)).shape == (2, 5, 4, 4), fact


# ------------------------------------------------------------------ tiles of a layer


@pytest.mark.parametrize(
    ("size", "limit", "parts"),
    [(10, 4, [4, 3, 3]), (513, 512, [257, 256]), (9, 3, [3, 3, 3]), (130, 50, [44, 43, 43])],
)
def test_tile_arrays_split_evenly_larger_parts_first(size, limit, parts, aihwkit_fact):
    fact = aihwkit_fact(
        "TileModuleArray splits n rows over k tiles into parts of n // k, the first ones larger "
        "by one",
        "Blocks and thaw_, which compare with what aihwkit makes of the same mapping",
        "read sizes from the tiles and re-check thaw_ on checkpoints of the earlier version",
    )
    array = AnalogLinear(size, size, rpu_config=cut_at(limit)).analog_module
    assert isinstance(array, TileModuleArray), fact
    assert array.in_sizes == parts, fact
    assert array.out_sizes == parts, fact


def test_only_layers_above_the_limit_get_an_array(aihwkit_fact):
    fact = aihwkit_fact(
        "analog_module is the tile itself up to the size limit (512 by default, 0 for none), and "
        "a TileModuleArray above it",
        "TileGrid, which makes both look alike",
        "adapt how TileGrid finds the tiles of a layer",
    )
    default = TorchInferenceRPUConfig()
    for layer, is_array in [
        (AnalogLinear(512, 3, rpu_config=default), False),
        (AnalogLinear(513, 3, rpu_config=default), True),
        (AnalogLinear(3, 513, rpu_config=default), True),
        (AnalogLinear(600, 3, rpu_config=cut_at(0)), False),
    ]:
        assert isinstance(layer.analog_module, TileModuleArray) == is_array, fact
        assert isinstance(layer.analog_module, TileModule) != is_array, fact


def test_arrays_are_indexed_by_input_then_output_and_own_the_bias(aihwkit_fact):
    fact = aihwkit_fact(
        "TileModuleArray.array[i][o] holds input block i of output block o, analog_tiles() lists "
        "inputs first, and the bias belongs to the array, not to its tiles",
        "TileGrid, Blocks.put and the order of digests and cells",
        "adapt the order of tiles wherever they are packed or named",
    )
    layer = AnalogLinear(10, 7, rpu_config=cut_at(4))
    array, weight = layer.analog_module, layer.get_weights()[0]
    flat = [tile for row in array.array for tile in row]
    assert [len(row) for row in array.array] == [2, 2, 2], fact
    assert all(a is b for a, b in zip(layer.analog_tiles(), flat, strict=True)), fact
    columns = weight.split(array.in_sizes, dim=1)
    for row, column in zip(array.array, columns, strict=True):
        for tile, block in zip(row, column.split(array.out_sizes), strict=True):
            assert torch.equal(tile.get_weights()[0], block), fact
            assert tile.bias is None, fact
    assert isinstance(array.bias, nn.Parameter), fact
    assert array.bias.shape == (7,), fact


def test_mapped_convolutions_split_across_whole_channels(aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogConv2dMapped splits across channels, keeps its tiles in .array with .in_sizes in "
        "channels, and has a Parameter as bias, but no analog_module",
        "TileGrid, which takes the tiles of such a layer from the layer itself",
        "see how the tiles of a mapped convolution are laid out now",
    )
    layer = AnalogConv2dMapped(11, 9, 3, rpu_config=cut_at(37))
    assert layer.in_sizes == [4, 4, 3], fact
    assert layer.out_sizes == [9], fact
    assert [tile.in_size for row in layer.array for tile in row] == [36, 36, 27], fact
    assert layer.get_weights()[0].shape == (9, 99), fact
    assert layer.weight is None, fact
    assert isinstance(layer.bias, nn.Parameter), fact
    assert not hasattr(layer, "analog_module"), fact
    with fact.raises(ModuleError, r"too small to fit a single group \(kernel\): 9 > 8"):
        AnalogConv2dMapped(3, 9, 3, rpu_config=cut_at(8))
    # The same convolution unmapped is cut anywhere, through the middle of a kernel too.
    assert AnalogConv2d(11, 9, 3, rpu_config=cut_at(37)).analog_module.in_sizes == [33] * 3, fact


def test_mapped_linear_layers_always_have_an_array(aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogLinearMapped is an AnalogLinear that has a TileModuleArray even for a single tile",
        "TileGrid, and a frozen form that is the same for both",
        "adapt how TileGrid finds the tiles of a layer",
    )
    assert issubclass(AnalogLinearMapped, AnalogLinear), fact
    layer = AnalogLinearMapped(4, 3, rpu_config=cut_at(4))
    assert isinstance(layer.analog_module, TileModuleArray), fact
    assert layer.analog_module.in_sizes == [4], fact


# ------------------------------------------------------------------ conversion


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3))
        self.second = nn.Linear(3, 2)


def test_conversion_copies_and_excludes_by_full_name(aihwkit_fact):
    fact = aihwkit_fact(
        "convert_to_analog copies the model, keeps its class with ensure_analog_root=False, and "
        "excludes by full dotted name only",
        "convert, which does the same and raises on names that do not exist",
        "let convert say the same of names as aihwkit does",
    )
    digital = Twice()
    analog = convert_to_analog(
        digital, pulsed(), ensure_analog_root=False, exclude_modules=["first.0"]
    )
    assert type(analog) is Twice, fact
    assert type(analog.first[0]) is nn.Linear, fact
    assert type(analog.second) is AnalogLinear, fact
    assert type(digital.second) is nn.Linear, fact
    by_last_name = convert_to_analog(
        digital, pulsed(), ensure_analog_root=False, exclude_modules=["0"]
    )
    assert type(by_last_name.first[0]) is AnalogLinear, fact


def test_conversion_makes_frozen_layers_trainable_again(aihwkit_fact):
    fact = aihwkit_fact(
        "the context of a converted layer wants a gradient though its digital layer did not",
        "freezing after conversion, by type",
        "see whether converted layers keep requires_grad, and say so in the guide",
    )
    digital = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    analog = convert_to_analog(digital, pulsed())
    assert tile_of(analog[0]).analog_ctx.requires_grad, fact


def test_conversion_separates_layers_that_are_shared(aihwkit_fact):
    fact = aihwkit_fact(
        "convert_to_analog converts a layer that is used in two places into two",
        "convert, which goes layer by layer so that a shared layer has one set of tiles",
        "convert may go through whole models now",
    )

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.here = nn.Linear(3, 3)
            self.there = self.here

    analog = convert_to_analog(Shared(), pulsed(), ensure_analog_root=False)
    assert analog.here is not analog.there, fact


def test_conversion_loses_repeated_children_of_a_sequential(aihwkit_fact):
    fact = aihwkit_fact(
        "convert_to_analog drops an activation that an nn.Sequential uses a second time",
        "convert, which changes the class of a Sequential in place and so keeps its children",
        "convert may go through whole models now",
    )
    relu = nn.ReLU()
    digital = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    analog = convert_to_analog(digital, pulsed())
    assert [type(child) for child in analog] == [AnalogLinear, nn.ReLU, AnalogLinear], fact


def test_an_analogue_sequential_is_a_sequential_of_another_class(aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSequential derives from nn.Sequential, is a container and has no state of its own",
        "convert, which changes the class of a Sequential in place",
        "build the container anew in convert",
    )
    assert issubclass(AnalogSequential, nn.Sequential), fact
    assert AnalogSequential.IS_CONTAINER is True, fact
    assert set(vars(AnalogSequential())) == set(vars(nn.Sequential())), fact
