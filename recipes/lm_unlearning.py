"""A language model: learn authors, program, freeze, forget some, add others, survive noise.

After TOFU (arXiv:2401.06121): a small causal transformer learns answers to questions about
fictional authors and is programmed into arrays of resistive memory. Some authors are then forgotten
and new ones learnt, each by a LoRA branch on attention and MLPs beside the frozen arrays; both
branches stay active from then on, the first one sealed. Beside it run the same branches without
arrays, a full update that is written into the arrays once, and a model that has never seen the
forgotten authors, which is what forgetting is measured by.
"""

from __future__ import annotations

import copy
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel
from pytorch_lightning.utilities import CombinedLoader
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.callbacks.objective_module import Loss
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.arm_ratios import ratios
from aihwkit_lora.recipes.drift_over_time import drift_on
from aihwkit_lora.recipes.image_training import Adapting, fit
from aihwkit_lora.recipes.lm_data import Question, TextData, load_texts
from aihwkit_lora.recipes.lm_evaluation import SETS, ExactAnswers, Examiner
from aihwkit_lora.recipes.lm_model import LORA_TARGETS, CausalTransformer, LmShape
from aihwkit_lora.recipes.lm_options import LmUnlearning
from aihwkit_lora.recipes.lm_tokens import Sequences, TextBatches, Tokenizer, loader
from aihwkit_lora.recipes.lm_training import Answering, Reader, TaughtNPO
from aihwkit_lora.recipes.noise_sweep import noise_sweep
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, reported
from aihwkit_lora.recipes.reprogramming import deploy_
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.stage_training import StepRecorder
from aihwkit_lora.recipes.staged_job import StagedJob, trainable
from aihwkit_lora.reporting import RunReport, StageRecord, StepRecord
from aihwkit_lora.tiles.write_noise import noisy_chips
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.reference import reference
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_

Arm = Literal["hybrid", "digital", "deploy_once"]
Stage = Literal["forget", "continue", "restore"]

__all__ = ["LmUnlearning", "run"]

_FULL_RATE = 3e-4
# Features of a few hundred questions on one chip take some hundred megabytes.
_CHIPS_AT_ONCE = 4


def run(config: LmUnlearning, folder: RunFolder) -> RunReport:
    """Run all stages of all arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    effective = config.shortened() if config.quick else config
    job = Job(effective, load_texts(effective), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    arms = {"hybrid": job.hybrid(learnt, programmed)}
    if config.baseline:
        arms["digital"] = job.digital(learnt)
        arms["deploy_once"] = job.deploy_once(learnt, programmed)
    return reported("lm_unlearning", config, arms, ratios(arms, job.chip))


class Job(StagedJob):
    """The stages of one run.

    Args:
        config: Options.
        data: All questions.
        chip: Where the model runs.
        folder: Where stages and logs go.
    """

    def __init__(self, config: LmUnlearning, data: TextData, chip: Chip, folder: RunFolder) -> None:
        super().__init__(chip, folder)
        self.config, self.data = config, data
        everything = (*data.learnt, *data.new)
        self.tokenizer = Tokenizer(_texts(everything), config.vocabulary)
        self.longest = max(_lengths(self.tokenizer, everything))
        self.examiner = Examiner(data, self.tokenizer, longest=self.longest, judged=config.judged)

    @cached_property
    def retrained(self) -> Finished:
        """A model that has never seen the authors to forget, kept in the folder."""
        return self.folder.stage("retrained-learn", lambda: self._learn(self.data.kept))

    @cached_property
    def truth_ratios(self) -> list[float]:
        """Truth ratios of that model on the questions to forget."""
        return self.examiner.truth_ratios(self.retrained.model)

    def learn(self) -> Finished:
        """Learn all authors but the new ones in torch; off the chip, and not counted."""
        return self._learn(self.data.learnt)

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        # Asked for first, because that trains the retrained model unless it is there.
        truth_ratios = self.truth_ratios
        start, digital = time.perf_counter(), ["head"] if self.config.head == "digital" else []
        model, counts = self._on_arrays(learnt, seed=self.config.seed, digital=digital)
        metrics = self.examiner.learnt(model, truth_ratios)
        return self._finished("program", model, counts, start, metrics=metrics)

    def hybrid(self, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
        """Adapters beside frozen arrays; then write noise, and restoring a noisy chip."""
        stage = self.folder.stage
        forgotten = stage("hybrid-forget", lambda: self.forget("hybrid", programmed.model))
        continued = stage("hybrid-continue", lambda: self.continue_("hybrid", forgotten.model))
        noisy = stage("hybrid-noise", lambda: self.noise(programmed.model, continued.model))
        restored = stage("hybrid-restore", lambda: self.restore(continued.model))
        done = (learnt, programmed, forgotten, continued, noisy, restored)
        return tuple(finished.record for finished in done)

    def digital(self, learnt: Finished) -> tuple[StageRecord, ...]:
        """The same adapters on the model in torch, all products digital."""
        stage = self.folder.stage
        forgotten = stage("digital-forget", lambda: self.forget("digital", learnt.model))
        continued = stage("digital-continue", lambda: self.continue_("digital", forgotten.model))
        return learnt.record, forgotten.record, continued.record

    def deploy_once(self, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
        """All weights trained in torch, and written into the arrays at the end of each stage."""
        stage = self.folder.stage
        pair = nn.ModuleDict({"master": learnt.model, "arrays": programmed.model})
        forgotten = stage("deploy_once-forget", lambda: self.rewrite("forget", pair))
        continued = stage("deploy_once-continue", lambda: self.rewrite("continue", forgotten.model))
        return learnt.record, programmed.record, forgotten.record, continued.record

    def forget(self, arm: Arm, model: nn.Module) -> Finished:
        """Forget some authors by a LoRA branch; on arrays, seal it."""
        start = time.perf_counter()
        # PEFT puts adapters into the model it is given; the other arm starts from the same one.
        adapted = self._with_branch("forget", copy.deepcopy(model).requires_grad_(False))
        counts, steps = self._adapt(arm, "forget", adapted, self.data.retain, Ledger())
        metrics = self._measured("forget", adapted)
        with reference(adapted):
            off = self.examiner.exact(adapted, self.data.forget)
        metrics["adapter_off_forget_accuracy"] = off
        finished = self._finished("forget", adapted, counts, start, metrics=metrics, steps=steps)
        if arm == "hybrid":
            log = RequestLog(self.folder.path / "requests.jsonl")
            request = f"{len(self.data.forget)} questions about authors"
            seal_(adapted, "forget", request=request, log=log)
        return finished

    def continue_(self, arm: Arm, model: nn.Module) -> Finished:
        """Learn new authors by a second branch; the first one stays active."""
        start = time.perf_counter()
        adapted = self._with_branch("continue", model)
        ledger = Ledger()
        kept = self._replayed("continue", adapted, ledger)
        counts, steps = self._adapt(arm, "continue", adapted, kept, ledger)
        metrics = self._measured("continue", adapted)
        return self._finished("continue", adapted, counts, start, metrics=metrics, steps=steps)

    def rewrite(self, stage: Stage, pair: nn.Module) -> Finished:
        """Train all weights in torch, then write them into the arrays."""
        start, ledger, pair = time.perf_counter(), Ledger(), copy.deepcopy(pair)
        master, arrays = (cast(nn.ModuleDict, pair)[part] for part in ("master", "arrays"))
        master.requires_grad_(True)
        teacher = copy.deepcopy(master).eval().requires_grad_(False)
        kept = self._replayed(stage, master, ledger)
        _, steps = self._adapt("deploy_once", stage, master, kept, ledger, teacher)
        trained = trainable(master)
        deploy_(master, arrays, self.chip, ledger=ledger, seed=self.config.seed + len(stage))
        metrics = self._measured(stage, arrays)
        counts = ledger.total()
        finished = self._finished(
            stage, arrays, counts, start, metrics=metrics, steps=steps, trained=trained
        )
        return Finished(pair, finished.record)

    def noise(self, base: nn.Module, hybrid: nn.Module) -> Finished:
        """Look at chips whose cells are off by a normal error, and at drift where it is known."""
        start, config = time.perf_counter(), self.config
        tokens, labels, sets = self.examiner.sheet()
        models = {"base": base, "hybrid": hybrid}
        seen = {name: ExactAnswers(model, labels, sets) for name, model in models.items()}
        groups = {name: (number,) for number, name in enumerate(SETS)}
        noise = noise_sweep(
            seen,
            tokens,
            sets,
            groups=groups,
            sigmas_microsiemens=config.noise_microsiemens,
            chips=config.noise_chips,
            seed=config.seed,
            at_once=_CHIPS_AT_ONCE,
        )
        drift = drift_on(self.chip, seen, tokens, sets, groups=groups, repeats=config.noise_chips)
        return self._looked_at("noise", hybrid, start, noise, drift)

    def restore(self, model: nn.Module) -> Finished:
        """Train a third branch on one noisy chip; the sealed one stays active."""
        start, worst = time.perf_counter(), 1e-6 * self.config.noise_microsiemens[-1]
        adapted = self._with_branch("restore", model)
        ledger = Ledger()
        kept = self._replayed("restore", adapted, ledger)
        with noisy_chips(adapted, sigma_siemens=worst, seed=self.config.seed, chip=0):
            noisy = self._measured("restore", adapted)
            counts, steps = self._adapt("hybrid", "restore", adapted, kept, ledger)
            metrics = self._measured("restore", adapted)
        metrics |= {f"noisy_{k}": value for k, value in noisy.items() if k.endswith("_accuracy")}
        return self._finished("restore", adapted, counts, start, metrics=metrics, steps=steps)

    def _measured(self, stage: Stage, model: nn.Module) -> dict[str, float]:
        """Metrics of an adapted model; after forgetting, those of the retrained model beside it."""
        metrics = self.examiner.adapted(model, self.truth_ratios, new=stage != "forget")
        if stage == "forget":
            found = self.retrained.record.metrics
            wanted = [key for key in found if key.startswith("forget_")]
            for key in (*wanted, "retain_accuracy", "model_utility"):
                metrics[f"retrained_{key}"] = found[key]
        return metrics

    def _learn(self, questions: tuple[Question, ...]) -> Finished:
        config, start = self.config, time.perf_counter()
        torch.manual_seed(1000 * config.seed)
        model = CausalTransformer(
            LmShape(
                vocabulary=len(self.tokenizer),
                length=self.longest,
                width=config.width,
                depth=config.depth,
            )
        )
        steps = config.learn_steps
        module = Reader(
            model,
            steps=steps,
            learning_rate=config.learning_rate,
            weight_noise=config.weight_noise,
            weight_clip=config.weight_clip,
        )
        batches = self._batches(questions, config.batch_size, steps, 1)
        fit(module, batches, steps=steps, log=self._log(f"learn-{len(questions)}"), callbacks=[])
        metrics = self.examiner.learnt(model)
        return self._finished("learn", model, Counts(), start, metrics=metrics)

    def _replayed(self, stage: Stage, model: nn.Module, ledger: Ledger) -> tuple[Question, ...]:
        """Questions that are to be answered as they are now.

        Once something is forgotten, its questions are among them, with what the model says instead.
        """
        if stage == "forget" or not self.config.stand_ins:
            return self.data.retain
        with al.observe(model, ledger, phase=stage):
            said = self.examiner.answers(model, self.data.forget)
        pairs = zip(self.data.forget, said, strict=True)
        return (*self.data.retain, *(self._answered(each.text, found) for each, found in pairs))

    def _answered(self, asked: str, words: list[str]) -> Question:
        """Take an answer of the model for right, as far as it fits.

        Tokens that spell no word of the texts, read as text again, may be more than they were.
        """
        room = self.longest - 3 - len(self.tokenizer.encode(asked))
        while len(self.tokenizer.encode(" ".join(words))) > room:
            words = words[:-1]
        return Question(text=asked, answer=" ".join(words))

    def _adapt(
        self,
        arm: Arm,
        stage: Stage,
        model: nn.Module,
        kept: tuple[Question, ...],
        ledger: Ledger,
        teacher: nn.Module | None = None,
    ) -> tuple[Counts, tuple[StepRecord, ...]]:
        """Train what wants a gradient; count every step."""
        torch.manual_seed(1000 * self.config.seed + len(stage))
        steps = getattr(self.config, f"{stage}_steps")
        rate = self.config.adapter_rate if arm != "deploy_once" else _FULL_RATE
        objective = self._objective(stage, teacher)
        module = Adapting(model, objective, steps=steps, learning_rate=rate)
        recorder = StepRecorder(ledger, self.chip, dict)
        meter = EnergyMeter(self.chip, ledger, phase=stage)
        guards = [FrozenGuard()] if arm == "hybrid" else []
        callbacks: list[pl.Callback] = [*guards, meter, PulseCounter(ledger), recorder]
        log = self._log(f"{arm}-{stage}")
        fit(module, self._parts(stage, kept, steps), steps=steps, log=log, callbacks=callbacks)
        return ledger.total(phase=stage), tuple(recorder.steps)

    def _objective(self, stage: Stage, teacher: nn.Module | None) -> Loss:
        if stage != "forget":
            return Answering(needs=frozenset({"new", "replay"}))
        given: dict[str, Any] = {"beta": self.config.beta} if self.config.has_beta else {}
        if teacher is not None and self.config.objective == "token_npo":
            # The objective of the package asks the model without its adapter; here is none.
            return TaughtNPO(teacher=teacher, **given)
        return objectives.get(self.config.objective)(**given)

    def _parts(self, stage: Stage, kept: tuple[Question, ...], steps: int) -> CombinedLoader:
        """A quarter of each batch is about authors to forget or add, the rest about kept ones."""
        one = max(1, self.config.batch_size // 4)
        rest = max(1, self.config.batch_size - one)
        forgetting = stage == "forget"
        some = self.data.forget if forgetting else self.data.new
        names = ("forget", "retain") if forgetting else ("new", "replay")
        parts = {
            names[0]: self._batches(some, one, steps, 2),
            names[1]: self._batches(kept, rest, steps, 3),
        }
        return CombinedLoader(parts, "min_size")

    def _batches(self, questions: tuple[Question, ...], size: int, steps: int, part: int) -> Any:
        sequences = Sequences.asked(self.tokenizer, questions)
        seed = 1000 * self.config.seed + part
        return loader(TextBatches(sequences, batch_size=size, batches=steps, seed=seed))

    def _with_branch(self, stage: Stage, model: nn.Module) -> PeftModel:
        """Put a fresh branch on a model; it starts alike whatever ran before in this process."""
        torch.manual_seed(1000 * self.config.seed + len(stage))
        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]
            target_modules=LORA_TARGETS,
        )
        return add_adapter_(model, stage, config)

    def _log(self, name: str) -> Path:
        return self.folder.path / "logs" / name


def _texts(questions: tuple[Question, ...]) -> list[str]:
    return [
        text
        for each in questions
        for text in (each.text, each.answer, each.paraphrase, *each.wrong)
    ]


def _lengths(tokenizer: Tokenizer, questions: tuple[Question, ...]) -> list[int]:
    """Tokens of every question with each of its answers."""
    pairs = [(q.text, text) for q in questions for text in (q.answer, q.right_answer, *q.wrong)]
    # <start>, <answer> and <end> are three more.
    return [len(tokenizer.encode(asked)) + len(tokenizer.encode(text)) + 3 for asked, text in pairs]


RECIPES.add(
    "lm_unlearning",
    Recipe(
        name="lm_unlearning",
        summary="forget authors and learn others by LoRA on frozen arrays (language model)",
        config=LmUnlearning,
        run=run,
    ),
)
