"""Face recognition: learn, program, freeze, forget a person, continue with another; counted.

The first workload of arXiv:2601.10037: an MLP-Mixer learns some people in torch and is programmed
into arrays of resistive memory. One person is then forgotten, and a new one learnt, each by a LoRA
branch beside the frozen arrays; both branches stay active from then on. Then the arrays err by
write noise and drift, and a third branch makes up for the noise of one chip. Beside that run the
other ways to forget and to learn; see ``face_baselines``.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.arm_ratios import ratios
from aihwkit_lora.recipes.classifier_job import ClassifierJob
from aihwkit_lora.recipes.face_baselines import BASELINES
from aihwkit_lora.recipes.face_data import FaceData, FaceImages, load_faces
from aihwkit_lora.recipes.face_models import build_model
from aihwkit_lora.recipes.face_objectives import Objective, continuing, forgetting_by, learning
from aihwkit_lora.recipes.face_options import FaceRecognition
from aihwkit_lora.recipes.face_training import Schedule, Trainee, fit
from aihwkit_lora.recipes.face_verification import verify
from aihwkit_lora.recipes.mixer import LORA_TARGETS
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, reported
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.stage_training import VALIDATION, Evaluation, Score, StepRecorder
from aihwkit_lora.recipes.staged_job import trainable
from aihwkit_lora.reporting import RunReport, StageRecord
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.objectives import apply_negation_
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_
from aihwkit_lora.unlearning.verification import Verdict

__all__ = ["NEGATION_STRENGTHS", "FaceRecognition", "Job", "run"]

Adapted = Literal["hybrid", "digital"]
"""Arms with adapters: on frozen arrays, or on the model in torch."""

Stage = Literal["forget", "continue", "restore"]

NEGATION_STRENGTHS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
"""How much of a branch the objective ``negation`` may subtract; tried on validation images."""


def run(config: FaceRecognition, folder: RunFolder) -> RunReport:
    """Run all stages of all arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    resolved = config.resolved
    job = Job(resolved, load_faces(resolved), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    arms = {"hybrid": hybrid(job, learnt, programmed)}
    for name in resolved.arms:
        arms[name] = BASELINES.get(name)(job, learnt, programmed)
    return reported("face_recognition", config, arms, ratios(arms, job.chip))


def hybrid(job: Job, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
    """Adapters beside frozen arrays; then noise, drift, and the restoring of a noisy chip.

    Args:
        job: The run.
        learnt: What it has learnt.
        programmed: The same on frozen arrays.
    """
    base, stage = programmed.model, job.folder.stage
    forgotten = stage("hybrid-forget", lambda: job.forget(base))
    if job.config.verify:
        findings = verify(job, forgotten.model, job.config.verify)
        verdicts = ", ".join(f"{findings.count(verdict)} {verdict}" for verdict in Verdict)
        job.folder.say(f"verification: {verdicts}; see {job.folder.path / 'forgetting.md'}")
    continued = stage("hybrid-continue", lambda: job.continue_(forgotten.model))
    noisy = stage("hybrid-noise", lambda: job.noise(base, continued.model))
    drifted = stage("hybrid-drift", lambda: job.drift(base, continued.model))
    restored = stage("hybrid-restore", lambda: job.restore(continued.model))
    done = (learnt, programmed, forgotten, continued, noisy, drifted, restored)
    return tuple(finished.record for finished in done)


class Job(ClassifierJob[FaceRecognition, FaceData]):
    """The stages of one run.

    Args:
        config: Options.
        faces: Images of everybody.
        chip: Where the model runs.
        folder: Where logs go.
    """

    def __init__(
        self, config: FaceRecognition, faces: FaceData, chip: Chip, folder: RunFolder
    ) -> None:
        super().__init__(config, faces, chip, folder, shown=config.noise_images)

    def learn(self) -> Finished:
        """Learn the first people in torch. That happens off the chip and is not counted."""
        self._seed(0)
        model, config = self.build(), self.config
        schedule = Schedule(
            epochs=config.learn_epochs,
            learning_rate=config.learn_rate,
            batch_size=64,
            weight_decay=0.01,
        )
        objective = learning(weight_noise=config.weight_noise)
        learnt, start = self.people.learnt, time.perf_counter()
        trainee = Trainee(model, objective, schedule, score=lambda e: -e.loss(*learnt))
        log = self.folder.path / "logs" / "learn"
        fit(trainee, self.people.train.of(*learnt), self.people, schedule, log=log, callbacks=[])
        return self._finished("learn", model, Counts(), start, metrics=self._learnt(model))

    def build(self) -> nn.Module:
        """Make a fresh network, with an output for everybody."""
        config = self.config
        return build_model(
            config.model, image_size=config.image_size, outputs=len(config.everybody)
        )

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        start = time.perf_counter()
        model, counts = self._on_arrays(learnt, seed=self.config.seed)
        metrics = self._learnt(model)
        return self._finished("program", model, counts, start, metrics=metrics)

    def forget(self, programmed: nn.Module, *, arm: Adapted = "hybrid") -> Finished:
        """Forget one person by a LoRA branch, and seal it where it stands beside arrays."""
        adapter = self._adapter(self.config.forget_rank)
        # PEFT puts adapters into the model it is given; the other arms start from the same one.
        model = add_adapter_(copy.deepcopy(programmed), "forget", adapter)
        return self._adapt(arm, "forget", model, self.forgetting(self.config.objective))

    def continue_(self, forgotten: nn.Module, *, arm: Adapted = "hybrid") -> Finished:
        """Learn a new person by a second branch; the first stays active, and fixed."""
        model = add_adapter_(forgotten, "continue", self._adapter(self.config.continue_rank))
        return self._adapt(arm, "continue", model, self.continuing())

    def noise(self, base: nn.Module, adapted: nn.Module) -> Finished:
        """See what write noise costs, with adapters and without: ``noise.json``, ``noise.png``."""
        start = time.perf_counter()
        sweep = self._noise_sweep(base, adapted, self.config.noise_microsiemens)
        return self._looked_at("noise", adapted, start, sweep)

    def restore(self, continued: nn.Module) -> Finished:
        """Make up for one chip's write noise by a third branch; the others stay active."""
        model = add_adapter_(continued, "restore", self._adapter(self.config.restore_rank))
        with self._noisy(model):
            noisy = self.evaluate("restore", model)
            finished = self._adapt("hybrid", "restore", model, self.continuing())
        metrics = {f"noisy_{name}": value for name, value in noisy.items()}
        record = dataclasses.replace(
            finished.record, metrics={**finished.record.metrics, **metrics}
        )
        return Finished(model, record)

    def train(
        self,
        arm: str,
        stage: Stage,
        trainee: Trainee,
        schedule: Schedule,
        ledger: Ledger,
        *,
        guards: Sequence[pl.Callback] = (),
        meters: Sequence[pl.Callback] | None = None,
    ) -> Finished:
        """Train a stage of any arm, counted.

        Args:
            arm: Its name.
            stage: Decides on images, metrics and random numbers.
            trainee: What to train.
            schedule: How long and how fast.
            ledger: Where it is counted, under the stage's name.
            guards: Callbacks before the meters.
            meters: What counts; None for pulses, reads and everything digital.
        """
        self._seed(len(stage))
        model, start = trainee.model, time.perf_counter()
        recorder = StepRecorder(ledger, self.chip, lambda: self.evaluate(stage, model))
        if meters is None:
            meter = EnergyMeter(self.chip, ledger, phase=stage, validation_phase=VALIDATION)
            meters = [meter, PulseCounter(ledger)]
        log = self.folder.path / "logs" / f"{arm}-{stage}"
        callbacks = [*guards, *meters, recorder]
        fit(trainee, self._images(stage), self.people, schedule, log=log, callbacks=callbacks)
        trained = trainable(model)
        if isinstance(model, PeftModel) and stage == "forget":
            self._settle(model, sealed=arm == "hybrid")
        off = self._adapter_off(model) if arm == "hybrid" else {}
        metrics = {**self.evaluate(stage, model), **off}
        counts, steps = ledger.total(phase=stage), tuple(recorder.steps)
        return self._finished(
            stage, model, counts, start, metrics=metrics, steps=steps, trained=trained
        )

    def evaluate(self, stage: Stage, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test images of each group that there is at a stage.

        Args:
            stage: After ``forget`` the new person is not there yet.
            model: Whom to ask.
        """
        result = Evaluation.of(model, self.people.test)
        metrics = {
            "forget_accuracy": result.accuracy(self.people.forgotten),
            "retain_accuracy": result.accuracy(*self.people.kept),
        }
        if stage != "forget":
            metrics["new_accuracy"] = result.accuracy(self.people.new)
        return metrics

    def score(self, stage: Stage) -> Score:
        """How epochs are ranked, on validation images.

        Args:
            stage: Which one.
        """
        faces = self.people
        if stage == "forget":
            return lambda e: -e.loss(*faces.kept) - 10.0 * e.accuracy(faces.forgotten)
        return lambda e: -e.loss(*faces.kept, faces.new)

    def forgetting(self, name: str) -> Objective:
        """Make an objective that forgets.

        Args:
            name: Of an objective for classifiers.
        """
        faces, margin = self.people, self.config.margin
        return forgetting_by(name, forgotten=faces.forgotten, kept=faces.kept, margin=margin)

    def continuing(self, *, vary: bool = True) -> Objective:
        """Make the objective that learns the new person.

        Args:
            vary: Whether images vary from step to step.
        """
        forgotten, margin = self.people.forgotten, self.config.margin
        return continuing(forgotten=forgotten, margin=margin, vary=vary)

    def _adapt(
        self, arm: Adapted, stage: Stage, model: PeftModel, objective: Objective
    ) -> Finished:
        config = self.config
        schedule = Schedule(
            epochs=getattr(config, f"{stage}_epochs"),
            learning_rate=1e-2,
            batch_size=config.batch_size,
        )
        # Negation learns what is to be forgotten, and turns it round in the end.
        turned = stage == "forget" and config.objective == "negation"
        score = None if turned else self.score(stage)
        trainee = Trainee(model, objective, schedule, score=score)
        guards = [FrozenGuard()] if arm == "hybrid" else []
        return self.train(arm, stage, trainee, schedule, Ledger(), guards=guards)

    def _settle(self, model: PeftModel, *, sealed: bool) -> None:
        """Keep the branch that forgets in force, whatever is learnt later."""
        if self.config.objective == "negation":
            self._negate(model)
        if sealed:
            log = RequestLog(self.folder.path / "requests.jsonl")
            seal_(model, "forget", request=f"person {self.config.forgotten}", log=log)

    def _negate(self, model: PeftModel) -> None:
        """Subtract the branch, as strongly as serves validation images best."""
        rank = self.score("forget")

        def score(strength: float) -> float:
            trial = copy.deepcopy(model)
            apply_negation_(trial, "forget", strength)
            return rank(Evaluation.of(trial, self.people.validation))

        apply_negation_(model, "forget", max(NEGATION_STRENGTHS, key=score))

    def _images(self, stage: Stage) -> FaceImages:
        """Images of everybody learnt so far; the forgotten person's are gone once forgotten."""
        faces = self.people
        people = faces.learnt if stage == "forget" else (*faces.kept, faces.new)
        return faces.train.of(*people)

    def _adapter(self, rank: int) -> LoraConfig:
        # PEFT divides by the rank; the paper's code does not.
        alpha = self.config.lora_scale * rank
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)  # type: ignore[arg-type]

    def _learnt(self, model: nn.Module) -> dict[str, float]:
        learnt = Evaluation.of(model, self.people.test).accuracy(*self.people.learnt)
        return {"learnt_accuracy": learnt}

    def _adapter_off(self, model: nn.Module) -> dict[str, float]:
        """What the arrays still know: the forgotten person without any adapter."""
        if not isinstance(model, PeftModel):
            return {}
        with audit(model, reason="what the arrays still know"), model.disable_adapter():
            result = Evaluation.of(model, self.people.test)
        return {"adapter_off_forget_accuracy": result.accuracy(self.people.forgotten)}

    def _seed(self, stage: int) -> None:
        torch.manual_seed(1000 * self.config.seed + stage)


RECIPES.add(
    "face_recognition",
    Recipe(
        name="face_recognition",
        summary="forget one person and learn another by LoRA on frozen arrays (MLP-Mixer)",
        config=FaceRecognition,
        run=run,
    ),
)
