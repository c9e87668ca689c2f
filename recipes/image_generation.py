"""Image generation: learn styles, program, freeze, forget one, add another, survive noise; counted.

The third workload of arXiv:2601.10037: a class-conditional diffusion transformer learns to draw
objects in styles and is programmed into arrays of resistive memory. One style is then forgotten and
a new one learnt, each by a LoRA branch on the MLPs beside the frozen arrays; both branches stay
active from then on, the first one sealed. Beside it run the same branches without arrays, and a
full update of all weights that is written into the arrays once.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.callbacks.objective_module import Loss
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.accuracy_sweep import Hits
from aihwkit_lora.recipes.arm_ratios import ratios
from aihwkit_lora.recipes.canvas import Pixels, canvas
from aihwkit_lora.recipes.diffusers_dit import DiffusersDiT
from aihwkit_lora.recipes.diffusion import (
    LORA_TARGETS,
    DiffusionTransformer,
    digital_modules,
)
from aihwkit_lora.recipes.drift_over_time import drift_on
from aihwkit_lora.recipes.image_data import (
    ImageData,
    Pictures,
    joined,
    load_images,
)
from aihwkit_lora.recipes.image_evaluation import Examiner
from aihwkit_lora.recipes.image_options import ImageGeneration
from aihwkit_lora.recipes.image_training import (
    Adapting,
    Denoiser,
    NoisyBatches,
    Regression,
    Taught,
    averaging,
    fit,
    loader,
)
from aihwkit_lora.recipes.judges import Judge, train_judge
from aihwkit_lora.recipes.noise_sweep import NoiseSweep
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

__all__ = ["ImageGeneration", "run"]

_FULL_RATE = 3e-4


def run(config: ImageGeneration, folder: RunFolder) -> RunReport:
    """Run all stages of all arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    effective = config.shortened() if config.quick else config
    job = Job(effective, load_images(effective), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    arms = {"hybrid": job.hybrid(learnt, programmed)}
    if config.baseline:
        arms["digital"] = job.digital(learnt)
        arms["deploy_once"] = job.deploy_once(learnt, programmed)
    return reported("image_generation", config, arms, ratios(arms, job.chip))


class Job(StagedJob):
    """The stages of one run.

    Args:
        config: Options.
        data: Real images.
        chip: Where the model runs.
        folder: Where stages, logs and pictures go.
    """

    def __init__(
        self, config: ImageGeneration, data: ImageData, chip: Chip, folder: RunFolder
    ) -> None:
        super().__init__(chip, folder)
        self.config, self.data = config, data

    @cached_property
    def canvas(self) -> Pixels:
        """What models draw on."""
        return canvas(self.config.vae, self.data.image_shape)

    @cached_property
    def material(self) -> ImageData:
        """The images as models shall draw them."""
        train = self.data.train
        drawn = dataclasses.replace(train, images=self.canvas.encode(train.images))
        return dataclasses.replace(self.data, train=drawn)

    @cached_property
    def examiner(self) -> Examiner:
        """The judge, trained once and kept in the folder."""
        judged = self.folder.stage("judge", self._train_judge)
        return Examiner(
            self.data,
            cast(Judge, judged.model),
            per_cell=self.config.per_cell,
            seed=self.config.seed,
            steps=self.config.euler_steps,
            canvas=self.canvas,
        )

    def learn(self) -> Finished:
        """Learn all styles but the new one in torch; off the chip, and not counted."""
        config, start = self.config, time.perf_counter()
        examiner = self.examiner
        torch.manual_seed(1000 * config.seed)
        model = config.network(self.data, self.canvas)
        steps = config.learn_steps
        module = Denoiser(
            model,
            steps=steps,
            learning_rate=config.learning_rate,
            weight_noise=config.weight_noise,
            weight_clip=config.weight_clip,
            weight_decay=config.weight_decay,
            chip=self.chip,
        )
        seen = self.material.seen(*self.data.learnt)
        batches = self._batches(seen, config.learn_batch_size, steps, 1)
        fit(module, batches, steps=steps, log=self._log("learn"), callbacks=[averaging(steps)])
        metrics = {**examiner.learnt(model), **examiner.own()}
        examiner.grid(model, self._picture("learn"))
        return self._finished("learn", model, Counts(), start, metrics=metrics)

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        start, digital = time.perf_counter(), digital_modules(learnt)
        model, counts = self._on_arrays(learnt, seed=self.config.seed, digital=digital)
        self.examiner.grid(model, self._picture("program"))
        metrics = self.examiner.learnt(model)
        return self._finished("program", model, counts, start, metrics=metrics)

    def hybrid(self, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
        """Adapters beside frozen arrays; then write noise, drift, and restoring a noisy chip."""
        before, stage = programmed.record.metrics, self.folder.stage
        forgotten = stage("hybrid-forget", lambda: self.forget("hybrid", programmed.model, before))
        continued = stage(
            "hybrid-continue", lambda: self.continue_("hybrid", forgotten.model, before)
        )
        models = {"base": programmed.model, "hybrid": continued.model}
        noisy = stage("hybrid-noise", lambda: self.noise(models))
        drifted = stage("hybrid-drift", lambda: self.drift(models))
        restored = stage("hybrid-restore", lambda: self.restore(continued.model, before))
        done = (learnt, programmed, forgotten, continued, noisy, drifted, restored)
        return tuple(finished.record for finished in done)

    def digital(self, learnt: Finished) -> tuple[StageRecord, ...]:
        """The same adapters on the model in torch, all products digital."""
        before, stage = learnt.record.metrics, self.folder.stage
        forgotten = stage("digital-forget", lambda: self.forget("digital", learnt.model, before))
        continued = stage(
            "digital-continue", lambda: self.continue_("digital", forgotten.model, before)
        )
        return learnt.record, forgotten.record, continued.record

    def deploy_once(self, learnt: Finished, programmed: Finished) -> tuple[StageRecord, ...]:
        """All weights trained in torch, and written into the arrays at the end of each stage."""
        before, stage = programmed.record.metrics, self.folder.stage
        pair = nn.ModuleDict({"master": learnt.model, "arrays": programmed.model})
        forgotten = stage("deploy_once-forget", lambda: self.rewrite("forget", pair, before))
        continued = stage(
            "deploy_once-continue", lambda: self.rewrite("continue", forgotten.model, before)
        )
        return learnt.record, programmed.record, forgotten.record, continued.record

    def forget(self, arm: Arm, model: nn.Module, before: Mapping[str, float]) -> Finished:
        """Forget one style by a LoRA branch; on arrays, seal it."""
        start = time.perf_counter()
        # PEFT puts adapters into the model it is given; the other arm starts from the same one.
        adapted = self._with_branch(copy.deepcopy(model).requires_grad_(False), "forget")
        counts, steps = self._adapt(arm, "forget", adapted)
        metrics = self.examiner.adapted(adapted, before, new=False)
        with reference(adapted):
            metrics["adapter_off_forget_accuracy"] = self.examiner.forgotten(adapted)
        self.examiner.grid(adapted, self._picture(f"{arm}-forget"))
        finished = self._finished("forget", adapted, counts, start, metrics=metrics, steps=steps)
        if arm == "hybrid":
            log = RequestLog(self.folder.path / "requests.jsonl")
            seal_(adapted, "forget", request=f"style {self.config.forgotten}", log=log)
        return finished

    def continue_(self, arm: Arm, model: nn.Module, before: Mapping[str, float]) -> Finished:
        """Learn a new style by a second branch and its row of the digital embedding."""
        start = time.perf_counter()
        adapted = self._with_branch(model, "continue")
        self._start_row(adapted).requires_grad_(True)
        counts, steps = self._adapt(arm, "continue", adapted)
        metrics = self.examiner.adapted(adapted, before, new=True)
        self.examiner.grid(adapted, self._picture(f"{arm}-continue"))
        return self._finished("continue", adapted, counts, start, metrics=metrics, steps=steps)

    def rewrite(self, stage: Stage, pair: nn.Module, before: Mapping[str, float]) -> Finished:
        """Train all weights in torch, then write them into the arrays."""
        start, ledger, pair = time.perf_counter(), Ledger(), copy.deepcopy(pair)
        master, arrays = (cast(nn.ModuleDict, pair)[part] for part in ("master", "arrays"))
        master.requires_grad_(True)
        if stage == "continue":
            self._start_row(master)
        teacher = copy.deepcopy(master).eval().requires_grad_(False)
        counts, steps = self._adapt("deploy_once", stage, master, teacher)
        trained = trainable(master)
        deploy_(master, arrays, self.chip, ledger=ledger, seed=self.config.seed + len(stage))
        metrics = self.examiner.adapted(arrays, before, new=stage == "continue")
        self.examiner.grid(arrays, self._picture(f"deploy_once-{stage}"))
        counts = Counts.sum([counts, ledger.total()])
        finished = self._finished(
            stage, arrays, counts, start, metrics=metrics, steps=steps, trained=trained
        )
        return Finished(pair, finished.record)

    def noise(self, models: Mapping[str, nn.Module]) -> Finished:
        """Look at chips with write noise on top; one image of each style and object says enough."""
        start, data = time.perf_counter(), self.data
        sweep = NoiseSweep(
            points=tuple(map(float, self.config.noise_microsiemens)),
            draws=self.config.noise_chips,
            groups=self._groups,
            samples=torch.full((len(data.styles),), len(data.objects)),
            models={name: self._hits(model) for name, model in models.items()},
            seed=self.config.seed,
        )
        return self._looked_at("noise", models["hybrid"], start, sweep)

    def drift(self, models: Mapping[str, nn.Module]) -> Finished:
        """Let a year pass, or say why nobody knows what that would do."""
        start = time.perf_counter()
        sweep = drift_on(
            self.chip,
            {name: self.examiner.drawn_styles(model) for name, model in models.items()},
            *self.examiner.cells,
            groups=self._groups,
            repeats=self.config.noise_chips,
            seed=self.config.seed,
        )
        return self._looked_at("drift", models["hybrid"], start, sweep)

    @property
    def _groups(self) -> dict[str, tuple[int, ...]]:
        data = self.data
        return {"forget": (data.forgotten,), "retain": tuple(data.kept), "new": (data.new,)}

    def _hits(self, model: nn.Module) -> Hits:
        def right(microsiemens: int, chip: int) -> Tensor:
            with self._noisy(model, microsiemens, chip):
                return self.examiner.right_by_style(model)

        chips = range(self.config.noise_chips)
        swept = [
            torch.stack([right(microsiemens, chip) for chip in chips])
            for microsiemens in self.config.noise_microsiemens
        ]
        clean = self.examiner.right_by_style(model)
        return Hits(clean=clean, right=torch.stack(swept), outputs=len(self.data.styles))

    def restore(self, model: nn.Module, before: Mapping[str, float]) -> Finished:
        """Train a third branch on one noisy chip; the sealed one stays active."""
        start = time.perf_counter()
        adapted = self._with_branch(model, "restore")
        with self._noisy(adapted, self.config.restore_microsiemens, 0):
            noisy = self.examiner.adapted(adapted, before, new=True)
            counts, steps = self._adapt("hybrid", "restore", adapted)
            metrics = self.examiner.adapted(adapted, before, new=True)
            self.examiner.grid(adapted, self._picture("hybrid-restore"))
        metrics |= {f"noisy_{key}": value for key, value in noisy.items() if "/" not in key}
        return self._finished("restore", adapted, counts, start, metrics=metrics, steps=steps)

    def _adapt(
        self, arm: Arm, stage: Stage, model: nn.Module, teacher: nn.Module | None = None
    ) -> tuple[Counts, tuple[StepRecord, ...]]:
        """Train what wants a gradient; count every step."""
        ledger, steps = Ledger(), getattr(self.config, f"{stage}_steps")
        rate, objective = self._rate(arm, stage), self._objective(stage, teacher)
        # What will be written into arrays has to fit them.
        fits = {"weight_clip": self.config.weight_clip, "chip": self.chip}
        options = fits if arm == "deploy_once" else {}
        module = Adapting(model, objective, steps=steps, learning_rate=rate, **options)
        recorder = StepRecorder(ledger, self.chip, dict)
        meter = EnergyMeter(self.chip, ledger, phase=stage)
        guards = [FrozenGuard()] if arm == "hybrid" else []
        callbacks: list[pl.Callback] = [*guards, meter, PulseCounter(ledger), recorder]
        log = self._log(f"{arm}-{stage}")
        fit(module, self._parts(stage, steps), steps=steps, log=log, callbacks=callbacks)
        return ledger.total(phase=stage), tuple(recorder.steps)

    def _objective(self, stage: Stage, teacher: nn.Module | None) -> Loss:
        if stage != "forget":
            return Regression(needs=frozenset({"new", "replay"}))
        kind = objectives.get(self.config.objective)
        if self.config.objective != "pseudo_class":
            return kind()
        count, forgotten, instead = len(self.data.objects), self.data.forgotten, self.data.kept[0]
        other = {forgotten * count + item: instead * count + item for item in range(count)}
        if teacher is not None:
            # The objective of the package asks the model without its adapter; here is none.
            return Taught(teacher=teacher, other=other)
        return kind(**{"other": other})

    def _parts(self, stage: Stage, steps: int) -> CombinedLoader:
        """A quarter of each batch is of the style to forget, or half of the new one."""
        data, part = self.material, 4 if stage == "forget" else 2
        one = max(1, self.config.batch_size // part)
        kept, rest = data.seen(*data.kept), max(1, self.config.batch_size - one)
        if stage == "forget":
            some, names = data.seen(data.forgotten), ("forget", "retain")
        else:
            some, names = data.seen(data.new), ("new", "replay")
            kept = joined(kept, self._stand_ins())
        parts = {
            names[0]: self._batches(some, one, steps, 2),
            names[1]: self._batches(kept, rest, steps, 3),
        }
        return CombinedLoader(parts, "min_size")

    def _stand_ins(self) -> Pictures:
        """What the forgotten style shows now, made without any image of it.

        Without them its label drifts while others are trained, and the style comes back.
        """
        instead = self.material.seen(self.data.kept[0])
        blank = self.config.objective == "gaussian_target"
        images = torch.zeros_like(instead.images) if blank else instead.images
        labels = torch.full_like(instead.styles, self.data.forgotten)
        return Pictures(images=images, styles=labels, objects=instead.objects)

    def _batches(self, pictures: Pictures, size: int, steps: int, part: int) -> Any:
        seed, objects = 1000 * self.config.seed + part, len(self.data.objects)
        return loader(
            NoisyBatches(pictures, objects=objects, batch_size=size, batches=steps, seed=seed)
        )

    def _with_branch(self, model: nn.Module, stage: Stage) -> PeftModel:
        """Add a seeded branch, so that a resumed run goes on as an uninterrupted one."""
        config = self.config
        torch.manual_seed(1000 * config.seed + len(stage))
        rank = config.forget_rank if stage == "forget" else config.continue_rank
        alpha = config.lora_scale * rank
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)  # type: ignore[arg-type]
        return add_adapter_(cast(PeftModel, model), stage, lora)

    def _rate(self, arm: Arm, stage: Stage) -> float:
        if arm == "deploy_once":
            return _FULL_RATE
        return self.config.forget_rate if stage == "forget" else self.config.continue_rate

    @torch.no_grad()
    def _start_row(self, model: nn.Module) -> nn.Parameter:
        """Let the new style start as the mean of the kept ones."""
        kinds = DiffusionTransformer | DiffusersDiT
        network = next(part for part in model.modules() if isinstance(part, kinds))
        kept = torch.stack([network.style.row(style) for style in self.data.kept])
        row = network.style.row(self.data.new)
        row.copy_(kept.mean(dim=0))
        return row

    def _noisy(
        self, model: nn.Module, microsiemens: int, chip: int
    ) -> AbstractContextManager[nn.Module]:
        seed = self.config.seed
        return noisy_chips(model, sigma_siemens=1e-6 * microsiemens, seed=seed, chip=chip)

    def _train_judge(self) -> Finished:
        start, config = time.perf_counter(), self.config
        judge = train_judge(self.data, steps=config.judge_steps, seed=config.seed)
        return self._finished("judge", judge, Counts(), start, metrics={})

    def _log(self, name: str) -> Path:
        return self.folder.path / "logs" / name

    def _picture(self, name: str) -> Path:
        return self.folder.path / "pictures" / f"{name}.png"


RECIPES.add(
    "image_generation",
    Recipe(
        name="image_generation",
        summary="forget one style and learn another by LoRA on frozen arrays (diffusion)",
        config=ImageGeneration,
        run=run,
        threads=2,
    ),
)
