"""DriftSweep: literal accuracies of a layer that fades, and training that does not notice."""

from __future__ import annotations

import copy
import itertools

import pytest
import pytorch_lightning as pl
import torch
from aihwkit.inference.noise.base import BaseNoiseModel
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter
from aihwkit_lora.callbacks.drift_sweep import DriftSweep, drift_key
from aihwkit_lora.errors import ConfigurationError, StageError


class Fading(BaseNoiseModel):
    """All weights shrink linearly; after 10 s they change their sign."""

    def apply_drift_noise(self, weights, drift_noise_parameters, t_inference):
        return weights * (1.0 - t_inference / 10.0)


class Gamble(BaseNoiseModel):
    """Each array keeps its weights or turns them round; drawn once, from torch's generator."""

    def generate_drift_coefficients(self, g_target):
        return torch.randint(2, ()) * 2.0 - 1.0

    def apply_drift_noise(self, weights, drift_noise_parameters, t_inference):
        return weights * drift_noise_parameters[0]


ACCURACY = MulticlassAccuracy(num_classes=3, average="micro")
# Outputs for inputs 0, 1 and 2. The largest of each column is at 0, 1 and 2; with its sign changed,
# at 1, 2 and 0.
WEIGHT = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]])
INPUTS = torch.eye(6)[[0, 1, 2, 0]]
LABELS = torch.tensor([0, 1, 2, 1])
FRESH, TURNED = 0.75, 0.25


def selector() -> nn.Module:
    """A frozen layer that tells three inputs apart and ignores three others, with an adapter."""
    linear = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([WEIGHT, torch.zeros(3, 3)], dim=1))
    chip = al.chips.get("rm-180nm")
    model = al.convert(nn.Sequential(linear), chip).requires_grad_(False)
    al.program_(model, chip, seed=0)
    model = al.freeze_(model)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=al.target_modules(model)))


def batches(size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=size)


def predict(module, batch):
    return module.model(batch[0]), batch[1]


def sweep(seconds, **options) -> DriftSweep:
    options = {"loader": batches(), "noise_model": Fading(), "predict": predict, **options}
    return DriftSweep(seconds, ACCURACY, name="accuracy", **options)


def still(module):
    """An optimiser that changes nothing, so that accuracies are those of the start."""
    return torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.0)


def array_of(model):
    ((_, layer),) = al.frozen_layers(model)
    return layer.analog_module


def swept(trainer):
    return [row for row in trainer.memory.logged if any(key.startswith("drift/") for key in row)]


class Values(pl.Callback):
    """Adapters after each step, and random numbers that were left for the next."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        adapters = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        self.seen.append((adapters, torch.get_rng_state(), pl_module.training))


def test_end_of_training_logs_the_accuracy_at_each_time(lab):
    trainer = lab.fit(lab.Module(selector(), optimizer=still), sweep([0, 5.0, 20]))
    wanted = {
        "drift/accuracy_at_0s": FRESH,
        "drift/accuracy_at_5s": FRESH,
        "drift/accuracy_at_20s": TURNED,
    }
    assert swept(trainer) == [{"step": 3, **wanted}]
    found = trainer.callback_metrics
    assert {key: float(found[key]) for key in wanted} == wanted


def test_sweeps_after_every_second_validation_and_not_twice_at_the_end(lab):
    trainer = lab.fit(
        lab.Module(selector(), optimizer=still), sweep([20.0], every_n_validations=2),
        validation=1, val_check_interval=1, batches=4,
    )  # fmt: skip
    assert swept(trainer) == [{"step": step, "drift/accuracy_at_20s": TURNED} for step in (2, 4)]


def test_last_validation_that_was_not_due_leaves_the_sweep_at_the_end(lab):
    trainer = lab.fit(
        lab.Module(selector(), optimizer=still), sweep([20.0], every_n_validations=2),
        validation=1, val_check_interval=1, batches=3,
    )  # fmt: skip
    assert [row["step"] for row in swept(trainer)] == [2, 3]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_sanity_check_is_no_validation(lab):
    callback, module = sweep([0.0], every_n_validations=1), lab.Module(selector())
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, num_sanity_val_steps=1, logger=False, callbacks=callback,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    module.training_step = lambda batch: predict(module, batch)[0].sum()
    trainer.fit(module, batches(), batches())
    assert callback.state_dict() == {"validations": 1}


def test_every_fit_ends_with_a_sweep(lab):
    module, callback = lab.Module(selector(), optimizer=still), sweep([0.0])
    for _ in range(2):
        assert [row["step"] for row in swept(lab.fit(module, callback))] == [3]


def test_validation_outside_of_training_is_not_swept(lab):
    trainer = lab.fit(lab.Module(selector(), optimizer=still), sweep([0.0], every_n_validations=1))
    trainer.validate(lab.Module(selector()), batches(), verbose=False)
    assert len(swept(trainer)) == 1


def test_validation_loaders_of_the_trainer_are_the_default(lab):
    module = lab.Module(selector(), optimizer=still)
    seen = []

    def count(module, batch):
        seen.append(len(batch[0]))
        return predict(module, (batch[0], torch.zeros(len(batch[0]), dtype=torch.long)))

    lab.fit(module, sweep([0.0, 1.0], loader=None, predict=count), validation=3)
    assert seen == [lab.batch] * 3 * 2


@pytest.mark.parametrize("kind", [list, lambda loaders: dict(enumerate(loaders))])
def test_all_of_several_validation_loaders_count(lab, kind):
    module, seen = lab.Module(selector(), optimizer=still), []
    module.val_dataloader = lambda: kind([batches(4), batches(1)])
    module.validation_step = lambda batch, _, dataloader_idx=0: None

    def count(module, batch):
        seen.append(len(batch[0]))
        return predict(module, batch)

    trainer = lab.fit(module, sweep([20.0], loader=None, predict=count))
    assert seen == [4, 1, 1, 1, 1]
    assert swept(trainer) == [{"step": 3, "drift/accuracy_at_20s": TURNED}]


def test_draws_give_their_mean_and_the_worst(lab):
    # Signs of the first draw of a generator with seeds 5 to 8.
    signs = [int(torch.randint(2, (), generator=torch.Generator().manual_seed(5 + i))) * 2 - 1
             for i in range(4)]  # fmt: skip
    assert signs == [1, -1, 1, 1]
    callback = sweep([1.0, 2.0], noise_model=Gamble(), repeats=4, seed=5)
    trainer = lab.fit(lab.Module(selector(), optimizer=still), callback)
    mean = (TURNED + 3 * FRESH) / 4
    assert swept(trainer) == [
        {
            "step": 3,
            "drift/accuracy_at_1s": mean,
            "drift/accuracy_at_1s_worst": TURNED,
            "drift/accuracy_at_2s": mean,
            "drift/accuracy_at_2s_worst": TURNED,
        }
    ]
    assert tuple(swept(trainer)[0])[1:] == callback.keys


def test_worst_error_is_the_largest(lab):
    def squared(module, batch):
        return module.model(batch[0]).argmax(1).float(), batch[1].float()

    callback = DriftSweep(
        [1.0], MeanSquaredError(), loader=batches(), noise_model=Gamble(), predict=squared,
        repeats=4, seed=5,
    )  # fmt: skip
    trainer = lab.fit(lab.Module(selector(), optimizer=still), callback)
    # Fresh: 0, 0, 0 and 1 off; turned: 1, 1, 2 and 0 off.
    (row,) = swept(trainer)
    fresh, turned = 1 / 4, 6 / 4
    assert row == {
        "step": 3,
        "drift/mean_squared_error_at_1s": (turned + 3 * fresh) / 4,
        "drift/mean_squared_error_at_1s_worst": turned,
    }


def test_training_goes_as_if_there_were_no_sweep(lab):
    seen = []
    for extra in ([], [sweep([0.0, 20.0], noise_model=Gamble(), repeats=2, every_n_validations=1)]):
        values = Values()
        lab.fit(lab.Module(selector()), values, *extra, validation=1, val_check_interval=1)
        seen.append(values.seen)
    for (one, state, training), (other, other_state, other_training) in zip(*seen, strict=True):
        assert all(map(torch.equal, one, other))
        assert torch.equal(state, other_state)
        assert training
        assert other_training


def test_arrays_go_back_to_the_time_and_the_fate_that_they_had(lab):
    model = selector()
    al.drift_(model, 3.0, noise_model=Fading())
    array, before = array_of(model), {}
    before = (array.seconds, array.tensors, array.fate)
    lab.fit(lab.Module(model, optimizer=still), sweep([0.0, 20.0], noise_model=Gamble()))
    assert all(map(lambda a, b: a is b, (array.tensors, array.fate), before[1:]))
    assert array.seconds == before[0] == 3.0


def test_arrays_as_programmed_have_no_fate_afterwards(lab):
    model = selector()
    array = array_of(model)
    lab.fit(lab.Module(model, optimizer=still), sweep([20.0], noise_model=Gamble()))
    assert (array.seconds, array.fate) == (0.0, None)
    assert array.tensors is array.programmed


def test_exception_in_a_sweep_leaves_nothing_behind(lab):
    model, done = selector(), itertools.count()
    ledger = al.Ledger()

    def fail(module, batch):
        if next(done) == 3:
            raise RuntimeError("power cut")
        return predict(module, batch)

    states = []

    class Remember(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            states.append((torch.get_rng_state(), [m.training for m in pl_module.modules()]))

        def on_exception(self, trainer, pl_module, exception):
            states.append((torch.get_rng_state(), [m.training for m in pl_module.modules()]))
            states.append(array_of(model).seconds)

    with pytest.raises(RuntimeError, match="power cut"):
        lab.fit(
            lab.Module(model), Remember(), EnergyMeter(lab.chip, ledger),
            sweep([20.0, 30.0], predict=fail, every_n_validations=1),
            validation=1,
        )  # fmt: skip
    (state, modes), (state_after, modes_after), seconds = states
    assert torch.equal(state, state_after)
    assert modes == modes_after
    assert seconds == 0.0
    # Two batches at 20 s and one at 30 s.
    assert ledger.total(phase="drift")["tile_reads"] == 3 * 2


def test_reads_of_a_sweep_have_a_phase_of_their_own(lab):
    ledger, alone = al.Ledger(), al.Ledger()
    options = {"validation": 1, "val_check_interval": 2, "batches": 4}
    lab.fit(lab.Module(selector()), EnergyMeter(lab.chip, alone), **options)
    lab.fit(
        lab.Module(selector()),
        sweep([0.0, 20.0], repeats=3, every_n_validations=1),
        EnergyMeter(lab.chip, ledger),
        **options,
    )
    # Two sweeps of three draws at two times, four images each, on one tile.
    assert ledger.total(phase="drift")["tile_reads"] == 2 * 3 * 2 * 4
    assert ledger.total(phase="drift")["transposed_tile_reads"] == 0
    for phase in ("train", "validate"):
        assert ledger.total(phase=phase) == alone.total(phase=phase)
    assert ledger.phases() == ("train", "validate", "drift")


def test_phase_carries_the_name_it_is_given(lab):
    ledger = al.Ledger()
    callback = sweep([0.0], phase="a year later", every_n_validations=1)
    lab.fit(lab.Module(selector()), callback, EnergyMeter(lab.chip, ledger), validation=1)
    assert ledger.total(phase="a year later")["tile_reads"] == 4


def test_two_and_two_epochs_sweep_as_four(lab):
    def run(callback, epochs, resume=None):
        module = lab.Module(selector())
        return lab.fit(module, callback, max_epochs=epochs, validation=1, resume=resume)

    whole = run(sweep([20.0], every_n_validations=3), 4)
    first = run(sweep([20.0], every_n_validations=3), 2)
    first.save_checkpoint(lab.folder / "two.ckpt")
    second = run(sweep([20.0], every_n_validations=3), 4, resume=lab.folder / "two.ckpt")
    assert [row["step"] for row in swept(whole)] == [9, 12]
    assert [row["step"] for row in swept(first)] == [6]
    assert swept(second) == swept(whole)
    stored = torch.load(lab.folder / "two.ckpt", weights_only=True)["callbacks"]
    assert stored["DriftSweep"] == {"validations": 2}


def test_metric_of_the_user_is_left_alone(lab):
    metric = copy.deepcopy(ACCURACY)
    metric.update(torch.tensor([0]), torch.tensor([0]))
    callback = DriftSweep([20.0], metric, loader=batches(), noise_model=Fading(), predict=predict)
    trainer = lab.fit(lab.Module(selector(), optimizer=still), callback)
    assert float(metric.compute()) == 1.0
    assert swept(trainer) == [{"step": 3, "drift/multiclass_accuracy_at_20s": TURNED}]


@pytest.mark.parametrize("seconds", [[], [1.0, -1.0], [float("nan")], [float("inf")], [2.0, 2]])
def test_refuses_times_that_are_none(seconds):
    refusal = "DriftSweep: expected different times since programming of 0 s or more, got"
    with pytest.raises(ConfigurationError, match=refusal):
        sweep(seconds)


@pytest.mark.parametrize("name", ["repeats", "every_n_validations"])
def test_refuses_numbers_below_one(name):
    with pytest.raises(ConfigurationError, match=f"expected {name} of 1 or more, got 0"):
        sweep([0.0], **{name: 0})


def test_refuses_to_call_a_draw_the_worst_if_nobody_knows():
    refusal = r"which of 2 draws is the worst, got MeanMetric without a direction"
    with pytest.raises(ConfigurationError, match=refusal):
        DriftSweep([0.0], MeanMetric(), repeats=2)
    assert DriftSweep([0.0], MeanMetric()).repeats == 1


def test_asks_for_batches_before_it_trains(lab):
    module, steps = selector(), []
    with pytest.raises(ConfigurationError, match="expected batches to evaluate on, got a trainer"):
        lab.fit(lab.Module(module, after_step=lambda: steps.append(1)), sweep([0.0], loader=None))
    assert steps == []


def test_asks_for_a_noise_model_before_it_trains(lab):
    model, steps = selector(), []
    array_of(model).rpu_config.noise_model = None
    with pytest.raises(ConfigurationError, match="expected a noise model that says how its cells"):
        lab.fit(
            lab.Module(model, after_step=lambda: steps.append(1)), sweep([1.0], noise_model=None)
        )
    assert steps == []


def test_refuses_models_without_frozen_layers(lab):
    with pytest.raises(StageError, match="expected"):
        lab.fit(lab.Module(nn.Linear(6, 3)), sweep([1.0]))


def test_refuses_metrics_of_several_numbers(lab):
    metric = MulticlassAccuracy(num_classes=3, average=None)
    callback = DriftSweep([0.0], metric, loader=batches(), predict=predict)
    with pytest.raises(ConfigurationError, match=r"metric that gives one number, got \(3,\)"):
        lab.fit(lab.Module(selector()), callback)


def test_keys_do_not_round_times():
    assert drift_key("loss", 31_536_000.0) == "drift/loss_at_31536000s"
    assert drift_key("loss", 1e-7, worst=True) == "drift/loss_at_1e-07s_worst"
