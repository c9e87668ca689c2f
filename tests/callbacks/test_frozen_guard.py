"""The guard stops training when conductances move, and only then."""

from __future__ import annotations

import pytest
import torch
from aihwkit.optim import AnalogSGD
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import FrozenGuard
from aihwkit_lora.errors import ConfigurationError, FrozenConductanceError, StageError

TILE = r"layer 'model.base_model.model.{}.base_layer', tile \(input 0, output 0\): expected the"


class Intruder:
    """Writes a tensor of one layer behind everybody's back, after some step."""

    def __init__(self, model, layer, *, step, what="conductance"):
        self.array = dict(al.frozen_layers(model))[f"base_model.model.{layer}.base_layer"]
        self.step, self.what, self.steps = step, what, 0

    def __call__(self):
        self.steps += 1
        if self.steps == self.step:
            getattr(self.array.analog_module.programmed, self.what).view(-1)[0] += 2.0**-10


@pytest.mark.parametrize("layer", ["0", "2", "4"])
@pytest.mark.parametrize("what", ["conductance", "scale"])
def test_raw_write_is_found_and_the_tile_named(lab, layer, what):
    model = lab.hybrid()
    intruder = Intruder(model, layer, step=2, what=what)
    with pytest.raises(FrozenConductanceError, match=TILE.format(layer)):
        lab.fit(lab.Module(model, after_step=intruder), FrozenGuard())


@pytest.mark.parametrize(
    ("every", "noticed_after"), [(None, 8), (1, 2), (3, 3), (5, 5), (8, 8), (9, 8)]
)
def test_write_in_the_second_step_is_found_at_the_next_comparison(lab, every, noticed_after):
    model = lab.hybrid()
    intruder = Intruder(model, "2", step=2)
    with pytest.raises(FrozenConductanceError, match=TILE.format("2")):
        lab.fit(lab.Module(model, after_step=intruder), FrozenGuard(every), batches=8, max_epochs=2)
    assert intruder.steps == noticed_after


@pytest.fixture
def hashed(monkeypatch):
    """The step at each comparison."""
    steps, compare = [], FrozenGuard._compare

    def note(guard, trainer, pl_module):
        steps.append(trainer.global_step)
        compare(guard, trainer, pl_module)

    monkeypatch.setattr(FrozenGuard, "_compare", note)
    return steps


def test_batches_without_a_step_are_not_compared(lab, hashed):
    options = {"batches": 7, "accumulate_grad_batches": 3}
    lab.fit(lab.Module(lab.hybrid()), FrozenGuard(1), **options)
    # After each step, and at the end of the epoch and of training.
    assert hashed == [1, 2, 3, 3, 3]


def test_a_step_that_falls_into_a_batch_of_several_is_compared_after_it(lab, hashed):
    lab.fit(lab.TwoOptimizers(lab.hybrid()), FrozenGuard(3), batches=4)
    # Steps 2, 4, 6 and 8 end batches; the third and the sixth are due.
    assert hashed == [4, 6, 8, 8]


def test_reprogramming_is_noticed_and_told_apart(lab):
    model = lab.hybrid()

    def write():
        al.reprogram_(model, lab.chip, seed=0)

    expected = r"step 1: expected the conductances of the start of training, got others, written"
    with pytest.raises(FrozenConductanceError, match=expected):
        lab.fit(lab.Module(model, after_step=write), FrozenGuard(1))
    al.verify(model)


def test_writing_between_two_fits_starts_a_new_comparison(lab):
    model, guard = lab.hybrid(), FrozenGuard(1)
    lab.fit(lab.Module(model), guard)
    first = guard.fingerprint
    al.reprogram_(model, lab.chip, seed=0)
    lab.fit(lab.Module(model), guard)
    assert first != guard.fingerprint == al.fingerprint(model)


def analog_sgd(model):
    model.requires_grad_(True)
    optimizer = AnalogSGD(model.parameters(), lr=0.1)
    optimizer.regroup_param_groups(model)
    return optimizer


def adam(model):
    return torch.optim.Adam(model.requires_grad_(True).parameters(), lr=0.1)


@pytest.mark.parametrize("optimizer", [analog_sgd, adam])
def test_optimiser_over_all_parameters_moves_adapters_and_nothing_frozen(lab, optimizer):
    model, guard = lab.hybrid(), FrozenGuard(1)
    frozen, before = al.fingerprint(model), [p.clone() for p in model.parameters()]
    lab.fit(lab.Module(model, optimizer=optimizer), guard, max_epochs=2)
    assert al.fingerprint(model) == frozen == guard.fingerprint
    names = [name for name, _ in model.named_parameters()]
    moved = [
        name
        for name, old, new in zip(names, before, model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert sum("lora_B" in name for name in moved) == 3


def test_model_without_frozen_layers_is_refused(lab):
    module = lab.Module(nn.Linear(6, 3))
    with pytest.raises(StageError, match="expected frozen layers, got none"):
        lab.fit(module, FrozenGuard())


@pytest.fixture
def other_ranks(monkeypatch):
    """Lets two more processes seem to train along; tests/survival has real ones."""

    def pretend(find):
        module = "aihwkit_lora.callbacks.frozen_guard.on_all_ranks"
        monkeypatch.setattr(module, lambda own, trainer: find(own, trainer.global_step))

    return pretend


def test_ranks_with_different_chips_are_named(lab, other_ranks):
    other_ranks(lambda own, step: [own, own, "0123456789abcdef"])
    expected = (
        r"rank 0 and rank 2: expected the same conductances, got fingerprints [0-9a-f]{12}… and "
        r"0123456789ab….*the same seed, program_\(model, chip, seed=0\)"
    )
    with pytest.raises(FrozenConductanceError, match=expected):
        lab.fit(lab.Module(lab.hybrid()), FrozenGuard())


@pytest.mark.parametrize("every", [1, 2])
def test_a_change_on_another_rank_stops_this_one(lab, other_ranks, every):
    other_ranks(lambda own, step: [own, "changed" if step > 1 else own, own])
    expected = "step 2: expected .* on every rank, got others on rank 1, but not on rank 0"
    with pytest.raises(FrozenConductanceError, match=expected):
        lab.fit(lab.Module(lab.hybrid()), FrozenGuard(every))


@pytest.mark.parametrize("every", [0, -3])
def test_comparing_less_than_every_step_is_refused(every):
    with pytest.raises(ConfigurationError, match=f"every_n_steps of 1 or more, got {every}"):
        FrozenGuard(every)
