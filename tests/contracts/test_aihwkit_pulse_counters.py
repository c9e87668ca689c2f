"""aihwkit's pulsed update: where it happens, what it is given, which pulses it counts itself."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect

import pytest
import torch
from aihwkit.nn import AnalogConv2d, AnalogConv2dMapped, AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator import rpu_base
from aihwkit.simulator.configs import SingleRPUConfig, UpdateParameters
from aihwkit.simulator.configs import compounds as compound_module
from aihwkit.simulator.configs import devices as device_module
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.parameters.enums import PulseType, VectorUnitCellUpdatePolicy

from aihwkit_lora.metering.pulse_counters import PULSED_TILES

COUNTS = "metering.insitu and metering.pulse_counters"
FOLLOWS = "programming.pulse_trains"


def ideal(**fields):
    return ConstantStepDevice(
        **{
            "dw_min": 2.0**-10,
            "dw_min_dtod": 0.0,
            "dw_min_std": 0.0,
            "up_down_dtod": 0.0,
            "w_max": 9.0,
            "w_min": -9.0,
            "w_max_dtod": 0.0,
            "w_min_dtod": 0.0,
            **fields,
        }
    )


def tile_of(*, bias=False, update=None, **fields):
    """A pulsed tile with 4 inputs and 3 outputs, all weights 0."""
    config = SingleRPUConfig(device=ideal(**fields), update=update or UpdateParameters())
    config.mapping.digital_bias = False
    (tile,) = AnalogLinear(4, 3, bias=bias, rpu_config=config).analog_tiles()
    tile.tile.set_weights(torch.zeros(3, 4 + bias))
    tile.set_learning_rate(0.1)
    return tile


# ------------------------------------------------------------------ where pulses are applied


def test_updates_of_pulsed_tiles_go_through_two_methods_of_a_class(aihwkit_fact):
    fact = aihwkit_fact(
        "the C++ class AnalogTile inherits update and update_indexed from FloatingPointTile, and "
        "both can be set on the class and deleted again",
        COUNTS,
        "find where pulses are applied now, or training would go uncounted",
    )
    assert rpu_base.tiles.AnalogTile in PULSED_TILES, fact
    assert rpu_base.tiles.FloatingPointTile not in PULSED_TILES, fact
    calls = []
    for name in ("update", "update_indexed"):
        assert name not in vars(rpu_base.tiles.AnalogTile), fact
        assert name in vars(rpu_base.tiles.FloatingPointTile), fact
        setattr(rpu_base.tiles.AnalogTile, name, lambda *inputs, n=name: calls.append(n))
    try:
        tile = tile_of()
        tile.update(torch.ones(1, 4), torch.ones(1, 3))
        tile.program_weights(max_iter=1, tolerance=None)
        conv = AnalogConv2d(1, 1, 2, rpu_config=SingleRPUConfig(device=ideal()), use_indexed=True)
        optimizer = AnalogSGD(conv.parameters(), lr=0.1)
        conv(torch.ones(1, 1, 3, 3)).sum().backward()
        conv(torch.ones(1, 1, 3, 3)).sum().backward()
        optimizer.step()
    finally:
        for name in ("update", "update_indexed"):
            delattr(rpu_base.tiles.AnalogTile, name)
    assert calls == ["update", "update", "update_indexed", "update_indexed"], fact
    before = tile.tile.get_weights()
    tile.update(torch.ones(1, 4), torch.ones(1, 3))
    assert not torch.equal(tile.tile.get_weights(), before), fact


def test_the_place_of_an_argument_counts_and_not_its_name(aihwkit_fact):
    fact = aihwkit_fact(
        "the fourth argument of the C++ update, named d_trans, transposes x, and the fifth, named "
        "x_trans, transposes d",
        COUNTS,
        "swap them in _read_update",
    )
    x, d = torch.rand(5, 4), torch.rand(5, 3)
    tile = tile_of(update=UpdateParameters(pulse_type=PulseType.MEAN_COUNT)).tile
    tile.update(x.T.contiguous(), d, False, True, False)
    tile.update(x.T.contiguous(), d, False, d_trans=True)
    with pytest.raises(RuntimeError, match="Invalid x_input dimensions"):
        tile.update(x.T.contiguous(), d, False, x_trans=True)
    once, thrice = (
        tile.get_weights() / 2.0,
        tile_of(update=UpdateParameters(pulse_type=PulseType.MEAN_COUNT)).tile,
    )
    thrice.update(x, d, False)
    assert torch.equal(once, thrice.get_weights()), fact


def test_an_analogue_bias_is_an_input_of_1_behind_the_others(aihwkit_fact):
    fact = aihwkit_fact(
        "with bias=True the C++ tile appends an input of 1 as its last column",
        "Update.vectors",
        "put the 1 where it is now",
    )
    update = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
    tile, plain = tile_of(bias=True, update=update), tile_of(bias=True, update=update)
    x, d = torch.rand(1, 4), torch.rand(1, 3)
    tile.tile.update(x, d, True)
    plain.tile.update(torch.cat([x, torch.ones(1, 1)], 1), d, False)
    assert torch.equal(tile.tile.get_weights(), plain.tile.get_weights()), fact
    assert bool((tile.tile.get_weights()[:, 4] < 0).all()), fact


def test_convolutions_list_more_indices_than_rows(aihwkit_fact):
    fact = aihwkit_fact(
        "fold_indices has a row per input of the tile, 0 for padding, 1 for the bias, and further "
        "rows for two channels and more with an analogue bias",
        "Update.vectors",
        "re-derive the rows from RPUSimple::copyIndexedInput",
    )
    config = SingleRPUConfig(device=ideal())
    config.mapping.digital_bias = False
    conv = AnalogConv2d(2, 3, 2, padding=1, rpu_config=config, use_indexed=True)
    conv(torch.ones(1, 2, 2, 2))
    (tile,) = conv.analog_tiles()
    rows = conv.fold_indices.view(-1, 9)
    assert (tile.tile.get_x_size(), len(rows)) == (9, 10), fact
    assert rows[0].tolist() == [0, 0, 0, 0, 2, 3, 0, 4, 5], fact
    assert rows[8:].unique().tolist() == [1], fact


def test_mapped_convolutions_keep_indices_by_the_channels_of_their_tiles(aihwkit_fact):
    fact = aihwkit_fact(
        "a mapped convolution is indexed, on the CPU too, and holds one of fold_indices_lst for "
        "each row of its array",
        "Site.index_matrix",
        "find where the indices of a tile are kept now",
    )
    config = SingleRPUConfig(device=ideal())
    config.mapping.max_input_size = 5
    conv = AnalogConv2dMapped(2, 3, 2, rpu_config=config)
    conv(torch.ones(1, 2, 3, 3))
    assert len(conv.fold_indices_lst) == len(conv.array) == 2, fact
    assert all(tile.is_indexed() for row in conv.array for tile in row), fact
    assert conv.fold_indices_lst[0].tolist()[:4] == [2, 3, 5, 6], fact


# ------------------------------------------------------------------ what a tile tells of itself


def test_a_tile_tells_its_rate_and_its_granularity(aihwkit_fact):
    fact = aihwkit_fact(
        "dump_extra() of a pulsed tile holds the learning rate, a backward factor of 1 and the "
        "granularity of its device",
        "TrainCounter, which makes the trains from them",
        "find the new names; a guess would scale all counts",
    )
    tile = tile_of(dw_min=0.003)
    extra = tile.tile.dump_extra()
    assert extra["rpu.learning_rate"] == [pytest.approx(0.1)], fact
    assert extra["rpu.bwd_alpha"] == [1.0], fact
    assert extra["rpu.rpu_device.weight_granularity"] == [pytest.approx(0.003)], fact


def test_hidden_parameters_change_the_granularity(aihwkit_fact):
    fact = aihwkit_fact(
        "set_hidden_parameters takes the mean step of the given cells for the granularity",
        "TrainCounter, which asks for it at each update",
        "it could be asked for once if this is over",
    )
    tile = tile_of()
    parameters = tile.get_hidden_parameters()
    for name in ("dwmin_up", "dwmin_down"):
        parameters[name] *= 4.0
    tile.set_hidden_parameters(parameters)
    extra = tile.tile.dump_extra()
    assert extra["rpu.rpu_device.weight_granularity"] == [2.0**-8], fact


def test_a_tile_knows_the_settings_that_it_was_made_with(aihwkit_fact):
    fact = aihwkit_fact(
        "get_meta_parameters().update has every field of UpdateParameters, with update_management "
        "switched on by update_bl_management, and takes no notice of a configuration edited later",
        "TrainCounter",
        "read them from where they act now",
    )
    update = UpdateParameters(desired_bl=7, update_management=False, res=0.25)
    tile = tile_of(update=update)
    tile.rpu_config.update.desired_bl = 9
    held = tile.tile.get_meta_parameters().update
    found = {
        field.name: getattr(held, field.name) for field in dataclasses.fields(UpdateParameters)
    }
    found["pulse_type"] = PulseType(found["pulse_type"].name)
    wanted = dataclasses.replace(update, desired_bl=7, update_management=True)
    assert found == dataclasses.asdict(wanted), fact


def test_settings_of_an_update_are_all_known(aihwkit_fact):
    fields = {field.name for field in dataclasses.fields(UpdateParameters)}
    fact = aihwkit_fact(
        f"UpdateParameters and the pulse types are those that are followed, now {sorted(fields)}",
        FOLLOWS,
        "follow what is new, or refuse it",
    )
    assert fields == {
        "d_res_implicit",
        "d_sparsity",  # of use to dynamic transfer alone
        "desired_bl",
        "fixed_bl",
        "pulse_type",
        "res",
        "sto_round",
        "um_grad_scale",
        "update_bl_management",
        "update_management",
        "x_res_implicit",
    }, fact
    assert {kind.name for kind in PulseType} == {
        "DETERMINISTIC_IMPLICIT",
        "MEAN_COUNT",
        "NONE",
        "NONE_WITH_DEVICE",
        "STOCHASTIC",
        "STOCHASTIC_COMPRESSED",
    }, fact
    assert {policy.name for policy in VectorUnitCellUpdatePolicy} == {
        "ALL",
        "SINGLE_FIXED",
        "SINGLE_RANDOM",
        "SINGLE_SEQUENTIAL",
    }, fact


def test_unit_cells_are_all_known(aihwkit_fact):
    found = {
        name
        for name, kind in inspect.getmembers(compound_module, inspect.isclass)
        if kind.__module__ == compound_module.__name__
    }
    fact = aihwkit_fact(
        f"the unit cells are these and no others (now {sorted(found)})",
        "_by_device, which says which cells of a weight a pulse reaches",
        "a new subclass of a known cell would be counted like its parent: decide on it",
    )
    assert found == {
        "BufferedTransferCompound",
        "ChoppedTransferCompound",
        "DifferenceUnitCell",
        "DigitalRankUpdateCell",
        "DynamicTransferCompound",
        "MixedPrecisionCompound",
        "OneSidedUnitCell",
        "ReferenceUnitCell",
        "TransferCompound",
        "UnitCell",
        "VectorUnitCell",
    }, fact
    assert device_module.PulsedDevice not in (
        device_module.IdealDevice.__mro__ + device_module.FloatingPointDevice.__mro__
    ), fact


# ------------------------------------------------------------------ rates and random numbers


def test_negative_rates_are_refused(aihwkit_fact):
    fact = aihwkit_fact(
        "a pulsed tile refuses a negative learning rate, and AnalogSGD too",
        FOLLOWS + ", which refuses them",
        "follow their sign",
    )
    with fact.raises(RuntimeError, "lr should be positive"):
        tile_of().tile.set_learning_rate(-0.1)
    with fact.raises(ValueError, "Invalid learning rate"):
        AnalogSGD([torch.nn.Parameter(torch.ones(1))], lr=-0.1)


def test_the_cpu_draws_from_rand_of_c(aihwkit_fact):
    fact = aihwkit_fact(
        "trains on the CPU come from rand() of the C library, which srand() seeds",
        "the test that counting leaves aihwkit's random numbers alone",
        "find another way to seed it, or compare in law",
    )
    found = []
    for seed in (1, 1, 2):
        tile = tile_of()
        ctypes.CDLL(None).srand(seed)
        tile.update(torch.full((20, 4), 0.5), torch.full((20, 3), 0.01))
        found.append(tile.tile.get_weights())
    assert torch.equal(found[0], found[1]), fact
    assert not torch.equal(found[0], found[2]), fact


# ------------------------------------------------------------------ counters of aihwkit itself


def test_the_cpu_counts_no_pulses(aihwkit_fact):
    fact = aihwkit_fact(
        "get_pulse_counters() of a tile on the CPU is an empty int64 tensor, whatever count_pulses "
        "says",
        "TrainCounter, which draws trains instead",
        "if the CPU counts now, read its counters and call them exact",
    )
    tile = tile_of(count_pulses=True)
    tile.update(torch.ones(1, 4), torch.ones(1, 3))
    counters = tile.tile.get_pulse_counters()
    assert counters.shape == (0,), fact
    assert counters.dtype == torch.int64, fact
    assert not [name for name in tile.tile.dump_extra() if "puls" in name], fact
