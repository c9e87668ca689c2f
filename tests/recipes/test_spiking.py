"""The spiking network: counts, the neuron against snntorch, and zeros that drive no row."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.spiking import (
    LORA_TARGETS,
    LeakyIntegrateAndFire,
    SnntorchNeuron,
    SpikingNet,
    WiderHead,
    spike,
)

CHIP = al.chips.get("rm-180nm")


def frozen(**sizes):
    torch.manual_seed(0)
    model = al.convert(SpikingNet(**sizes), CHIP).requires_grad_(False)
    al.program_(model, CHIP, seed=0, level="sampled")
    return al.freeze_(model)


def clips(count, bands=140):
    generator = torch.Generator().manual_seed(count)
    # Counts of 0 to 5, half of them zero.
    return 0.1 * torch.randint(-5, 6, (count, 10, bands), generator=generator).clamp(min=0)


def counted(model, x):
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer"):
        model(x)
    return ledger


def test_counts_are_those_of_the_paper():
    net = SpikingNet()
    weights = {name: p.numel() for name, p in net.named_parameters() if p.ndim == 2}
    assert weights == {"input.weight": 71_680, "recurrent.weight": 262_144, "head.weight": 2_560}
    assert sum(weights.values()) == 336_384
    assert sum(p.numel() for p in net.parameters()) == 337_413
    assert counted(net, clips(3)).total()["forward_macs"] == 3 * 3_340_800


def test_counts_of_arrays_and_branches():
    model = frozen()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS)
    peft = get_peft_model(model, config)
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == 13_408
    counts = counted(peft, clips(2)).total()
    assert counts["cell_reads"] == 2 * 3_340_800
    assert counts["forward_macs"] == 2 * 134_080
    assert counts["array_cycles"] == 2 * (10 + 10 + 1)


def test_only_rows_with_a_spike_are_driven():
    model, x, seen = frozen(neurons=300), clips(4), []
    # Inputs are at least a fiftieth of the largest, so that none of them rounds to code 0.
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.append((name, inputs[0])))
        for name, layer in (("input", model.input), ("recurrent", model.recurrent))
    ]
    ledger = counted(model, x)
    for hook in hooks:
        hook.remove()
    for name, layer in (("input", model.input), ("recurrent", model.recurrent)):
        driven = sum(int(inputs.count_nonzero()) for which, inputs in seen if which == name)
        rows = 10 * len(x) * layer.in_features
        counts = ledger.total(layer=name)
        # Three tiles stand side by side, and each drives the row.
        assert counts["active_row_drives"] == 3 * driven
        assert counts["row_drives"] == 3 * rows
        assert 0 < driven < rows
    first = next(inputs for which, inputs in seen if which == "recurrent")
    assert not first.any()


def test_silence_drives_no_row_of_the_input_layer():
    ledger = counted(frozen(neurons=20), torch.zeros(2, 10, 140))
    assert ledger.total(layer="input")["active_row_drives"] == 0
    assert ledger.total(layer="input")["row_drives"] == 2 * 10 * 140


def test_neuron_follows_its_equations():
    generator = torch.Generator().manual_seed(0)
    neuron, potential = LeakyIntegrateAndFire(), torch.zeros(50)
    expected, fired = [0.0] * 50, 0
    for _ in range(20):
        current = 0.4 * torch.rand(50, generator=generator) - 0.05
        spikes, potential = neuron(current, potential)
        for index in range(50):
            charged = 0.5 * expected[index] + float(current[index])
            assert spikes[index] == float(charged > 0.3)
            fired += charged > 0.3
            expected[index] = 0.0 if charged > 0.3 else charged
        assert potential.tolist() == pytest.approx(expected, abs=1e-6)
    assert 100 < fired < 900


def test_gradient_is_a_rectangle_of_area_one():
    excess = torch.tensor([-0.26, -0.24, 0.0, 0.24, 0.26], requires_grad=True)
    spike(excess).backward(torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0]))
    assert excess.grad.tolist() == [0.0, 2.0, 6.0, 2.0, 0.0]


def test_spikes_are_those_of_snntorch_and_so_are_gradients():
    pytest.importorskip("snntorch", reason="snntorch is not installed (extra 'snn')")
    torch.manual_seed(0)
    ours = SpikingNet(neurons=64)
    theirs = copy.deepcopy(ours)
    theirs.neuron = SnntorchNeuron()
    x = clips(16)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(ours.rates(x), theirs.rates(x))
    assert 0.02 < float(ours.rates(x).detach().mean()) < 0.9
    for net in (ours, theirs):
        nn.functional.cross_entropy(net(x), torch.arange(16) % 5).backward()
    for mine, other in pairs:
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-7)
    # A potential with its graph would be in the way of copies and files.
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(theirs)))(x), theirs(x))


def test_recurrence_reads_its_layer_once_per_step():
    net, calls = SpikingNet(neurons=8), []
    net.recurrent.register_forward_hook(lambda *_: calls.append(1))
    net(clips(3))
    assert len(calls) == 10


def test_recurrence_carries_spikes_from_step_to_step():
    net = SpikingNet(neurons=2, bands=1, outputs=2)
    with torch.no_grad():
        for layer in (net.input, net.recurrent):
            layer.weight.zero_()
            layer.bias.zero_()
        net.input.weight[0] = 1.0
        net.recurrent.weight[1, 0] = 1.0
    x = torch.zeros(1, 10, 1)
    x[0, [2, 9]] = 1.0
    # The second neuron fires a step after the first; the last spike of all arrives too late.
    assert net.rates(x).tolist() == [[pytest.approx(0.2), pytest.approx(0.1)]]


def test_wider_head_puts_new_outputs_last():
    old = nn.Linear(4, 2)
    head, x = WiderHead(old, 4, 3), torch.rand(5, 4)
    assert torch.equal(head(x)[:, :2], old(x))
    assert torch.equal(head(x)[:, 2:], head.new(x))


def test_impossible_networks_and_clips_are_refused(monkeypatch):
    with pytest.raises(ConfigurationError, match="of at least 1, got 140, 0 and 5"):
        SpikingNet(neurons=0)
    with pytest.raises(UnknownNameError, match="unknown neuron 'snn'"):
        SpikingNet(neuron="snn")
    with pytest.raises(DataError, match=r"shape \(n, windows, 140\), found \(3, 140\)"):
        SpikingNet(neurons=4)(torch.zeros(3, 140))
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(ConfigurationError, match=r"Install aihwkit-lora\[snn\], or choose neuron"):
        SpikingNet(neuron="snntorch")
