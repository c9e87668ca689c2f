"""An interrupted run and its continuation are the uninterrupted run, wherever the cut was made."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.metering import Counts


class PowerCutError(RuntimeError):
    pass


class Cut(pl.Callback):
    """Saves after a batch, last as Lightning's checkpoints do, and ends the run."""

    def __init__(self, path, batch):
        self.path, self.batch, self.seen = path, batch, 0

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)
            raise PowerCutError


class Run:
    """A run that writes something in every second batch; each has a ledger and a model."""

    def __init__(self, lab, kind=None, **options):
        self.lab, self.ledger = lab, al.Ledger()
        self.module = (kind or lab.Restartable)(lab.tiny())
        self.options = {"sizes": (4, 2), "batches": 5, "max_epochs": 2, **options}
        meters = (PulseCounter(self.ledger), EnergyMeter(lab.fake, self.ledger))
        self.callbacks = (*meters, self.Writer(self.ledger), FrozenGuard(1))

    class Writer(pl.Callback):
        def __init__(self, ledger):
            self.ledger = ledger

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 2:
                counts = Counts({"set_pulses": batch_idx, "verify_reads": 7})
                self.ledger.add(counts, phase="reprogram", layer="1")

    def fit(self, *more, **options):
        trainer = self.lab.fit(self.module, *self.callbacks, *more, **self.options | options)
        return trainer.memory.logged

    def fit_until(self, batch):
        """Rows until the cut, and what was saved then."""
        path, rows = self.lab.folder / f"{batch}.ckpt", []

        class Keep(pl.Callback):
            def on_exception(self, trainer, *_):
                rows.extend(trainer.memory.logged)

        with pytest.raises(PowerCutError):
            self.fit(Keep(), Cut(path, batch))
        return rows, path

    def adapters(self):
        return [p for p in self.module.parameters() if p.requires_grad]


WAYS = {
    "a step in each batch": {},
    "a step in three batches": {"accumulate_grad_batches": 3},
    "validation in between": {"validation": 2, "val_check_interval": 4},
    "validation while gradients accumulate": {
        "accumulate_grad_batches": 3,
        "validation": 1,
        "val_check_interval": 4,
    },
}


def assert_same(lab, batch, kind=None, **options):
    through, first, second = (Run(lab, kind, **options) for _ in range(3))
    rows = through.fit()
    before, path = first.fit_until(batch)
    after = second.fit(resume=path)
    assert before + after == rows
    assert second.ledger.state_dict() == through.ledger.state_dict()
    assert all(map(torch.equal, second.adapters(), through.adapters()))
    assert al.fingerprint(second.module) == al.fingerprint(through.module)


# With validation every four batches of five, it is due after the fourth and the ninth.
CUTS = [
    (way, batch)
    for way, options in WAYS.items()
    for batch in range(1, 11)
    if "validation" not in options or batch not in (4, 9)
]


@pytest.mark.parametrize(("way", "batch"), CUTS)
def test_wherever_it_is_cut(lab, way, batch):
    assert_same(lab, batch, **WAYS[way])


@pytest.mark.parametrize("way", ["validation in between", "validation while gradients accumulate"])
@pytest.mark.parametrize("batch", [4, 9])
def test_cut_between_a_batch_and_its_validation(lab, way, batch):
    """Lightning 2.6.6 does without that validation; everything else is the same."""
    through, first, second = (Run(lab, **WAYS[way]) for _ in range(3))
    rows = through.fit()
    before, path = first.fit_until(batch)
    after = second.fit(resume=path)
    for row in before + after + rows:
        del row["energy_total_j"]
    assert before + after == rows
    assert through.ledger.phases() == ("train", "reprogram", "validate")
    for phase in ("train", "reprogram"):
        found, expected = second.ledger.by_layer(phase), through.ledger.by_layer(phase)
        assert found == {layer: expected[layer] for layer in found}
    validated = [run.ledger.total(phase="validate")["tile_reads"] for run in (second, through)]
    assert validated[0] == validated[1] / 2 > 0


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
def test_with_optimisers_stepped_by_hand(lab, batch):
    class Third(lab.TwoOptimizers):
        def __init__(self, model):
            super().__init__(model, every=3)

    assert_same(lab, batch, Third)


def test_cut_twice(lab):
    through, first, second, third = (Run(lab, accumulate_grad_batches=3) for _ in range(4))
    rows = through.fit()
    before, path = first.fit_until(2)
    between = []

    class Keep(pl.Callback):
        def on_exception(self, trainer, *_):
            between.extend(trainer.memory.logged)

    again = lab.folder / "again.ckpt"
    with pytest.raises(PowerCutError):
        second.fit(Keep(), Cut(again, 5), resume=path)
    assert before + between + third.fit(resume=again) == rows
    assert third.ledger.state_dict() == through.ledger.state_dict()


def test_state_is_plain_and_holds_the_open_step(lab):
    run = Run(lab, accumulate_grad_batches=3)
    _, path = run.fit_until(2)
    stored = torch.load(path, weights_only=True)["callbacks"]
    assert stored["EnergyMeter"] == {
        "ledger": run.ledger.state_dict(),
        "open": {
            event: {"count": count, "level": "exact"}
            for event, count in sorted(run.ledger.total().items())
            if event != "optimizer_updates"
        },
    }
    assert stored["EnergyMeter"]["open"]["tile_reads"]["count"] == 12
    assert stored["PulseCounter"] == {
        "ledger": run.ledger.state_dict(),
        "open": {
            "set_pulses": {"count": 1, "level": "exact"},
            "verify_reads": {"count": 7, "level": "exact"},
        },
        "pulses": {"seed": 0, "updates": 0},
    }


def test_what_happens_before_a_run_is_resumed_belongs_to_no_step(lab):
    """A script that programs again before it resumes: the checkpoint's ledger is what counts."""
    first = Run(lab, accumulate_grad_batches=3)
    _, path = first.fit_until(2)
    second = Run(lab, accumulate_grad_batches=3)
    second.ledger.add(Counts({"set_pulses": 999}), phase="program", layer="0")

    class Late(pl.Callback):
        def on_fit_start(self, *_):
            second.ledger.add(Counts({"set_pulses": 1000}), phase="late", layer="0")

    rows = second.fit(Late(), resume=path, max_epochs=1)
    # batches 1 and 3 have written 1 and 3
    assert [row["set_pulses"] for row in rows] == [1, 3]
    assert rows[-1]["pulses_total"] == 1004


def test_a_fit_after_a_resumed_one_begins_anew(lab):
    _, path = Run(lab, accumulate_grad_batches=3).fit_until(2)
    run = Run(lab, accumulate_grad_batches=3)
    run.fit(resume=path)
    assert run.fit(batches=2, max_epochs=1)[0]["energy_j/forward"] == 2 * 16


def test_checkpoints_of_weights_only_train_as_others_and_hold_no_counts(lab):
    run, plain = Run(lab), Run(lab)
    saving = ModelCheckpoint(lab.folder / "weights", save_weights_only=True, every_n_train_steps=1)
    rows = run.fit(saving, enable_checkpointing=True)
    assert rows == plain.fit()
    stored = torch.load(saving.best_model_path, weights_only=True)
    assert "callbacks" not in stored


# With this callback Lightning 2.6.6 resumes from the last checkpoint, unasked, if there is one.
@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_checkpoint_on_an_exception_holds_the_work_of_the_broken_batch(lab):
    """It was done, so it is paid for: in the next step, which is that of the fourth batch."""

    class Broken(lab.Restartable):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2 and self.breaks:
                raise PowerCutError
            return loss

    first, second = Run(lab, Broken, max_epochs=1), Run(lab, Broken, max_epochs=1)
    first.module.breaks, second.module.breaks = True, False
    with pytest.raises(PowerCutError):
        first.fit(OnExceptionCheckpoint(lab.folder / "broken"), enable_checkpointing=True)
    rows = second.fit(resume=lab.folder / "broken" / "on_exception.ckpt")
    assert [row["energy_j/forward"] for row in rows] == [32, 16]
    assert [row["energy_j/backward"] for row in rows] == [28, 28]


def test_draws_of_training_in_place_go_on(lab):
    from aihwkit.nn import AnalogLinear
    from aihwkit.optim import AnalogSGD
    from aihwkit.simulator.configs import SingleRPUConfig

    from aihwkit_lora.metering.step_meter import PulsesPerStep

    layer = AnalogLinear(3, 2, rpu_config=SingleRPUConfig())
    optimizer = AnalogSGD(layer.parameters(), lr=0.1)

    def steps(meter, seeds):
        meter.start(layer)
        values = []
        for seed in seeds:
            layer(torch.full((4, 3), 0.1 * seed)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(meter.end_batch())
        meter.finish()
        return values

    through = steps(PulsesPerStep(al.Ledger(), seed=3), range(1, 7))
    first, second = (PulsesPerStep(al.Ledger(), seed=3) for _ in range(2))
    before = steps(first, range(1, 4))
    second.load_state_dict(first.state_dict())
    assert before + steps(second, range(4, 7)) == through
    assert all(values["pulses"] > 0 for values in through)
