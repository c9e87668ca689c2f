"""The other ways to forget one person and to learn another, through the same ledger.

``reprogram``: all weights are trained, and the arrays written after every step. ``deploy_once``:
all weights are trained in torch, and written once, at the end of a stage. ``digital``: the same
adapters as those of the hybrid arm, on the model in torch. ``in_situ``: all weights are trained in
place, on aihwkit's pulsed devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import PulseCounter
from aihwkit_lora.metering import Ledger
from aihwkit_lora.recipes.face_objectives import OWN, Objective, needs_a_branch
from aihwkit_lora.recipes.face_training import Schedule, Trainee
from aihwkit_lora.recipes.in_situ import PulsedTrainee, on_pulsed_tiles, weights_on_tiles
from aihwkit_lora.recipes.reprogramming import Reprogrammer, deploy_, train_all_weights_
from aihwkit_lora.recipes.run_folder import Finished
from aihwkit_lora.registry import Registry
from aihwkit_lora.reporting import StageRecord

if TYPE_CHECKING:
    from aihwkit_lora.recipes.face_recognition import Job

Stage = Literal["forget", "continue"]

Baseline = Callable[["Job", Finished, Finished], tuple[StageRecord, ...]]
"""From a job and its finished stages ``learn`` and ``program`` to all stages of an arm."""

BASELINES = Registry[Baseline]("baseline")
"""Arms beside the hybrid one, by name."""

_FULL_RATES = {"forget": 5e-3, "continue": 2e-2}
_IN_SITU_RATE = 0.05


@BASELINES.register("reprogram")
def reprogram(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train all weights; write the arrays after every step."""
    model, stage = programmed.model, job.folder.stage
    forgotten = stage("reprogram-forget", lambda: _rewrite(job, "forget", model))
    continued = stage("reprogram-continue", lambda: _rewrite(job, "continue", forgotten.model))
    return learnt.record, programmed.record, forgotten.record, continued.record


@BASELINES.register("deploy_once")
def deploy_once(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Take the same steps on all weights in torch; write the arrays once, after each stage."""
    pair = nn.ModuleDict({"master": learnt.model, "arrays": programmed.model})
    stage = job.folder.stage
    forgotten = stage("deploy_once-forget", lambda: _deploy(job, "forget", pair))
    continued = stage("deploy_once-continue", lambda: _deploy(job, "continue", forgotten.model))
    return learnt.record, programmed.record, forgotten.record, continued.record


@BASELINES.register("digital")
def digital(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train the hybrid arm's adapters on the model in torch."""
    stage = job.folder.stage
    forgotten = stage("digital-forget", lambda: job.forget(learnt.model, arm="digital"))
    continued = stage("digital-continue", lambda: job.continue_(forgotten.model, arm="digital"))
    return learnt.record, forgotten.record, continued.record


@BASELINES.register("in_situ")
def in_situ(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train all weights in place, by pulses, from what programming left in the arrays."""
    stage, config = job.folder.stage, job.config

    def begin() -> Finished:
        start, arrays, device = learnt.model, programmed.model, config.in_situ_device
        model = on_pulsed_tiles(start, arrays, device, seed=config.seed)
        return _pulse(job, "forget", model)

    forgotten = stage("in_situ-forget", begin)
    continued = stage("in_situ-continue", lambda: _pulse(job, "continue", forgotten.model))
    return learnt.record, programmed.record, forgotten.record, continued.record


def _few_steps(job: Job, stage: Stage) -> Schedule:
    """Few steps on all images each, for a step that writes the arrays is dear."""
    epochs = getattr(job.config, f"reprogram_{stage}_epochs")
    return Schedule(epochs=epochs, learning_rate=_FULL_RATES[stage], batch_size=None)


def _objective(job: Job, stage: Stage, *, vary: bool = True) -> Objective:
    """What the hybrid arm is trained by, or the default if that needs a branch.

    In few steps the new person is learnt better from images that stay as they are.
    """
    if stage == "continue":
        return job.continuing(vary=vary)
    name = job.config.objective
    return job.forgetting(OWN if needs_a_branch(name) else name)


def _rewrite(job: Job, stage: Stage, model: nn.Module) -> Finished:
    ledger, schedule = Ledger(), _few_steps(job, stage)
    if stage == "forget":
        model = train_all_weights_(copy.deepcopy(model))
    seed = job.config.seed + len(stage)
    write = Reprogrammer(model, job.chip, ledger, phase=stage, seed=seed)
    trainee = Trainee(model, _objective(job, stage, vary=False), schedule, after_step=write)
    return job.train("reprogram", stage, trainee, schedule, ledger)


def _deploy(job: Job, stage: Stage, pair: nn.Module) -> Finished:
    ledger, schedule, pair = Ledger(), _few_steps(job, stage), copy.deepcopy(pair)
    master, arrays = (cast(nn.ModuleDict, pair)[part] for part in ("master", "arrays"))
    objective = _objective(job, stage, vary=False)
    trainee = Trainee(master.requires_grad_(True), objective, schedule, score=job.score(stage))
    trained = job.train("deploy_once", stage, trainee, schedule, ledger)
    seed = job.config.seed + len(stage)
    deploy_(master, arrays, job.chip, ledger=ledger, phase=stage, seed=seed)
    counts = ledger.total(phase=stage)
    record = replace(
        trained.record,
        metrics=job.evaluate(stage, arrays),
        counts=counts,
        energy=al.price(counts, job.chip),
        fingerprint=al.fingerprint(arrays),
    )
    return Finished(pair, record)


def _pulse(job: Job, stage: Stage, model: nn.Module) -> Finished:
    config, ledger = job.config, Ledger()
    schedule = Schedule(
        epochs=getattr(config, f"in_situ_{stage}_epochs"),
        learning_rate=_IN_SITU_RATE,
        batch_size=config.batch_size,
    )
    trainee = PulsedTrainee(model, _objective(job, stage), schedule)
    # Pulses are counted; reads of tiles that are trained in place cannot be.
    counter = PulseCounter(ledger, phase=stage, seed=config.seed)
    finished = job.train("in_situ", stage, trainee, schedule, ledger, meters=[counter])
    record = replace(finished.record, trainable_parameters=weights_on_tiles(model))
    return Finished(model, record)
