"""Every way in which an analogue layer can change, tried on frozen layers of every kind of tile.

The table :data:`WAYS` lists what aihwkit 1.2.0 and torch offer, and what comes of it: an error that
names the layer and the way out (``"raises"``), or nothing (``"unchanged"``).
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.inference.calibration import (
    InputRangeCalibrationType,
    calibrate_input_ranges,
    calibrate_quantization_ranges,
)
from aihwkit.inference.utils import drift_analog_weights, program_analog_weights
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_analog, convert_to_digital
from aihwkit.optim import AnalogAdam, AnalogSGD
from aihwkit.simulator.configs import InferenceRPUConfig
from aihwkit.simulator.presets import ReRamSBPreset
from aihwkit.utils.analog_info import analog_summary
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import aihwkit_lora as al
from aihwkit_lora.tiles.grid import TileGrid, tile_weight

CHIP = al.chips.get("rm-180nm")
# Loose, since programming is not what is tested here.
QUICK = replace(CHIP.write_policy, tolerance=0.3, max_pulses=3000)
OUTPUTS, COLUMNS, ROWS = 12, 6, 8  # of the layer; of each of its tiles

Way = Callable[[Any], object]
"""What is done with the model; :class:`Kind` in conftest.py says what that is."""


@dataclass(frozen=True)
class Evidence:
    """What a frozen layer is and does, its digital bias left out."""

    fingerprint: str
    weight: Tensor
    outputs: Tensor
    gradients: Tensor


def evidence(model: Any) -> Evidence:
    array = model.frozen.analog_module
    inputs = array.blocks.in_features
    drive = torch.linspace(-2.0, 2.0, 5 * inputs).view(5, inputs).requires_grad_()
    outputs = array(drive)
    upstream = torch.linspace(-1.0, 1.0, outputs.numel()).view_as(outputs)
    (gradients,) = torch.autograd.grad(outputs, drive, upstream)
    weight = model.frozen.weight.clone()
    return Evidence(al.fingerprint(model), weight, outputs.detach(), gradients)


def assert_unchanged(model: Any, before: Evidence) -> None:
    after = evidence(model)
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.weight, before.weight)
    assert torch.equal(after.outputs, before.outputs)
    assert torch.equal(after.gradients, before.gradients)
    al.verify(model)


def batch(model: Any) -> Tensor:
    return torch.randn(5, 16) if isinstance(model.stem, nn.Linear) else torch.randn(5, 1, 6, 6)


def last_tile(model: Any) -> Any:
    return list(model.frozen.analog_tiles())[-1]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
    if isinstance(optimizer, AnalogSGD | AnalogAdam):
        optimizer.regroup_param_groups(model)
    before = model.stem.weight.detach().clone()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(3.0 * batch(model)).square().mean().backward()
        optimizer.step()
    # Gradients came through to the digital layer below.
    assert model.stem.weight.grad.any()
    assert torch.equal(model.stem.weight, before) == (optimizer.param_groups[0]["lr"] == 0.0)


# ------------------------------------------------------------------------------- ways, as functions


def training(optimiser: type[torch.optim.Optimizer], **settings: float) -> Way:
    return lambda model: train(model, optimiser(model.parameters(), **settings))


def training_of_all_that_can_be(model: Any) -> None:
    train(model.requires_grad_(True), torch.optim.SGD(model.parameters(), lr=0.01))


def a_step_on_the_weight(optimiser: type[torch.optim.Optimizer]) -> Way:
    def way(model: Any) -> None:
        weight = model.frozen.weight
        weight.grad = torch.ones(weight.shape)
        optimiser([weight], lr=0.1).step()

    return way


def backward_zero_grad_step(model: Any) -> None:
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    model.train()(batch(model)).square().mean().backward()
    optimizer.zero_grad()
    optimizer.step()


def gradient_probe_step(model: Any) -> None:
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    x = batch(model).requires_grad_()
    torch.autograd.grad(model.train()(x).square().mean(), x)
    optimizer.step()


def tile(method: str, *args: Any, **kwargs: Any) -> Way:
    return lambda model: getattr(last_tile(model), method)(*args, **kwargs)


def layer(method: str, *args: Any) -> Way:
    return lambda model: getattr(model.frozen, method)(*args)


def root(method: str, *args: Any, **kwargs: Any) -> Way:
    return lambda model: getattr(model.eval(), method)(*args, **kwargs)


def load_a_digital_layer(model: Any) -> None:
    state = {"weight": torch.zeros(model.frozen.weight.shape), "bias": torch.zeros(OUTPUTS)}
    model.frozen.load_state_dict(state, strict=False)


def configuration_edited(model: Any) -> None:
    config = last_tile(model).rpu_config
    config.mapping.weight_scaling_omega = 0.1
    config.pre_post.input_range.enable = False
    if hasattr(config, "forward"):
        config.forward.out_noise, config.forward.inp_res = 1.0, 0.2


def averaged_and_copied_back(model: Any) -> None:
    average = AveragedModel(model, use_buffers=True)
    own = [*model.parameters(), *model.buffers()]
    for values in own:
        values.data = values.data + 1.0
    average.update_parameters(model)
    averages = [*average.module.parameters(), *average.module.buffers()]
    for values, averaged in zip(own, averages, strict=True):
        values.data.copy_(averaged.data)


def all_parameters_and_buffers_replaced(model: Any) -> None:
    for values in (*model.parameters(), *model.buffers()):
        values.data = torch.zeros_like(values)


def all_parameters_in_one_vector(model: Any) -> None:
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(torch.zeros_like(vector), model.parameters())


def called_with_other_parameters(model: Any) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    torch.func.functional_call(model, zeros, batch(model))


def state_zeroed_in_place(model: Any) -> None:
    for values in model.state_dict().values():
        values.zero_()


def reset_everywhere(model: Any) -> None:
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)


def initialised_as_in_transformers(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.normal_(mean=0.0, std=0.02)


def initialised_by_torch(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)


def an_ordinary_layer_from_its_weight(model: Any) -> None:
    weight = model.frozen.weight.flatten(1)
    digital = nn.Linear(weight.shape[1], OUTPUTS, bias=False)
    digital.weight = nn.Parameter(weight.clone())
    ordinary = AnalogLinear.from_digital(digital, InferenceRPUConfig())
    ordinary.set_weights(torch.zeros(weight.shape))


def weights_read_and_zeroed(model: Any) -> None:
    read = [model.frozen.get_weights(), *model.get_weights().values()]
    for each in model.frozen.analog_tiles():
        read += [each.get_weights(), each.get_weights(apply_weight_scaling=False)]
    for weight, _ in read:
        weight.zero_()


def strong_inputs_in_train_mode(model: Any) -> None:
    for _ in range(10):
        model.train()(100.0 * batch(model)).sum().backward()


def input_ranges_calibrated(how: InputRangeCalibrationType) -> Way:
    return lambda model: calibrate_input_ranges(
        model, how, iter([((100.0 * batch(model),), {}) for _ in range(3)])
    )


def quantisers_calibrated(model: Any) -> None:
    calibrate_quantization_ranges(model, [(100.0 * batch(model), 0) for _ in range(3)])


# Names under which aihwkit's tiles hand out memory that they read from.
HANDLES = [
    *("shared_weights", "_shared_weight_tensor", "analog_ctx", "programmed_weights", "bias"),
    *("mapping_scales", "out_scaling_alpha", "alpha", "input_range"),
]
WEIGHTS, CALIBRATION = torch.zeros(COLUMNS, ROWS), InputRangeCalibrationType

# ---------------------------------------------------------------------------------------- the table

WAYS: dict[str, dict[str, tuple[Way, str]]] = {
    # The updates of torch transfer tiles (5) and custom tiles (6) are these, on their kinds.
    "1, 5, 6 update": {
        "AnalogSGD": (training(AnalogSGD, lr=0.01, momentum=0.9, weight_decay=0.1), "unchanged"),
        "AnalogAdam": (training(AnalogAdam, lr=0.01), "unchanged"),
        "tile.update": (tile("update", torch.ones(1, ROWS), torch.ones(1, COLUMNS)), "raises"),
        "tile.update_indexed": (tile("update_indexed", torch.ones(1, ROWS), WEIGHTS), "raises"),
    },
    "2 digital optimiser": {
        "SGD": (training(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1), "unchanged"),
        "AdamW": (training(torch.optim.AdamW, lr=0.01, weight_decay=0.1), "unchanged"),
        "requires_grad_ of the model": (training_of_all_that_can_be, "unchanged"),
        "requires_grad_ of the weight": (lambda m: m.frozen.weight.requires_grad_(), "raises"),
        "SGD on the weight": (a_step_on_the_weight(torch.optim.SGD), "raises"),
        "Adam on the weight": (a_step_on_the_weight(torch.optim.Adam), "raises"),
        "AnalogSGD on the weight": (a_step_on_the_weight(AnalogSGD), "raises"),
    },
    # Decay, diffusion, clipping, remapping and the weight modifier come with each step.
    "3 after an update": {
        "AnalogSGD at rate 0": (training(AnalogSGD, lr=0.0), "unchanged"),
        "tile.post_update_step": (tile("post_update_step"), "raises"),
    },
    "4 queue": {
        "backward, zero_grad, step": (backward_zero_grad_step, "unchanged"),
        "autograd.grad, step": (gradient_probe_step, "unchanged"),
    },
    "7 set_weights": {
        "tile": (tile("set_weights", WEIGHTS), "raises"),
        "tile, realistic": (tile("set_weights", WEIGHTS, None, realistic=True), "raises"),
        "layer": (layer("set_weights", torch.zeros(OUTPUTS, 16), torch.zeros(OUTPUTS)), "raises"),
        "model": (lambda m: m.set_weights(m.get_weights()), "raises"),
    },
    "8 programming": {
        "tile": (tile("program_weights"), "raises"),
        "layer": (layer("program_analog_weights"), "raises"),
        "model": (root("program_analog_weights"), "raises"),
        "model, noise model": (root("program_analog_weights", PCMLikeNoiseModel()), "raises"),
        "function": (lambda m: program_analog_weights(m.eval(), None), "raises"),
    },
    "9 drift": {
        "tile": (tile("drift_weights", 86400.0), "raises"),
        "layer": (layer("drift_analog_weights", 86400.0), "raises"),
        "function": (lambda m: drift_analog_weights(m.eval(), 86400.0), "raises"),
    },
    "10 remapping": {
        "tile": (tile("remap_weights"), "raises"),
        "layer": (layer("remap_analog_weights"), "raises"),
        "model": (root("remap_analog_weights"), "raises"),
    },
    "11 decay, diffusion, reset": {
        "tile.decay_weights": (tile("decay_weights", 0.5), "raises"),
        "tile.diffuse_weights": (tile("diffuse_weights"), "raises"),
        "tile.reset_columns": (tile("reset_columns", 0, 2), "raises"),
        "tile.reset": (tile("reset"), "raises"),
        "all tiles": (root("apply_to_analog_tiles", lambda each: each.reset()), "raises"),
    },
    "12 hidden parameters": {
        "tile.set_hidden_parameters": (
            tile("set_hidden_parameters", OrderedDict(hidden_weights=WEIGHTS)),
            "raises",
        ),
        "tile.set_hidden_update_index": (tile("set_hidden_update_index", 0), "raises"),
        "tile.load_extra": (tile("load_extra", {}), "raises"),
        "tile.set_forward_parameters": (tile("set_forward_parameters", {}), "raises"),
        "tile.set_backward_parameters": (tile("set_backward_parameters", {}), "raises"),
    },
    "13 random weights": {"tile": (tile("set_weights_uniform_random", -1.0, 1.0), "raises")},
    "14 simulator tile": {
        "tile.tile": (lambda m: last_tile(m).tile.set_weights(WEIGHTS), "raises"),
        "tile.tile = ...": (tile("__setattr__", "tile", None), "raises"),
        "tile.set_delta_weights": (tile("set_delta_weights", WEIGHTS), "raises"),
    },
    "15 load_state_dict": {
        "of a digital layer": (load_a_digital_layer, "unchanged"),
        "of an aihwkit tile": (
            tile("load_state_dict", {"shared_weights": WEIGHTS}, strict=False),
            "unchanged",
        ),
        "__setstate__ of a tile": (
            lambda m: last_tile(m).__setstate__(last_tile(m).__getstate__()),
            "unchanged",
        ),
    },
    "16 configuration": {
        "layer.replace_rpu_config": (layer("replace_rpu_config", ReRamSBPreset()), "raises"),
        "model.replace_rpu_config": (root("replace_rpu_config", ReRamSBPreset()), "raises"),
        "tile.to": (tile("to", ReRamSBPreset()), "raises"),
        "tile.replace_with": (tile("replace_with", ReRamSBPreset()), "raises"),
        "its fields": (configuration_edited, "unchanged"),
    },
    "17 cast or move": {
        **{
            f"model.{name}": (root(name), "unchanged")
            for name in ("half", "bfloat16", "double", "float", "cpu", "share_memory")
        },
        "model.to(dtype)": (root("to", torch.float16), "unchanged"),
        "model.to(device)": (root("to", "cpu"), "unchanged"),
        "model.to_empty": (root("to_empty", device="cpu"), "unchanged"),
        "tile.half": (tile("half"), "unchanged"),
        "tile.cpu": (tile("cpu"), "unchanged"),
        "tile.to(device)": (tile("to", "cpu"), "unchanged"),
    },
    "18 shared weights and averages": {
        "tile.ensure_shared_weights": (tile("ensure_shared_weights", WEIGHTS), "raises"),
        "AveragedModel": (averaged_and_copied_back, "unchanged"),
        "p.data = ...": (all_parameters_and_buffers_replaced, "unchanged"),
        "vector_to_parameters": (all_parameters_in_one_vector, "unchanged"),
        "functional_call": (called_with_other_parameters, "unchanged"),
        "state_dict in place": (state_zeroed_in_place, "unchanged"),
    },
    "19 initialisation": {
        "reset_parameters": (reset_everywhere, "raises"),
        "as in transformers": (initialised_as_in_transformers, "raises"),
        "nn.init": (initialised_by_torch, "raises"),
    },
    "20 conversion and export": {
        "convert_to_digital": (convert_to_digital, "unchanged"),
        "convert_to_digital in place": (lambda m: convert_to_digital(m, inplace=True), "unchanged"),
        "convert_to_analog in place": (
            lambda m: convert_to_analog(
                m, InferenceRPUConfig(), exclude_modules=["stem"], inplace=True
            ),
            "unchanged",
        ),
        "from_digital": (an_ordinary_layer_from_its_weight, "unchanged"),
        "analog_summary": (lambda m: analog_summary(m, tuple(batch(m).shape)), "unchanged"),
        "tile.read_weights": (tile("read_weights"), "raises"),
    },
    "21 alias": {
        **{f"tile.{name}": (tile("__getattr__", name), "raises") for name in HANDLES},
        **{
            f"tile.{name} = ...": (tile("__setattr__", name, WEIGHTS), "raises") for name in HANDLES
        },
        "weight.data": (lambda m: m.frozen.weight.data.zero_(), "raises"),
        "weight = ...": (lambda m: setattr(m.frozen, "weight", None), "raises"),
        "conductance": (lambda m: m.frozen.analog_module.conductance.zero_(), "raises"),
        "scale": (lambda m: m.frozen.analog_module.scale.mul_(2.0), "raises"),
        "get_weights": (weights_read_and_zeroed, "unchanged"),
    },
    "22 digital scales": {
        "tile.set_scales": (tile("set_scales", 2.0), "raises"),
        "tile.set_mapping_scales": (tile("set_mapping_scales", 2.0), "raises"),
        "tile.set_learned_out_scales": (tile("set_learned_out_scales", 2.0), "raises"),
    },
    "23 input range": {
        "tile.set_input_range": (tile("set_input_range", 2.0), "raises"),
        "tile.init_input_processing": (tile("init_input_processing"), "raises"),
        "strong inputs": (strong_inputs_in_train_mode, "unchanged"),
        "moving quantile": (input_ranges_calibrated(CALIBRATION.MOVING_QUANTILE), "unchanged"),
        "quantile": (input_ranges_calibrated(CALIBRATION.CACHE_QUANTILE), "unchanged"),
    },
    "24 quantisers": {"calibrate_quantization_ranges": (quantisers_calibrated, "unchanged")},
    "25 weight modifier": {"train mode": (lambda m: m.train()(batch(m)), "unchanged")},
}
CASES = [
    pytest.param(way, outcome, id=f"{number}: {name}: {outcome}")
    for number, rows in WAYS.items()
    for name, (way, outcome) in rows.items()
]


@pytest.mark.parametrize(("way", "outcome"), CASES)
def test_no_way_moves_a_frozen_layer(tile_kind: Any, way: Way, outcome: str) -> None:
    model = tile_kind.frozen()
    before = evidence(model)
    if outcome == "raises":
        way_out = r"reprogram_\(|drift_\(|thaw_\("
        with pytest.raises(al.FrozenConductanceError, match=rf"layer 'frozen'.*({way_out})"):
            way(model)
    else:
        way(model)
    assert_unchanged(model, before)


# ---------------------------------------------------------------- the same ways, on ordinary layers


def held(model: Any) -> Tensor:
    """What the tiles of an ordinary layer hold."""
    return torch.cat([tile_weight(each).flatten() for each in TileGrid(model.frozen, "").each()])


def test_an_ordinary_layer_does_move_in_training(tile_kind: Any) -> None:
    model = tile_kind.ordinary()
    before = held(model)
    train(model, AnalogSGD(model.parameters(), lr=0.1))
    assert not torch.equal(held(model), before)


def test_an_ordinary_layer_does_move_at_rate_0(tile_kind: Any) -> None:
    model = tile_kind.ordinary().requires_grad_(False)
    before = held(model)
    AnalogSGD(model.parameters(), lr=0.0).step()
    assert torch.equal(held(model), before) != tile_kind.moves_by_itself


# ------------------------------------------------------------- ways that begin before the freezing


def test_updates_queued_before_freezing_arrive_at_the_replaced_tiles_only(tile_kind: Any) -> None:
    model = tile_kind.ordinary()
    replaced = list(TileGrid(model.frozen, "").each())
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    model.train()(batch(model)).square().mean().backward()
    al.freeze_(model, programmed_by="test")
    before, theirs = evidence(model), [tile_weight(each) for each in replaced]
    optimizer.step()
    assert not all(map(torch.equal, map(tile_weight, replaced), theirs))
    assert_unchanged(model, before)


def test_writing_the_replaced_tiles_writes_no_frozen_one(tile_kind: Any) -> None:
    model = tile_kind.ordinary()
    replaced = list(TileGrid(model.frozen, "").each())
    al.freeze_(model, programmed_by="test")
    before = evidence(model)
    for each in replaced:
        each.tile.set_weights(torch.zeros_like(each.tile.get_weights()))
        each.set_scales(9.0)
        each.set_input_range(9.0)
    assert_unchanged(model, before)


# ------------------------------------------------------------------- 15: checkpoints and copies


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda m: m.load_state_dict(m.state_dict()), id="strict"),
        pytest.param(
            lambda m: m.load_state_dict(m.state_dict(), load_rpu_config=False),
            id="without the configuration",
        ),
        pytest.param(
            lambda m: nn.Module.load_state_dict(m, m.state_dict(), assign=True), id="assigned"
        ),
    ],
)
def test_its_own_state_moves_nothing(loadable_kind: Any, load: Way) -> None:
    model = loadable_kind.frozen()
    before = evidence(model)
    load(model)
    assert_unchanged(model, before)


@functools.cache
def programmed_once(kind: Any) -> nn.Module:
    model = kind.ordinary()
    al.program_(model, CHIP, seed=0, policy=QUICK)
    return al.freeze_(model)


def programmed(kind: Any) -> Any:
    """A model whose cells are known, one of its own for each test."""
    return copy.deepcopy(programmed_once(kind))


def test_the_state_of_another_model_is_refused(programmable_kind: Any) -> None:
    model = programmed(programmable_kind)
    before = evidence(model)
    state = programmable_kind.frozen().state_dict()
    assert not torch.equal(
        state["frozen.analog_module.conductance"], model.frozen.analog_module.conductance
    )
    match = r"'frozen\.analog_module\.conductance': .*reprogram_\("
    with pytest.raises(al.FrozenConductanceError, match=match):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_programmed_cells_are_the_same_when_thawed_and_frozen_again(programmable_kind: Any) -> None:
    model = programmed(programmable_kind)
    before = evidence(model)
    assert_unchanged(al.freeze_(al.thaw_(model)), before)


def torch_saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        pytest.param(torch_saved, id="torch.save"),
    ],
)
def test_a_copy_is_equal_and_apart(tile_kind: Any, copied: Callable[[Any], Any]) -> None:
    model = tile_kind.frozen()
    before = evidence(model)
    twin = copied(model)
    assert_unchanged(twin, before)
    twin.frozen.analog_module.programmed.conductance.zero_()
    with pytest.raises(al.FrozenConductanceError, match=r"layer 'frozen', tile \(input 0, output"):
        al.verify(twin)
    assert_unchanged(model, before)


# ---------------------------------------------------- 22 to 26: outputs, with equal conductances


def test_the_function_is_one_and_the_same_in_train_and_eval_mode(tile_kind: Any) -> None:
    model = tile_kind.frozen()
    x = torch.cat([tile_kind.batch(), 100.0 * tile_kind.batch()])
    outputs = [model.train(training)(x).detach() for training in (False, True, True, False)]
    assert outputs[0].any()
    assert all(torch.equal(each, outputs[0]) for each in outputs[1:])


def test_noise_is_drawn_for_each_read_and_moves_nothing(tile_kind: Any) -> None:
    model = tile_kind.frozen(noise=0.1)
    before, x = al.fingerprint(model), tile_kind.batch()
    reads = [model.train(training)(x) for training in (False, True) for _ in range(3)]
    sum(read.sum() for read in reads).backward()
    has_converters = hasattr(last_tile(model).rpu_config, "forward")
    assert len({tuple(read.flatten().tolist()) for read in reads}) == (6 if has_converters else 1)
    assert al.fingerprint(model) == before
    al.verify(model)


# --------------------------------------------------------------------------- what may be written


def test_the_digital_bias_can_be_trained(tile_kind: Any) -> None:
    model = tile_kind.frozen()
    before = evidence(model)
    digital = not last_tile(model).analog_bias
    bias = model.frozen.bias.clone()
    config = LoraConfig(r=1, target_modules=["frozen"], bias="all")
    adapted = get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len([name for name in trained if "frozen" in name and "bias" in name]) == digital
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(tile_kind.batch()).square().mean().backward()
        optimizer.step()
    base = adapted.unload()
    assert torch.equal(base.frozen.bias, bias) != digital
    assert_unchanged(base, before)
