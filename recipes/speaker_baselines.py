"""The other ways to forget one speaker and to enrol another, through the same ledger.

``reprogram``: all weights are trained, and the arrays written after every step. ``deploy_once``:
all weights are trained in torch, and written once, at the end of a stage. ``digital``: the same
adapters as those of the hybrid arm, on the network in torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

import aihwkit_lora as al
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.reprogramming import Reprogrammer, deploy_, train_all_weights_
from aihwkit_lora.recipes.run_folder import Finished
from aihwkit_lora.recipes.speaker_training import OneCycle, SpeakerTrainee, saturating
from aihwkit_lora.recipes.spiking import WiderHead
from aihwkit_lora.registry import Registry
from aihwkit_lora.reporting import StageRecord

if TYPE_CHECKING:
    from aihwkit_lora.recipes.speaker_authentication import Job

Stage = Literal["forget", "continue"]

Baseline = Callable[["Job", Finished, Finished], tuple[StageRecord, ...]]
"""From a job and its finished stages ``learn`` and ``program`` to all stages of an arm."""

BASELINES = Registry[Baseline]("baseline")
"""Arms beside the hybrid one, by name."""

_FULL_RATE = 1e-3


@BASELINES.register("reprogram")
def reprogram(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train all weights; write the arrays after every step."""
    model, stage = programmed.model, job.folder.stage
    forgotten = stage("reprogram-forget", lambda: _rewrite(job, "forget", model))
    continued = stage("reprogram-continue", lambda: _rewrite(job, "continue", forgotten.model))
    return learnt.record, programmed.record, forgotten.record, continued.record


@BASELINES.register("deploy_once")
def deploy_once(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train all weights in torch for as long as the adapters; write the arrays once."""
    pair = nn.ModuleDict({"master": learnt.model, "arrays": programmed.model})
    stage = job.folder.stage
    forgotten = stage("deploy_once-forget", lambda: _deploy(job, "forget", pair))
    continued = stage("deploy_once-continue", lambda: _deploy(job, "continue", forgotten.model))
    return learnt.record, programmed.record, forgotten.record, continued.record


@BASELINES.register("digital")
def digital(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Train the hybrid arm's adapters on the network in torch, all products digital."""
    stage = job.folder.stage
    forgotten = stage("digital-forget", lambda: job.forget(learnt.model, arm="digital"))
    continued = stage("digital-continue", lambda: job.continue_(forgotten.model, arm="digital"))
    return learnt.record, forgotten.record, continued.record


def _rewrite(job: Job, stage: Stage, model: nn.Module) -> Finished:
    ledger, config = Ledger(), job.config
    if stage == "forget":
        model = train_all_weights_(copy.deepcopy(model))
    else:
        _grow(job, model)
    schedule = OneCycle.of_steps(
        getattr(config, f"reprogram_{stage}_steps"),
        clips=len(job.clips(stage)),
        learning_rate=_FULL_RATE,
        batch_size=config.reprogram_batch_size,
    )
    seed = config.seed + len(stage)
    write = Reprogrammer(model, job.chip, ledger, phase=stage, seed=seed)
    trainee = SpeakerTrainee(model, job.loss(stage), schedule, after_step=write)
    return job.train("reprogram", stage, trainee, schedule, ledger)


def _deploy(job: Job, stage: Stage, pair: nn.Module) -> Finished:
    ledger, pair = Ledger(), copy.deepcopy(pair)
    master, arrays = (cast(nn.ModuleDict, pair)[part] for part in ("master", "arrays"))
    if stage == "continue":
        for model in (master, arrays):
            _grow(job, model)
    schedule = job.schedule(stage, _FULL_RATE)
    trainee = SpeakerTrainee(
        master.requires_grad_(True), job.loss(stage), schedule, score=job.score(stage)
    )
    # The new speaker's row stays digital: no ADC ends its sums.
    on_arrays = nn.ModuleList(master.get_submodule(name) for name, _ in al.frozen_layers(arrays))
    with saturating(on_arrays, job.chip):
        trained = job.train("deploy_once", stage, trainee, schedule, ledger)
    written = Ledger()
    seed = job.config.seed + len(stage)
    deploy_(master, arrays, job.chip, ledger=written, seed=seed)
    counts = Counts.sum([trained.record.counts, written.total()])
    record = replace(
        trained.record,
        metrics=job.evaluate(stage, arrays),
        counts=counts,
        energy=al.price(counts, job.chip),
        fingerprint=al.fingerprint(arrays),
    )
    return Finished(pair, record)


def _grow(job: Job, model: nn.Module) -> None:
    """Add the new speaker's row to the head; it is digital, as in the hybrid arm."""
    job.seed("grow")
    network = cast(Any, model)
    network.head = WiderHead(network.head, job.config.hidden, 1)
