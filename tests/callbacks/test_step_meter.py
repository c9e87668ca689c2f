"""Meters without a trainer: optimiser steps, open steps, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogAdam, AnalogSGD
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Counts, Level
from aihwkit_lora.metering.step_meter import (
    EnergyPerStep,
    OptimizerSteps,
    PulsesPerStep,
    StepCounts,
    pour,
)


@pytest.fixture
def steps():
    counted = OptimizerSteps()
    yield counted
    counted.stop()


class OfParent(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Steps another optimiser over the same parameters, as lookahead does."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


KINDS = {
    "SGD": sgd,
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "a step that calls its parent's": lambda model: OfParent(model.parameters(), lr=0.1),
    "an optimiser inside another": lambda model: Wrapper(sgd(model)),
    "AnalogSGD": lambda model: AnalogSGD(model.parameters(), lr=0.1),
    "AnalogAdam": lambda model: AnalogAdam(model.parameters()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_counts_once(steps, kind):
    model = nn.Linear(2, 1)
    sgd(model), KINDS["Adam"](model)  # torch hooks the classes of these from now on
    optimizer = KINDS[kind](model)
    steps.start(model)
    for number in (1, 2, 0, 3):
        for _ in range(number):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert steps.take() == number


def test_steps_of_other_models_do_not_count(steps):
    own, other = nn.Linear(2, 1), nn.Linear(2, 1)
    steps.start(own)
    sgd(other).step()
    assert steps.take() == 0
    sgd(nn.ModuleList([own, other])).step()
    assert steps.take() == 1


def test_a_parameter_that_is_new_in_the_model_counts(steps):
    model = nn.Sequential(nn.Linear(2, 1))
    steps.start(model)
    model[0] = nn.Linear(2, 1)
    sgd(model).step()
    assert steps.take() == 1


def test_an_optimiser_that_raised_hides_no_later_step(steps):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("fails")

    model = nn.Linear(2, 1)
    steps.start(model)
    with pytest.raises(ValueError, match="fails"):
        Fails(model.parameters(), lr=0.1).step()
    assert steps.take() == 0
    sgd(model).step()
    assert steps.take() == 1


def test_nothing_counts_after_the_end(steps):
    model = nn.Linear(2, 1)
    assert not steps.running
    steps.start(model)
    assert steps.running
    steps.stop()
    sgd(model).step()
    assert steps.take() == 0
    assert not steps.running


# ------------------------------------------------------------------ open steps


def test_what_is_skipped_belongs_to_no_step():
    ledger = al.Ledger()
    counts = StepCounts(ledger)
    ledger.add(Counts({"tile_reads": 2}), phase="train", layer="a")
    counts.collect()
    ledger.add(Counts({"tile_reads": 100}), phase="train", layer="a")
    counts.skip()
    ledger.add(Counts({"tile_reads": 3}), phase="train", layer="a")
    assert counts.next()["tile_reads"] == 5


def test_only_what_is_selected_belongs_to_steps():
    ledger = al.Ledger()
    counts = StepCounts(ledger, select=lambda all_of_it: all_of_it.total(layer="a"))
    ledger.add(Counts({"tile_reads": 2}), phase="train", layer="a")
    ledger.add(Counts({"tile_reads": 100}), phase="train", layer="b")
    assert counts.next()["tile_reads"] == 2


def test_pouring_keeps_how_sure_counts_are():
    source, into = al.Ledger(), al.Ledger()
    source.add(Counts({"set_pulses": 2}, level=Level.SIMULATED), phase="train", layer="a")
    source.add(Counts({"tile_reads": 3}), phase="check", layer="b")
    pour(source, into)
    pour(source, into)
    assert into.total(phase="train", layer="a").level is Level.SIMULATED
    assert into.total(phase="check", layer="b")["tile_reads"] == 6


# ------------------------------------------------------------------ meters


def test_a_meter_counts_between_its_start_and_its_end(lab):
    model, meter = lab.tiny(), EnergyPerStep(lab.fake, al.Ledger())
    optimizer = sgd(model)

    def step():
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    step()
    assert meter.end_batch() is None
    meter.start(model)
    step()
    assert meter.end_batch()["energy_j"] == 64.0
    step()
    meter.finish()
    step()
    meter.finish()
    # the second step, which nobody asked for, is in the ledger
    assert meter.ledger.total()["tile_reads"] == 2 * 6


def test_ending_validation_twice_or_without_a_start_is_harmless(lab):
    meter = EnergyPerStep(lab.fake, al.Ledger())
    meter.begin_validation()
    meter.end_validation()
    meter.stop()
    assert meter.phase == "train"


def test_a_phase_that_changes_in_validation_holds_afterwards(lab):
    model, meter = lab.tiny(), EnergyPerStep(lab.fake, al.Ledger())
    meter.start(model)
    meter.begin_validation()
    meter.phase = "unlearn:person 2"
    model(torch.ones(2, 4))
    meter.end_validation()
    model(torch.ones(2, 4))
    meter.finish()
    assert meter.ledger.phases() == ("validate", "unlearn:person 2")


def test_a_stopped_meter_holds_on_to_no_model():
    meter = PulsesPerStep(al.Ledger())
    model = nn.Linear(2, 1)
    meter.start(model)
    meter.finish()
    assert not any(held is model for held in vars(meter._pulses).values())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_callbacks_can_be_copied_and_sent(lab, way):
    ledger = al.Ledger()
    ledger.add(Counts({"set_pulses": 2}), phase="program", layer="a")
    counter, meter = way((PulseCounter(ledger), EnergyMeter(lab.chip, ledger, phase="learn")))
    assert counter.ledger is meter.ledger is not ledger
    assert meter.ledger.state_dict() == ledger.state_dict()
    assert (meter.phase, meter.chip.name) == ("learn", lab.chip.name)
    assert al.price(ledger.total(), meter.chip) == al.price(ledger.total(), lab.chip)
    trainer = lab.fit(lab.Module(lab.hybrid()), counter, meter)
    assert trainer.memory.logged[-1]["pulses_total"] == 2


# ------------------------------------------------------------------ callbacks


def test_two_energy_meters_do_not_count_into_one_ledger(lab):
    class Second(EnergyMeter):
        """Lightning tells callbacks that keep a state by their names."""

    ledger = al.Ledger()
    with pytest.raises(StageError, match="expected a ledger of its own, got one that another"):
        lab.fit(
            lab.Module(lab.tiny()), EnergyMeter(lab.fake, ledger), Second(lab.fake, ledger),
            sizes=(4, 2),
        )  # fmt: skip
    assert ledger.phases() == ()


def test_optimisers_over_copies_of_the_parameters_are_refused(lab):
    class Copies(lab.Module):
        """As DeepSpeed's optimisers, which have flat copies."""

        def configure_optimizers(self):
            flat = torch.cat([p.detach().flatten() for p in self.parameters()])
            return torch.optim.SGD([flat.requires_grad_()], lr=0.1)

    expected = (
        r"SingleDeviceStrategy: expected optimisers over parameters of Copies, got optimisers"
    )
    for callback in (PulseCounter(al.Ledger()), EnergyMeter(lab.fake, al.Ledger())):
        with pytest.raises(StageError, match=expected):
            lab.fit(Copies(lab.tiny()), callback, sizes=(4, 2))


def test_meter_names_what_has_no_price(lab):
    prices = lab.fake.prices
    energy = {event: cost for event, cost in prices.energy.items() if event != "tile_reads"}
    free = prices.latency_free - {"forward_macs"}
    chip = replace(lab.fake, prices=replace(prices, energy=energy, latency_free=free))
    meter = EnergyMeter(chip, al.Ledger())
    assert meter.unpriced == ()
    trainer = lab.fit(lab.Module(lab.tiny()), meter, sizes=(4, 2))
    assert meter.unpriced == ("tile_reads", "forward_macs")
    assert [row["unpriced_events"] for row in trainer.memory.logged] == [2, 2, 2]
    assert [row["energy_j/forward"] for row in trainer.memory.logged] == [10, 10, 10]


def test_wear_is_logged_where_it_is_known(lab):
    model, ledger = lab.hybrid(), al.Ledger()

    def write():
        layer = dict(al.frozen_layers(model))["base_model.model.0.base_layer"]
        target = {"0": torch.as_tensor(layer.weight) * 0.9}
        al.reprogram_(model, lab.chip, target, ledger=ledger, seed=3)

    trainer = lab.fit(lab.Module(model, after_step=write), PulseCounter(ledger))
    worn = [row["most_worn"] for row in trainer.memory.logged]
    arrays = [layer.analog_module for _, layer in al.frozen_layers(model)]
    cells = [tile for array in arrays for tile in array.programming.cells]
    assert worn[-1] == max(int(tile.wear.max()) for tile in cells)
    assert worn == sorted(worn)


def test_real_writes_are_logged_as_their_reports_say(lab):
    model, ledger, reports = lab.hybrid(), al.Ledger(), []

    def write():
        reports.append(al.reprogram_(model, lab.chip, ledger=ledger, seed=len(reports)))

    trainer = lab.fit(
        lab.Module(model, after_step=write),
        PulseCounter(ledger), EnergyMeter(lab.chip, ledger),
    )  # fmt: skip
    rows = trainer.memory.logged
    assert [row["pulses"] for row in rows] == [report.pulses for report in reports]
    assert all(row["pulses"] > 0 for row in rows)
    for row, report in zip(rows, reports, strict=True):
        assert row["energy_j/write"] == pytest.approx(report.energy.energy_j.value, rel=1e-12)
    assert rows[-1]["pulses_total"] == sum(report.pulses for report in reports)


def test_analogue_optimisers_count_their_steps(lab):
    config = al.chips.get("rm-180nm").rpu_config()
    model = nn.Sequential(AnalogLinear(6, 3, rpu_config=config))

    def analog_sgd(of):
        optimizer = AnalogSGD(of.parameters(), lr=0.05)
        optimizer.regroup_param_groups(of)
        return optimizer

    trainer = lab.fit(lab.Module(model, optimizer=analog_sgd), PulseCounter(al.Ledger()))
    assert [row["optimizer_steps"] for row in trainer.memory.logged] == [1, 1, 1]
