"""Observation ends with training, however it ends, and checkpoints carry the ledger."""

from __future__ import annotations

import copy

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import InferenceRPUConfig
from aihwkit.simulator.presets import ReRamESPreset
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.errors import StageError


def observed(model, ledger, phase):
    with al.observe(model, ledger, phase=phase):
        model(torch.zeros(4, 6)).sum().backward()
    return ledger.total(phase=phase)


def analog_sgd(model):
    optimizer = AnalogSGD(model.parameters(), lr=0.05)
    optimizer.regroup_param_groups(model)
    return optimizer


def analog(config):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return convert_to_analog(model, config)


def test_model_can_be_observed_again_after_training(lab):
    ledger, model = al.Ledger(), lab.hybrid()
    fresh = observed(copy.deepcopy(model), al.Ledger(), "later")
    lab.fit(lab.Module(model), EnergyMeter(lab.chip, ledger))
    assert observed(model, ledger, "later")["tile_reads"] == fresh["tile_reads"] == 4 * 3
    assert ledger.total(phase="later")["forward_macs"] == fresh["forward_macs"] > 0


@pytest.mark.parametrize("failing_step", [1, 3])
def test_exception_ends_observation_and_keeps_what_was_counted(lab, failing_step):
    ledger, model, done = al.Ledger(), lab.hybrid(), []

    def fail():
        done.append(1)
        if len(done) == failing_step:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        lab.fit(lab.Module(model, after_step=fail), EnergyMeter(lab.chip, ledger))
    assert ledger.total(phase="train")["tile_reads"] == failing_step * 3 * lab.batch
    fresh = observed(lab.hybrid(), al.Ledger(), "later")
    found = observed(model, ledger, "later")
    assert found["tile_reads"] == fresh["tile_reads"]
    assert found["forward_macs"] == fresh["forward_macs"]
    assert ledger.phases() == ("train", "later")


def test_one_meter_serves_two_fits_and_counts_steps_from_each_start(lab):
    ledger, model = al.Ledger(), lab.hybrid()
    meter = EnergyMeter(lab.chip, ledger)
    first = lab.fit(lab.Module(model), meter)
    observed(model, ledger, "between")
    second = lab.fit(lab.Module(model), meter)
    assert ledger.total(phase="train")["tile_reads"] == 2 * 3 * 3 * lab.batch
    latencies = [row["latency_s"] for row in first.memory.logged + second.memory.logged]
    assert latencies == [latencies[0]] * 6


def test_meter_refuses_layers_whose_reads_cannot_be_counted(lab):
    module = lab.Module(analog(InferenceRPUConfig()), optimizer=analog_sgd)
    with pytest.raises(StageError, match=r"layer 'model.0': expected a frozen layer"):
        lab.fit(module, EnergyMeter(lab.chip, al.Ledger()))


def test_counter_refuses_pulsed_layers_that_train_without_a_count(lab):
    module = lab.Module(analog(ReRamESPreset()), optimizer=analog_sgd)
    refusal = r"layer 'model.0': expected pulses that can be counted, got an unfrozen pulsed tile"
    with pytest.raises(StageError, match=refusal):
        lab.fit(module, PulseCounter(al.Ledger()))


def test_counter_accepts_unfrozen_inference_layers(lab):
    module = lab.Module(analog(InferenceRPUConfig()), optimizer=analog_sgd)
    trainer = lab.fit(module, PulseCounter(al.Ledger()))
    assert [row["pulses"] for row in trainer.memory.logged] == [0, 0, 0]


def test_counter_accepts_pulsed_layers_once_frozen(lab):
    model = al.freeze_(analog(ReRamESPreset()), programmed_by="test")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=al.target_modules(model)))
    trainer = lab.fit(lab.Module(model, optimizer=analog_sgd), PulseCounter(al.Ledger()))
    assert [row["pulses"] for row in trainer.memory.logged] == [0, 0, 0]


class Run:
    """A run that writes its arrays every step, so that all kinds of events are counted."""

    def __init__(self, lab):
        self.lab, self.ledger, self.model = lab, al.Ledger(), lab.hybrid()
        self.callbacks = (EnergyMeter(lab.chip, self.ledger), PulseCounter(self.ledger))
        self.written = 0

    def write(self):
        layer = dict(al.frozen_layers(self.model))["base_model.model.0.base_layer"]
        target = {"0": torch.as_tensor(layer.weight) * 0.9}
        al.reprogram_(self.model, self.lab.chip, target, ledger=self.ledger, phase="train", seed=3)

    def fit(self, epochs, resume=None):
        module = self.lab.Module(self.model, after_step=self.write)
        return self.lab.fit(module, *self.callbacks, max_epochs=epochs, resume=resume)


class ReadOnlyRun(Run):
    """A run on arrays that stay as they are."""

    def write(self):
        pass


def test_two_and_two_epochs_count_as_four(lab):
    through = ReadOnlyRun(lab)
    whole = through.fit(4)
    first = ReadOnlyRun(lab)
    trainer = first.fit(2)
    checkpoint = lab.folder / "two.ckpt"
    trainer.save_checkpoint(checkpoint)
    second = ReadOnlyRun(lab)
    rest = second.fit(4, resume=checkpoint)
    assert second.ledger.state_dict() == through.ledger.state_dict()
    assert second.ledger.total()["optimizer_updates"] > first.ledger.total()["optimizer_updates"]
    assert trainer.memory.logged + rest.memory.logged == whole.memory.logged


def test_written_pulses_survive_a_checkpoint(lab):
    first = Run(lab)
    trainer = first.fit(1)
    checkpoint = lab.folder / "one.ckpt"
    trainer.save_checkpoint(checkpoint)
    stored = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert stored["PulseCounter"] == first.ledger.state_dict()
    assert stored["EnergyMeter"] == first.ledger.state_dict()
    ledger = al.Ledger()
    PulseCounter(ledger).load_state_dict(stored["PulseCounter"])
    assert ledger.total() == first.ledger.total()
    assert ledger.total()["set_pulses"] > 0
