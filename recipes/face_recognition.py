"""Face recognition: learn, program, freeze, forget a person, continue with another; counted.

The first workload of arXiv:2601.10037: an MLP-Mixer learns five people in torch and is programmed
into arrays of resistive memory. One person is then forgotten, and a new one learnt, each by a LoRA
branch beside the frozen arrays; both branches stay active from then on. Beside it runs the
baseline that trains all weights and writes the arrays after every step.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.face_data import FaceData, FaceDataConfig, FaceImages, load_faces
from aihwkit_lora.recipes.face_objectives import (
    OWN,
    Objective,
    continuing,
    forgetting_by,
    learning,
    needs_a_branch,
    require_usable,
)
from aihwkit_lora.recipes.face_ratios import ratios
from aihwkit_lora.recipes.face_verification import verify
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer
from aihwkit_lora.recipes.recipe import RECIPES, Recipe
from aihwkit_lora.recipes.reprogramming import Reprogrammer, train_all_weights_
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.training import (
    VALIDATION,
    Evaluation,
    Schedule,
    Score,
    StepRecorder,
    Trainee,
    fit,
)
from aihwkit_lora.reporting import RunReport, StageRecord, environment
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.objectives import apply_negation_
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_
from aihwkit_lora.unlearning.verification import Verdict

NEGATION_STRENGTHS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
"""How much of a branch the objective ``negation`` may subtract; tried on validation images."""


@dataclass(frozen=True, kw_only=True)
class FaceRecognition(FaceDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        baseline: Whether to run the arm that reprograms all weights.
        learn_epochs: Epochs of learning the first people, in torch.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        objective: Name of the objective that forgets; any one for classifiers. The baseline forgets
            by the default one if it needs a branch that can be left out.
        forget_rank: Rank of the adapter that forgets.
        forget_epochs: Its epochs.
        continue_rank: Rank of the adapter that learns the new person.
        continue_epochs: Its epochs.
        lora_scale: Factor on the adapters' output; ``lora_alpha`` is this times the rank.
        margin: Logits by which the forgotten output shall stay below the winner.
        batch_size: Images per step of the adapters.
        reprogram_forget_epochs: Steps in which the baseline forgets, each on all images.
        reprogram_continue_epochs: Steps in which the baseline learns the new person.
        verify: How many models to train from scratch without the forgotten person, to verify the
            forgetting against; 0 for no verification.

    Example:
        >>> FaceRecognition(data="digits", seed=1).forgotten
        2
    """

    chip: str = "rm-180nm"
    baseline: bool = True
    learn_epochs: int = 150
    weight_noise: float = 0.03
    objective: str = OWN
    forget_rank: int = 6
    forget_epochs: int = 30
    continue_rank: int = 8
    continue_epochs: int = 100
    lora_scale: float = 4.0
    margin: float = 5.0
    batch_size: int = 128
    reprogram_forget_epochs: int = 30
    reprogram_continue_epochs: int = 60
    verify: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        require_usable(self.objective)
        for name in (field.name for field in dataclasses.fields(self)):
            if name.endswith(("_epochs", "_rank", "_size")) and getattr(self, name) < 1:
                raise ConfigurationError(
                    f"expected {name} of at least 1, found {getattr(self, name)}."
                )
        if self.verify < 0:
            raise ConfigurationError(f"expected verify of 0 or more, found {self.verify}.")


def run(config: FaceRecognition, folder: RunFolder) -> RunReport:
    """Run all stages of both arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    job = Job(config, load_faces(config), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    forgotten = folder.stage("hybrid-forget", lambda: job.forget(programmed.model))
    if config.verify:
        findings = verify(job, forgotten.model, config.verify)
        verdicts = ", ".join(f"{findings.count(verdict)} {verdict}" for verdict in Verdict)
        folder.say(f"verification: {verdicts}; see {folder.path / 'forgetting.md'}")
    continued = folder.stage("hybrid-continue", lambda: job.continue_(forgotten.model))
    start = (learnt.record, programmed.record)
    arms = {"hybrid": (*start, forgotten.record, continued.record)}
    if config.baseline:
        forgotten = folder.stage("reprogram-forget", lambda: job.rewrite(programmed.model))
        continued = folder.stage("reprogram-continue", lambda: job.rewrite_on(forgotten.model))
        arms["reprogram"] = (*start, forgotten.record, continued.record)
    return RunReport(
        recipe="face_recognition",
        chip=config.chip,
        seed=config.seed,
        config=dataclasses.asdict(config),
        environment=environment(),
        arms=arms,
        ratios=ratios(arms, job.chip),
    )


class Job:
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
        self.config, self.faces, self.chip, self.folder = config, faces, chip, folder

    def learn(self) -> Finished:
        """Learn the first people in torch. That happens off the chip and is not counted."""
        self._seed(0)
        model = MlpMixer()
        schedule = Schedule(
            epochs=self.config.learn_epochs, learning_rate=5e-3, batch_size=64, weight_decay=0.01
        )
        objective = learning(weight_noise=self.config.weight_noise)
        learnt, start = self.faces.learnt, time.perf_counter()
        trainee = Trainee(model, objective, schedule, score=lambda e: -e.loss(*learnt))
        log = self.folder.path / "logs" / "learn"
        fit(trainee, self.faces.train.of(*learnt), self.faces, schedule, log=log, callbacks=[])
        trainee.restore_best()
        return self._finished("learn", model, Counts(), start, metrics=self._learnt(model))

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        start, ledger = time.perf_counter(), Ledger()
        model = al.convert(learnt, self.chip).requires_grad_(False)
        al.program_(model, self.chip, ledger=ledger, phase="program", seed=self.config.seed)
        al.freeze_(model)
        metrics = self._learnt(model)
        return self._finished("program", model, ledger.total(), start, metrics=metrics)

    def forget(self, programmed: nn.Module) -> Finished:
        """Forget one person by a LoRA branch, and seal it."""
        adapter = self._adapter(self.config.forget_rank)
        # PEFT puts adapters into the model it is given; the other arm starts from the same one.
        model = add_adapter_(copy.deepcopy(programmed), "forget", adapter)
        objective = self._forgetting(self.config.objective)
        # Negation learns what is to be forgotten, and turns it round in the end.
        score = None if self.config.objective == "negation" else _forget_score(self.faces)
        return self._adapt("forget", model, objective, self.config.forget_epochs, score)

    def continue_(self, forgotten: nn.Module) -> Finished:
        """Learn a new person by a second branch; the first stays active, and fixed."""
        model = add_adapter_(forgotten, "continue", self._adapter(self.config.continue_rank))
        objective, score = self._continuing(), _continue_score(self.faces)
        return self._adapt("continue", model, objective, self.config.continue_epochs, score)

    def rewrite(self, programmed: nn.Module) -> Finished:
        """Forget by training all weights, written into the arrays after each step."""
        model = train_all_weights_(copy.deepcopy(programmed))
        epochs, name = self.config.reprogram_forget_epochs, self.config.objective
        objective = self._forgetting(OWN if needs_a_branch(name) else name)
        return self._reprogram("forget", model, objective, epochs, 5e-3)

    def rewrite_on(self, forgotten: nn.Module) -> Finished:
        """Learn the new person in the same way."""
        epochs = self.config.reprogram_continue_epochs
        # In so few steps it gets further with images that stay as they are.
        objective = self._continuing(vary=False)
        return self._reprogram("continue", forgotten, objective, epochs, 2e-2)

    def _adapt(
        self,
        stage: str,
        model: PeftModel,
        objective: Objective,
        epochs: int,
        score: Score | None,
    ) -> Finished:
        schedule = Schedule(epochs=epochs, learning_rate=1e-2, batch_size=self.config.batch_size)
        trainee = Trainee(model, objective, schedule, score=score)
        return self._train("hybrid", stage, trainee, schedule, Ledger(), FrozenGuard())

    def _reprogram(
        self, stage: str, model: nn.Module, objective: Objective, epochs: int, rate: float
    ) -> Finished:
        ledger = Ledger()
        schedule = Schedule(epochs=epochs, learning_rate=rate, batch_size=None)
        seed = self.config.seed + len(stage)
        write = Reprogrammer(model, self.chip, ledger, phase=stage, seed=seed)
        trainee = Trainee(model, objective, schedule, after_step=write)
        return self._train("reprogram", stage, trainee, schedule, ledger)

    def _train(
        self,
        arm: str,
        stage: str,
        trainee: Trainee,
        schedule: Schedule,
        ledger: Ledger,
        *guards: FrozenGuard,
    ) -> Finished:
        self._seed(len(stage))
        model, start = trainee.model, time.perf_counter()
        evaluate = self._after_forgetting if stage == "forget" else self._after_continuing
        recorder = StepRecorder(ledger, self.chip, lambda: evaluate(model))
        meter = EnergyMeter(self.chip, ledger, phase=stage, validation_phase=VALIDATION)
        callbacks = [*guards, meter, PulseCounter(ledger), recorder]
        log = self.folder.path / "logs" / f"{arm}-{stage}"
        images = self._images(stage)
        fit(trainee, images, self.faces, schedule, log=log, callbacks=callbacks)
        trainee.restore_best()
        trained = _trainable(model)
        if isinstance(model, PeftModel) and stage == "forget":
            self._seal(model)
        metrics = {**evaluate(model), **self._adapter_off(model)}
        finished = self._finished(stage, model, ledger.total(phase=stage), start, metrics=metrics)
        record = dataclasses.replace(
            finished.record, steps=tuple(recorder.steps), trainable_parameters=trained
        )
        return Finished(model, record)

    def _seal(self, model: PeftModel) -> None:
        """Keep the branch that forgets in force, whatever is learnt later."""
        if self.config.objective == "negation":
            self._negate(model)
        log = RequestLog(self.folder.path / "requests.jsonl")
        seal_(model, "forget", request=f"person {self.config.forgotten}", log=log)

    def _negate(self, model: PeftModel) -> None:
        """Subtract the branch, as strongly as serves validation images best."""

        def score(strength: float) -> float:
            trial = copy.deepcopy(model)
            apply_negation_(trial, "forget", strength)
            return _forget_score(self.faces)(Evaluation.of(trial, self.faces.validation))

        apply_negation_(model, "forget", max(NEGATION_STRENGTHS, key=score))

    def _images(self, stage: str) -> FaceImages:
        """Images of everybody learnt so far; the forgotten person's are gone once forgotten."""
        faces = self.faces
        people = faces.learnt if stage == "forget" else (*faces.kept, faces.new)
        return faces.train.of(*people)

    def _forgetting(self, name: str) -> Objective:
        faces, margin = self.faces, self.config.margin
        return forgetting_by(name, forgotten=faces.forgotten, kept=faces.kept, margin=margin)

    def _continuing(self, *, vary: bool = True) -> Objective:
        forgotten, margin = self.faces.forgotten, self.config.margin
        return continuing(forgotten=forgotten, margin=margin, vary=vary)

    def _adapter(self, rank: int) -> LoraConfig:
        # PEFT divides by the rank; the paper's code does not.
        alpha = self.config.lora_scale * rank
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)  # type: ignore[arg-type]

    def _learnt(self, model: nn.Module) -> dict[str, float]:
        learnt = Evaluation.of(model, self.faces.test).accuracy(*self.faces.learnt)
        return {"learnt_accuracy": learnt}

    def _after_forgetting(self, model: nn.Module) -> dict[str, float]:
        return self._forgotten_and_kept(Evaluation.of(model, self.faces.test))

    def _after_continuing(self, model: nn.Module) -> dict[str, float]:
        result = Evaluation.of(model, self.faces.test)
        return {
            **self._forgotten_and_kept(result),
            "new_accuracy": result.accuracy(self.faces.new),
        }

    def _forgotten_and_kept(self, result: Evaluation) -> dict[str, float]:
        return {
            "forget_accuracy": result.accuracy(self.faces.forgotten),
            "retain_accuracy": result.accuracy(*self.faces.kept),
        }

    def _adapter_off(self, model: nn.Module) -> dict[str, float]:
        """What the arrays still know: the forgotten person without any adapter."""
        if not isinstance(model, PeftModel):
            return {}
        with audit(model, reason="what the arrays still know"), model.disable_adapter():
            result = Evaluation.of(model, self.faces.test)
        return {"adapter_off_forget_accuracy": result.accuracy(self.faces.forgotten)}

    def _seed(self, stage: int) -> None:
        torch.manual_seed(1000 * self.config.seed + stage)

    def _finished(
        self,
        name: str,
        model: nn.Module,
        counts: Counts,
        start: float,
        *,
        metrics: dict[str, float],
    ) -> Finished:
        frozen = next(al.frozen_layers(model), None) is not None
        record = StageRecord(
            name=name,
            metrics=metrics,
            counts=counts,
            energy=al.price(counts, self.chip),
            trainable_parameters=_trainable(model),
            fingerprint=al.fingerprint(model) if frozen else "",
            wall_s=time.perf_counter() - start,
        )
        return Finished(model, record)


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _forget_score(faces: FaceData) -> Score:
    return lambda e: -e.loss(*faces.kept) - 10.0 * e.accuracy(faces.forgotten)


def _continue_score(faces: FaceData) -> Score:
    return lambda e: -e.loss(*faces.kept, faces.new)


RECIPES.add(
    "face_recognition",
    Recipe(
        name="face_recognition",
        summary="forget one person and learn another by LoRA on frozen arrays (MLP-Mixer)",
        config=FaceRecognition,
        run=run,
    ),
)
