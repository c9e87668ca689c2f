"""RelapseGuard: literal accuracies on forget sets, and the error that stops a relapse."""

from __future__ import annotations

import itertools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter
from aihwkit_lora.callbacks.relapse_guard import RelapseError, RelapseGuard, relapse_key
from aihwkit_lora.errors import ConfigurationError

IMAGES = 8
GENERATOR = torch.Generator().manual_seed(3)
FIRST = DataLoader(TensorDataset(torch.randn(IMAGES, 6, generator=GENERATOR)), batch_size=3)
SECOND = DataLoader(TensorDataset(torch.randn(4, 6, generator=GENERATOR)), batch_size=4)


class Memory:
    """What a model is said to know of a forget set: a fraction of its images, after each step."""

    def __init__(self, *fractions: float, sets=(IMAGES,)):
        self.fractions, self.sets = fractions, sets
        self.shown = itertools.count()

    def predict(self, module, batch):
        """Read the chip, then answer as scripted: right for the first images of a set."""
        module.model(batch[0])
        known = self.fractions[min(module.trainer.global_step, len(self.fractions) - 1)] * IMAGES
        first = next(self.shown) % 3 * 3
        places = torch.arange(first, first + len(batch[0]))
        return (places < known).int(), torch.ones(len(batch[0]), dtype=torch.int)


def guard(memory, **options) -> RelapseGuard:
    options = {"predict": memory.predict, "name": "accuracy", **options}
    return RelapseGuard({"person 2": FIRST}, BinaryAccuracy(), **options)


def relapses(trainer):
    rows = trainer.memory.logged
    return [row for row in rows if any(key.startswith("relapse/") for key in row)]


def row(step, value):
    return {"step": step, "relapse/person 2": value}


def test_logs_every_evaluation_and_lets_pass_what_stays_within_the_tolerance(lab):
    found = guard(Memory(0.25, 0.0, 0.5, 0.125), tolerance=0.25)
    trainer = lab.fit(lab.Module(lab.hybrid()), found, validation=1, val_check_interval=1)
    assert relapses(trainer) == [row(0, 0.25), row(1, 0.0), row(2, 0.5), row(3, 0.125)]
    assert found.baselines == {"person 2": 0.25}
    assert float(trainer.callback_metrics["relapse/person 2"]) == 0.125


def test_without_validation_only_start_and_end_are_evaluated(lab):
    trainer = lab.fit(lab.Module(lab.hybrid()), guard(Memory(0.25), tolerance=0.0))
    assert relapses(trainer) == [row(0, 0.25), row(3, 0.25)]


def test_relapse_beyond_the_tolerance_stops_training_and_says_what_to_do(lab):
    steps = []
    module = lab.Module(lab.hybrid(), after_step=lambda: steps.append(1))
    found = guard(Memory(0.25, 0.25, 0.625), tolerance=0.25)
    with pytest.raises(RelapseError) as error:
        lab.fit(module, found, validation=1, val_check_interval=1)
    assert str(error.value) == (
        "request 'person 2', step 2: expected accuracy of 0.5 or less on its forget set (0.25 at "
        "the start of training, and a tolerance of 0.25), got 0.625. The model knows again what it "
        "was made to forget: go back to an earlier checkpoint, see that the unlearning adapter is "
        "active, or let the objective hold this forget set down."
    )
    assert len(steps) == 2
    assert relapses(module.trainer)[-1] == row(2, 0.625)


def test_relapse_at_the_end_is_found_without_validation(lab):
    with pytest.raises(RelapseError, match=r"'person 2', step 3: expected accuracy of 0.3 or less"):
        lab.fit(lab.Module(lab.hybrid()), guard(Memory(0.25, 0, 0, 1), tolerance=0.05))


def test_limit_holds_whatever_the_baseline(lab):
    found = guard(Memory(0.0, 0.25, 0.375), limit=0.25)
    refusal = (
        r"step 2: expected accuracy of 0.25 or less on its forget set \(the limit\), got 0.375"
    )
    with pytest.raises(RelapseError, match=refusal):
        lab.fit(lab.Module(lab.hybrid()), found, validation=1, val_check_interval=1)


def test_limit_holds_before_the_first_step_too(lab):
    steps = []
    module = lab.Module(lab.hybrid(), after_step=lambda: steps.append(1))
    with pytest.raises(RelapseError, match=r"step 0: expected accuracy of 0.1 or less"):
        lab.fit(module, guard(Memory(0.125), limit=0.1))
    assert steps == []


def test_metric_that_is_no_number_is_a_relapse(lab):
    class Broken(BinaryAccuracy):
        def compute(self):
            return torch.tensor(torch.nan)

    found = RelapseGuard({"a": FIRST}, Broken(), limit=0.5, predict=Memory(0.0).predict)
    with pytest.raises(RelapseError, match=r"expected Broken of 0.5 or less .* got nan"):
        lab.fit(lab.Module(lab.hybrid()), found)


def test_baseline_stays_over_fits_so_that_small_relapses_add_up(lab):
    found, module = guard(Memory(0.25, 0.25, 0.25, 0.375), tolerance=0.125), None
    for _ in range(2):
        trainer = lab.fit(lab.Module(lab.hybrid()), found)
        assert relapses(trainer)[-1] == row(3, 0.375)
    assert relapses(trainer) == [row(3, 0.375)]
    found.predict = Memory(0.375, 0.375, 0.375, 0.5).predict
    module = lab.Module(lab.hybrid())
    with pytest.raises(RelapseError, match=r"0.25 at the start of training.* got 0.5"):
        lab.fit(module, found)


def test_request_that_comes_later_gets_a_baseline_of_its_own(lab):
    def known(module, batch):
        answer = torch.full((len(batch[0]),), len(batch[0]) == 4)
        return answer.int(), torch.ones(len(batch[0]), dtype=torch.int)

    found = RelapseGuard({"first": FIRST}, BinaryAccuracy(), tolerance=0.0, predict=known)
    lab.fit(lab.Module(lab.hybrid()), found)
    found.forget_sets["second"] = SECOND
    trainer = lab.fit(lab.Module(lab.hybrid()), found)
    assert found.baselines == {"first": 0.0, "second": 1.0}
    assert relapses(trainer) == [
        {"step": 0, "relapse/second": 1.0},
        {"step": 3, "relapse/first": 0.0, "relapse/second": 1.0},
    ]


def test_resumed_run_keeps_the_baseline_of_the_first_start(lab):
    def run(found, epochs, resume=None):
        module = lab.Module(lab.hybrid())
        return lab.fit(module, found, max_epochs=epochs, validation=1, resume=resume)

    scripts = [0.25, 0, 0, 0.375, 0, 0, 0.25]
    whole = run(guard(Memory(*scripts), tolerance=0.25), 2)
    first = run(guard(Memory(*scripts), tolerance=0.25), 1)
    first.save_checkpoint(lab.folder / "one.ckpt")
    stored = torch.load(lab.folder / "one.ckpt", weights_only=True)["callbacks"]
    assert stored["RelapseGuard"] == {"baselines": {"person 2": 0.25}}
    second = run(guard(Memory(*scripts), tolerance=0.25), 2, resume=lab.folder / "one.ckpt")
    assert relapses(whole) == [row(0, 0.25), row(3, 0.375), row(6, 0.25)]
    assert relapses(first) + relapses(second) == relapses(whole)
    strict = guard(Memory(0.625), tolerance=0.25)
    with pytest.raises(RelapseError, match=r"0.25 at the start of training"):
        run(strict, 2, resume=lab.folder / "one.ckpt")


def test_guard_leaves_training_and_its_counts_alone(lab):
    def run(*callbacks):
        ledger, model = al.Ledger(), lab.hybrid()
        meter = EnergyMeter(lab.chip, ledger)
        options = {"validation": 1, "val_check_interval": 1}
        lab.fit(lab.Module(model), meter, *callbacks, **options)
        adapters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return ledger, adapters, torch.get_rng_state()

    ledger, adapters, state = run()
    guarded, same, same_state = run(guard(Memory(0.25), tolerance=0.0))
    assert all(map(torch.equal, adapters, same))
    assert torch.equal(state, same_state)
    for phase in ("train", "validate"):
        assert guarded.total(phase=phase) == ledger.total(phase=phase)
    # At the start and after three validations, three layers; at the end nobody counts any more.
    assert guarded.total(phase="relapse")["tile_reads"] == 4 * 3 * IMAGES
    assert set(guarded.phases()) == {"train", "validate", "relapse"}


def test_real_relapse_of_a_real_model_is_caught(lab):
    """A linear layer learns by gradient descent what the guard does not want it to know."""
    x, y = torch.eye(6)[:3], torch.tensor([0, 1, 2])

    class Learner(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            nn.init.constant_(self.layer.weight, 0.0)
            nn.init.constant_(self.layer.bias, 0.0)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch):
            return nn.functional.cross_entropy(self(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    accuracy = MulticlassAccuracy(num_classes=3, average="micro")
    found = RelapseGuard({"three": [(x, y)]}, accuracy, tolerance=0.5)
    with pytest.raises(RelapseError, match=r"'three', step 3: .* got 1\. "):
        lab.fit(Learner(), found)
    assert found.baselines == {"three": pytest.approx(1 / 3)}


def test_batches_that_are_no_pairs_need_a_function(lab):
    found = RelapseGuard({"a": FIRST}, BinaryAccuracy(), tolerance=0.0)
    with pytest.raises(ConfigurationError, match="expected a pair of inputs and targets, got list"):
        lab.fit(lab.Module(lab.hybrid()), found)


def test_modules_without_forward_need_a_function(lab):
    pairs = [(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int))]
    found = RelapseGuard({"a": pairs}, BinaryAccuracy(), tolerance=0.0)
    with pytest.raises(ConfigurationError, match=r"Module: expected a module with a forward"):
        lab.fit(lab.Module(lab.hybrid()), found)


def test_refuses_to_guard_nothing():
    with pytest.raises(ConfigurationError, match="expected a forget set or more, got none"):
        RelapseGuard({}, BinaryAccuracy(), tolerance=0.0)


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1, "limit": 0.2}])
def test_refuses_both_and_neither_of_tolerance_and_limit(options):
    with pytest.raises(ConfigurationError, match="expected either a tolerance or a limit, got"):
        RelapseGuard({"a": FIRST}, BinaryAccuracy(), **options)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_refuses_tolerances_below_zero(tolerance):
    with pytest.raises(ConfigurationError, match="expected a tolerance of 0 or more, got"):
        RelapseGuard({"a": FIRST}, BinaryAccuracy(), tolerance=tolerance)


def test_refuses_metrics_that_fall_with_what_is_known():
    with pytest.raises(ConfigurationError, match="got MeanSquaredError, which falls"):
        RelapseGuard({"a": FIRST}, MeanSquaredError(), tolerance=0.0)


def test_key_carries_the_request():
    assert relapse_key("a/b") == "relapse/a/b"
