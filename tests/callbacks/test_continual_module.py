"""ContinualModule: a new task by any objective, beside what earlier adapters do."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import aihwkit_lora as al
from aihwkit_lora.callbacks import ContinualModule, EnergyMeter, PulseCounter, RelapseGuard
from aihwkit_lora.continual import objectives
from aihwkit_lora.continual.composition import active_adapters, add_adapter_
from aihwkit_lora.continual.head import grow_head_
from aihwkit_lora.errors import ConfigurationError, RelapseError, StageError
from aihwkit_lora.unlearning.reference import adapters_in_training
from aihwkit_lora.unlearning.seal import seal_, verify_seals

from .objectives import Classifier, Kept, Weighted, batches, samples


def two_adapters(lab, *, sealed=False):
    """One adapter that is fixed and a fresh one, in sum."""
    model = lab.frozen()
    for name in ("forget", "learn"):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["0", "2", "4"])
        model = add_adapter_(model, name, config)
        if name == "forget":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(std=0.1)
            if sealed:
                seal_(model, "forget", request="person 2")
    return model


@pytest.fixture
def make(lab):
    def make(objective=None, *, sealed=False, **options):
        module = Classifier(two_adapters(lab, sealed=sealed))
        objective = objective or objectives.get("replay")()
        return ContinualModule(module, objective, **{"task": "person 5"} | options)

    return make


def fit(module, *callbacks, validation=None, **options):
    logger = Kept()
    defaults = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    defaults |= dict.fromkeys(quiet, False)
    trainer = pl.Trainer(
        logger=logger, log_every_n_steps=1, callbacks=list(callbacks), **defaults | options
    )
    trainer.rows = logger.rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
        trainer.fit(module, module.data(batches(2), batches(3, seed=1)), validation)
    return trainer


@pytest.mark.parametrize("sealed", [False, True])
def test_only_the_newest_adapter_moves_and_all_stay_active(make, sealed):
    module = make(sealed=sealed)
    model = module.module.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(module)
    assert trainer.global_step == 3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".learn." in name}
    assert active_adapters(model) == ("forget", "learn")
    assert adapters_in_training(model) == {"learn"}
    if sealed:
        verify_seals(model)


def test_all_logged_keys_and_the_loss(make):
    weights = {"new": 1.0, "replay": 0.5}
    module = make(Weighted(weights=weights, needs=frozenset({"new", "replay"})))
    data = [samples(4), samples(6, seed=1)]
    expected = sum(
        weight * nn.functional.cross_entropy(module(2.0 * own.tensors[0][:2]), own.tensors[1][:2])
        for weight, own in zip(weights.values(), data, strict=True)
    )
    loaders = {part: batches(2, seed=seed) for part, seed in (("new", 3), ("replay", 4))}
    trainer = fit(module, validation=loaders)
    assert trainer.rows[0]["continual/person 5/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert {key for row in trainer.rows for key in row} - {"step", "epoch"} == {
        "continual/person 5/loss",
        "continual/person 5/new_accuracy",
        "continual/person 5/replay_accuracy",
        "own_epochs",
    }
    for part, seed in (("new", 3), ("replay", 4)):
        x, y = samples(4, seed=seed).tensors
        accuracy = (module(2.0 * x).argmax(1) == y).double().mean().item()
        assert trainer.callback_metrics[f"continual/person 5/{part}_accuracy"] == accuracy


def test_meters_count_under_the_task(make, lab):
    ledger = al.Ledger()
    meters = [EnergyMeter(lab.chip, ledger, phase="something else"), PulseCounter(ledger)]
    module = make()
    assert (module.task, module.phase) == ("person 5", "continual:person 5")
    fit(module, *meters)
    assert ledger.phases() == ("continual:person 5",)
    assert ledger.total().pulses == 0


class Once(pl.Callback):
    """The user's own callback."""


def test_a_guard_comes_with_the_module_and_beside_the_users_callbacks(make):
    x = samples(8, seed=7).tensors[0]
    module = make()
    guessed = module(2.0 * x).argmax(1)
    # Half of what is to stay forgotten is known already; no more than that is allowed.
    labels = torch.where(torch.arange(8) < 4, guessed, (guessed + 1) % 3)
    metric = MulticlassAccuracy(average="micro")
    module.guard = RelapseGuard({"person 2": [[x, labels]]}, metric, tolerance=1.0)
    module.module.configure_callbacks = Once
    trainer = fit(module)
    assert trainer.callback_metrics["relapse/person 2"] >= 0.0
    assert module.guard.baselines == {"person 2": 0.5}
    assert [type(one) for one in module.configure_callbacks()] == [Once, RelapseGuard]

    module.guard = RelapseGuard({"person 2": [[x, guessed]]}, metric, limit=0.1)
    with pytest.raises(RelapseError, match="request 'person 2', step 0: expected"):
        fit(module)


@pytest.mark.parametrize("name", sorted(objectives.names()))
def test_registered_objectives_train(make, name):
    if name == "der++":
        pytest.skip("its replay part also has logits")
    module = make(objectives.get(name)())
    module.objective.prepare_(module.module.model, [(2.0 * x, y) for x, y in batches(2)])
    loss = [row for row in fit(module).rows if "continual/person 5/loss" in row]
    assert len(loss) == 3


def test_replay_with_logits_goes_through(make):
    module = make(objectives.get("der++")())
    x, y = samples(4).tensors
    stored = TensorDataset(x, y, torch.zeros(4, 3))
    data = module.data(batches(2), DataLoader(stored, batch_size=2))
    losses = [module.objective.loss(module.model, batch) for batch, *_ in data]
    assert len(losses) == 2
    assert all(bool(torch.isfinite(loss)) for loss in losses)


@pytest.mark.parametrize("adapted", [True, False])
def test_rows_of_a_grown_head_are_trained(lab, adapted):
    layers = ["0", "4"] if adapted else ["0", "2"]
    model = add_adapter_(lab.frozen(), "learn", LoraConfig(r=2, target_modules=layers))
    module = Classifier(grow_head_(model, 1))
    (rows,) = [name for name, _ in module.named_modules() if name.endswith("4.grown_rows")]
    options = {"task": "5", "heads": [] if adapted else [rows]}
    if not adapted:
        with pytest.raises(StageError, match=r"grown_rows\..*: expected only adapters"):
            ContinualModule(module, objectives.get("replay")(), task="5")
    grown = module.get_submodule(rows)
    before = [parameter.detach().clone() for parameter in grown.parameters()]
    fit(ContinualModule(module, objectives.get("replay")(), **options))
    assert not any(map(torch.equal, grown.parameters(), before))


def test_missing_replay_is_named(make):
    needs = frozenset({"new", "replay"})
    module = make(Weighted(weights={"new": 1.0, "replay": 1.0}, needs=needs))
    with pytest.raises(ConfigurationError, match=r"ContinualModule: expected batches of 'replay'"):
        module.data(batches(1))
    lonely = make(objectives.get("lwf")())
    assert len(lonely.data(batches(1)).flattened) == 1


def test_a_task_has_a_name(make):
    with pytest.raises(ConfigurationError, match="expected a name for logs and the ledger, got ''"):
        make(task="")
