"""What PulseCounter and EnergyMeter log, compared in full with the ledger."""

from __future__ import annotations

import csv

import pytest
import pytorch_lightning as pl
import torch

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.metering import Counts

# Parameters of the three adapters: rank 2 times (inputs + outputs).
ADAPTER = 2 * ((6 + 5) + (5 + 4) + (4 + 3))


class Snapshots(pl.Callback):
    """Totals of the ledger before training and after each batch, all phases apart."""

    def __init__(self, ledger):
        self.ledger, self.totals = ledger, []

    def _take(self):
        phases = ("program", "train", "validate")
        self.totals.append({phase: self.ledger.total(phase=phase) for phase in phases})

    def on_train_start(self, *_):
        self._take()

    def on_train_batch_end(self, *_):
        self._take()

    def steps(self, phase="train"):
        pairs = zip(self.totals, self.totals[1:], strict=False)
        return [after[phase].minus(before[phase]) for before, after in pairs]

    def sums(self):
        return [Counts.sum(total.values()) for total in self.totals[1:]]


def single(value):
    """The value as Lightning keeps it: in single precision."""
    return float(torch.tensor(float(value)))


def expected(steps, sums, chip, epochs):
    found = []
    for number, (step, total, epoch) in enumerate(zip(steps, sums, epochs, strict=True)):
        cost, whole = al.price(step, chip), al.price(total, chip)
        values = {
            "pulses": step["set_pulses"] + step["reset_pulses"],
            "set_pulses": step["set_pulses"],
            "reset_pulses": step["reset_pulses"],
            "verify_reads": step["verify_reads"],
            "pulses_total": total["set_pulses"] + total["reset_pulses"],
            "energy_j": cost.energy_j.value,
            "latency_s": cost.latency_s.value,
            "energy_total_j": whole.energy_j.value,
        }
        logged = {name: single(value) for name, value in values.items()}
        found.append({"step": number, "epoch": epoch, **logged})
    return found


def test_hybrid_model_logs_the_ledgers_differences_and_no_pulse(lab):
    ledger = al.Ledger()
    snapshots = Snapshots(ledger)
    trainer = lab.fit(
        lab.Module(lab.hybrid()),
        EnergyMeter(lab.chip, ledger), PulseCounter(ledger), snapshots,
        max_epochs=2,
    )  # fmt: skip
    steps = snapshots.steps()
    wanted = expected(steps, snapshots.sums(), lab.chip, [0, 0, 0, 1, 1, 1])
    assert trainer.memory.logged == wanted
    assert all(row["pulses"] == row["pulses_total"] == 0 for row in wanted)
    assert all(row["energy_j"] > 0 and row["latency_s"] > 0 for row in wanted)
    for step in steps:
        assert step["tile_reads"] == 3 * lab.batch
        assert step["optimizer_updates"] == ADAPTER
        assert step["forward_macs"] == ADAPTER * lab.batch


def test_written_arrays_log_their_pulses(lab):
    ledger, model = al.Ledger(), lab.hybrid()
    snapshots = Snapshots(ledger)

    def write():
        al.reprogram_(model, lab.chip, ledger=ledger, phase="train", seed=0)

    trainer = lab.fit(
        lab.Module(model, after_step=write),
        EnergyMeter(lab.chip, ledger), PulseCounter(ledger), snapshots,
    )  # fmt: skip
    wanted = expected(snapshots.steps(), snapshots.sums(), lab.chip, [0, 0, 0])
    assert trainer.memory.logged == wanted
    assert all(row["pulses"] > 0 and row["verify_reads"] > 0 for row in wanted)
    assert wanted[-1]["pulses_total"] == sum(row["pulses"] for row in wanted)


def test_programming_before_training_is_in_the_totals_and_in_no_step(lab):
    ledger = al.Ledger()
    ledger.add(Counts({"set_pulses": 1000, "verify_reads": 50}), phase="program", layer="0")
    trainer = lab.fit(lab.Module(lab.hybrid()), EnergyMeter(lab.chip, ledger), PulseCounter(ledger))
    rows = trainer.memory.logged
    assert [row["pulses"] for row in rows] == [0, 0, 0]
    assert [row["verify_reads"] for row in rows] == [0, 0, 0]
    assert [row["pulses_total"] for row in rows] == [1000, 1000, 1000]
    before = al.price(ledger.total(phase="program"), lab.chip).energy_j.value
    assert rows[0]["energy_total_j"] == pytest.approx(before + rows[0]["energy_j"], rel=1e-6)
    assert rows[0]["energy_j"] < before


def test_csv_holds_the_same_names_and_values(lab):
    ledger = al.Ledger()
    trainer = lab.fit(lab.Module(lab.hybrid()), EnergyMeter(lab.chip, ledger), PulseCounter(ledger))
    (file,) = lab.folder.rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines:
        stored = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    assert stored == trainer.memory.logged


def test_progress_bar_shows_pulses_and_energy_of_the_step(lab):
    ledger = al.Ledger()
    trainer = lab.fit(lab.Module(lab.hybrid()), EnergyMeter(lab.chip, ledger), PulseCounter(ledger))
    shown, last = trainer.progress_bar_metrics, trainer.memory.logged[-1]
    assert shown == {"energy_j": last["energy_j"], "pulses": 0.0}


def test_validation_has_a_phase_of_its_own_and_belongs_to_no_step(lab):
    ledger = al.Ledger()
    snapshots = Snapshots(ledger)
    meter = EnergyMeter(lab.chip, ledger)
    trainer = lab.fit(
        lab.Module(lab.hybrid()), meter, PulseCounter(ledger), snapshots,
        validation=4, val_check_interval=1, max_epochs=2,
    )  # fmt: skip
    epochs = [0, 0, 0, 1, 1, 1]
    wanted = expected(snapshots.steps(), snapshots.sums(), lab.chip, epochs)
    assert [row for row in trainer.memory.logged if "pulses" in row] == wanted
    assert ledger.phases() == ("train", "validate")
    assert ledger.total(phase="train")["tile_reads"] == 6 * 3 * lab.batch
    assert ledger.total(phase="validate")["tile_reads"] == 6 * 4 * 3 * lab.batch
    assert ledger.total(phase="validate")["transposed_tile_reads"] == 0
    assert ledger.total(phase="validate")["optimizer_updates"] == 0


def test_phases_carry_the_names_they_are_given(lab):
    ledger = al.Ledger()
    meter = EnergyMeter(lab.chip, ledger, phase="unlearn", validation_phase="check")
    lab.fit(lab.Module(lab.hybrid()), meter, validation=1)
    assert ledger.phases() == ("unlearn", "check")


def test_steps_of_accumulated_batches_add_up_to_the_ledger(lab):
    ledger = al.Ledger()
    trainer = lab.fit(
        lab.Module(lab.hybrid()), EnergyMeter(lab.chip, ledger), PulseCounter(ledger),
        batches=6, accumulate_grad_batches=2,
    )  # fmt: skip
    total = ledger.total(phase="train")
    assert total["optimizer_updates"] == 3 * ADAPTER
    assert total["tile_reads"] == 6 * 3 * lab.batch
    rows = trainer.memory.logged
    assert [row["step"] for row in rows] == [0, 1, 2]
    energy = al.price(total, lab.chip).energy_j.value
    assert sum(row["energy_j"] for row in rows) == pytest.approx(energy, rel=1e-6)
    assert rows[-1]["energy_total_j"] == single(energy)
