"""RunReporter: literal stages on a chip with round prices, after finished and broken fits.

A step of the tiny model costs 64 J; see test_logged_values.py. Validation is no part of it.
"""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter
from aihwkit_lora.callbacks.run_reporter import RunReporter
from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.metering import Counts
from aihwkit_lora.recipes.cli import main
from aihwkit_lora.reporting import RunReport, StepRecord, environment

STEP_COUNTS = {
    "tile_reads": 6,
    "transposed_tile_reads": 2,
    "forward_macs": 20,
    "input_gradient_macs": 12,
    "weight_gradient_macs": 20,
    "optimizer_updates": 10,
}
ADAPTERS = 10


class Scored(pl.Callback):
    """Gives the metrics of a module that evaluates itself, one that is no number among them."""

    def on_validation_epoch_end(self, trainer, pl_module):
        values = {"retain_accuracy": 0.5 + trainer.global_step / 16, "broken": torch.nan}
        pl_module.log_dict(values)


def steps(*energies, metrics=None, pulses=0):
    of_step = metrics or {}
    return tuple(
        StepRecord(step=step, energy_j=energy, pulses=pulses, metrics=of_step.get(step, {}))
        for step, energy in enumerate(energies, 1)
    )


class Bench:
    """Fits of the tiny model that report to one file."""

    def __init__(self, lab):
        self.lab, self.ledger, self.model = lab, al.Ledger(), lab.tiny()
        self.path = lab.folder / "run" / "report.json"

    def reporter(self, stage="forget", **options):
        options = {"phase": "unlearn", **options}
        return RunReporter(self.path, self.lab.fake, self.ledger, stage=stage, **options)

    def fit(self, reporter, *callbacks, after_step=lambda: None, **options):
        module = self.lab.Module(self.model, after_step=after_step)
        meter = EnergyMeter(self.lab.fake, self.ledger, phase=reporter.phase)
        return self.lab.fit(module, meter, *callbacks, reporter, sizes=(4, 2), **options)

    def stages(self, arm="hybrid"):
        return {stage.name: stage for stage in RunReport.read(self.path).arms[arm]}


@pytest.fixture
def bench(lab):
    return Bench(lab)


def fail_at(step):
    """An after_step that fails at one step of one fit."""
    taken = []

    def after_step():
        taken.append(1)
        if len(taken) == step:
            raise RuntimeError("power cut")

    return after_step


def test_a_fit_becomes_a_stage(bench):
    options = {"seed": 7, "recipe": "faces", "config": {"rank": 1}}
    bench.fit(bench.reporter(**options), Scored(), validation=1, val_check_interval=2, batches=4)
    report = RunReport.read(bench.path)
    assert (report.recipe, report.chip, report.seed) == ("faces", "fake", 7)
    assert report.config == {"rank": 1}
    assert report.environment == environment()
    (stage,) = report.arms["hybrid"]
    assert stage.name == "forget"
    assert {event: stage.counts[event] for event in STEP_COUNTS} == {
        event: 4 * count for event, count in STEP_COUNTS.items()
    }
    assert stage.counts == bench.ledger.total(phase="unlearn")
    assert (stage.energy.energy_j.value, stage.energy.latency_s.value) == (256.0, 32.0)
    assert stage.metrics == {"retain_accuracy": 0.75}
    metrics = {2: {"retain_accuracy": 0.625}, 4: {"retain_accuracy": 0.75}}
    assert stage.steps == steps(64.0, 64.0, 64.0, 64.0, metrics=metrics)
    assert stage.trainable_parameters == ADAPTERS
    assert stage.fingerprint == al.fingerprint(bench.model)
    assert stage.wall_s > 0.0
    assert stage.interrupted == ""


def test_stage_of_a_finished_fit_has_the_layout_of_all_stages(bench):
    bench.fit(bench.reporter())
    (stage,) = json.loads(bench.path.read_text())["arms"]["hybrid"]["stages"]
    assert "interrupted" not in stage


def test_accumulated_batches_are_one_step(bench):
    bench.fit(bench.reporter(), batches=5, accumulate_grad_batches=3)
    assert bench.stages()["forget"].steps == steps(152.0, 108.0)


def test_steps_of_two_optimisers_in_a_batch_are_one_record(bench, lab):
    module = lab.TwoOptimizers(bench.model)
    meter = EnergyMeter(lab.fake, bench.ledger, phase="unlearn")
    lab.fit(module, meter, bench.reporter(), sizes=(4, 2), batches=2)
    assert bench.stages()["forget"].steps == steps(64.0, 64.0)


def test_fits_of_one_run_go_to_one_file_and_count_apart(bench):
    bench.fit(bench.reporter(config={"a": 1}))
    bench.fit(bench.reporter("continue", phase="continual", config={"b": 2}), batches=2)
    bench.fit(bench.reporter("again", phase="continual"), batches=1)
    report = RunReport.read(bench.path)
    assert [stage.name for stage in report.arms["hybrid"]] == ["forget", "continue", "again"]
    assert [stage.energy.energy_j.value for stage in report.arms["hybrid"]] == [192.0, 128.0, 64.0]
    assert [len(stage.steps) for stage in report.arms["hybrid"]] == [3, 2, 1]
    assert report.config == {"a": 1, "b": 2}


def test_one_reporter_serves_a_second_fit_after_another_name(bench):
    reporter = bench.reporter()
    bench.fit(reporter)
    reporter.stage = "continue"
    bench.fit(reporter, batches=1)
    assert bench.stages()["continue"].steps == steps(64.0)
    assert bench.stages()["continue"].energy.energy_j.value == 64.0


def test_arms_stand_side_by_side(bench):
    bench.fit(bench.reporter())
    bench.fit(bench.reporter(arm="reprogram"), batches=1)
    assert bench.stages()["forget"].energy.energy_j.value == 192.0
    assert bench.stages("reprogram")["forget"].energy.energy_j.value == 64.0


def test_what_was_written_belongs_to_the_stage_whatever_its_phase(bench):
    bench.ledger.add(Counts({"set_pulses": 1000}), phase="program", layer="0")
    written = Counts({"set_pulses": 3, "reset_pulses": 1})

    def write():
        bench.ledger.add(written, phase="reprogram", layer="0")

    bench.fit(bench.reporter(), after_step=write)
    stage = bench.stages()["forget"]
    assert stage.steps == steps(564.0, 564.0, 564.0, pulses=4)
    assert (stage.pulses, stage.counts["set_pulses"]) == (12, 9)


def test_only_metrics_that_are_wanted_are_kept(bench):
    bench.fit(bench.reporter(metrics=["energy_j", "absent"]), Scored(), validation=1)
    assert bench.stages()["forget"].metrics == {"energy_j": 64.0}


def test_models_without_frozen_layers_have_no_fingerprint(lab, bench):
    lab.fit(lab.Module(nn.Linear(6, 3)), bench.reporter())
    stage = bench.stages()["forget"]
    assert (stage.fingerprint, stage.trainable_parameters) == ("", 21)
    assert stage.steps == steps(0.0, 0.0, 0.0)


def test_exception_leaves_an_interrupted_stage(bench):
    with pytest.raises(RuntimeError, match="power cut"):
        bench.fit(bench.reporter(), after_step=fail_at(3))
    stage = bench.stages()["forget"]
    assert stage.interrupted == "RuntimeError: power cut"
    assert stage.steps == steps(64.0, 64.0)
    assert stage.energy.energy_j.value == 192.0


def test_error_without_a_message_is_named(bench):
    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        bench.fit(bench.reporter(), after_step=stop)
    assert bench.stages()["forget"].interrupted == "StopError"


def test_error_after_the_last_step_leaves_an_interrupted_stage(bench):
    class Late(pl.Callback):
        def on_train_end(self, *_):
            raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        bench.fit(bench.reporter(), Late())
    assert bench.stages()["forget"].interrupted == "RuntimeError: too late"


def test_errors_outside_of_a_fit_write_nothing(bench):
    reporter = bench.reporter()
    trainer = bench.fit(reporter)
    before = bench.path.read_bytes()
    module = bench.lab.Module(bench.model)
    module.validation_step = lambda batch: fail_at(1)()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.validate(module, bench.lab.loader(1, 4, 2), verbose=False)
    assert bench.path.read_bytes() == before


def comparable(stage):
    return {key: value for key, value in stage.to_dict().items() if key != "wall_s"}


def test_resumed_fit_takes_the_place_of_the_interrupted_one(lab, bench):
    """In the middle of an epoch, and of a step of two batches."""

    def fit(bench, reporter, *callbacks, resume=None, after_step=lambda: None):
        module = lab.Restartable(bench.model, after_step=after_step)
        meter = EnergyMeter(lab.fake, bench.ledger, phase="unlearn")
        return lab.fit(
            module, meter, Scored(), *callbacks, reporter, sizes=(4, 2), batches=6, resume=resume,
            accumulate_grad_batches=2, validation=1, val_check_interval=2, max_epochs=2,
        )  # fmt: skip

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                trainer.save_checkpoint(lab.folder / "middle.ckpt")

    whole = Bench(lab)
    whole.path = lab.folder / "whole.json"
    fit(whole, whole.reporter())
    with pytest.raises(RuntimeError, match="power cut"):
        fit(bench, bench.reporter(), Save(), after_step=fail_at(6))
    broken = bench.stages()["forget"]
    assert broken.interrupted
    assert len(broken.steps) == 5

    resumed = Bench(lab)
    fit(resumed, resumed.reporter("other"))  # a stage that came in between
    resumed.ledger, resumed.model = al.Ledger(), lab.tiny()
    fit(resumed, resumed.reporter(), resume=lab.folder / "middle.ckpt")
    assert list(resumed.stages()) == ["forget", "other"]
    assert comparable(resumed.stages()["forget"]) == comparable(whole.stages()["forget"])
    assert resumed.stages()["forget"].wall_s > 0.0
    state = torch.load(lab.folder / "middle.ckpt", weights_only=True)["callbacks"]
    key = "RunReporter{'arm': 'hybrid', 'stage': 'forget'}"
    assert state[key]["energy_j"] == [108.0] * 4
    assert state[key]["open"]["tile_reads"] == {"count": 6, "level": "exact"}


def test_next_stage_may_start_from_the_checkpoint_of_the_last(bench):
    trainer = bench.fit(bench.reporter())
    trainer.save_checkpoint(bench.lab.folder / "one.ckpt")
    bench.ledger, bench.model = al.Ledger(), bench.lab.tiny()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        bench.fit(bench.reporter("continue"), resume=bench.lab.folder / "one.ckpt", max_epochs=2)
    assert bench.stages()["continue"].steps == steps(64.0, 64.0, 64.0)
    assert bench.stages()["continue"].energy.energy_j.value == 192.0


def test_resume_without_the_meter_is_refused_before_training(bench):
    bench.ledger.add(Counts({"set_pulses": 5}), phase="program", layer="0")
    trainer = bench.fit(bench.reporter())
    trainer.save_checkpoint(bench.lab.folder / "one.ckpt")
    bench.ledger, taken = al.Ledger(), []
    module = bench.lab.Module(bench.model, after_step=lambda: taken.append(1))
    refusal = "stage 'forget': expected the ledger of the checkpoint, got one that holds less"
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(ConfigurationError, match=refusal),
    ):
        bench.lab.fit(
            module, bench.reporter(), sizes=(4, 2), resume=bench.lab.folder / "one.ckpt",
            max_epochs=2,
        )  # fmt: skip
    assert taken == []


def test_finished_stage_is_kept_unless_told_otherwise(bench):
    bench.fit(bench.reporter())
    before, taken = bench.path.read_bytes(), []
    refusal = r"report.json: expected no finished stage 'forget' of arm 'hybrid' yet, got one"
    with pytest.raises(ConfigurationError, match=refusal):
        bench.fit(bench.reporter(), after_step=lambda: taken.append(1))
    assert (bench.path.read_bytes(), taken) == (before, [])
    bench.fit(bench.reporter(overwrite=True), batches=1)
    assert bench.stages()["forget"].steps == steps(64.0)


def test_finished_stage_may_be_trained_further(bench):
    trainer = bench.fit(bench.reporter())
    trainer.save_checkpoint(bench.lab.folder / "one.ckpt")
    bench.fit(bench.reporter(), resume=bench.lab.folder / "one.ckpt", max_epochs=2)
    assert bench.stages()["forget"].steps == steps(*[64.0] * 6)


def test_report_of_another_run_is_refused_before_training(bench):
    bench.fit(bench.reporter())
    taken, options = [], {"batches": 1}
    for name, value, found in (("seed", 3, 0), ("recipe", "faces", "'fit'")):
        with pytest.raises(ConfigurationError, match=f"expected a report of {name} .*{found}"):
            bench.fit(
                bench.reporter("b", **{name: value}), after_step=lambda: taken.append(1), **options
            )
    reporter = RunReporter(bench.path, bench.lab.chip, bench.ledger, stage="c", phase="unlearn")
    with pytest.raises(ConfigurationError, match="expected a report of chip 'rm-180nm', got one"):
        bench.fit(reporter)
    assert taken == []


def test_file_that_is_no_report_is_refused_before_training(bench):
    bench.path.parent.mkdir()
    bench.path.write_text("{}")
    with pytest.raises(DataError, match="expected a report of schema 1, got None"):
        bench.fit(bench.reporter())
    assert bench.path.read_text() == "{}"


def test_command_line_prints_it(bench, capsys):
    bench.fit(bench.reporter())
    with pytest.raises(RuntimeError, match="power cut"):
        bench.fit(bench.reporter("continue"), after_step=fail_at(2))
    assert main(["report", str(bench.path)]) == 0
    shown = capsys.readouterr().out
    assert "fit on fake, seed 0" in shown
    assert "forget" in shown
    assert "192 J" in shown
