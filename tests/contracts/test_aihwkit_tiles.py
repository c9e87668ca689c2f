"""aihwkit's tiles: names that we read, products, cells, random numbers, programming."""

from __future__ import annotations

import pytest
import torch
from aihwkit.exceptions import TorchTileConfigError
from aihwkit.inference.compensation.drift import (
    GlobalDriftCompensation,
    GlobalDriftCompensationWithExactReference,
    PerColumnDriftCompensation,
)
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs import devices as device_module
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
from aihwkit.simulator.tiles.analog import AnalogTile
from aihwkit.simulator.tiles.floating_point import FloatingPointTile
from aihwkit.simulator.tiles.inference import InferenceTile
from torch import nn


def pulsed():
    return SingleRPUConfig(device=ConstantStepDevice())


def tile_of(rpu_config, *, bias=True):
    """A tile with 4 inputs and 3 outputs."""
    return next(AnalogLinear(4, 3, bias=bias, rpu_config=rpu_config).analog_tiles())


# ------------------------------------------------------------------ names that we read

ON_EVERY_TILE = {
    "analog_bias",
    "bias",
    "device",
    "digital_bias",
    "in_size",
    "input_range",
    "mapping_scales",
    "out_scaling_alpha",
    "out_size",
    "reference_combined_weights",
    "rpu_config",
    "tile",
}
ON_INFERENCE_TILES = {"alpha", "drift_baseline", "drift_noise_parameters", "programmed_weights"}


@pytest.mark.parametrize(
    ("config", "inference"),
    [
        (pulsed, False),
        (FloatingPointRPUConfig, False),
        (InferenceRPUConfig, True),
        (TorchInferenceRPUConfig, True),
    ],
)
def test_tiles_have_the_attributes_that_are_read(config, inference, aihwkit_fact):
    fact = aihwkit_fact(
        "every tile has the attributes of its digital periphery, and inference tiles those of "
        "their programming, None until programmed",
        "freeze_, which reads scales, ranges and programming off a tile",
        "find the new name: getattr with a default would silently drop a scale",
    )
    tile = tile_of(config())
    missing = {name for name in ON_EVERY_TILE if not hasattr(tile, name)}
    assert missing == set(), fact
    present = {name for name in ON_INFERENCE_TILES if hasattr(tile, name)}
    assert present == (ON_INFERENCE_TILES if inference else set()), fact
    assert {getattr(tile, name) for name in present - {"alpha"}} <= {None}, fact
    assert tile.reference_combined_weights is None, fact
    if inference:
        assert torch.equal(tile.alpha, torch.ones(1)), fact


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_logical_weights_are_array_times_scales(config_class, aihwkit_fact):
    fact = aihwkit_fact(
        "get_weights() is the array times get_scales(), the product of mapping_scales and "
        "out_scaling_alpha, and does not contain alpha",
        "tile_scale, which multiplies get_scales() by alpha",
        "re-derive the factor behind a column from the tile's forward",
    )
    config = config_class()
    config.mapping.weight_scaling_omega = 0.5
    config.mapping.weight_scaling_columnwise = True
    config.mapping.learn_out_scaling = config.mapping.out_scaling_columnwise = True
    config.forward.is_perfect = True
    tile = tile_of(config, bias=False).eval()
    assert tile.mapping_scales.shape == (3,), fact
    tile.out_scaling_alpha.data.copy_(torch.tensor([1.0, 2.0, 4.0]))
    tile.alpha.fill_(8.0)
    array = tile.tile.get_weights()
    assert torch.equal(array.abs().amax(1), torch.full((3,), 0.5)), fact
    scales = tile.mapping_scales * tile.out_scaling_alpha
    assert torch.equal(tile.get_scales(), scales), fact
    assert torch.equal(tile.get_weights()[0], array * scales[:, None]), fact
    # The alpha of drift compensation acts in forward only.
    assert torch.allclose(tile(torch.eye(4)).T, 8.0 * array * scales[:, None], rtol=1e-5), fact


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_no_scales_without_weight_scaling(config_class, aihwkit_fact):
    fact = aihwkit_fact(
        "weight_scaling_omega is 0 by default, and mapping_scales, out_scaling_alpha, input_range "
        "and get_scales() are then None",
        "tile_scale, which takes None for a factor of 1",
        "adapt tile_scale; chips set omega themselves",
    )
    tile = tile_of(config_class())
    assert tile.mapping_scales is None, fact
    assert tile.out_scaling_alpha is None, fact
    assert tile.input_range is None, fact
    assert tile.get_scales() is None, fact


def test_learned_input_ranges_show_on_the_tile(aihwkit_fact):
    fact = aihwkit_fact(
        "a tile with a learned input range holds it as the Parameter input_range",
        "freeze_, which takes the range over",
        "find the new name, or a frozen layer would scale its inputs differently",
    )
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    assert isinstance(tile_of(config).input_range, nn.Parameter), fact


def test_an_analogue_bias_is_one_more_column_of_the_array(aihwkit_fact):
    fact = aihwkit_fact(
        "with digital_bias=False a C++ tile says analog_bias and holds the bias as last column",
        "Blocks, which count it as one more driven row",
        "find the new name, or a frozen layer would lose its bias",
    )
    config = InferenceRPUConfig()
    config.mapping.digital_bias = False
    tile = tile_of(config)
    assert tile.analog_bias, fact
    assert tile.bias is None, fact
    assert tile.tile.get_weights().shape == (3, 5), fact
    assert tile.get_weights()[0].shape == (3, 4), fact


@pytest.mark.parametrize(
    "config", [pulsed, FloatingPointRPUConfig, InferenceRPUConfig, TorchInferenceRPUConfig]
)
def test_array_weights_come_as_a_copy(config, aihwkit_fact):
    fact = aihwkit_fact(
        "tile.tile.get_weights() returns a copy, shape (out_size, in_size)",
        "tile_weight and thaw_",
        "copy before use, or frozen conductances share memory with a tile that moves",
    )
    tile = tile_of(config())
    weight = tile.tile.get_weights()
    assert weight.shape == (3, 4), fact
    before = weight.clone()
    weight.add_(1.0)
    assert torch.equal(tile.tile.get_weights(), before), fact


# ------------------------------------------------------------------ the bare array's products


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_forward_of_the_bare_array(config_class, aihwkit_fact):
    fact = aihwkit_fact(
        "tile.tile.forward(x, bias, in_trans, out_trans, is_test, non_blocking) is x @ weight.T "
        "without scales and bias",
        "comparing the blocked product with it, and drift compensation, which reads this way",
        "adapt the order of its arguments",
    )
    config = config_class()
    config.forward.is_perfect = True
    config.mapping.weight_scaling_omega = 0.5
    array, x = tile_of(config).tile, torch.randn(5, 4)
    expected = x @ array.get_weights().T
    y = array.forward(x, False, False, False, True, False)
    assert torch.allclose(y, expected, rtol=0, atol=1e-6), fact


def test_transposed_inputs_are_for_cpp_tiles_only(aihwkit_fact):
    fact = aihwkit_fact(
        "C++ tiles take inputs with the batch last, torch tiles refuse them",
        "frozen tiles, which are only ever read with the batch first",
        "nothing, if both take the batch first; else adapt how tiles are called",
    )
    x = torch.randn(5, 4)
    config = InferenceRPUConfig()
    config.forward.is_perfect = True
    array = tile_of(config).tile
    y = array.forward(x.T.contiguous(), False, True, True, True, False)
    assert torch.allclose(y.T, x @ array.get_weights().T, rtol=0, atol=1e-6), fact
    with fact.raises(TorchTileConfigError, "Non-trans MVMs supported only"):
        tile_of(TorchInferenceRPUConfig()).tile.forward(x.T, False, True, True, True, False)


def test_backward_of_the_bare_array(aihwkit_fact):
    fact = aihwkit_fact(
        "tile.tile.backward(d, bias, in_trans, out_trans, non_blocking) is d @ weight on C++ "
        "tiles; torch tiles leave it to autograd",
        "gradients through frozen training tiles, which follow rpu_config.backward",
        "adapt the order of its arguments",
    )
    config = pulsed()
    config.backward.is_perfect = True
    array, d = tile_of(config).tile, torch.randn(5, 3)
    x_grad = array.backward(d, False, False, False, False)
    assert torch.allclose(x_grad, d @ array.get_weights(), rtol=0, atol=1e-6), fact
    with fact.raises(NotImplementedError, ""):
        tile_of(TorchInferenceRPUConfig()).tile.backward(d, False, False, False, False)


# ------------------------------------------------------------------ building and reading a tile


@pytest.mark.parametrize("tile_class", [AnalogTile, FloatingPointTile, InferenceTile])
@pytest.mark.parametrize("bias", [False, True])
def test_tiles_are_built_from_sizes_configuration_and_bias(tile_class, bias, aihwkit_fact):
    fact = aihwkit_fact(
        "a tile is made with (out_size, in_size, rpu_config, bias), and with digital_bias=False "
        "the bias is one more column behind in_size",
        "the reference engine, which makes tiles to read with",
        "adapt how it makes them",
    )
    config = {
        AnalogTile: pulsed,
        FloatingPointTile: FloatingPointRPUConfig,
        InferenceTile: InferenceRPUConfig,
    }[tile_class]()
    config.mapping.digital_bias = False
    tile = tile_class(3, 4, config, bias)
    assert (tile.out_size, tile.in_size) == (3, 4), fact
    assert tile.tile.get_weights().shape == (3, 4 + bias), fact


@pytest.mark.parametrize(
    "config_class", [SingleRPUConfig, InferenceRPUConfig, TorchInferenceRPUConfig]
)
def test_noise_of_each_column_is_drawn_once_and_can_be_carried_over(config_class, aihwkit_fact):
    fact = aihwkit_fact(
        "with out_noise_std a tile draws the noise of each column once; get_forward_parameters() "
        "shows it as out_noise_values, and set_forward_parameters() takes it over",
        "freeze_ and thaw_, which carry it over",
        "find the new name, or all columns of a frozen tile would be equally noisy",
    )
    config = config_class()
    config.forward.out_noise_std = 0.5
    tile, twin = tile_of(config), tile_of(config)
    drawn = tile.get_forward_parameters()["out_noise_values"]
    assert drawn.shape == (3,), fact
    # Three continuous values that repeat: the chance is zero for all purposes.
    assert not torch.equal(twin.get_forward_parameters()["out_noise_values"], drawn), fact
    twin.set_forward_parameters(tile.get_forward_parameters())
    assert torch.equal(twin.get_forward_parameters()["out_noise_values"], drawn), fact
    config.forward.out_noise_std = 0.0
    without = tile_of(config).get_forward_parameters().get("out_noise_values", torch.empty(0))
    assert without.numel() == 0, fact


@pytest.mark.parametrize("config", [pulsed, InferenceRPUConfig])
def test_reading_without_gradient_queues_nothing(config, aihwkit_fact):
    fact = aihwkit_fact(
        "a forward under no_grad leaves the queue of a C++ tile empty",
        "the reference engine, which reads with C++ tiles for as long as a model lives",
        "empty the queue after each read",
    )
    tile = tile_of(config()).eval()
    with torch.no_grad():
        tile(torch.randn(5, 4))
    assert tile.analog_ctx.analog_input == [], fact
    assert tile.analog_ctx.analog_grad_output == [], fact


class Readout:
    """What a drift compensation sees of a tile, and how often it looked."""

    def __init__(self):
        self.calls = []

    def _forward_drift_readout_tensor(self, reset_if=False, exact_reference=False):
        self.calls.append((reset_if, exact_reference))
        return torch.tensor([[1.0, -3.0], [2.0, 2.0]])


@pytest.mark.parametrize(
    ("compensation", "exact", "baseline"),
    [
        (GlobalDriftCompensation(), False, [2.0]),
        (GlobalDriftCompensationWithExactReference(), True, [2.0]),
        (PerColumnDriftCompensation(), False, [1.5, 2.5]),
    ],
)
def test_drift_compensations_see_a_readout_only(compensation, exact, baseline, aihwkit_fact):
    fact = aihwkit_fact(
        "a drift compensation takes its baseline from tile._forward_drift_readout_tensor(), reads "
        "a pattern of one-hot rows, and apply(readout, baseline) is baseline / readout",
        "drift_, which gives it a frozen tile that has this method only",
        "see what else a compensation asks a tile for",
    )
    readout = Readout()
    found = compensation.init_baseline(readout)
    assert readout.calls == [(True, True) if exact else (True, False)], fact
    assert found.flatten().tolist() == baseline, fact
    assert torch.equal(compensation.get_readout_tensor(4), torch.eye(4)), fact
    halved = 0.5 * readout._forward_drift_readout_tensor()
    assert compensation.apply(halved, found).flatten().tolist() == [2.0] * len(baseline), fact


# ------------------------------------------------------------------ pulses and cells


def test_pulse_counters_are_empty_on_the_cpu(net, aihwkit_fact):
    fact = aihwkit_fact(
        "with count_pulses=True a tile on the CPU gives an empty tensor of counts, and no error",
        "PulseCounter, which refuses pulsed tiles rather than report zero",
        "if pulses are counted on the CPU now, let PulseCounter read them as differences",
    )
    model = net(SingleRPUConfig(device=ConstantStepDevice(count_pulses=True)))
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    counts = next(model[1].analog_tiles()).tile.get_pulse_counters()
    assert counts.dtype == torch.int64, fact
    assert counts.shape == (0,), fact


COMMON_CELL = (
    "max_bound min_bound dwmin_up dwmin_down decay_scales diffusion_rates reset_bias drift_nu"
)


@pytest.mark.parametrize(
    ("device", "own"),
    [
        ("ConstantStepDevice", ""),
        ("LinearStepDevice", "slope_up slope_down"),
        ("SoftBoundsDevice", "slope_up slope_down"),
        ("SoftBoundsPmaxDevice", "slope_up slope_down"),
        ("SoftBoundsReferenceDevice", "reference"),
        ("ExpStepDevice", ""),
        ("PowStepDevice", "gamma_up gamma_down"),
        ("PowStepReferenceDevice", "gamma_up gamma_down reference"),
        ("PiecewiseStepDevice", ""),
    ],
)
def test_parameters_of_a_cell_have_known_names(device, own, aihwkit_fact):
    fact = aihwkit_fact(
        f"get_hidden_parameters() of {device} names the parameters of its update rule",
        "the pulse response, whose parameters carry these names",
        "check the update rule of this device against the new C++ source before renaming",
    )
    config = SingleRPUConfig(device=getattr(device_module, device)())
    hidden = AnalogTile(2, 3, config).get_hidden_parameters()
    assert list(hidden) == [*COMMON_CELL.split(), *own.split()], fact
    assert {tuple(values.shape) for values in hidden.values()} == {(2, 3)}, fact


def test_setting_cells_ignores_where_their_weights_stand(aihwkit_fact):
    fact = aihwkit_fact(
        "a device with write noise adds persistent_weights to its hidden parameters, and "
        "set_hidden_parameters ignores them: it draws noise around what reads saw before",
        "hold_cells, which sets the weights after the hidden parameters",
        "if they are kept now, hold_cells needs its second step no more",
    )
    tile = AnalogTile(8, 8, SingleRPUConfig(device=ReRamArrayOMPresetDevice()))
    hidden = tile.get_hidden_parameters()
    assert list(hidden) == [*COMMON_CELL.split(), "persistent_weights", "reference"], fact
    goal = torch.zeros(8, 8)
    tile.set_hidden_parameters({**hidden, "persistent_weights": goal})
    # 64 continuous values that are all as wanted by chance: zero for all purposes.
    assert not torch.equal(tile.get_hidden_parameters()["persistent_weights"], goal), fact


def test_setting_weights_puts_cells_exactly_there_and_draws_their_write_noise(aihwkit_fact):
    fact = aihwkit_fact(
        "set_weights sets the persistent weights of a device with write noise exactly, and each "
        "time draws new noise on what reads see",
        "hold_cells, and thaw_, whose reads differ from the frozen ones by that noise",
        "if the noise is kept now, thaw_ can promise the very weights that were frozen",
    )
    tile = AnalogTile(8, 8, SingleRPUConfig(device=ReRamArrayOMPresetDevice()))
    goal, reads = tile.get_hidden_parameters()["persistent_weights"], []
    for _ in range(2):
        tile.set_weights(goal, None, apply_weight_scaling=False)
        assert torch.equal(tile.get_hidden_parameters()["persistent_weights"], goal), fact
        reads.append(tile.tile.get_weights())
    # 64 continuous values that all repeat: the chance is zero for all purposes.
    assert not torch.equal(*reads), fact


# ------------------------------------------------------------------ random numbers


def noisy(config_class):
    config = config_class()
    config.forward.out_noise, config.forward.out_res = 0.1, -1.0
    return config


def read_twice_from_one_seed(config):
    tile, x = tile_of(config, bias=False).eval(), torch.ones(8, 4)
    reads = []
    for _ in range(2):
        torch.manual_seed(3)
        reads.append(tile(x))
    return reads


@pytest.mark.parametrize("config_class", [SingleRPUConfig, InferenceRPUConfig])
def test_torchs_seed_does_not_reach_cpp_noise(config_class, aihwkit_fact):
    fact = aihwkit_fact(
        "torch.manual_seed does not reach the noise of C++ tiles",
        "frozen tiles that draw from torch's generator, and resumed runs that repeat",
        "say in the guide that unfrozen C++ tiles can be seeded too",
    )
    # Two equal reads of 24 values without a converter: the chance is zero for all purposes.
    assert not torch.equal(*read_twice_from_one_seed(noisy(config_class))), fact


def test_torchs_seed_does_reach_torch_tiles(aihwkit_fact):
    fact = aihwkit_fact(
        "torch.manual_seed decides the noise of TorchInferenceTile",
        "choosing torch tiles for the RPUConfig of every chip",
        "look for the generator that torch tiles use now",
    )
    config = noisy(TorchInferenceRPUConfig)
    first, second = read_twice_from_one_seed(config)
    assert torch.equal(first, second), fact
    tile = tile_of(config).eval()
    assert not torch.equal(tile(torch.ones(8, 4)), tile(torch.ones(8, 4))), fact


def test_construction_seed_fixes_cells_but_no_noise(aihwkit_fact):
    fact = aihwkit_fact(
        "construction_seed fixes the device-to-device parameters of C++ tiles, not their noise",
        "drawing cells from a generator of our own in program_",
        "if it fixes noise as well, unfrozen runs can be repeated: say so in the guide",
    )
    tiles = [
        AnalogTile(3, 4, SingleRPUConfig(device=ConstantStepDevice(construction_seed=seed)))
        for seed in (1, 1, 2)
    ]
    steps = [tile.get_hidden_parameters()["dwmin_up"] for tile in tiles]
    assert torch.equal(steps[0], steps[1]), fact
    assert not torch.equal(steps[0], steps[2]), fact
    for tile in tiles[:2]:
        tile.set_weights(torch.zeros(3, 4))
    tiles[0].rpu_config.forward.out_res = -1.0
    reads = [tile.forward(torch.ones(64, 4)) for tile in tiles[:2]]
    # 192 values of 254 levels that all repeat: below 1e-40 at the default noise of half a level.
    assert not torch.equal(*reads), fact


# ------------------------------------------------------------------ program_weights of aihwkit


def training_tile():
    return tile_of(pulsed(), bias=False)


def test_a_training_tile_cannot_be_programmed_twice(aihwkit_fact):
    fact = aihwkit_fact(
        "the second program_weights() of a training tile raises UnboundLocalError",
        "program_, which has a write-verify loop of its own",
        "if aihwkit's works now, compare the two and say in the guide what differs",
    )
    tile = training_tile()
    tile.program_weights()
    with fact.raises(UnboundLocalError, "target_weights"):
        tile.program_weights()


def test_a_training_tile_cannot_be_programmed_with_inputs_of_ones_own(aihwkit_fact):
    fact = aihwkit_fact(
        "program_weights(x_values=…) of a training tile raises UnboundLocalError",
        "program_, which has a write-verify loop of its own",
        "if aihwkit's works now, compare the two and say in the guide what differs",
    )
    with fact.raises(UnboundLocalError, "target_values"):
        training_tile().program_weights(x_values=torch.eye(4))


def test_a_layer_of_training_tiles_cannot_be_programmed(aihwkit_fact):
    fact = aihwkit_fact(
        "program_analog_weights() of a layer with training tiles raises TypeError",
        "program_, which has a write-verify loop of its own",
        "if aihwkit's works now, compare the two and say in the guide what differs",
    )
    layer = AnalogLinear(4, 3, rpu_config=pulsed()).eval()
    with fact.raises(TypeError, "unexpected keyword argument 'noise_model'"):
        layer.program_analog_weights()


def test_programming_a_training_tile_starts_from_random_weights(aihwkit_fact):
    fact = aihwkit_fact(
        "program_weights() of a training tile randomises the array before its first pulse",
        "reprogram_, which starts from where the cells stand and counts from there",
        "see what aihwkit's loop starts from now",
    )
    tile = training_tile()
    before = tile.tile.get_weights()
    tile.program_weights(max_iter=0)
    # 12 continuous values that all repeat: the chance is zero for all purposes.
    assert not torch.equal(tile.tile.get_weights(), before), fact
