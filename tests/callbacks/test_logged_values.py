"""Every call of a logger, in full, for two small layers on a chip with round prices.

Layers of 4 × 2 and 2 × 2 weights on arrays of 2 × 2, adapters of rank 1, batches of two vectors. A
batch costs, in joules:

* forwards 16: 6 tile reads at 1, 20 MACs at 0.5
* backwards 28: 2 tile reads at 10, 12 + 20 MACs at 0.25

and a step 20 more: 10 parameters at 2. It takes 4 s forwards and 2 · 2 s backwards.
"""

from __future__ import annotations

import csv

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.metering import Counts

NO_PULSES = {
    "pulses": 0.0,
    "set_pulses": 0.0,
    "reset_pulses": 0.0,
    "verify_reads": 0.0,
    "pulsed_cells": 0.0,
    "failed_cells": 0.0,
    "pulses_total": 0.0,
}
ENERGY = {
    "energy_j": 64.0,
    "energy_j/write": 0.0,
    "energy_j/forward": 16.0,
    "energy_j/backward": 28.0,
    "energy_j/optimizer": 20.0,
    "energy_j/transfer": 0.0,
    "energy_j/analog": 26.0,
    "energy_j/digital": 38.0,
    "energy_j/memory": 0.0,
    "latency_s": 8.0,
    "latency_s/write": 0.0,
    "latency_s/forward": 4.0,
    "latency_s/backward": 4.0,
    "latency_s/optimizer": 0.0,
    "latency_s/transfer": 0.0,
    "energy_total_j": 64.0,
    "unpriced_events": 0.0,
}
STEP = {"step": 0, "optimizer_steps": 1.0, **NO_PULSES, **ENERGY}
THREE_BATCHES = {
    "energy_j": 152.0,
    "energy_j/forward": 48.0,
    "energy_j/backward": 84.0,
    "energy_j/analog": 78.0,
    "energy_j/digital": 74.0,
    "latency_s": 24.0,
    "latency_s/forward": 12.0,
    "latency_s/backward": 12.0,
}
TWO_BATCHES = {
    "energy_j": 108.0,
    "energy_j/forward": 32.0,
    "energy_j/backward": 56.0,
    "energy_j/analog": 52.0,
    "energy_j/digital": 56.0,
    "latency_s": 16.0,
    "latency_s/forward": 8.0,
    "latency_s/backward": 8.0,
}
WRITTEN = Counts(
    {
        "set_pulses": 3,
        "reset_pulses": 1,
        "verify_reads": 5,
        "pulsed_cells": 2,
        "failed_cells": 1,
        "set_slots": 2,
    }
)
OF_WRITTEN = {
    "pulses": 4.0,
    "set_pulses": 3.0,
    "reset_pulses": 1.0,
    "verify_reads": 5.0,
    "pulsed_cells": 2.0,
    "failed_cells": 1.0,
    "energy_j": 584.0,
    "energy_j/write": 520.0,
    "energy_j/analog": 546.0,
    "latency_s": 136.0,
    "latency_s/write": 128.0,
}


def meters(lab, ledger, **phases):
    return PulseCounter(ledger), EnergyMeter(lab.fake, ledger, **phases)


def test_one_batch_per_step(lab):
    ledger = al.Ledger()
    trainer = lab.fit(lab.Module(lab.tiny()), *meters(lab, ledger), sizes=(4, 2))
    assert trainer.memory.logged == [
        STEP,
        STEP | {"step": 1, "energy_total_j": 128.0},
        STEP | {"step": 2, "energy_total_j": 192.0},
    ]
    assert list(trainer.memory.logged[0]) == list(STEP)


def test_three_batches_per_step(lab):
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, al.Ledger()),
        sizes=(4, 2), batches=5, max_epochs=2, accumulate_grad_batches=3,
    )  # fmt: skip
    assert trainer.memory.logged == [
        STEP | THREE_BATCHES | {"energy_total_j": 152.0},
        STEP | TWO_BATCHES | {"step": 1, "energy_total_j": 260.0},
        STEP | THREE_BATCHES | {"step": 2, "energy_total_j": 412.0},
        STEP | TWO_BATCHES | {"step": 3, "energy_total_j": 520.0},
    ]


def test_two_optimisers_stepped_by_hand(lab):
    trainer = lab.fit(
        lab.TwoOptimizers(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2), batches=2
    )
    assert trainer.memory.logged == [
        STEP | {"optimizer_steps": 2.0},
        STEP | {"step": 1, "optimizer_steps": 2.0, "energy_total_j": 128.0},
    ]


def test_batches_without_a_step_log_nothing_in_manual_optimisation(lab):
    class Logging(lab.TwoOptimizers):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("batch", float(batch_idx))

    trainer = lab.fit(
        Logging(lab.tiny(), every=3), *meters(lab, al.Ledger()), sizes=(4, 2), batches=7
    )
    own = [row for row in trainer.memory.logged if "batch" not in row]
    assert own == [
        STEP | THREE_BATCHES | {"step": 2, "optimizer_steps": 2.0, "energy_total_j": 152.0},
        STEP | THREE_BATCHES | {"step": 5, "optimizer_steps": 2.0, "energy_total_j": 304.0},
    ]
    # The numbers of Lightning's own rows.
    assert [row["step"] for row in trainer.memory.logged if "batch" in row] == list(range(7))


def test_one_optimiser_stepped_twice_and_around_lightning(lab):
    """Neither raises global_step as an optimiser of Lightning's does."""

    class Raw(lab.TwoOptimizers):
        def training_step(self, batch, batch_idx):
            self.manual_backward(lab.Module.training_step(self, batch, batch_idx))
            first, _ = self.optimizers(use_pl_optimizer=False)
            first.step()
            first.step()

    trainer = lab.fit(Raw(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2), batches=1)
    updates = {  # of 6 of the 10 parameters, twice
        "energy_j": 68.0,
        "energy_j/optimizer": 24.0,
        "energy_j/digital": 42.0,
        "energy_total_j": 68.0,
    }
    assert trainer.memory.logged == [STEP | {"optimizer_steps": 2.0} | updates]


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_step_without_a_loss_costs_nothing_and_is_a_step(lab):
    class Skipping(lab.Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    trainer = lab.fit(Skipping(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2))
    nothing = dict.fromkeys(ENERGY, 0.0) | {"energy_total_j": 64.0}
    assert trainer.memory.logged == [
        STEP,
        STEP | nothing | {"step": 1},
        STEP | {"step": 2, "energy_total_j": 128.0},
    ]


def test_a_module_that_leaves_steps_out_logs_those_it_takes(lab):
    class Leaving(lab.Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx % 2:
                optimizer.step(closure)
            else:
                closure()

    trainer = lab.fit(Leaving(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2), batches=4)
    # Lightning's number counts what it asked for.
    assert trainer.memory.logged == [
        STEP | TWO_BATCHES | {"step": 1, "energy_total_j": 108.0},
        STEP | TWO_BATCHES | {"step": 3, "energy_total_j": 216.0},
    ]


def test_validation_in_between_has_a_phase_of_its_own(lab):
    ledger = al.Ledger()
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, ledger), sizes=(4, 2), batches=4, validation=2,
        val_check_interval=1, accumulate_grad_batches=2, num_sanity_val_steps=1,
    )  # fmt: skip
    assert trainer.memory.logged == [
        STEP | TWO_BATCHES | {"energy_total_j": 108.0 + 32.0},
        STEP | TWO_BATCHES | {"step": 1, "energy_total_j": 2 * 108.0 + 3 * 32.0},
    ]
    assert ledger.phases() == ("train", "validate")
    assert ledger.total(phase="validate")["tile_reads"] == 4 * 2 * 6
    assert ledger.total(phase="validate")["transposed_tile_reads"] == 0


class Writer(pl.Callback):
    """Adds to the ledger what writing an array would add, in the batch of a number."""

    def __init__(self, ledger, batch, phase="reprogram"):
        self.ledger, self.batch, self.phase = ledger, batch, phase

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.ledger.add(WRITTEN, phase=self.phase, layer="0")


@pytest.mark.parametrize("phase", ["reprogram", "train", "validate"])
def test_arrays_written_in_a_step(lab, phase):
    ledger = al.Ledger()
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, ledger), Writer(ledger, 1, phase), sizes=(4, 2)
    )
    assert trainer.memory.logged == [
        STEP,
        STEP | OF_WRITTEN | {"step": 1, "pulses_total": 4.0, "energy_total_j": 648.0},
        STEP | {"step": 2, "pulses_total": 4.0, "energy_total_j": 712.0},
    ]


def test_arrays_written_in_a_batch_without_a_step_belong_to_the_next_step(lab):
    ledger = al.Ledger()
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, ledger), Writer(ledger, 0),
        sizes=(4, 2), batches=2, accumulate_grad_batches=2,
    )  # fmt: skip
    expected = STEP | TWO_BATCHES | OF_WRITTEN | {"pulses_total": 4.0, "energy_total_j": 628.0}
    with_reads = {"energy_j": 628.0, "energy_j/analog": 572.0, "latency_s": 144.0}
    assert trainer.memory.logged == [expected | with_reads]


@pytest.mark.parametrize("before", [0, 1])
def test_programming_before_training_is_in_the_totals_and_in_no_step(lab, before):
    ledger = al.Ledger()
    callbacks = meters(lab, ledger)
    for _ in range(before + 1):
        ledger.add(WRITTEN, phase="program", layer="0")
    trainer = lab.fit(lab.Module(lab.tiny()), *callbacks, sizes=(4, 2), batches=1)
    pulses, joules = 4.0 * (before + 1), 520.0 * (before + 1)
    assert trainer.memory.logged == [
        STEP | {"pulses_total": pulses, "energy_total_j": 64.0 + joules}
    ]


class BrokenError(RuntimeError):
    pass


def test_an_exception_in_a_step_keeps_what_was_counted(lab):
    ledger = al.Ledger()
    memory = []

    class Broken(lab.Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                memory.extend(self.trainer.memory.logged)
                raise BrokenError("in a step")
            return loss

    with pytest.raises(BrokenError, match="in a step"):
        lab.fit(Broken(lab.tiny()), *meters(lab, ledger), sizes=(4, 2))
    assert memory == [STEP, STEP | {"step": 1, "energy_total_j": 128.0}]
    total = ledger.total(phase="train")
    # The third batch went forwards only.
    assert (total["tile_reads"], total["transposed_tile_reads"]) == (18, 4)
    assert total["optimizer_updates"] == 20
    assert al.price(ledger.total(), lab.fake).energy_j.value == 128.0 + 16.0


def test_the_last_step_of_max_steps_is_logged(lab):
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, al.Ledger()),
        sizes=(4, 2), batches=9, max_steps=2, max_epochs=-1, accumulate_grad_batches=3,
    )  # fmt: skip
    assert trainer.memory.logged == [
        STEP | THREE_BATCHES | {"energy_total_j": 152.0},
        STEP | THREE_BATCHES | {"step": 1, "energy_total_j": 304.0},
    ]


def test_two_fits_count_steps_from_each_start(lab):
    ledger, module = al.Ledger(), lab.Module(lab.tiny())
    callbacks = meters(lab, ledger)
    # One batch of three is left over, and belongs to no step.
    first = lab.fit(module, *callbacks, sizes=(4, 2), batches=3, max_steps=1, max_epochs=-1)
    ledger.add(WRITTEN, phase="between", layer="0")
    second = lab.fit(module, *callbacks, sizes=(4, 2), batches=1)
    assert first.memory.logged == [STEP]
    assert second.memory.logged == [STEP | {"pulses_total": 4.0, "energy_total_j": 648.0}]


def test_each_meter_logs_its_own_rows_without_the_other(lab):
    pulses = lab.fit(lab.Module(lab.tiny()), meters(lab, al.Ledger())[0], sizes=(4, 2), batches=1)
    energy = lab.fit(lab.Module(lab.tiny()), meters(lab, al.Ledger())[1], sizes=(4, 2), batches=1)
    assert pulses.memory.logged == [{"step": 0, "optimizer_steps": 1.0, **NO_PULSES}]
    assert energy.memory.logged == [{"step": 0, "optimizer_steps": 1.0, **ENERGY}]


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(("every", "logged"), [(2, [1, 3]), (3, [2]), (50, []), (0, [])])
def test_rows_come_as_often_as_the_trainer_logs(lab, every, logged):
    class Logging(lab.Module):
        def training_step(self, batch, batch_idx):
            self.log("batch", float(batch_idx))
            return super().training_step(batch, batch_idx)

    trainer = lab.fit(
        Logging(lab.tiny()), *meters(lab, al.Ledger()),
        sizes=(4, 2), batches=5, log_every_n_steps=every,
    )  # fmt: skip
    rows = trainer.memory.logged
    assert [row["step"] for row in rows if "pulses" in row] == logged
    assert [row["step"] for row in rows if "batch" in row] == logged


def test_phases_carry_the_names_they_are_given(lab):
    ledger = al.Ledger()
    phases = {"phase": "unlearn:person 2", "validation_phase": "check"}
    lab.fit(lab.Module(lab.tiny()), *meters(lab, ledger, **phases), sizes=(4, 2), validation=1)
    assert ledger.phases() == ("unlearn:person 2", "check")


def test_the_phase_may_change_between_batches(lab):
    ledger = al.Ledger()
    counter, meter = meters(lab, ledger, phase="continual:task 0")

    class NextTask(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for callback in (counter, meter):
                callback.phase = f"continual:task {batch_idx // 2}"

    trainer = lab.fit(
        lab.Module(lab.tiny()), NextTask(), counter, meter,
        sizes=(4, 2), batches=4, accumulate_grad_batches=4,
    )  # fmt: skip
    assert meter.phase == counter.phase == "continual:task 1"
    assert ledger.phases() == ("continual:task 0", "continual:task 1")
    assert [ledger.total(phase=phase)["tile_reads"] for phase in ledger.phases()] == [12, 12]
    (row,) = trainer.memory.logged
    assert row["energy_j"] == row["energy_total_j"] == 4 * 44.0 + 20.0


def test_work_under_other_phases_is_in_the_total_only(lab):
    ledger = al.Ledger()

    class Probing(pl.Callback):
        def on_train_batch_end(self, *_):
            ledger.add(Counts({"tile_reads": 1000}), phase="drift", layer="0")

    trainer = lab.fit(
        lab.Module(lab.tiny()), Probing(), *meters(lab, ledger), sizes=(4, 2), batches=1
    )
    assert trainer.memory.logged == [STEP | {"energy_total_j": 1064.0}]


# ------------------------------------------------------------------ loggers


def test_csv_holds_the_same_names_and_values(lab):
    trainer = lab.fit(lab.Module(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2))
    (file,) = lab.folder.rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines:
        stored = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    assert stored == trainer.memory.logged


def test_tensorboard_holds_the_same_names_and_values(lab):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(lab.folder, version="board")
    lab.fit(
        lab.Module(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2), batches=2, loggers=[logger]
    )
    events = reader.EventAccumulator(logger.log_dir)
    events.Reload()
    stored = {
        key: [(e.step, e.value) for e in events.Scalars(key)] for key in STEP.keys() - {"step"}
    }
    expected = {key: [(0, value), (1, value)] for key, value in STEP.items() if key != "step"}
    assert stored == expected | {"energy_total_j": [(0, 64.0), (1, 128.0)]}


def test_large_counts_reach_loggers_without_rounding(lab):
    ledger = al.Ledger()
    ledger.add(Counts({"set_pulses": 2**53 - 1}), phase="program", layer="0")
    trainer = lab.fit(lab.Module(lab.tiny()), PulseCounter(ledger), sizes=(4, 2), batches=1)
    assert trainer.memory.logged[0]["pulses_total"] == 2**53 - 1
    assert trainer.callback_metrics["pulses_total"].item() == 2**53 - 1


def test_progress_bar_shows_pulses_and_microjoules_and_loggers_do_not(lab):
    trainer = lab.fit(lab.Module(lab.tiny()), *meters(lab, al.Ledger()), sizes=(4, 2))
    assert trainer.progress_bar_metrics == {"pulses": 0.0, "energy_uj": 64e6}
    assert "energy_uj" not in trainer.memory.logged[-1]


def test_values_are_metrics_that_other_callbacks_can_watch(lab):
    budget = EarlyStopping(
        "energy_total_j", patience=99, divergence_threshold=400.0, check_on_train_epoch_end=True
    )
    trainer = lab.fit(
        lab.Module(lab.tiny()), *meters(lab, al.Ledger()), budget, sizes=(4, 2), max_epochs=9
    )
    # 3 · 64 J an epoch
    assert trainer.current_epoch == 3
    watched = {key: value.item() for key, value in trainer.callback_metrics.items()}
    last = STEP | {"energy_total_j": 576.0}
    assert watched == {key: value for key, value in last.items() if key != "step"}
