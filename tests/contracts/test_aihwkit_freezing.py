"""What ``requires_grad``, plain optimisers and ``zero_grad`` do not do for aihwkit's tiles."""

from __future__ import annotations

import pytest
import torch
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    DigitalRankUpdateRPUConfig,
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
    UnitCellRPUConfig,
)
from aihwkit.simulator.configs.compounds import MixedPrecisionCompound, TransferCompound
from aihwkit.simulator.configs.devices import ConstantStepDevice, SoftBoundsDevice
from aihwkit.simulator.parameters.enums import WeightClipType, WeightRemapType
from aihwkit.simulator.parameters.inference import WeightClipParameter, WeightRemapParameter


def pulsed():
    return SingleRPUConfig(device=ConstantStepDevice())


def tiki_taka():
    devices = [SoftBoundsDevice(), SoftBoundsDevice()]
    return UnitCellRPUConfig(device=TransferCompound(unit_cell_devices=devices))


def mixed_precision():
    return DigitalRankUpdateRPUConfig(device=MixedPrecisionCompound(device=ConstantStepDevice()))


TRAINED_BY_UPDATES = [pulsed, tiki_taka, mixed_precision, FloatingPointRPUConfig]
TRAINED_BY_GRADIENTS = [InferenceRPUConfig, TorchInferenceRPUConfig]


def tile_of(layer):
    return next(layer.analog_tiles())


def held(layer):
    """What the array of a layer holds, in normalised units."""
    return tile_of(layer).tile.get_weights().clone()


def train(net, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


# aihwkit's updates are stochastic. Five steps at this rate move the tiles of each configuration by
# hundreds of pulses, or 1e-3 and more; none at all has a probability below 1e-12.
@pytest.mark.parametrize("config", TRAINED_BY_UPDATES)
def test_requires_grad_does_not_freeze_a_training_tile(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSGD updates a training tile whatever its requires_grad says",
        "the design that frozen is a type without an update path, not a flag",
        "say in the guide from which version on the flag works; the frozen types stay",
    )
    model = net(config())
    model[1].requires_grad_(False)
    before = held(model[1])
    train(model, AnalogSGD(model.parameters(), lr=1.0))
    assert not torch.equal(held(model[1]), before), fact


@pytest.mark.parametrize("config", TRAINED_BY_GRADIENTS)
def test_requires_grad_does_freeze_an_inference_tile(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSGD leaves an inference tile alone that wants no gradient",
        "PulseCounter, which lets unfrozen inference tiles pass as not pulsed",
        "treat inference tiles as tiles that move",
    )
    model = net(config())
    model[1].requires_grad_(False)
    before = held(model[1])
    train(model, AnalogSGD(model.parameters(), lr=1.0))
    assert torch.equal(held(model[1]), before), fact


@pytest.mark.parametrize("config", TRAINED_BY_UPDATES + TRAINED_BY_GRADIENTS)
def test_a_plain_optimiser_freezes_training_tiles_but_their_queue_grows(config, net, aihwkit_fact):
    fact = aihwkit_fact(
        "without an analogue optimiser each backward pass queues one more update in a training "
        "tile's context, and none in an inference tile's",
        "frozen tiles that queue nothing (a memory leak otherwise)",
        "see who empties the queue now",
    )
    model = net(config())
    model[1].requires_grad_(False)
    before = held(model[1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, torch.optim.SGD(trained, lr=0.1), steps=7)
    assert torch.equal(held(model[1]), before), fact
    queued = 7 if config in TRAINED_BY_UPDATES else 0
    context = tile_of(model[1]).analog_ctx
    assert len(context.analog_input) == queued, fact
    assert len(context.analog_grad_output) == queued, fact


def test_queued_updates_survive_zero_grad(net, aihwkit_fact):
    fact = aihwkit_fact(
        "zero_grad() leaves queued updates, and the next step applies them to the conductances",
        "forget and audit passes, which run on frozen tiles only",
        "say in the guide that zero_grad is enough from this version on",
    )
    model = net(pulsed())
    optimizer = AnalogSGD(model.parameters(), lr=1.0)
    before = held(model[1])
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.zero_grad()
    optimizer.step()
    # Chance of no pulse in 8 samples on 12 cells: below 1e-12.
    assert not torch.equal(held(model[1]), before), fact


def test_gradient_probes_queue_updates_too(net, aihwkit_fact):
    fact = aihwkit_fact(
        "torch.autograd.grad with respect to the input queues an update of the tile",
        "attacks and saliency passes, which run on frozen tiles only",
        "say in the guide that gradient probes are harmless from this version on",
    )
    model = net(pulsed())
    x = torch.randn(8, 4, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    assert len(tile_of(model[1]).analog_ctx.analog_input) == 1, fact


@pytest.mark.parametrize("config_class", TRAINED_BY_GRADIENTS)
def test_clipping_moves_a_tile_that_wants_no_gradient(config_class, net, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSGD.step() clips the weights of an inference tile at rate 0 without a gradient",
        "the design that frozen is a type without an update path, not a flag",
        "the frozen types stay; say in the guide what the flag covers now",
    )
    config = config_class(
        clip=WeightClipParameter(type=WeightClipType.FIXED_VALUE, fixed_value=0.1)
    )
    model = net(config).requires_grad_(False)
    assert held(model[1]).abs().max() > 0.1, fact
    AnalogSGD(model.parameters(), lr=0.0).step()
    assert held(model[1]).abs().max() == torch.tensor(0.1), fact


@pytest.mark.parametrize("config_class", TRAINED_BY_GRADIENTS)
def test_remapping_moves_conductances_behind_equal_logical_weights(config_class, net, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSGD.step() remaps conductances at rate 0 and makes up for it in digital scales",
        "the digest of frozen tiles, which covers conductances and scales separately",
        "the digest stays; say in the guide what the flag covers now",
    )
    config = config_class(remap=WeightRemapParameter(type=WeightRemapType.LAYERWISE_SYMMETRIC))
    config.mapping.weight_scaling_omega = 0.25
    model = net(config).requires_grad_(False)
    logical = model[1].get_weights()[0]
    assert held(model[1]).abs().max() == 0.25, fact
    AnalogSGD(model.parameters(), lr=0.0).step()
    assert held(model[1]).abs().max() == 1.0, fact
    assert torch.allclose(model[1].get_weights()[0], logical, rtol=1e-6, atol=1e-7), fact


def test_decay_moves_a_training_tile_that_wants_no_gradient(net, aihwkit_fact):
    fact = aihwkit_fact(
        "AnalogSGD.step() lets a pulsed tile decay at rate 0 without a gradient",
        "the design that frozen is a type without an update path, not a flag",
        "the frozen types stay; say in the guide what the flag covers now",
    )
    device = ConstantStepDevice(lifetime=10.0, lifetime_dtod=0.0)
    model = net(SingleRPUConfig(device=device)).requires_grad_(False)
    before = held(model[1])
    AnalogSGD(model.parameters(), lr=0.0).step()
    assert torch.allclose(held(model[1]), 0.9 * before, rtol=1e-5), fact
