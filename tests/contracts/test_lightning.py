"""In what order Lightning calls hooks, what it saves of callbacks, and how it resumes."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import pytorch_lightning as pl
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import ConstantStepDevice
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

# Batches are in memory, so workers would only cost time.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

COUNTERS = "the meters, which cut the ledger into optimiser steps"
RESUME = "PulseCounter and EnergyMeter, which keep the ledger in checkpoints"


class Module(pl.LightningModule):
    """Trains a layer; lists what it does in ``events``."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = nn.Linear(2, 1) if layer is None else layer
        self.events = []

    def training_step(self, x):
        self.events.append("training_step")
        loss = self.layer(x).square().mean()
        self.log("large", float(2**24 + 1))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def optimizer_step(self, *args, **kwargs):
        before = self.layer.weight.detach().clone()
        super().optimizer_step(*args, **kwargs)
        moved = not torch.equal(self.layer.weight, before)
        self.events.append("weights moved" if moved else "weights stayed")


class Validated(Module):
    def validation_step(self, x):
        self.events.append("validation_step")


class Analogue(Module):
    """A digital layer below a pulsed one."""

    def __init__(self):
        config = SingleRPUConfig(device=ConstantStepDevice())
        super().__init__(nn.Sequential(nn.Linear(2, 2), AnalogLinear(2, 1, rpu_config=config)))

    def configure_optimizers(self):
        return AnalogSGD(self.parameters(), lr=0.5)

    optimizer_step = pl.LightningModule.optimizer_step

    @property
    def array(self):
        return next(self.layer[1].analog_tiles()).tile.get_weights()


class Recorder(pl.Callback):
    """Lists the hooks that are called, or those of some names, in ``events``."""

    def __init__(self, *names, events=None):
        self.names, self.events = names, [] if events is None else events

    def note(self, name):
        if not self.names or name in self.names:
            self.events.append(name)


def _noting(name):
    return lambda self, trainer, *args, **kwargs: self.note(name)


HOOKS = """
    setup teardown on_fit_start on_fit_end on_sanity_check_start on_sanity_check_end on_train_start
    on_train_end on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end
    on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end
    on_validation_batch_start on_validation_batch_end on_before_zero_grad on_before_backward
    on_after_backward on_before_optimizer_step on_exception
"""
for _name in HOOKS.split():
    setattr(Recorder, _name, _noting(_name))


class Stateful(pl.Callback):
    """Saves ``state``; keeps what it is given back in ``loaded``."""

    def __init__(self, state=None):
        self.state, self.loaded = state or {}, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


def trainer_of(*callbacks, **options):
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | options
    return pl.Trainer(callbacks=list(callbacks), **options)


def batches(n):
    return DataLoader(torch.ones(n, 2), batch_size=1)


# ------------------------------------------------------------------ order of hooks


def test_order_of_hooks_around_a_step(lightning_fact):
    fact = lightning_fact(
        "in automatic optimisation the hooks of a batch come as listed, and the optimiser has "
        "moved the weights by on_train_batch_end",
        COUNTERS,
        "check where a step begins and ends, or costs are logged for the wrong one",
    )
    module = Module()
    trainer_of(Recorder(events=module.events)).fit(module, batches(1))
    assert module.events == [
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "weights moved",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ], fact


def test_accumulated_batches_share_a_step(lightning_fact):
    fact = lightning_fact(
        "with accumulate_grad_batches=2 on_before_optimizer_step comes before on_train_batch_end "
        "of every second batch, and of the last one of an epoch",
        COUNTERS,
        "check which batches belong to a step",
    )
    recorder = Recorder("on_before_optimizer_step", "on_train_batch_end")
    trainer_of(recorder, accumulate_grad_batches=2).fit(Module(), batches(5))
    step, batch = "on_before_optimizer_step", "on_train_batch_end"
    assert recorder.events == [batch, step, batch, batch, step, batch, step, batch], fact


def test_global_step_counts_steps_not_batches(lightning_fact):
    fact = lightning_fact(
        "trainer.global_step at on_train_batch_end is the number of optimiser steps so far",
        "StepCounts, which waits for global_step to change",
        "find another sign that a step was taken",
    )
    seen = []

    class Reader(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.global_step)

    trainer_of(Reader(), accumulate_grad_batches=2, max_epochs=2).fit(Module(), batches(3))
    assert seen == [0, 1, 2, 2, 3, 4], fact


def test_a_sanity_check_validates_before_training_starts(lightning_fact):
    fact = lightning_fact(
        "the sanity check calls the hooks of validation before on_train_start, with "
        "trainer.sanity_checking set",
        "EnergyMeter, which observes from on_train_start on and so leaves the sanity check out",
        "see that reads of the sanity check are not taken for those of a run",
    )
    sanity = []

    class Reader(pl.Callback):
        def on_validation_start(self, trainer, *args):
            sanity.append(trainer.sanity_checking)

    recorder = Recorder(
        "on_sanity_check_start",
        "on_sanity_check_end",
        "on_validation_start",
        "on_validation_end",
        "on_train_start",
        "on_train_epoch_end",
        "on_train_batch_end",
    )
    trainer = trainer_of(recorder, Reader(), num_sanity_val_steps=1)
    trainer.fit(Validated(), batches(1), batches(1))
    assert recorder.events == [
        "on_sanity_check_start",
        "on_validation_start",
        "on_validation_end",
        "on_sanity_check_end",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_train_epoch_end",
    ], fact
    assert sanity == [True, False], fact


def test_all_of_validation_lies_between_its_start_and_end(lightning_fact):
    fact = lightning_fact(
        "validation steps run between on_validation_start and on_validation_end",
        "EnergyMeter, which counts reads in between under another phase",
        "check which reads are taken for validation",
    )
    module = Validated()
    recorder = Recorder("on_validation_start", "on_validation_end", events=module.events)
    trainer_of(recorder).fit(module, batches(1), batches(2))
    assert module.events == [
        "training_step",
        "weights moved",
        "on_validation_start",
        "validation_step",
        "validation_step",
        "on_validation_end",
    ], fact


def test_an_exception_is_told_instead_of_the_end(lightning_fact):
    fact = lightning_fact(
        "after an exception in training, callbacks get on_exception and neither on_train_end nor "
        "teardown",
        "EnergyMeter, which stops observing at whichever comes",
        "see who stops the observer now",
    )

    class Broken(Module):
        def training_step(self, x):
            raise ValueError("broken")

    recorder = Recorder()
    with fact.raises(ValueError, "broken"):
        trainer_of(recorder).fit(Broken(), batches(1))
    assert recorder.events == [
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_exception",
    ], fact


def test_checkpoints_come_last(tmp_path, lightning_fact):
    fact = lightning_fact(
        "ModelCheckpoint is moved behind all other callbacks",
        "counters, whose last step has to be in the checkpoint of that step",
        "see that a checkpoint holds what its own step cost",
    )
    checkpoint, recorder = ModelCheckpoint(dirpath=tmp_path), Recorder()
    trainer = trainer_of(checkpoint, recorder, enable_checkpointing=True)
    assert trainer.callbacks == [recorder, checkpoint], fact


def test_logged_numbers_are_float32(lightning_fact):
    fact = lightning_fact(
        "self.log keeps a number as float32, which cannot hold 2²⁴ + 1",
        "logging rounded counts, with the exact ones in the ledger",
        "say in the guide that logged counts are exact now",
    )
    trainer = trainer_of()
    trainer.fit(Module(), batches(1))
    assert trainer.logged_metrics["large"].item() == 2**24, fact


# ------------------------------------------------------------------ what is saved of callbacks


def save(path, *callbacks, weights_only=False):
    trainer = trainer_of(*callbacks)
    trainer.fit(Module(), batches(1))
    trainer.save_checkpoint(path, weights_only=weights_only)
    return torch.load(path, weights_only=True)


def test_state_of_a_callback_is_saved_exactly_and_loads_safely(tmp_path, lightning_fact):
    fact = lightning_fact(
        "the state of a callback is saved under the name of its class, whole numbers of any size "
        "included, and loads with weights_only",
        RESUME,
        "save the state of the ledger in another form",
    )
    state = {"counts": [2**80, 3], "layer": "head", "seconds": 0.5}
    checkpoint = save(tmp_path / "a.ckpt", Stateful(state))
    (key,) = checkpoint["callbacks"]
    assert key == Stateful().state_key == Stateful.__qualname__, fact
    assert checkpoint["callbacks"][key] == state, fact


def test_an_empty_state_is_not_saved(tmp_path, lightning_fact):
    fact = lightning_fact(
        "a callback whose state is empty leaves no trace in a checkpoint",
        RESUME,
        "an empty ledger is saved and loaded too now: see that loading one is harmless",
    )
    assert save(tmp_path / "a.ckpt", Stateful({}))["callbacks"] == {}, fact


def test_checkpoints_of_weights_only_have_no_callbacks(tmp_path, lightning_fact):
    fact = lightning_fact(
        "save_checkpoint(weights_only=True) leaves out callbacks and optimisers",
        "counters, whose ledger such a checkpoint does not carry on",
        "counts survive in such checkpoints now: say so in the docstrings of the counters",
    )
    stored = save(tmp_path / "a.ckpt", Stateful({"n": 1}), weights_only=True)
    assert set(stored) & {"callbacks", "optimizer_states", "state_dict"} == {"state_dict"}, fact


# ------------------------------------------------------------------ resuming


def test_resuming_loads_callbacks_before_on_fit_start(tmp_path, lightning_fact):
    fact = lightning_fact(
        "resuming with weights_only loading gives a callback its state between setup and "
        "on_fit_start, and goes on from the saved step",
        "counters, which are set to zero when made and never in on_fit_start",
        "check that a resumed run adds to the counts of its checkpoint",
    )
    path = tmp_path / "a.ckpt"
    assert save(path, Stateful({"n": 7}))["global_step"] == 1, fact
    events = []

    class Resumed(Stateful):
        state_key = Stateful().state_key
        setup, on_fit_start = _noting("setup"), _noting("on_fit_start")

        def note(self, name):
            events.append((name, self.loaded))

    resumed = Resumed()
    trainer = trainer_of(resumed, max_epochs=2)
    trainer.fit(Module(), batches(1), ckpt_path=path, weights_only=True)
    assert events == [("setup", None), ("on_fit_start", {"n": 7})], fact
    assert trainer.global_step == 2, fact


def test_modules_of_plain_tensors_load_safely(tmp_path, lightning_fact):
    fact = lightning_fact(
        "load_from_checkpoint and resuming load plain tensors with weights_only, the default",
        "frozen layers, whose state is plain tensors",
        "say in the guide how to load a checkpoint",
    )
    path = tmp_path / "a.ckpt"
    stored = save(path)["state_dict"]
    for options in ({}, {"weights_only": True}):
        loaded = Module.load_from_checkpoint(path, **options)
        assert torch.equal(loaded.layer.weight, stored["layer.weight"]), fact
    resumed = Module()
    trainer_of().fit(resumed, batches(1), ckpt_path=path)
    # One epoch was asked for and is over, so what was loaded is what there is.
    assert torch.equal(resumed.layer.weight, stored["layer.weight"]), fact
    assert resumed.events == [], fact


def test_a_callback_that_is_missing_on_resuming_only_warns(tmp_path, lightning_fact):
    fact = lightning_fact(
        "resuming without a callback of the checkpoint warns, and its counts are gone",
        "counters, which go on only in a run that has them too",
        "say in the docstrings of the counters what happens now",
    )
    path = tmp_path / "a.ckpt"
    save(path, Stateful({"n": 7}))
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint") as caught:
        trainer_of(max_epochs=2).fit(Module(), batches(1), ckpt_path=path)
    assert any("['Stateful']" in str(warning.message) for warning in caught), fact


class Counted(Module):
    """Lists the batches that it trains on, as epoch and number."""

    def training_step(self, x, index):
        self.events.append((self.current_epoch, index))
        return self.layer(x).square().mean()

    optimizer_step = pl.LightningModule.optimizer_step


class InterruptionError(Exception):
    pass


class StopAfter(pl.Callback):
    """Saves right after a batch, and ends the run there."""

    def __init__(self, path, epoch, batch):
        self.path, self.last = path, (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (trainer.current_epoch, index) == self.last:
            trainer.save_checkpoint(self.path)
            raise InterruptionError


@pytest.mark.filterwarnings("ignore:.*not resumable")
@pytest.mark.parametrize("first", [3, 4])
def test_a_second_resume_repeats_batches_if_the_first_began_at_an_epochs_end(
    tmp_path, first, lightning_fact
):
    fact = lightning_fact(
        "a run resumed from a checkpoint of an epoch's last batch, and resumed again in the next "
        "epoch, trains that epoch from its start; resumed from elsewhere, it repeats nothing",
        "the kill test, which does not save right after an epoch's last batch",
        "if it repeats nothing now, save there too, and say so under limits in docs/callbacks.md",
    )
    size, (one, two) = 5, (tmp_path / "one.ckpt", tmp_path / "two.ckpt")

    def trained(start, *stops):
        module = Counted()
        with contextlib.suppress(InterruptionError):
            trainer_of(*stops, max_epochs=3).fit(module, batches(size), ckpt_path=start)
        return module.events

    seen = trained(None, StopAfter(one, 0, first))
    seen += trained(one, StopAfter(two, 1, 2))
    last = trained(two)
    everything = [(epoch, batch) for epoch in range(3) for batch in range(size)]
    if first < size - 1:
        assert seen + last == everything, fact
    else:
        # Its epoch_progress says that epoch 1 was over when the second checkpoint was written.
        assert seen == everything[: size + 3], fact
        assert last != everything[size + 3 :], fact
        assert last[0] == (1, 0), fact


# ------------------------------------------------------------------ Lightning on aihwkit's layers


def test_freezing_by_lightning_does_not_freeze_pulsed_layers(lightning_fact):
    fact = lightning_fact(
        "BaseFinetuning.freeze sets requires_grad only, so AnalogSGD goes on pulsing the tile",
        "FrozenGuard, and the design that frozen is a type, not a flag",
        "say in the guide from which version on Lightning freezes pulsed layers",
    )
    module = Analogue()
    BaseFinetuning.freeze(module.layer[1])
    before = module.array
    trainer_of(max_epochs=3).fit(module, batches(4))
    # Chance of no pulse in twelve steps on two cells: below 1e-12.
    assert not torch.equal(module.array, before), fact


def test_unfrozen_models_resume_only_with_unsafe_loading(tmp_path, lightning_fact):
    fact = lightning_fact(
        "resuming and load_from_checkpoint of a model with aihwkit's layers fail unless "
        "weights_only=False",
        "frozen layers, whose state is plain tensors, so that runs resume safely",
        "say in the guide from which version on unfrozen models resume safely too",
    )
    path = tmp_path / "a.ckpt"
    trainer = trainer_of()
    trainer.fit(Analogue(), batches(1))
    trainer.save_checkpoint(path)
    with fact.raises(pickle.UnpicklingError, "Weights only load failed"):
        Analogue.load_from_checkpoint(path)
    with fact.raises(pickle.UnpicklingError, "Weights only load failed"):
        trainer_of(max_epochs=2).fit(Analogue(), batches(1), ckpt_path=path)
    loaded = Analogue.load_from_checkpoint(path, weights_only=False)
    assert torch.equal(loaded.array, trainer.lightning_module.array), fact


def test_weight_averaging_fails_on_unfrozen_models(lightning_fact):
    fact = lightning_fact(
        "StochasticWeightAveraging raises on the placeholder of aihwkit's weights",
        "frozen layers, which have no such placeholder, so that adapters can be averaged",
        "say in the guide from which version on unfrozen models can be averaged too",
    )
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    with fact.raises(RuntimeError, "placeholder mode, so operation 'to'"):
        trainer_of(averaging, max_epochs=3).fit(Analogue(), batches(1))
