"""UnlearningModule: the objective's loss, the user's module, and nothing else that is trained."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import (
    EnergyMeter,
    ForgettingStopper,
    FrozenGuard,
    PulseCounter,
    RunReporter,
    UnlearningModule,
)
from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.reporting import RunReport
from aihwkit_lora.unlearning import objectives

from .objectives import CLASSES, Classifier, Kept, Weighted, batches, samples

GOOD = Weighted(weights={"forget": -0.1, "retain": 1.0})


@pytest.fixture
def make(lab):
    """The module to test around a fresh classifier."""

    def make(objective=None, *, kind=Classifier, **options):
        module = kind(lab.hybrid())
        objective = objective or Weighted(weights={"forget": -0.1, "retain": 1.0})
        return UnlearningModule(module, objective, **{"request": "person 2"} | options)

    return make


def fit(module, *callbacks, forget=1, retain=2, validation=None, resume=None, data=None, **options):
    """Fit without any frills and return the trainer, which has the logged rows."""
    logger = Kept()
    defaults = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    defaults |= dict.fromkeys(quiet, False)
    trainer = pl.Trainer(
        logger=logger, log_every_n_steps=1, callbacks=list(callbacks), **defaults | options
    )
    trainer.rows = logger.rows
    if data is None:
        data = module.data(batches(forget, label=2), batches(retain, seed=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
        trainer.fit(module, data, validation, ckpt_path=resume)
    return trainer


def quietly(verb, *args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        return verb(*args)


def parts(**seeds):
    return {part: batches(2, seed=seed) for part, seed in seeds.items()}


def test_loss_is_the_objectives_and_only_adapters_move(make):
    module = make()
    before = copy.deepcopy(module.module)
    trainer = fit(module, FrozenGuard(1))
    (row,) = [row for row in trainer.rows if row["step"] == 0 and "unlearn/person 2/loss" in row]
    forget, retain = (samples(2, label=2), samples(4, seed=1))
    losses = [
        nn.functional.cross_entropy(before(2.0 * data.tensors[0][:2]), data.tensors[1][:2]).item()
        for data in (forget, retain)
    ]
    assert row["unlearn/person 2/loss"] == pytest.approx(-0.1 * losses[0] + losses[1], rel=1e-5)
    changed = {
        name
        for (name, old), new in zip(
            before.named_parameters(), module.module.parameters(), strict=True
        )
        if not torch.equal(old, new)
    }
    trained = {name for name, p in before.named_parameters() if p.requires_grad}
    assert changed == trained
    assert all(".lora_" in name for name in trained)


def test_objective_gets_the_users_module_the_parts_and_the_progress(make):
    module = make()
    fit(module, max_epochs=2, forget=1, retain=4)
    models, sizes, progress = zip(*module.objective.seen, strict=True)
    assert {*map(id, models)} == {id(module.module)}
    assert [*sizes] == [{"forget": 2, "retain": 2}] * 8
    assert [*progress] == [step / 8 for step in range(8)]


def test_progress_counts_optimiser_steps_and_ends_at_the_cap(make):
    module = make()
    fit(module, retain=6, accumulate_grad_batches=3)
    assert [seen[2] for seen in module.objective.seen] == [0.0] * 3 + [0.5] * 3
    module = make(max_steps=2)
    trainer = fit(module, retain=6)
    assert [seen[2] for seen in module.objective.seen] == [0.0, 0.5]
    assert trainer.global_step == 2


def test_progress_stays_0_where_no_end_is_known(make):
    module = make()

    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    fit(module, Enough(), retain=6, max_epochs=-1)
    assert [seen[2] for seen in module.objective.seen] == [0.0] * 3


def test_without_a_forward_the_objective_gets_the_model_inside(lab):
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = lab.hybrid()
            self.helper = nn.Linear(2, 2).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = UnlearningModule(Bare(), GOOD, request="2")
    assert module.model is module.module.net
    module.module.second = lab.hybrid()
    with pytest.raises(
        StageError, match=r"Bare: expected a forward\(inputs\), or one part .* got 2"
    ):
        _ = module.model


def test_accumulated_gradients_are_those_of_one_large_batch(make):
    small, large = make(), make()
    forget, retain = samples(4, label=2), samples(4, seed=1)
    for module, size, every in ((small, 2, 2), (large, 4, 1)):
        loaders = [torch.utils.data.DataLoader(d, batch_size=size) for d in (forget, retain)]
        fit(module, data=module.data(*loaders), accumulate_grad_batches=every)
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_meters_count_under_the_request(make, lab, tmp_path, accumulate):
    ledger = al.Ledger()
    meters = [EnergyMeter(lab.chip, ledger), PulseCounter(ledger)]
    reporter = RunReporter(tmp_path / "report.json", lab.chip, ledger, stage="forget")
    module = make()
    fit(module, *meters, reporter, retain=6, accumulate_grad_batches=accumulate)
    assert {meter.phase for meter in meters} == {"unlearn:person 2"}
    assert ledger.phases() == ("unlearn:person 2",)
    total = ledger.total(phase="unlearn:person 2")
    # 6 batches of 2 + 2 samples; LoRA of rank 2 on 6→5→4→3.
    assert total["forward_macs"] == 24 * 2 * (6 + 5 + 5 + 4 + 4 + 3)
    assert total["optimizer_updates"] == 6 // accumulate * 2 * (6 + 5 + 5 + 4 + 4 + 3)
    (stage,) = RunReport.read(tmp_path / "report.json").arms["hybrid"]
    assert stage.counts == total


def test_validation_parts_are_measured_and_others_go_to_the_user(make):
    module = make()
    loaders = {**parts(forget=3, retain=4), "own": batches(2, seed=5)}
    trainer = fit(module, validation=loaders)
    for part, seed in (("forget", 3), ("retain", 4)):
        x, y = samples(4, seed=seed).tensors
        accuracy = (module.module(2.0 * x).argmax(1) == y).double().mean().item()
        assert trainer.callback_metrics[f"unlearn/person 2/{part}_accuracy"] == accuracy
    x, y = samples(4, seed=5).tensors
    loss = nn.functional.cross_entropy(module.module(2.0 * x), y).item()
    assert trainer.callback_metrics["own_loss/dataloader_idx_2"] == pytest.approx(loss, rel=1e-5)
    assert module.module.called == ["on_train_epoch_end"]
    assert trainer.callback_metrics["own_epochs"] == 1.0
    assert "log" not in vars(module.module)


def test_all_logged_keys(make):
    trainer = fit(make(), validation=parts(forget=3, retain=4))
    assert {key for row in trainer.rows for key in row} - {"step", "epoch"} == {
        "unlearn/person 2/loss",
        "unlearn/person 2/forget_accuracy",
        "unlearn/person 2/retain_accuracy",
        "own_epochs",
    }


def test_test_and_predict_are_the_users_and_log_nothing_of_ours(make):
    module = make()
    trainer = fit(module)
    x, y = samples(4, seed=6).tensors
    (found,) = quietly(trainer.test, module, batches(2, seed=6))
    own = (module.module(2.0 * x).argmax(1) == y).double().mean().item()
    assert found == {"test_accuracy": pytest.approx(own)}
    guessed = torch.cat(quietly(trainer.predict, module, batches(2, seed=6)))
    assert torch.equal(guessed, module.module(2.0 * x))
    (found,) = quietly(trainer.validate, module, batches(2, seed=6))
    assert set(found) == {"own_loss"}
    found = quietly(trainer.validate, module, parts(forget=6))
    assert set(found[0]) == {"unlearn/person 2/forget_accuracy"}


def test_metric_and_predictions_can_be_given(make):
    from torchmetrics import MeanMetric

    module = make(metric=MeanMetric(), predict=lambda model, batch: (model(batch[0]).sum(), 1.0))
    trainer = fit(module, validation=parts(forget=3))
    x = samples(4, seed=3).tensors[0]
    sums = [module.module(2.0 * half).sum().item() for half in (x[:2], x[2:])]
    found = trainer.callback_metrics["unlearn/person 2/forget_accuracy"].item()
    assert found == pytest.approx(sum(sums) / 2, rel=1e-5)


def test_checkpoint_is_that_of_the_users_module(make, lab, tmp_path):
    module = make()
    trainer = fit(module)
    for name, weights_only in (("all", False), ("weights", True)):
        trainer.save_checkpoint(tmp_path / name, weights_only)
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["state_dict"].keys() == module.module.state_dict().keys()
        again = Classifier.load_from_checkpoint(tmp_path / name, model=lab.hybrid())
        assert again.hparams == {"rate": 0.05}
        assert all(map(torch.equal, again.parameters(), module.module.parameters()))


def test_checkpoint_of_the_users_module_loads(make, lab, tmp_path):
    other = make()
    fit(other)
    trainer = pl.Trainer(logger=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(other.module)
    trainer.save_checkpoint(tmp_path / "own", weights_only=True)
    module = make()
    assert not all(map(torch.equal, module.parameters(), other.parameters()))
    fitted = torch.load(tmp_path / "own", weights_only=True)
    module.on_load_checkpoint(fitted)
    module.load_state_dict(fitted["state_dict"])
    assert all(map(torch.equal, module.parameters(), other.parameters()))


class Cut(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("cut")


class Repeatable(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        torch.manual_seed(self.global_step)  # read noise depends on the step only
        return batch


# Not after the third batch: an epoch ends there, which the shorter of these loaders cannot know.
@pytest.mark.parametrize("cut", [2, 4])
def test_an_interrupted_run_and_its_continuation_are_the_uninterrupted_run(make, lab, cut):
    def run(*more, **options):
        ledger = al.Ledger()
        module = make(objectives.get("npo")(), kind=Repeatable)
        data = module.data(lab.loader(2, 6, 1), lab.loader(3, 6, 1))
        for loader in data.flattened:
            labels = loader.dataset.tensors[1].abs().mul(9).long().squeeze(1) % CLASSES
            loader.dataset.tensors = (loader.dataset.tensors[0], labels)
        meter = EnergyMeter(lab.chip, ledger)
        try:
            fit(module, meter, *more, max_epochs=2, data=data, **options)
        except KeyError:
            return None
        return ledger.state_dict(), [p.clone() for p in module.parameters()]

    path = lab.folder / "cut.ckpt"
    through = run()
    assert run(Cut(path, cut)) is None
    counted, parameters = run(resume=path)
    assert counted == through[0]
    assert all(map(torch.equal, parameters, through[1]))


def test_optimisers_of_the_user_lose_what_is_frozen_and_keep_their_schedule(make):
    module = make()
    trainer = fit(module, retain=2, max_epochs=2)
    (optimizer,) = trainer.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    (group,) = optimizer.param_groups
    assert all(".lora_" in names[id(p)] for p in group["params"])
    assert len(group["params"]) == 6
    assert group["lr"] == 0.05 * 0.5**2


def test_a_factory_takes_the_place_of_the_users_optimisers(make):
    given = []

    def factory(parameters):
        given.extend(parameters)
        return torch.optim.Adam(parameters, lr=0.01)

    trainer = fit(make(optimizer=factory))
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    assert len(given) == 6


def test_optimisers_of_something_else_are_refused(make):
    module = make(optimizer=lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(StageError, match="expected an optimiser over parameters of the adapters"):
        fit(module)


def test_dictionaries_of_optimisers_are_restricted_too(make):
    class Monitored(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates}}

    trainer = fit(make(kind=Monitored))
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [6]


def test_what_is_no_adapter_must_not_be_trainable(make, lab):
    module = Classifier(lab.hybrid())
    module.head = nn.Linear(3, 3)
    with pytest.raises(StageError, match=r"parameter 'head.weight' and 1 more: expected only adap"):
        UnlearningModule(module, GOOD, request="2")
    allowed = UnlearningModule(module, GOOD, request="2", heads=["head"])
    head = module.head.weight.detach().clone()
    module.forward = lambda x: module.head(module.model(x))
    fit(allowed)
    assert not torch.equal(module.head.weight, head)
    with pytest.raises(StageError, match=r"head 'had': expected the full name of a module"):
        UnlearningModule(module, GOOD, request="2", heads=["had"])
    with pytest.raises(StageError, match=r"head 'model': expected a digital module, got one with"):
        UnlearningModule(module, GOOD, request="2", heads=["model"])


def test_it_is_checked_again_when_training_starts(make):
    module = make()
    bias = next(p for n, p in module.named_parameters() if n.endswith("base_layer.bias"))
    bias.requires_grad_(True)
    with pytest.raises(StageError, match=r"base_layer.bias': expected only adapters"):
        fit(module)


def test_models_that_are_not_ready_are_refused(lab):
    with pytest.raises(StageError, match="Classifier: expected a model with frozen layers"):
        UnlearningModule(Classifier(nn.Linear(6, 3)), GOOD, request="2")
    model = lab.hybrid().requires_grad_(False)
    with pytest.raises(StageError, match="Classifier: expected an adapter that is trainable"):
        UnlearningModule(Classifier(model), GOOD, request="2")


def test_heads_that_peft_trains_as_copies_are_part_of_the_adapter(lab):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = lab.frozen(), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.body(x))

    config = LoraConfig(r=1, target_modules=["body.0"], modules_to_save=["head"])
    module = UnlearningModule(Classifier(get_peft_model(Net(), config)), GOOD, request="2")
    fit(module)


OPTIONS = {"esd": {"null_label": 3}, "pseudo_class": {"classes": 3}, "rmu": {"layer": "2"}}


@pytest.mark.parametrize("name", sorted(objectives.names()))
def test_unbounded_objectives_need_a_cap(make, name):
    objective = objectives.get(name)(**OPTIONS.get(name, {}))
    if objective.bounded:
        make(objective)
        return
    with pytest.raises(ConfigurationError, match=r"expected max_steps with .* without bound"):
        make(objective)
    make(objective, max_steps=3)


def test_the_cap_holds_against_a_least_number_of_epochs(make):
    trainer = fit(make(max_steps=3), retain=2, min_epochs=4, max_epochs=5)
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request": " "}, "expected a name for logs and the ledger, got ' '"),
        ({"max_steps": 0}, "expected max_steps of 1 or more, got 0"),
    ],
)
def test_impossible_options_are_refused(make, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**options)


def test_missing_parts_are_named(make):
    needs = frozenset({"forget", "retain", "reference"})
    module = make(Weighted(weights={"forget": 1.0, "retain": 1.0}, needs=needs))
    with pytest.raises(ConfigurationError, match=r"batches of 'retain', which Weighted needs"):
        module.data(batches(1))
    with pytest.raises(ConfigurationError, match=r"parts 'forget' and 'retain', got list. Train"):
        fit(module, data=batches(1))
    with pytest.raises(ConfigurationError, match=r"parts 'forget' and 'retain', got 'retain'"):
        fit(module, data=pl.utilities.CombinedLoader({"retain": batches(1)}, "max_size"))


def test_parts_that_nobody_needs_may_be_missing(make):
    module = make(Weighted(weights={"forget": 1.0}, needs=frozenset({"forget"})))
    fit(module, data=module.data(batches(2)))
    assert [seen[1] for seen in module.objective.seen] == [{"forget": 2}] * 2


def test_batches_that_are_no_pairs_need_a_function(make):
    module = make()
    with pytest.raises(ConfigurationError, match="batch: expected a pair of inputs and targets"):
        module.predict(module, torch.ones(2))


def test_longer_loader_gives_the_epoch_and_the_shorter_starts_over(make):
    module = make(Weighted(weights={"forget": 1.0, "retain": 1.0}))
    trainer = fit(module, forget=5, retain=2)
    assert trainer.global_step == 5


@pytest.mark.parametrize(
    ("forget", "retain", "patience", "steps"),
    [
        ([0.5, 0.0, 0.0], [1.0, 1.0, 1.0], 1, 2),
        ([0.5, 0.0, 0.0], [1.0, 1.0, 1.0], 2, 3),
        ([0.0, 0.5, 0.0, 0.0], [1.0] * 4, 2, 4),
        ([0.0] * 5, [0.5] * 5, 1, 5),
    ],
)
def test_stops_when_both_are_met_often_enough(make, forget, retain, patience, steps):
    module = make()
    told = iter([value for pair in zip(forget, retain, strict=True) for value in pair])

    def predict(_, batch):
        right = round(next(told) * len(batch[1]))
        guess = batch[1].clone()
        guess[right:] = (guess[right:] + 1) % CLASSES
        return guess, batch[1]

    module.predict = predict
    stopper = ForgettingStopper(forget_at_most=0.1, retain_at_least=0.9, patience=patience)
    loaders = {part: batches(1, 4) for part in ("forget", "retain")}
    trainer = fit(module, stopper, retain=1, validation=loaders, max_epochs=len(forget))
    assert trainer.global_step == steps
    again = ForgettingStopper(forget_at_most=0.1, retain_at_least=0.9, patience=patience)
    again.load_state_dict(stopper.state_dict())
    assert again.met == stopper.met


def test_stopper_never_asks_for_test_data(make):
    class Module(pl.LightningDataModule):
        def train_dataloader(self):
            return wanted.data(batches(1, label=2), batches(1))

        def val_dataloader(self):
            return parts(forget=1, retain=2)

        def test_dataloader(self):
            raise AssertionError("test data is not for training")

    class Plain(Classifier):
        on_after_batch_transfer = pl.LightningModule.on_after_batch_transfer

    wanted = make(kind=Plain)
    stopper = ForgettingStopper(forget_at_most=1.0, retain_at_least=0.0)
    trainer = fit(wanted, stopper, data=Module(), max_epochs=3)
    assert trainer.global_step == 1


def test_lightnings_own_early_stopping_can_watch_the_same_values(make):
    stop = EarlyStopping("unlearn/person 2/forget_accuracy", mode="min", stopping_threshold=1.1)
    assert fit(make(), stop, validation=parts(forget=3), max_epochs=3, retain=1).global_step == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_at_most": -0.1}, "expected forget_at_most from 0 to 1, got -0.1"),
        ({"retain_at_least": math.nan}, "expected retain_at_least from 0 to 1, got nan"),
        ({"patience": 0}, "expected patience of 1 or more, got 0"),
    ],
)
def test_impossible_stoppers_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ForgettingStopper(**{"forget_at_most": 0.0, "retain_at_least": 1.0} | options)


def test_stopper_wants_validation_parts_of_this_module(make, lab):
    stopper = ForgettingStopper(forget_at_most=0.0, retain_at_least=1.0)
    with pytest.raises(ConfigurationError, match=r"expected validation loaders .* got NoneType"):
        fit(make(), stopper)
    with pytest.raises(
        ConfigurationError, match=r"expected validation loaders .* got \['forget'\]"
    ):
        fit(make(), stopper, validation=parts(forget=1))
    with pytest.raises(ConfigurationError, match="expected an UnlearningModule, got Module"):
        lab.fit(lab.Module(lab.hybrid()), stopper, validation=1)


@pytest.mark.slow
def test_three_processes_forget_as_one(tmp_path):
    script = Path(__file__).with_name("objective_ranks.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    for rank in ranks:
        # 2 batches an epoch on each; stopped after the second validation.
        assert rank["steps"] == 4
        assert rank["updates"] == 4 * 2 * (6 + 5 + 5 + 4 + 4 + 3)
        assert rank["metrics"] == ranks[0]["metrics"]
        assert len(rank["metrics"]) == 2
        # Of 6 images on all ranks together, not of the 2 that each has seen.
        right = [6 * value for value in rank["metrics"].values()]
        assert right == pytest.approx([round(count) for count in right], abs=1e-5)
        for name, adapter in rank["adapters"].items():
            assert torch.equal(adapter, ranks[0]["adapters"][name])
