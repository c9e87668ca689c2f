"""Saving, copying and loading aihwkit's layers: what gets lost on the way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.optim.weight_view import PlaceholderDataView
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.presets.devices import (
    ReRamArrayHfO2PresetDevice,
    ReRamArrayOMPresetDevice,
    ReRamESPresetDevice,
    ReRamSBPresetDevice,
)
from torch.nn.utils import parameters_to_vector


def pulsed():
    return SingleRPUConfig(device=ConstantStepDevice())


ALL = [pulsed, FloatingPointRPUConfig, InferenceRPUConfig, TorchInferenceRPUConfig]
INFERENCE = [InferenceRPUConfig, TorchInferenceRPUConfig]
OF_PROGRAMMING = (
    "programmed_weights",
    "drift_noise_parameters",
    "drift_baseline",
    "reference_combined_weights",
)


def tile_of(layer):
    return next(layer.analog_tiles())


def held(layer):
    return tile_of(layer).tile.get_weights().clone()


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


# ------------------------------------------------------------------ a new context


def test_loading_swaps_context_and_array_and_wants_gradients_again(net, aihwkit_fact):
    fact = aihwkit_fact(
        "load_state_dict keeps the tile but gives it a new AnalogContext, which wants a gradient, "
        "and a new C++ array; the bias keeps its flag",
        "frozen tiles, which have neither, and in loading before optimisers are built",
        "see what an optimiser and a reference to tile.tile hold after loading",
    )
    model = net(pulsed()).requires_grad_(False)
    tile = tile_of(model[1])
    context, array = tile.analog_ctx, tile.tile
    model.load_state_dict(model.state_dict())
    assert tile_of(model[1]) is tile, fact
    assert tile.analog_ctx is not context, fact
    assert tile.tile is not array, fact
    assert tile.analog_ctx.requires_grad, fact
    assert not tile.bias.requires_grad, fact


def test_after_loading_an_older_optimiser_trains_nothing_and_leaks(net, aihwkit_fact):
    fact = aihwkit_fact(
        "an optimiser from before load_state_dict holds the old context: the tile trains no more, "
        "without an error, and its queue grows",
        "rewinding models in recipes, which only rewinds plain tensors",
        "unfrozen layers can be rewound inside a run now: say so in the guide",
    )
    model = net(pulsed())
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    model.load_state_dict(model.state_dict())
    before = held(model[1])
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(held(model[1]), before), fact
    assert len(tile_of(model[1]).analog_ctx.analog_input) == 3, fact


def test_copies_and_new_configurations_want_gradients_again(net, aihwkit_fact):
    fact = aihwkit_fact(
        "deepcopy, pickle and replace_rpu_config give a tile a new context that wants a gradient",
        "frozen layers, whose copies are frozen by type",
        "see whether a copy keeps requires_grad, and say so in the guide",
    )
    model = net(pulsed()).requires_grad_(False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tile_of(twin[1]).analog_ctx.requires_grad, fact
        assert not twin[0].weight.requires_grad, fact
    context = tile_of(model[1]).analog_ctx
    model[1].replace_rpu_config(pulsed())
    assert tile_of(model[1]).analog_ctx is not context, fact
    assert tile_of(model[1]).analog_ctx.requires_grad, fact


def test_moving_to_the_cpu_on_the_cpu_keeps_the_context(net, aihwkit_fact):
    fact = aihwkit_fact(
        "cpu() and to('cpu') of a model, layer or tile on the CPU keep its context and flag",
        "Lightning's CPU runs, which call them on unfrozen models too",
        "build optimisers after moving, as with load_state_dict",
    )
    model = net(pulsed()).requires_grad_(False)
    tile = tile_of(model[1])
    context = tile.analog_ctx
    model.cpu()
    model[1].to("cpu")
    tile.cpu()
    assert tile.analog_ctx is context, fact
    assert not context.requires_grad, fact


def test_attributes_of_ones_own_survive_loading_but_are_not_saved(net, aihwkit_fact):
    fact = aihwkit_fact(
        "an attribute set on a layer or tile survives load_state_dict and deepcopy, and is not in "
        "the state_dict",
        "leaving the record of a programming as an attribute of the layer, with a digest",
        "keep that record where loading and copying leave it alone",
    )
    model = net(pulsed())
    model[1].ours = tile_of(model[1]).ours = "record"
    state = model.state_dict()
    model.load_state_dict(state)
    for kept in (model[1], copy.deepcopy(model)[1]):
        assert (kept.ours, tile_of(kept).ours) == ("record", "record"), fact
    assert "ours" not in state["1.analog_module.analog_tile_state"], fact


# ------------------------------------------------------------------ cells with write noise


@pytest.mark.parametrize(
    "device",
    [
        ReRamArrayHfO2PresetDevice,
        ReRamArrayOMPresetDevice,
        ReRamESPresetDevice,
        ReRamSBPresetDevice,
    ],
)
@pytest.mark.parametrize("way", ["deepcopy", "load_state_dict"])
def test_copies_of_cells_with_write_noise_stand_where_reads_saw_them(device, way, aihwkit_fact):
    fact = aihwkit_fact(
        f"{way} keeps what reads of a device with write noise see, but moves its persistent "
        "weights there, within each cell's bounds",
        "keeping programmed cells in a record of our own (Cells), not in aihwkit's tile",
        "if persistent weights survive now, a record can be rebuilt from a tile",
    )
    layer = AnalogLinear(12, 10, bias=False, rpu_config=SingleRPUConfig(device=device()))
    cells, seen = tile_of(layer).get_hidden_parameters(), held(layer)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        twin = layer
        twin.load_state_dict(layer.state_dict())
    assert torch.equal(held(twin), seen), fact
    persistent = tile_of(twin).get_hidden_parameters()["persistent_weights"]
    assert torch.equal(persistent, seen.clamp(cells["min_bound"], cells["max_bound"])), fact
    # 120 continuous values that all equal their noisy reads by chance: zero for all purposes.
    assert not torch.equal(persistent, cells["persistent_weights"]), fact


# ------------------------------------------------------------------ programmed and drifted chips


@pytest.mark.parametrize("config", INFERENCE)
def test_a_drifted_chip_cannot_be_loaded(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "drift_analog_weights leaves the buffer alpha without shape, which load_state_dict "
        "refuses for a fresh model with shape (1,)",
        "frozen layers, which fold alpha into their scales",
        "if it loads now, say in the guide from which version on drifted models can be saved",
    )
    model = net(config()).eval()
    assert tile_of(model[1]).alpha.shape == (1,), fact
    model[1].drift_analog_weights(3600.0)
    assert tile_of(model[1]).alpha.shape == (), fact
    with fact.raises(RuntimeError, r"size mismatch for 1\.analog_module\.alpha"):
        net(config()).load_state_dict(model.state_dict())


@pytest.mark.parametrize("config", INFERENCE)
def test_how_a_chip_was_programmed_is_not_saved(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "a state_dict has the drifted weights but not how they were programmed, so that the next "
        "drift of the loaded model programs anew, on top of the drifted weights",
        "frozen layers, whose drift is computed from kept conductances and never written back",
        "if programming is saved now, freeze_ can take it from loaded models",
    )
    model = net(config()).eval()
    model[1].drift_analog_weights(3600.0)
    drifted = held(model[1])
    tile = tile_of(model[1])
    assert all(getattr(tile, name) is not None for name in OF_PROGRAMMING), fact
    assert torch.equal(tile.tile.get_weights(), drifted), fact
    assert not torch.equal(tile.programmed_weights, drifted), fact
    state = model.state_dict()
    state["1.analog_module.alpha"] = state["1.analog_module.alpha"].reshape(1)
    fresh = net(config()).eval()
    fresh.load_state_dict(state)
    loaded = tile_of(fresh[1])
    assert torch.equal(held(fresh[1]), drifted), fact
    assert [getattr(loaded, name) for name in OF_PROGRAMMING] == [None] * 4, fact
    fresh[1].drift_analog_weights(3600.0)
    assert torch.equal(loaded.reference_combined_weights, drifted), fact


@pytest.mark.parametrize("config", INFERENCE)
def test_drift_starts_from_what_was_programmed_each_time(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "drift_analog_weights overwrites the array but keeps programmed_weights, and "
        "program_analog_weights draws new ones from the kept reference",
        "freeze_, which takes programmed_weights for a sign that a layer was programmed",
        "see what tells a programmed layer from a converted one now",
    )
    layer = net(config()).eval()[1]
    reference = held(layer)
    layer.program_analog_weights()
    programmed = tile_of(layer).programmed_weights.clone()
    assert torch.equal(held(layer), programmed), fact
    layer.drift_analog_weights(3600.0)
    assert torch.equal(tile_of(layer).programmed_weights, programmed), fact
    assert not torch.equal(held(layer), programmed), fact
    layer.program_analog_weights()
    assert not torch.equal(tile_of(layer).programmed_weights, programmed), fact
    assert torch.equal(tile_of(layer).reference_combined_weights, reference), fact


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("config", ALL)
def test_checkpoints_need_unsafe_loading(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "a state_dict holds the tile class and the RPUConfig, which torch.load refuses unless "
        "weights_only=False",
        "frozen layers, whose state is plain tensors",
        "say in the guide from which version on unfrozen models load safely",
    )
    model = net(config())
    with fact.raises(pickle.UnpicklingError, "Weights only load failed"):
        torch.load(saved(model), weights_only=True)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(saved(model))
    rpu_config = type(tile_of(model[1]).rpu_config)
    assert f"{rpu_config.__module__}.{rpu_config.__name__}" in refused, fact
    tile = type(tile_of(model[1]))
    assert f"{tile.__module__}.{tile.__name__}" in refused, fact


@pytest.mark.parametrize("config", ALL)
def test_unsafe_loading_restores_what_tiles_hold(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "torch.load with weights_only=False and load_state_dict restore what a tile holds",
        "thaw_, whose layers are saved the way aihwkit saves its own",
        "warn in the guide that unfrozen layers do not survive a checkpoint",
    )
    model, fresh = net(config()), net(config())
    assert not torch.equal(held(fresh[1]), held(model[1])), fact
    fresh.load_state_dict(torch.load(saved(model), weights_only=False))
    assert torch.equal(held(fresh[1]), held(model[1])), fact
    assert torch.equal(fresh[1].get_weights()[1], model[1].get_weights()[1]), fact


def each(values, do):
    return [do(value) for value in values if isinstance(value, torch.Tensor)]


USUAL_WAYS = {
    "__deepcopy__": lambda model: copy.deepcopy(model.state_dict()),
    "clone": lambda model: each(model.state_dict().values(), torch.Tensor.clone),
    "cpu": lambda model: each(model.state_dict().values(), torch.Tensor.cpu),
    "norm": lambda model: each(model.parameters(), torch.Tensor.norm),
    "square": lambda model: each(model.parameters(), torch.Tensor.square),
    "view": lambda model: parameters_to_vector(model.parameters()),
}


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("operation", USUAL_WAYS)
def test_usual_ways_to_copy_or_penalise_parameters_raise(config, operation, net, aihwkit_fact):
    fact = aihwkit_fact(
        f"the placeholder in the place of a tile's weights raises on '{operation}'",
        "snapshots and penalties, which visit trainable parameters of frozen models only",
        "if it returns something now, see that it is the weights and not stale memory",
    )
    with fact.raises(RuntimeError, f"placeholder mode, so operation '{operation}'"):
        USUAL_WAYS[operation](net(config()))


@pytest.mark.parametrize("config", ALL)
def test_placeholders_are_what_a_state_dict_has_for_weights(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "state_dict()['….analog_ctx'] is a placeholder without values, and '….analog_tile_state' "
        "a dict",
        "adapters' checkpoints, which leave both out",
        "see that saved adapters still hold no weights of the base",
    )
    state = net(config()).state_dict()
    assert type(state["1.analog_module.analog_ctx"]) is PlaceholderDataView, fact
    assert type(state["1.analog_module.analog_tile_state"]) is dict, fact
