"""Observation ends with training, however it ends, and checkpoints carry the ledger."""

from __future__ import annotations

import copy

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    InferenceRPUConfig,
    IOParameters,
    PulseType,
    SingleRPUConfig,
    TransferCompound,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.presets import ReRamESPreset
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.metering.insitu import watch_pulses


def observed(model, ledger, phase):
    with al.observe(model, ledger, phase=phase):
        model(torch.zeros(4, 6)).sum().backward()
    return ledger.total(phase=phase)


def analog_sgd(model):
    optimizer = AnalogSGD(model.parameters(), lr=0.05)
    optimizer.regroup_param_groups(model)
    return optimizer


def pulsed():
    """Without noise and with trains that follow from what is multiplied."""
    device = ConstantStepDevice(dw_min_std=0.0, dw_min_dtod=0.0, w_max_dtod=0.0, w_min_dtod=0.0)
    update = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
    perfect = IOParameters(is_perfect=True)
    return SingleRPUConfig(device=device, update=update, forward=perfect, backward=perfect)


def analog(config):
    torch.manual_seed(0)

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


def test_counter_counts_training_in_place(lab):
    ledger = al.Ledger()
    module = lab.Module(analog(pulsed()), optimizer=analog_sgd)
    trainer = lab.fit(module, PulseCounter(ledger, phase="learn"))
    own = al.Ledger()
    again = lab.Module(analog(pulsed()), optimizer=analog_sgd)
    with watch_pulses(again, own, phase="learn"):
        lab.fit(again)
    assert ledger.total() == own.total()
    assert ledger.phases() == ("learn",)
    rows = trainer.memory.logged
    assert all(row["pulses"] == row["set_pulses"] + row["reset_pulses"] > 0 for row in rows)
    assert sum(row["pulses"] for row in rows) == rows[-1]["pulses_total"] == own.total().pulses


def test_counter_refuses_layers_whose_pulses_cannot_be_counted(lab):
    device = TransferCompound(unit_cell_devices=[ConstantStepDevice(), ConstantStepDevice()])
    module = lab.Module(analog(UnitCellRPUConfig(device=device)), optimizer=analog_sgd)
    refusal = r"layer 'model\.0': expected a tile whose pulses can be counted, got AnalogTile"
    with pytest.raises(UnsupportedTileError, match=refusal):
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
