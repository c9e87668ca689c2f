"""Speaker authentication: learn, program, freeze, forget one, enrol another, restore; counted.

The second workload of arXiv:2601.10037: a recurrent spiking network learns five speakers in torch
and is programmed into arrays of resistive memory. One speaker is then forgotten, and a new one
learnt, each by a LoRA branch inside the time loop, beside the frozen arrays; the branch that
forgets is sealed. Then the arrays err by write noise and drift, and a third branch makes up for the
noise of one chip. Beside that run the other ways to forget and to enrol; see ``speaker_baselines``.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.continual.head import grow_head_
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.arm_ratios import ratios
from aihwkit_lora.recipes.classifier_job import ClassifierJob
from aihwkit_lora.recipes.noise_sweep import NoiseSweep
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, reported
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.speaker_baselines import BASELINES
from aihwkit_lora.recipes.speaker_data import SpeakerClips, SpeakerData, load_speakers
from aihwkit_lora.recipes.speaker_options import SpeakerAuthentication
from aihwkit_lora.recipes.speaker_training import (
    Loss,
    OneCycle,
    SpeakerTrainee,
    fit,
    forgetting,
    naming,
    noisy_naming,
    saturating,
)
from aihwkit_lora.recipes.spiking import LORA_TARGETS, SpikingNet
from aihwkit_lora.recipes.stage_training import VALIDATION, Evaluation, Score, StepRecorder
from aihwkit_lora.reporting import RunReport, StageRecord
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.metrics.probe import linear_probe
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, seals

Adapted = Literal["hybrid", "digital"]
"""Arms with adapters: on frozen arrays, or on the network in torch."""

Stage = Literal["forget", "continue", "restore"]

__all__ = ["Job", "SpeakerAuthentication", "run"]


def run(config: SpeakerAuthentication, folder: RunFolder) -> RunReport:
    """Run all stages of all arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    resolved = config.resolved
    job = Job(resolved, load_speakers(resolved), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    arms = {"hybrid": hybrid(job, learnt, programmed)}
    for name in resolved.arms:
        arms[name] = BASELINES.get(name)(job, learnt, programmed)
    return reported("speaker_authentication", config, arms, ratios(arms, job.chip, sample="clip"))


def hybrid(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Adapters beside frozen arrays; then noise, drift, and the restoring of a noisy chip.

    Args:
        job: The run.
        learnt: What it has learnt.
        programmed: The same on frozen arrays.
    """
    base, stage = programmed.model, job.folder.stage
    forgotten = stage("hybrid-forget", lambda: job.forget(base))
    continued = stage("hybrid-continue", lambda: job.continue_(forgotten.model))
    noisy = stage("hybrid-noise", lambda: job.noise(base, continued.model))
    drifted = stage("hybrid-drift", lambda: job.drift(base, continued.model))
    restored = stage("hybrid-restore", lambda: job.restore(continued.model))
    done = (learnt, programmed, forgotten, continued, noisy, drifted, restored)
    return tuple(finished.record for finished in done)


class Job(ClassifierJob[SpeakerAuthentication, SpeakerData]):
    """The stages of one run.

    Args:
        config: Options.
        speakers: Clips of everybody.
        chip: Where the model runs.
        folder: Where logs and adapters go.
    """

    def __init__(
        self, config: SpeakerAuthentication, speakers: SpeakerData, chip: Chip, folder: RunFolder
    ) -> None:
        super().__init__(config, speakers, chip, folder, shown=config.noise_clips)

    def learn(self) -> Finished:
        """Learn the first speakers in torch. That happens off the chip and is not counted."""
        self.seed("learn")
        config, learnt, start = self.config, self.people.learnt, time.perf_counter()
        model = SpikingNet(neurons=config.hidden, outputs=len(learnt), neuron=config.neuron)
        schedule = self.schedule("learn", 2e-3)
        loss = noisy_naming(config.weight_noise)
        trainee = SpeakerTrainee(model, loss, schedule, score=lambda heard: -heard.loss(*learnt))
        with saturating(model, self.chip):
            self._fit(trainee, schedule, self.people.train.of(*learnt), "learn")
        return self._finished("learn", model, Counts(), start, metrics=self._learnt(model))

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        start = time.perf_counter()
        model, counts = self._on_arrays(learnt, seed=self.config.seed)
        metrics = self._learnt(model)
        return self._finished("program", model, counts, start, metrics=metrics)

    def forget(self, programmed: nn.Module, *, arm: Adapted = "hybrid") -> Finished:
        """Forget one speaker by a LoRA branch, and seal it where it stands beside arrays."""
        # PEFT puts adapters into the model it is given; the other arms start from the same one.
        model = self._with_adapter(copy.deepcopy(programmed), "forget")
        finished = self._adapt(arm, "forget", model, 4e-3)
        if arm == "hybrid":
            log = RequestLog(self.folder.path / "requests.jsonl")
            seal_(model, "forget", request=f"speaker {self.config.forgotten}", log=log)
        return finished

    def continue_(self, forgotten: nn.Module, *, arm: Adapted = "hybrid") -> Finished:
        """Learn a new speaker by a second branch and a digital row of the head."""
        model = self._with_adapter(forgotten, "continue")
        grow_head_(model, 1, head="head", generator=self._generator("grow"))
        finished = self._adapt(arm, "continue", model, 2e-3)
        if arm == "hybrid":
            model.save_pretrained(str(self.folder.path / "adapters"))
        return finished

    def noise(self, base: nn.Module, continued: nn.Module) -> Finished:
        """Let the arrays err as if written less well: one chip in full, and many of them."""
        start = time.perf_counter()
        with self._noisy(continued):
            metrics = self.evaluate("continue", continued)
        sweep = self._noise_sweep(base, continued, self.config.sigmas_microsiemens)
        metrics |= self._at_restored(sweep)
        return self._looked_at("noise", continued, start, sweep, metrics=metrics)

    def restore(self, continued: nn.Module) -> Finished:
        """Make up for one chip's write noise by a third branch; the others stay active."""
        model = self._with_adapter(continued, "restore")
        with self._noisy(model):
            finished = self._adapt("hybrid", "restore", model, 2e-3)
        model.save_pretrained(str(self.folder.path / "adapters"))
        return finished

    def train(
        self,
        arm: str,
        stage: Stage,
        trainee: SpeakerTrainee,
        schedule: OneCycle,
        ledger: Ledger,
        *guards: FrozenGuard,
    ) -> Finished:
        """Train a stage of any arm, counted.

        Args:
            arm: Its name.
            stage: Decides on clips, metrics and random numbers.
            trainee: What to train.
            schedule: How long and how fast.
            ledger: Where it is counted, under the stage's name.
            guards: Callbacks before the meters.
        """
        model, start = trainee.model, time.perf_counter()
        clips = self.clips(stage)
        recorder = StepRecorder(ledger, self.chip, lambda: self.evaluate(stage, model))
        meter = EnergyMeter(self.chip, ledger, phase=stage, validation_phase=VALIDATION)
        callbacks = [*guards, meter, PulseCounter(ledger), recorder]
        self.seed(stage)
        self._fit(trainee, schedule, clips, f"{arm}-{stage}", callbacks)
        metrics = {**self.evaluate(stage, model), **self._without_adapters(model)}
        counts = ledger.total(phase=stage)
        steps = tuple(recorder.steps)
        return self._finished(stage, model, counts, start, metrics=metrics, steps=steps)

    def clips(self, stage: Stage) -> SpeakerClips:
        """Clips of everybody learnt so far; the forgotten speaker's are gone once forgotten.

        Args:
            stage: Which one.
        """
        speakers = self.people
        if stage == "forget":
            return speakers.train.of(*speakers.learnt)
        left = speakers.train.of(*speakers.kept, speakers.new)
        generator = self._generator("replay")
        return left.replay(self.config.replay, generator, whole=speakers.new).balanced()

    def loss(self, stage: Stage) -> Loss:
        """What a stage minimises, in every arm.

        Args:
            stage: Which one.
        """
        if stage == "forget":
            return forgetting(forgotten=self.people.forgotten, kept=self.people.kept)
        return naming

    def score(self, stage: Stage) -> Score:
        """How epochs are ranked, on validation clips.

        Args:
            stage: Which one.
        """
        speakers = self.people
        if stage == "forget":
            forgotten, kept = speakers.forgotten, speakers.kept
            return lambda heard: -heard.loss(*kept) - 10.0 * heard.accuracy(forgotten)
        return lambda heard: -heard.loss(*speakers.kept, speakers.new)

    def schedule(self, stage: str, rate: float) -> OneCycle:
        """How long and how fast a stage trains.

        Args:
            stage: One with epochs of its own.
            rate: At its peak.
        """
        epochs = getattr(self.config, f"{stage}_epochs")
        return OneCycle(epochs=epochs, learning_rate=rate, batch_size=self.config.batch_size)

    def evaluate(self, stage: Stage, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test clips of each group that there is at a stage.

        Args:
            stage: After ``forget`` the new speaker is not there yet.
            model: Who hears them.
        """
        heard, speakers = Evaluation.of(model, self.people.test), self.people
        metrics = {
            "forget_accuracy": heard.accuracy(speakers.forgotten),
            "retain_accuracy": heard.accuracy(*speakers.kept),
        }
        if stage == "forget":
            return metrics
        return metrics | {
            "new_accuracy": heard.accuracy(speakers.new),
            "known_accuracy": heard.accuracy(*self._known),
        }

    def seed(self, stage: str) -> None:
        """Start the random numbers of a stage.

        Args:
            stage: One with numbers of its own.
        """
        torch.manual_seed(1000 * self.config.seed + _STREAMS.index(stage))

    @property
    def _known(self) -> tuple[int, ...]:
        """Everybody who is known in the end."""
        return (*self.people.kept, self.people.new)

    def _at_restored(self, sweep: NoiseSweep) -> dict[str, float]:
        """Mean and worst of all chips whose write noise is that of the one to restore."""
        index = sweep.points.index(self.config.restore_microsiemens)
        known = sweep.accuracies("hybrid", self._known)[index]
        return {
            "known_accuracy_mean": float(known.mean()),
            "known_accuracy_worst": float(known.min()),
            "forget_accuracy_worst": sweep.spreads("hybrid", "forget")[index].worst,
        }

    def _adapt(self, arm: Adapted, stage: Stage, model: PeftModel, rate: float) -> Finished:
        schedule = self.schedule(stage, rate)
        trainee = SpeakerTrainee(model, self.loss(stage), schedule, score=self.score(stage))
        guards = [FrozenGuard()] if arm == "hybrid" else []
        return self.train(arm, stage, trainee, schedule, Ledger(), *guards)

    def _fit(
        self,
        trainee: SpeakerTrainee,
        schedule: OneCycle,
        clips: SpeakerClips,
        log: str,
        callbacks: list[Any] | None = None,
    ) -> None:
        outputs = clips.labels.unique().tolist()
        fit(
            trainee,
            clips,
            self.people.validation.of(*outputs),
            schedule,
            log=self.folder.path / "logs" / log,
            callbacks=callbacks or [],
        )

    def _with_adapter(self, model: nn.Module, stage: str) -> PeftModel:
        # PEFT takes whole numbers by its annotation and any by its arithmetic.
        alpha = cast(int, self.config.lora_alpha)
        config = LoraConfig(r=self.config.rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
        self.seed(stage)
        return add_adapter_(model, stage, config)

    def _learnt(self, model: nn.Module) -> dict[str, float]:
        heard = Evaluation.of(model, self.people.test)
        return {"learnt_accuracy": heard.accuracy(*self.people.learnt)}

    def _without_adapters(self, model: nn.Module) -> dict[str, float]:
        """What is still there: a probe on the hidden neurons, and the arrays without adapters."""
        if not isinstance(model, PeftModel):
            return {}
        speakers = self.people
        trained = [parameter.requires_grad for parameter in model.parameters()]
        sealed = audit(model, reason="evaluation") if seals(model) else nullcontext()
        with sealed, model.disable_adapter():
            heard = Evaluation.of(model, speakers.test)
        # PEFT 0.21 makes every active adapter trainable on the way out.
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)
        return {
            "probe_forget_accuracy": self._probed(cast(SpikingNet, model.get_base_model())),
            "adapter_off_forget_accuracy": heard.accuracy(speakers.forgotten),
        }

    @torch.no_grad()
    def _probed(self, network: SpikingNet) -> float:
        """Forgotten clips that an attacker names who has clips of everybody and sees all spikes."""
        train, test = self.people.train, self.people.test.of(self.people.forgotten)
        rates = [network.rates(clips.inputs) for clips in (train, test)]
        return linear_probe(rates[0], train.labels, rates[1], test.labels)

    def _generator(self, stage: str) -> torch.Generator:
        seed = 1000 * self.config.seed + _STREAMS.index(stage)
        return torch.Generator().manual_seed(seed)


_STREAMS = ("learn", "forget", "continue", "restore", "grow", "replay")
"""Stages with random numbers of their own."""


RECIPES.add(
    "speaker_authentication",
    Recipe(
        name="speaker_authentication",
        summary="forget one speaker, enrol another, restore, by LoRA on a frozen spiking network",
        config=SpeakerAuthentication,
        run=run,
    ),
)
